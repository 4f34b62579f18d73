"""The engine on one device and on several that share the experts: same routing, same run."""

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.bench import (
    Rig,
    Routing,
    RoutingRecipe,
    StepSizes,
    adding_in_order,
    devices_record,
    logits_of,
    make_routing,
    measure_ceilings,
    measure_links,
    random_rig,
    replay_steps,
    shares_difference,
    step_sizes,
)
from moejax.cards import models_dir, read_card
from moejax.devices import team
from moejax.engine import OffloadEngine
from moejax.offload import SlotPlan
from moejax.qwen_moe import QwenMoeConfig, read_config
from moejax.results import read_json, to_plain
from moejax.strategies import STRATEGIES

SEED, CONTEXT = 0, 96
WORKLOAD = "qwen1.5-moe"
# One object, since another one would be compiled anew.
LRU = STRATEGIES["lru"].make(None)
# Steps that count and steps before them, by batch size.
STEPS = {1: (64, 32), 4: (40, 24), 16: (16, 12)}
PLAN_STEPS = {1: (64, 64), 4: (32, 32), 16: (16, 16)}
# Slots of a layer of one device; several have the same in all and, of half as many, the same each.
SLOTS = (0, 8, 16, 30)
NUM_LOGIT_STEPS = 12


class Case(NamedTuple):
    """What is replayed with which slots."""

    batch_size: int
    slots: int
    routing: Routing


def measure_engine(options: argparse.Namespace) -> dict[str, Any]:
    """Step times for each number of devices, and whether they compute the same."""
    config = read_model(options)
    found: dict[str, Any] = {
        "model": options.model,
        "rates": {},
        "cases": [],
        "logits": [],
        "plans": [],
    }
    said: dict[tuple[int, int], np.ndarray] = {}
    in_order: dict[tuple[int, int], np.ndarray] = {}
    for count in options.devices:
        begin = time.perf_counter()
        members = team(count)
        rig = random_rig(config, name=options.model, kernels=options.kernels, team=members)
        _say(f"{count} device(s): experts in host memory after {time.perf_counter() - begin:.0f} s")
        rates = _rates(rig, options, found)
        for batch_size in options.batch_sizes:
            engine = _engine(rig, config.num_experts)
            for case in cases(config, count, batch_size, options):
                found["cases"].append(measure(rig, engine, case, rates))
            said[count, batch_size] = _logits(rig, engine, config, batch_size, options, found)
            if count == 1:
                del engine
                gc.collect()
                in_order |= dict(_in_order(rig, config, batch_size, options))
                engine = _engine(rig, config.num_experts)
            for path in _plans_for(options, count, batch_size):
                found["plans"].append(measure_plan(rig, engine, path, rates, options))
            options.save(found)
            del engine
            gc.collect()
        del rig
        gc.collect()
    found["compared"] = list(compare(said, in_order, options.devices[0]))
    return found


def read_model(options: argparse.Namespace) -> QwenMoeConfig:
    """The card of the model, with fewer layers if asked for."""
    fields = read_card(models_dir() / f"{options.model}.toml")
    fields = {"max_position_embeddings": 32768} | fields.get("config", fields)
    config = dataclasses.replace(read_config(fields, options.model), dtype=options.dtype)
    if options.layers:
        config = dataclasses.replace(config, num_hidden_layers=options.layers)
    return config


