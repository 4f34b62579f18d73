"""Compiles the kernels of the decode step for an RTX 3090, and for an H100, without either.

    python scripts/check_kernels_sm86.py
    python scripts/check_kernels_sm86.py --strategies lru,intelligent --batch-sizes 1,4 -o json

needs the `triton` package (checked with 3.6), which brings a compiler and NVIDIA's assembler; XLA
compiles kernels with a copy of the same. Decode programs are lowered for CUDA at the model's real
sizes, without weights; the Triton IR of every kernel is taken out of them and compiled for each
target. Kernels with the same IR are compiled once.

A kernel fails if it cannot be lowered or compiled, if its code for sm_86 asks for more shared
memory than such a GPU has or uses an instruction that came with Hopper, and if it spills more than
a little on any target. Exit code 0: none fails; 1: some do; otherwise the check could not be made.
Nothing is run: that a kernel compiles says neither that it is right nor that it is fast.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from triton_kernels import TritonModule, compile_kernel, lower_for_cuda, triton_modules

from moejax.cards import MODELS, models_dir, read_card
from moejax.engine import _offload_kernels
from moejax.engine._expert_cache import (
    OffloadState,
    booleans,
    empty_cache,
    make_replay_table,
    make_sizes,
)
from moejax.engine._programs import Place
from moejax.engine.kernels._copy import schedule
from moejax.engine.kernels._dense_weights import pack_dense, supports
from moejax.engine.kernels._route import Router
from moejax.errors import BackendError, MoejaxError, UsageError
from moejax.offload import SCOPES, ExpertLayout, Scope, SlotPlan
from moejax.qwen_moe import QwenMoe, QwenMoeConfig, read_config
from moejax.qwen_moe import empty_cache as empty_kv_cache
from moejax.strategies import STRATEGIES, CacheShape

TARGETS = (86, 90)
# Of an engine's schedule; how many rows a kernel copies changes its bounds, not its code.
LAYERS_PER_COPY = 5


class Case(NamedTuple):
    """What a decode program is compiled for.

    Attributes:
      strategy: Name in `STRATEGIES`.
      scope: Who shares the slots.
      slots: Slots of each layer; a pool has as many in all.
      batch_size: Requests.
      positions: Tokens that the cache of each has room for.
      is_replayed: Whether recorded routing overrides the router.
    """

    strategy: str
    scope: Scope
    slots: int
    batch_size: int
    positions: int
    is_replayed: bool


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    try:
        if importlib.util.find_spec("triton") is None:
            raise UsageError("there is no compiler", "Install it: pip install triton==3.6.0")
        rows = list(check(read_model(options.model, options.layers), cases(options)))
    except MoejaxError as error:
        print(f"error: {error.cause}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(rows) if options.output == "json" else "\n".join(table(rows)))
    return 1 if any(row["faults"] for row in rows) else 0


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    def names(text: str) -> list[str]:
        return text.split(",")

    # Top-K reads like any other strategy, but wants a profile first.
    known = [name for name, kind in STRATEGIES.items() if not kind.needs_profile]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="qwen1.5-moe-a2.7b", help="card or config.json")
    parser.add_argument("--layers", type=int, help="take only so many layers")
    parser.add_argument("--strategies", type=names, default=known)
    parser.add_argument("--scopes", type=names, default=list(SCOPES))
    parser.add_argument("--slots", type=numbers, default=[8, 60], help="a layer")
    parser.add_argument("--batch-sizes", type=numbers, default=[1, 4, 16])
    parser.add_argument("--positions", type=numbers, default=[512, 8192])
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    options = parser.parse_args(arguments)
    for given, allowed in ((options.strategies, known), (options.scopes, SCOPES)):
        if set(given) - set(allowed):
            parser.error(f"{', '.join(given)}: not all are of {', '.join(allowed)}")
    return options


def read_model(name: str, num_layers: int | None) -> QwenMoeConfig:
    """Sizes and settings of a model that the kernels can run.

    Raises:
      UsageError: They cannot run it.
    """
    path = models_dir() / f"{name}.toml" if name in MODELS else Path(name)
    fields = read_card(path)
    # Cards leave out what has no size.
    config = read_config({"max_position_embeddings": 32768} | fields.get("config", fields), name)
    if num_layers is not None:
        config = replace(config, num_hidden_layers=num_layers)
    if (reason := supports(config)) is not None:
        raise UsageError(f"the kernels cannot run {name}: {reason}", "Choose another --model.")
    return config


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every strategy in the first of all settings, and every setting with the first strategy."""
    first, *others = options.strategies
    for name in (first, *others):
        for scope in options.scopes:
            for batch_size in options.batch_sizes:
                # Replayed routing is another input of the kernels that route and learn.
                for is_replayed in (False, True)[STRATEGIES[name].needs_future :]:
                    yield Case(
                        name, scope, options.slots[0], batch_size, options.positions[0], is_replayed
                    )
    is_replayed = STRATEGIES[first].needs_future
    for batch_size in options.batch_sizes:
        for slots in options.slots[1:]:
            yield Case(first, "layer", slots, batch_size, options.positions[0], is_replayed)
        for positions in options.positions[1:]:
            yield Case(first, "layer", options.slots[0], batch_size, positions, is_replayed)


