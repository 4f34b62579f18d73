"""Measures the engine on a GPU at full size: what reports/h100-engine is made of.

    python scripts/bench_engine.py --out results.json --max-seconds 500
    python scripts/bench_engine.py --out checks.json --parts check --layers 4
    python scripts/bench_engine.py --model tiny-moe --steps 8 --slots 6 --out cpu.json

Weights are drawn, so no checkpoint is needed, and routing is replayed, so that any hit ratio can
be had; the experts are put into pinned memory once. Run again with the same file to go on where
the time was up: what is there already is left out. Parts, what matters most first: `lru` at one
request, what `foresight` hides, the `host` driven baseline and `transformers`, `batches`, the
`rest` (contexts, a prompt, many steps, memory), all `strategies`, other `slots` and a pool, the
model's own `router`, `contrasts` of one number at a time and `sweeps` for the hardware profile.
Two more run only by name: the `check` of bits against a resident model, which a model of few layers
can run, and the `ladder`, every strategy at four capacities and three batch sizes on routing that
no fit sees:

    python scripts/bench_engine.py --out results.json --parts ladder --max-seconds 550
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from engine_baselines import Baseline, time_host_driven, time_transformers

from moejax.bench import (
    LADDER_SHARES,
    ROUTER,
    EngineBench,
    EngineCase,
    EngineSettings,
    Routing,
    RoutingRecipe,
    describe_bench,
    make_cases,
    make_profile,
    make_routing,
    measure_contexts,
    measure_drift,
    measure_host_reads,
    measure_machine,
    measure_memory,
    measure_prefill,
    open_bench,
    random_rig,
    run_cases,
)
from moejax.cards import MODELS, models_dir, read_card
from moejax.errors import BadFileError, MoejaxError
from moejax.offload import Scope
from moejax.qwen_moe import QwenMoeConfig, read_config, write_config
from moejax.results import capture_environment, read_json, to_plain, write_json
from moejax.strategies import STRATEGIES
from moejax.trace import TRACES
from moejax.workloads import WORKLOADS

SEED = 0
FORESIGHT_RATIO = 0.95
RATIOS = (1.0, 0.9, 0.0, 0.5, 0.75, 0.95)
# Slots, distinct experts that an event demands and hit ratios, by the number of requests.
BATCHES = {4: (16, 12, (1.0, 0.9, 0.0)), 16: (30, 28, (1.0, 0.9, 0.5))}
SLOTS = (4, 16, 30, 60)
CHECK_SLOTS = (4, 8, 16, 30, 60)
CONTEXTS = (100, 2048, 8192)
PROMPT_TOKENS = 2048
DRIFT_STEPS, DRIFT_ENDS = 2000, 200
# Different experts of an event where all hit, by the number of requests: what one of them takes.
CONTRASTS = {4: (4, 8), 16: (4, 16)}
# Timed steps of the ladder by batch size.
LADDER_STEPS = {1: 48, 4: 32, 16: 24}
LADDER_WARMUP_STEPS = 8
# Routing of the ladder is of another seed than all that the fit sees.
LADDER_SEED = 1


@dataclass
class Run:
    """Everything that the jobs share, and when all of it is to have ended."""

    options: argparse.Namespace
    config: QwenMoeConfig
    bench: EngineBench
    results: dict[str, Any]
    started_s: float
    routings: dict[tuple[str, int], Routing] = field(default_factory=dict)
    recipes: dict[tuple[str, int], RoutingRecipe] = field(default_factory=dict)

    def left_s(self) -> float:
        """Seconds until everything is to have ended."""
        return self.options.max_seconds - (time.perf_counter() - self.started_s)

    def save(self, results: dict[str, Any] | None = None) -> None:
        """Writes the file anew."""
        write_json(self.options.out, self.results if results is None else results)

    def measure(
        self, cases: Sequence[EngineCase], *, fit: bool = False, bench: EngineBench | None = None
    ) -> None:
        """Measures cases as long as there is time; `fit` says that the profile may see them."""
        prompts = np.random.default_rng(SEED).integers(0, self.config.vocab_size, (16, 16))
        done = [case_key(row) for row in self.results["engine"]]
        for case in cases:
            if case_key(case._asdict()) in done:
                continue
            if self.left_s() < self.options.case_seconds:
                say(self, f"no time for {case.label()}")
                return
            say(self, case.label())
            num_before = len(self.results["engine"])
            try:
                run_cases(
                    bench or self.bench,
                    [case],
                    self.results,
                    routings=self.routings,
                    prompts=prompts.tolist(),
                    save=lambda _: None,
                )
            except Exception as error:  # The other results count.
                self.fail(case.label(), error)
            for row in self.results["engine"][num_before:]:
                recipe = self.recipes.get((case.routing, case.batch_size))
                row |= {"fit": fit, "recipe": None if recipe is None else recipe._asdict()}
            self.save()

    def once(self, name: str, measure: Callable[[], Any], expected_s: float) -> None:
        """Stores what `measure` returns, or why it does not, unless it is there already."""
        if name in self.results:
            return
        if self.left_s() < expected_s:
            say(self, f"no time for {name}")
            return
        say(self, name)
        try:
            self.results[name] = to_plain(measure())
        except Exception as error:
            self.fail(name, error)
        self.save()

    def fail(self, part: str, error: Exception) -> None:
        """Notes what went wrong, and lets go of what may be too large."""
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        say(self, f"{part}: {cause}")
        self.results["failed"].append({"part": part, "error": cause})
        self.bench.let_go()
        self.save()

    def routing(
        self, slots: int, ratio: float, batch_size: int, distinct: int | None = None
    ) -> str:
        """The name of a routing of a hit ratio, made when it is first asked for."""
        num_steps = self.bench.settings.num_all_steps
        recipe = RoutingRecipe(
            "hit_ratio", num_steps, SEED, slots=slots, hit_ratio=ratio, num_distinct=distinct
        )
        return self.add(recipe, batch_size)

    def foreseeable(self, slots: int) -> str:
        """The name of the routing whose misses can be foreseen."""
        num_steps = self.bench.settings.num_all_steps
        recipe = RoutingRecipe(
            "foreseeable", num_steps, SEED, slots=slots, hit_ratio=FORESIGHT_RATIO
        )
        return self.add(recipe, 1)

    def add(self, recipe: RoutingRecipe, batch_size: int) -> str:
        """Makes the routing of a recipe once, and gives its name."""
        key = (recipe.label(), batch_size)
        if self.recipes.get(key) != recipe:
            self.recipes[key] = recipe
            self.routings[key] = make_routing(recipe, self.config, self.options.model, batch_size)
        return key[0]


def main(argv: Sequence[str] | None = None) -> int:
    started_s = time.perf_counter()
    options = read_options(argv)
    # The rest of the device is the baselines', which run while ours stays where it is.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.55")
    try:
        config = read_model(options)
        results = read_before(options.out, config)
        run = open_run(options, config, results, started_s)
        for name in options.parts:
            try:
                PARTS[name](run)
            except MoejaxError as error:  # The other parts count.
                run.fail(name, error)
            run.save()
    except MoejaxError as error:
        print(f"error: {error.cause}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.out}: {len(run.results['engine'])} cases")
    return 0


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    def parts(text: str) -> list[str]:
        unknown = set(text.split(",")) - set(PARTS)
        if unknown:
            raise argparse.ArgumentTypeError(f"{min(unknown)!r} is not one of {', '.join(PARTS)}")
        return text.split(",")

    def strategies(text: str) -> list[str]:
        unknown = set(text.split(",")) - set(STRATEGIES)
        if unknown:
            raise argparse.ArgumentTypeError(f"{min(unknown)!r} is no strategy")
        return text.split(",")

    parser = argparse.ArgumentParser(description="Measures the engine at full size.")
    parser.add_argument("--model", default="qwen1.5-moe-a2.7b", help="card or config.json")
    parser.add_argument("--layers", type=int, help="take only so many layers")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--kernels", default="auto", help="auto, pallas, interpret or xla")
    parser.add_argument("--layers-per-copy", type=int, help="layers that hide one expert's copy")
    parser.add_argument("--steps", type=int, default=64, help="that count in a case")
    parser.add_argument("--slots", type=int, default=8, help="of a layer, where a part takes one")
    parser.add_argument("--parts", type=parts, default=[p for p in PARTS if p not in BY_NAME])
    parser.add_argument(
        "--strategies", type=strategies, default=list(STRATEGIES), help="of check, ladder"
    )
    parser.add_argument("--max-seconds", type=float, default=540, help="start nothing after that")
    parser.add_argument("--case-seconds", type=float, default=15, help="that a case may take")
    parser.add_argument("--baseline-python", default=sys.executable, help="one that has torch")
    parser.add_argument("--baseline-seconds", type=float, default=150, help="for each of them")
    parser.add_argument("--distinct-layers", type=int, default=4, help="of the host-driven one")
    parser.add_argument("--out", type=Path, required=True, help="file for the results")
    return parser.parse_args(argv)


def read_model(options: argparse.Namespace) -> QwenMoeConfig:
    name = options.model
    path = models_dir() / f"{name}.toml" if name in MODELS else Path(name)
    fields = read_card(path)
    # Cards leave out what has no size.
    fields = {"max_position_embeddings": 32768} | fields.get("config", fields)
    config = dataclasses.replace(read_config(fields, name), dtype=options.dtype)
    if options.layers:
        config = dataclasses.replace(config, num_hidden_layers=options.layers)
    return config


def read_before(path: Path, config: QwenMoeConfig) -> dict[str, Any] | None:
    """The results of a run that was cut short, if there is one."""
    if not path.exists():
        return None
    results = read_json(path)
    if results.get("model", {}).get("config") != to_plain(write_config(config)):
        raise BadFileError(f"{path} is of another model or no run", "Name another file with --out.")
    return results


def open_run(
    options: argparse.Namespace,
    config: QwenMoeConfig,
    before: dict[str, Any] | None,
    started_s: float,
) -> Run:
    def tell(done_bytes: int, all_bytes: int) -> None:
        took_s = time.perf_counter() - started_s
        print(
            f"{took_s:6.1f} s  {done_bytes / 1e9:.1f} of {all_bytes / 1e9:.1f} GB", file=sys.stderr
        )

    rig = random_rig(
        config, name=options.model, kernels=options.kernels, seed=SEED, on_progress=tell
    )
    rig = dataclasses.replace(rig, layers_per_copy=options.layers_per_copy)
    settings = EngineSettings(num_steps=options.steps, is_checked=False, seed=SEED)
    recipe = RoutingRecipe("hit_ratio", settings.num_all_steps, SEED)
    bench = open_bench(rig, settings, make_profile(recipe, config, options.model))
    results = describe_bench(bench) if before is None else before
    # Every run that added to the file: the rates of a case are those of its own run.
    environment = to_plain(capture_environment(SEED))
    results.setdefault("runs", []).append(
        {"environment": environment, "ceilings": to_plain(bench.ceilings), "parts": options.parts}
    )
    return Run(options, config, bench, results, started_s)


def measure_lru(run: Run) -> None:
    """Hit ratios of one request."""
    slots = run.options.slots
    cases = [case("lru", slots, run.routing(slots, ratio, 1)) for ratio in RATIOS]
    run.measure(cases, fit=True)


def measure_foresight(run: Run) -> None:
    """What a prefetch hides where it can know, beside the same without."""
    slots = run.options.slots
    name = run.foreseeable(slots)
    run.measure([case(strategy, slots, name) for strategy in ("lru", "gate_look")], fit=True)


def measure_batches(run: Run) -> None:
    """More requests at once."""
    for size, wanted in BATCHES.items():
        most = min(run.config.num_experts, size * run.config.num_experts_per_tok)
        slots, distinct = min(wanted[0], run.config.num_experts), min(wanted[1], most)
        names = [run.routing(slots, ratio, size, distinct) for ratio in wanted[2]]
        run.measure([case("lru", slots, name, batch_size=size) for name in names], fit=True)


def measure_contrasts(run: Run) -> None:
    """Nothing missed and fewer experts at once, so that it can be told what one of them takes."""
    for size, numbers in CONTRASTS.items():
        slots = min(BATCHES[size][0], run.config.num_experts)
        topk = run.config.num_experts_per_tok
        names = [run.routing(slots, 1.0, size, max(n, topk)) for n in numbers if n <= slots]
        run.measure([case("lru", slots, name, batch_size=size) for name in names], fit=True)


def measure_ladder(run: Run) -> None:
    """Every strategy at four capacities and three batch sizes, on routing like a model's own.

    One engine with room for the most slots runs all capacities, so that only strategies and batch
    sizes have to be compiled.
    """
    num_experts = run.config.num_experts
    slots = [max(1, round(share * num_experts)) for share in LADDER_SHARES]
    for size, num_steps in LADDER_STEPS.items():
        recipe = ladder_recipe(run.options.model, LADDER_WARMUP_STEPS + num_steps)
        name = run.add(recipe, size)
        bench = EngineBench(
            run.bench.rig,
            dataclasses.replace(
                run.bench.settings, num_steps=num_steps, num_warmup_steps=LADDER_WARMUP_STEPS
            ),
            make_profile(recipe, run.config, run.options.model),
            run.bench.ceilings,
            run.bench.sizes,
            num_allocated=max(slots),
        )
        run.bench.let_go()
        for strategy in run.options.strategies:
            cases = [case(strategy, count, name, batch_size=size) for count in slots]
            run.measure(cases, bench=bench)
        bench.let_go()


def ladder_recipe(model: str, num_steps: int) -> RoutingRecipe:
    """Requests of a trace of this model, or of the workload that is made after it.

    Raises:
      BadFileError: There is neither.
    """
    if model in TRACES:
        return RoutingRecipe("requests", num_steps, LADDER_SEED, source=model)
    own = [name for name, workload in WORKLOADS.items() if workload.model == model]
    if not own:
        raise BadFileError(
            f"no trace and no workload is of {model}", "Name a model that has one with --model."
        )
    return RoutingRecipe("requests", num_steps, LADDER_SEED, source=own[0])


def measure_strategies(run: Run) -> None:
    """What each strategy costs where nothing is missed, and where nothing can be foreseen."""
    slots = run.options.slots
    hits, misses = (run.routing(slots, ratio, 1) for ratio in (1.0, 0.9))
    for strategy in STRATEGIES:
        run.measure([case(strategy, slots, hits)], fit=True)
        run.measure([case(strategy, slots, misses)])


def measure_slots(run: Run) -> None:
    """Other numbers of slots, and a pool of as many."""
    pooled = run.options.slots
    names = [run.routing(pooled, ratio, 1) for ratio in (1.0, 0.9, 0.0)]
    run.measure([case("lru", pooled, name, scope="pool") for name in names])
    for slots in fitting(SLOTS, run.config):
        run.measure([case("lru", slots, run.routing(slots, ratio, 1)) for ratio in (1.0, 0.9)])


def measure_router(run: Run) -> None:
    """The model's own routing, whose texts repeat themselves where weights are random."""
    slots = fitting((4, 8, 16, 30), run.config)
    run.measure([case("lru", count, ROUTER) for count in slots])