def cases(
    config: QwenMoeConfig, num_devices: int, batch_size: int, options: argparse.Namespace
) -> Iterator[Case]:
    """Everything missed, a workload at some capacities, and nothing missed."""
    num_steps, num_warmup = (max(2, n // options.shrink) for n in STEPS[batch_size])
    whole = -(-config.num_experts // num_devices)
    drawn = RoutingRecipe("requests", num_steps + num_warmup, SEED, source=options.workload)
    routing = make_routing(drawn, config, options.model, batch_size)
    slots = {-(-each // num_devices) for each in SLOTS} | set(SLOTS)
    for number in sorted({min(each, whole) for each in slots}):
        yield Case(batch_size, number, routing)
    kept = RoutingRecipe(
        "hit_ratio", num_steps + num_warmup, SEED, slots=config.num_experts, hit_ratio=1.0
    )
    yield Case(batch_size, whole, make_routing(kept, config, options.model, batch_size))


def measure(rig: Rig, engine: OffloadEngine, case: Case, rates: dict[str, Any]) -> dict[str, Any]:
    """One case: times, bounds, and the counts of every device beside the simulator's."""
    num_devices = rig.store.team.num_devices
    plan = rig.even_plan(case.slots, "layer")
    steps = replay_steps(engine.with_plan(plan), case.routing, case.batch_size, context=CONTEXT)
    num_warmup = len(steps.step_s) * STEPS[case.batch_size][1] // sum(STEPS[case.batch_size])
    record = devices_record(
        steps,
        rates["sizes"],
        num_devices=num_devices,
        batch_size=case.batch_size,
        mean_context=CONTEXT + (num_warmup + len(steps.step_s)) / 2,
        num_warmup=num_warmup,
        link_bytes_per_s=rates["link_bytes_per_s"],
        hbm_bytes_per_s=rates["hbm_bytes_per_s"],
    )
    difference = shares_difference(
        rig, plan, LRU, case.routing.experts, steps.counts, case.batch_size
    )
    _say(
        f"  {num_devices} device(s), batch {case.batch_size}, {case.slots} slots, "
        f"{case.routing.name}: {1e3 * record['step_s']['median']:.2f} ms, "
        f"{record['bound_sum_ratio']:.3f} of the bound, hits {record['hit_ratio']:.3f}, "
        f"counts {difference or 'equal'}"
    )
    return {
        "strategy": "lru",
        "slots": case.slots,
        "routing": case.routing.name,
        "kernels": engine.kernels,
        **record,
        "counts_equal": difference is None,
        "count_difference": difference,
    }


def measure_plan(
    rig: Rig, engine: OffloadEngine, path: Path, rates: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """What the engine takes with a plan of `moejax tune-cache`, and what was predicted."""
    plan = read_json(path)
    num_devices, batch_size = rig.store.team.num_devices, plan["batch_size"]
    slots = next(t["experts_per_layer"] for t in plan["tiers"] if t["memory"] == "device")
    num_steps, num_warmup = (max(2, n // options.shrink) for n in PLAN_STEPS[batch_size])
    recipe = RoutingRecipe("requests", num_steps + num_warmup, SEED + 2, source=options.workload)
    routing = make_routing(recipe, rig.config, options.model, batch_size)
    context = plan["context_tokens"] - num_warmup - num_steps // 2
    steps = replay_steps(
        engine.with_plan(SlotPlan("layer", tuple(slots))), routing, batch_size, context=context
    )
    record = devices_record(
        steps,
        rates["sizes"],
        num_devices=num_devices,
        batch_size=batch_size,
        mean_context=plan["context_tokens"],
        num_warmup=num_warmup,
        link_bytes_per_s=rates["link_bytes_per_s"],
        hbm_bytes_per_s=rates["hbm_bytes_per_s"],
    )
    mean_s = float(np.mean(steps.step_s[num_warmup:]))
    _say(
        f"  {path.name}: measured {1e3 * mean_s:.2f} ms in the mean, planned for "
        f"{1e3 * plan['step_latency_s']:.2f}; hits {record['hit_ratio']:.3f}, planned "
        f"{plan['hit_ratio']:.3f}"
    )
    return {"plan": path.name, "slots": slots, "mean_s": mean_s, **record}


def _plans_for(options: argparse.Namespace, num_devices: int, batch_size: int) -> Iterator[Path]:
    for path in options.plans:
        plan = read_json(path)
        if (plan.get("num_devices", 1), plan["batch_size"]) == (num_devices, batch_size):
            yield path


def compare(
    said: dict[tuple[int, int], np.ndarray], in_order: dict[tuple[int, int], np.ndarray], base: int
) -> Iterator[dict[str, Any]]:
    """Logits of several devices beside those of one, which adds the experts up in another order.

    And beside those of one device that adds them up in the order of several: to the bit.
    """
    for (count, batch_size), ours in said.items():
        if count == base:
            continue
        theirs = said[base, batch_size]
        spread = float(theirs.std())
        yield {
            "num_devices": count,
            "base_devices": base,
            "batch_size": batch_size,
            "num_tokens": int(np.prod(ours.shape[:2])),
            "same_tokens": int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
            "rms_difference_ratio": float(np.sqrt(np.mean((ours - theirs) ** 2))) / spread,
            "is_identical_in_order": bool(np.array_equal(ours, in_order[count, batch_size])),
        }


def _rates(rig: Rig, options: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    config, members = rig.config, rig.store.team
    layer = rig.store.layers[0]
    first = layer.addressable_shards[0].data
    ceilings = measure_ceilings(first, (config.vocab_size, config.hidden_size), seed=SEED)
    link = ceilings.link_bytes_per_s
    about: dict[str, Any] = {"ceilings": to_plain(ceilings)}
    if members.num_devices > 1:
        links = measure_links(
            layer, members, hidden=config.hidden_size, batch_sizes=options.batch_sizes
        )
        about["links"] = to_plain(links)
        _say(f"  links: {links.alone_bytes_per_s:.3g} alone, {links.beside_bytes_per_s:.3g} beside")
        for one in links.all_reduces:
            each_s = np.median(one["all_reduce_s"].samples)
            _say(f"  all-reduce of {one['all_reduce_bytes']} bytes: {1e6 * each_s:.1f} us")
    found["rates"][str(members.num_devices)] = about
    sizes: StepSizes = step_sizes(rig)
    found["sizes"] = sizes._asdict()
    return {"sizes": sizes, "link_bytes_per_s": link, "hbm_bytes_per_s": ceilings.hbm_bytes_per_s}


def _engine(rig: Rig, num_experts: int) -> OffloadEngine:
    whole = -(-num_experts // rig.store.team.num_devices)
    return rig.engine(rig.even_plan(whole, "layer"), LRU)


def _in_order(
    rig: Rig, config: QwenMoeConfig, batch_size: int, options: argparse.Namespace
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """What one device says that adds the experts up as several do."""
    for count in options.devices:
        if count > 1:
            plan = rig.even_plan(config.num_experts, "layer")
            with adding_in_order(count):
                engine = rig.engine(plan, STRATEGIES["lru"].make(None))
                yield (count, batch_size), _said(engine, config, batch_size, options)


def _said(
    engine: OffloadEngine, config: QwenMoeConfig, batch_size: int, options: argparse.Namespace
) -> np.ndarray:
    recipe = RoutingRecipe("requests", NUM_LOGIT_STEPS, SEED + 1, source=options.workload)
    routing = make_routing(recipe, config, options.model, batch_size)
    return logits_of(engine, routing, batch_size, NUM_LOGIT_STEPS, seed=SEED)


def _logits(
    rig: Rig,
    engine: OffloadEngine,
    config: QwenMoeConfig,
    batch_size: int,
    options: argparse.Namespace,
    found: dict[str, Any],
) -> np.ndarray:
    """Logits with few slots, which must be those with all, to the bit."""
    few, all_ = (
        _said(engine.with_plan(plan), config, batch_size, options)
        for plan in (rig.even_plan(2, "layer"), engine.plan)
    )
    is_identical = bool(np.array_equal(few, all_))
    _say(f"  batch {batch_size}: logits of few slots and of all are identical: {is_identical}")
    found["logits"].append(
        {
            "num_devices": rig.store.team.num_devices,
            "batch_size": batch_size,
            "num_steps": NUM_LOGIT_STEPS,
            "is_identical": is_identical,
        }
    )
    return all_


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
