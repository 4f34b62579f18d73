"""Measuring an engine: strategies x slots x scopes x batch sizes, case by case."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax

from moejax.engine import OffloadEngine
from moejax.errors import UsageError
from moejax.offload import Scope
from moejax.qwen_moe import write_config
from moejax.results import capture_environment, to_plain
from moejax.strategies import STRATEGIES, Profile, Strategy, check_pool

from ._engine_case import (
    ROUTER,
    EngineCase,
    Timed,
    case_record,
    check_bits,
    check_counts,
    time_generation,
    time_replay,
)
from ._engine_ceilings import Ceilings, measure_ceilings
from ._engine_check import Transcript, resident_transcript
from ._engine_rig import Rig, StepSizes, prefetch_schedule, step_sizes
from ._engine_steps import Routing

ENGINE_SCHEMA = "moejax.bench-engine/1"

Save = Callable[[dict[str, Any]], Any]
"""Called with the results so far after every case."""
Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class EngineSettings:
    """What is held fixed over all cases.

    Attributes:
      num_steps: Decode steps that count.
      num_warmup_steps: Steps before them.
      num_check_steps: Steps of the check for bit-identity.
      context: Tokens behind every request at the first step of a replay.
      is_checked: Whether bits and counts are compared as well.
      seed: Seed of everything drawn.
    """

    num_steps: int = 64
    num_warmup_steps: int = 16
    num_check_steps: int = 64
    context: int = 96
    is_checked: bool = True
    seed: int = 0

    @property
    def num_all_steps(self) -> int:
        """Steps of one case."""
        return self.num_steps + self.num_warmup_steps


@dataclass
class EngineBench:
    """Measures cases one after another; the engine of the last one is kept for the next.

    Attributes:
      rig: The model.
      settings: What all cases share.
      profile: What strategies may have learned beforehand.
      ceilings: Rates of this machine.
      sizes: Bytes that steps read.
      num_allocated: Slots of a layer that every engine makes room for, so that one of a strategy
        serves all smaller numbers and compiles once; None makes as many as the case has.
    """

    rig: Rig
    settings: EngineSettings
    profile: Profile | None
    ceilings: Ceilings
    sizes: StepSizes
    num_allocated: int | None = None
    _made: tuple[tuple[str, int, str], OffloadEngine] | None = None
    _strategies: dict[str, Strategy] = field(default_factory=dict)
    _transcripts: dict[tuple[int, str], Transcript] = field(default_factory=dict)

    def measure(
        self, case: EngineCase, *, routing: Routing | None, prompts: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        """The record of one case.

        Args:
          case: The case.
          routing: What overrides the router; None generates from the prompts.
          prompts: One for each request.

        Raises:
          UsageError: The strategy cannot work so.
        """
        settings = self.settings
        # It takes the most memory of all: it must be gone before the case's own slots are made.
        resident = self._resident(case, routing) if settings.is_checked else None
        strategy, engine = self.strategy(case.strategy), self.engine(case)
        timed = self._time(case, engine, routing, prompts)
        record = case_record(
            case, timed, self.sizes, self.ceilings, num_warmup=settings.num_warmup_steps
        )
        schedule = prefetch_schedule(engine)
        record |= {
            "kernels": engine.kernels,
            "device_bytes": engine.device_bytes,
            "schedule": None if schedule is None else schedule._asdict(),
        }
        if routing is not None:
            replayed = (routing, timed.steps)
            record |= check_counts(self.rig, engine, strategy, case.batch_size, replayed=replayed)
        elif settings.is_checked:
            num_steps = settings.num_check_steps
            record |= check_counts(
                self.rig, engine, strategy, case.batch_size, prompts=prompts, num_steps=num_steps
            )
        if resident is not None:
            record |= self._check_bits(case, resident, routing)
        return record

    def check_bits(self, case: EngineCase, routing: Routing | None = None) -> dict[str, Any]:
        """Whether tokens and logits of a case are those of an engine that holds every expert.

        Only an oracle is checked on replayed routing; the others route by themselves.
        """
        resident = self._resident(case, routing)
        # One engine with room for every expert runs all numbers of slots: programs are the same.
        engine = self.engine(case._replace(slots=self.rig.config.num_experts))
        plan = self.rig.even_plan(case.slots, case.scope)
        return self._check_bits(case, resident, routing, engine.with_plan(plan))

    def engine(self, case: EngineCase) -> OffloadEngine:
        """The engine of a case; that of another plan or strategy is let go before."""
        slots = max(case.slots, self.num_allocated or 0)
        key = (case.strategy, slots, case.scope)
        if self._made is None or self._made[0] != key:
            self.let_go()
            plan = self.rig.even_plan(slots, case.scope)
            self._made = key, self.rig.engine(plan, self.strategy(case.strategy))
        if slots == case.slots:
            return self._made[1]
        return self._made[1].with_plan(self.rig.even_plan(case.slots, case.scope))

    def let_go(self) -> None:
        """Gives back the device memory of the last engine."""
        self._made = None

    def strategy(self, name: str) -> Strategy:
        """A strategy of the registry, made once: programs are compiled for one object each.

        Raises:
          UsageError: It needs a profile and there is none.
        """
        _check_profile(name, self.profile is not None)
        if name not in self._strategies:
            self._strategies[name] = STRATEGIES[name].make(self.profile)
        return self._strategies[name]

    def _time(
        self,
        case: EngineCase,
        engine: OffloadEngine,
        routing: Routing | None,
        prompts: Sequence[Sequence[int]],
    ) -> Timed:
        num_warmup = self.settings.num_warmup_steps
        if routing is None:
            num_steps = self.settings.num_all_steps
            return time_generation(engine, prompts, num_steps, num_warmup=num_warmup)
        context = self.settings.context
        return time_replay(engine, routing, case.batch_size, context=context, num_warmup=num_warmup)

    def _check_bits(
        self,
        case: EngineCase,
        resident: Transcript,
        routing: Routing | None,
        engine: OffloadEngine | None = None,
    ) -> dict[str, Any]:
        return check_bits(
            engine or self.engine(case),
            resident,
            case.batch_size,
            self.settings.num_check_steps,
            seed=self.settings.seed,
            routing=routing if STRATEGIES[case.strategy].needs_future else None,
        )

    def _resident(self, case: EngineCase, routing: Routing | None) -> Transcript:
        """The resident engine's transcript, made once for each batch size."""
        if not STRATEGIES[case.strategy].needs_future:
            routing = None
        key = (case.batch_size, ROUTER if routing is None else routing.name)
        if key not in self._transcripts:
            self.let_go()
            self._transcripts[key] = resident_transcript(
                self.rig,
                case.batch_size,
                self.settings.num_check_steps,
                seed=self.settings.seed,
                routing=routing,
            )
        return self._transcripts[key]