def measure_rest(run: Run) -> None:
    """Contexts, a prompt, very many steps, device memory."""
    bench, slots = run.bench, run.options.slots
    name = run.routing(slots, 1.0, 1)
    engine = bench.engine(case("lru", slots, name))
    contexts = [c for c in CONTEXTS if c + 80 < run.config.max_position_embeddings]
    ahead = (bench.sizes, bench.ceilings)
    run.once("memory", lambda: memory(run, engine), 20)
    run.once("contexts", lambda: measure_contexts(bench.rig, engine, *ahead, contexts), 30)
    run.once("prefill", lambda: measure_prefill(bench.rig, engine, *ahead, PROMPT_TOKENS), 30)
    routing = run.routings[name, 1]
    steps = {"num_steps": DRIFT_STEPS, "num_ends": DRIFT_ENDS, "context": bench.settings.context}
    run.once("drift", lambda: measure_drift(engine, routing, **steps), 30)


def memory(run: Run, engine: Any) -> Any:
    return measure_memory(run.bench.rig, engine, batch_size=1, num_positions=512)


def measure_sweeps(run: Run) -> None:
    """Copies and expert compute, for the hardware profile."""
    run.bench.let_go()
    layer = run.bench.rig.store.layers[0]
    run.once("measured", lambda: measure_machine(quick=False, seed=SEED), 60)
    run.once("host_reads", lambda: measure_host_reads(layer, seed=SEED), 20)