def check(config: QwenMoeConfig, cases: Iterator[Case]) -> Iterator[dict[str, Any]]:
    """A row for each different kernel and target, with the first case that launches it."""
    seen: set[TritonModule] = set()
    for case in cases:
        print(" ".join(f"{key}={value}" for key, value in case._asdict().items()), file=sys.stderr)
        try:
            modules = triton_modules(lower_decode(config, case))
        except Exception as error:  # What the Triton backend cannot lower fails in many ways.
            fault = f"not lowered: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            yield {"kernel": "any", "target": "any", "faults": [fault], "case": case._asdict()}
            continue
        for name, module in modules.items():
            if module in seen:
                continue
            seen.add(module)
            for capability in TARGETS:
                row = {"kernel": name, "target": f"sm_{capability}", "warps": module.num_warps}
                yield {**row, **judge(module, capability), "case": case._asdict()}


def judge(module: TritonModule, capability: int) -> dict[str, Any]:
    """What a target makes of a kernel, and its faults, as plain values."""
    try:
        compiled = compile_kernel(module, capability)
    except BackendError as error:
        return {"faults": [error.cause]}
    return {**compiled._asdict(), "faults": list(compiled.faults)}


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a person wants to see."""
    heads = ("kernel", "target", "warps", "registers", "spill_bytes", "shared_bytes", "hopper")
    lines = [heads, *([_cell(row.get(head, "-")) for head in heads] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line, row in zip(lines, [{}, *rows], strict=True):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        yield "  ".join([*cells, *("FAULT: " + fault for fault in row.get("faults", ()))]).rstrip()


def _cell(value: Any) -> str:
    return (", ".join(value) or "-") if isinstance(value, list | tuple) else str(value)


def lower_decode(config: QwenMoeConfig, case: Case) -> jax.stages.Lowered:
    """Lowers one decode step of the engine, without weights and without a GPU."""
    dtype, strategy = jnp.dtype(config.dtype), STRATEGIES[case.strategy].make(None)
    layout = ExpertLayout(
        config.num_experts, config.hidden_size, config.moe_intermediate_size, dtype.name
    )
    num_layers = len(config.moe_layers)
    shape = CacheShape(num_layers, config.num_experts, config.num_experts_per_tok, 1)
    copies = schedule(layout.num_rows, LAYERS_PER_COPY)
    sizes = make_sizes(shape, layout, case.scope, strategy, copies)
    is_boolean = booleans(strategy, sizes)
    router = Router(strategy, sizes, is_boolean, case.batch_size, config.norm_topk_prob)
    num_ahead = sizes.shape.depth if sizes.asks_gates else 0
    program = _offload_kernels.Program(config, router, num_ahead, is_interpreted=False)
    plan = SlotPlan(case.scope, (case.slots,) * (num_layers if case.scope == "layer" else 1))

    def new_state() -> OffloadState:
        rows = jnp.zeros(case.batch_size, jnp.int32)
        return OffloadState(
            empty_kv_cache(config, case.batch_size, case.positions, dtype),
            Place(rows, rows, jnp.int32(0)),
            empty_cache(sizes, layout, plan, [strategy], dtype),
        )

    def step(weights, hosts, state, table):
        return _offload_kernels.decode_step(weights, hosts, program, state, table, None)

    weights = jax.eval_shape(lambda: pack_dense(QwenMoe(config, rngs=nnx.Rngs(0), dtype=dtype)))
    packed = jax.ShapeDtypeStruct((config.num_experts, layout.num_rows, layout.hidden), dtype)
    table = None
    if case.is_replayed:
        columns = 1 if case.batch_size == 1 else 16
        chosen = np.zeros((4, num_layers, case.batch_size * config.num_experts_per_tok), np.uint8)
        table = jax.eval_shape(lambda: make_replay_table(sizes, chosen, case.batch_size, columns))
    state = jax.eval_shape(new_state)
    return lower_for_cuda(jax.jit(step), weights, (packed,) * num_layers, state, table)


if __name__ == "__main__":
    sys.exit(main())