def open_bench(rig: Rig, settings: EngineSettings, profile: Profile | None) -> EngineBench:
    """Measures the machine's rates and gets ready for the first case."""
    config = rig.config
    head_shape = (config.vocab_size, config.hidden_size)
    ceilings = measure_ceilings(rig.store.layers[0], head_shape, seed=settings.seed)
    return EngineBench(rig, settings, profile, ceilings, step_sizes(rig))


def make_cases(
    strategies: Sequence[str],
    slots: Sequence[int],
    scopes: Sequence[Scope],
    batch_sizes: Sequence[int],
    routings: Sequence[str],
    *,
    num_experts: int,
    has_profile: bool = True,
) -> Iterator[EngineCase]:
    """Every combination, those of one engine beside each other.

    Raises:
      UsageError: A layer has fewer experts than slots, or a strategy needs the future and nothing
        is replayed, or needs a profile and has none, or cannot serve a pool.
    """
    if max(slots) > num_experts:
        raise UsageError(
            f"--slots {max(slots)} exceeds the {num_experts} experts of a layer",
            f"Give at most {num_experts}.",
        )
    for name in strategies:
        if STRATEGIES[name].needs_future and ROUTER in routings:
            raise UsageError(
                f"{name} needs the future, which only a replay knows", "Give a trace with --replay."
            )
        _check_profile(name, has_profile)
        if "pool" in scopes:
            check_pool(STRATEGIES[name].keeps_layers_apart, name)
    for name in strategies:
        for scope in scopes:
            for count in slots:
                for size in batch_sizes:
                    yield from (EngineCase(name, count, scope, size, kind) for kind in routings)


def _check_profile(name: str, has_profile: bool) -> None:
    if STRATEGIES[name].needs_profile and not has_profile:
        raise UsageError(
            f"{name} needs a profile and there is nothing to learn one from",
            "Give a trace with --replay or --profile, or leave the strategy out.",
        )


def describe_bench(bench: EngineBench) -> dict[str, Any]:
    """The results before the first case."""
    rig = bench.rig
    return {
        "schema": ENGINE_SCHEMA,
        "environment": to_plain(capture_environment(bench.settings.seed)),
        "model": {
            "name": rig.name,
            "config": write_config(rig.config),
            "dtype": rig.store.layout.dtype,
            "has_random_weights": rig.has_random_weights,
            "routed_bytes": rig.store.layout.layer_bytes * rig.num_layers,
        },
        "settings": asdict(bench.settings),
        "sizes": bench.sizes._asdict(),
        "ceilings": bench.ceilings._asdict(),
        "engine": [],
        "baselines": [],
        "failed": [],
    }


def run_cases(
    bench: EngineBench,
    cases: Iterable[EngineCase],
    results: dict[str, Any],
    *,
    routings: Mapping[tuple[str, int], Routing],
    prompts: Sequence[Sequence[int]],
    save: Save,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Measures the cases and saves after each; one that the device has no room for is noted.

    Args:
      bench: What measures.
      cases: What is measured; those already among the results are left out.
      results: Results so far, which grow.
      routings: What is replayed, by name and batch size.
      prompts: Where generation begins; taken in turn for the requests of a batch.
      save: Called with the results after every case.
      progress: Told before each case.

    Returns:
      The results.

    Raises:
      UsageError: A strategy cannot work so.
    """
    cases = list(cases)
    done = {tuple(record[name] for name in EngineCase._fields) for record in results["engine"]}
    for number, case in enumerate(cases):
        if tuple(case) in done:
            continue
        if progress is not None:
            progress(number, len(cases), case.label())
        routing = routings.get((case.routing, case.batch_size))
        mine = (
            [prompts[place % len(prompts)] for place in range(case.batch_size)] if prompts else []
        )
        try:
            results["engine"].append(bench.measure(case, routing=routing, prompts=mine))
        except jax.errors.JaxRuntimeError as error:
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            results["failed"].append({**case._asdict(), "error": cause})
            print(f"{case.label()}: {cause}", file=sys.stderr)
            bench.let_go()
        save(results)
    return results