def measure_host(run: Run) -> None:
    """The host-driven baseline on the very routing of our cases."""
    slots = run.options.slots
    ratios = (0.9, 1.0, 0.5, 0.0)
    routings = [run.routings[run.routing(slots, ratio, 1), 1].experts for ratio in ratios]

    def measure(limit_s: float) -> Baseline:
        return time_host_driven(
            run.options.baseline_python,
            run.config,
            routings,
            slots=slots,
            context=run.bench.settings.context,
            distinct_layers=run.options.distinct_layers,
            max_seconds=limit_s,
        )

    measure_baseline(run, "host_driven_decode", measure)


def measure_transformers(run: Run) -> None:
    """Transformers with every expert on the device."""

    def measure(limit_s: float) -> Baseline:
        return time_transformers(
            run.options.baseline_python,
            run.config,
            (1,),
            context=run.bench.settings.context,
            max_seconds=limit_s,
        )

    measure_baseline(run, "transformers_decode", measure)


def measure_baseline(run: Run, name: str, measure: Callable[[float], Baseline]) -> None:
    if any(row["script"] == name for row in run.results["baselines"]):
        return
    limit_s = min(run.left_s(), run.options.baseline_seconds)
    if limit_s < run.options.baseline_seconds / 2:
        say(run, f"no time for {name}")
        return
    say(run, name)
    run.bench.let_go()
    found = measure(limit_s)
    run.results["baselines"] += found.rows
    run.results.setdefault("baseline_notes", []).extend(found.notes)
    if found.error:
        run.results["failed"].append({"part": name, "error": found.error})
    run.save()


def measure_check(run: Run) -> None:
    """Bits of every strategy, number of slots, scope and batch against the resident model."""
    done = [case_key(row) for row in run.results.setdefault("checks", [])]
    for one in check_cases(run):
        if case_key(one._asdict()) in done:
            continue
        if run.left_s() < run.options.case_seconds:
            say(run, f"no time to check {one.label()}")
            return
        say(run, f"check {one.label()}")
        routing = run.routings.get((one.routing, one.batch_size))
        try:
            found = run.bench.check_bits(one, routing)
        except Exception as error:
            run.fail(f"check {one.label()}", error)
            continue
        run.results["checks"].append({**one._asdict(), **found})
        run.save()


def check_cases(run: Run) -> Iterator[EngineCase]:
    slots = fitting(CHECK_SLOTS, run.config)
    for name in run.options.strategies:
        kind = STRATEGIES[name]
        scopes = ("layer",) if kind.keeps_layers_apart else ("layer", "pool")
        for one in make_cases(
            [name], slots, scopes, (1, 4), ("",), num_experts=run.config.num_experts
        ):
            routing = ROUTER
            if kind.needs_future:
                routing = run.routing(run.options.slots, 0.5, one.batch_size)
            yield one._replace(routing=routing)


def case_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in EngineCase._fields)


def case(
    strategy: str, slots: int, routing: str, *, batch_size: int = 1, scope: Scope = "layer"
) -> EngineCase:
    return EngineCase(strategy, slots, scope, batch_size, routing)


def fitting(slots: Sequence[int], config: QwenMoeConfig) -> list[int]:
    return [count for count in slots if count <= config.num_experts]


def say(run: Run, text: str) -> None:
    took_s = run.options.max_seconds - run.left_s()
    print(f"{took_s:6.1f} s  {text}", file=sys.stderr, flush=True)


PARTS: dict[str, Callable[[Run], None]] = {
    "lru": measure_lru,
    "foresight": measure_foresight,
    "host": measure_host,
    "transformers": measure_transformers,
    "batches": measure_batches,
    "rest": measure_rest,
    "strategies": measure_strategies,
    "slots": measure_slots,
    "router": measure_router,
    "contrasts": measure_contrasts,
    "sweeps": measure_sweeps,
    "check": measure_check,
    "ladder": measure_ladder,
}
BY_NAME = ("check", "ladder")


if __name__ == "__main__":
    sys.exit(main())
