"""How long expert feed-forward blocks take on this machine, by tokens and number of experts."""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moejax._types import PRNGKey

from ._measure_sample import Probe, Progress, sample_probes

_HIDDEN_SIZE = 2048
_FFN_SIZE = 1408
"""The expert of Qwen1.5-MoE-A2.7B."""

_NUM_EXPERTS = 4
"""Experts held: a program goes through all of them, so that none waits in a cache."""

_NUM_DEVICE_PASSES = 16
"""Passes over the experts in one program on an accelerator, where a call costs many experts."""

_NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_NUM_QUICK_TOKENS = (1, 4, 16, 64)
_MAX_GROUP_TOKENS = 32
_NUM_SAMPLES = 9
_NUM_QUICK_SAMPLES = 7


class Expert(NamedTuple):
    """One SwiGLU feed-forward block, gate and up side by side."""

    gate_up: Float[Array, "hidden two_ffn"]
    down: Float[Array, "ffn hidden"]


def measure_compute(
    *, quick: bool, seed: int, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Times groups of one and, up to 32 tokens, of four experts, for 1 to 256 tokens.

    A group is what one layer does: its experts see the same tokens and their outputs are added.
    One program works through groups one after another, each on the output of the last, and a
    sample is the time of the program divided by its groups: a decode step does not pay Python's
    dispatch for every layer. Weights are bfloat16 on an accelerator and float32 on a CPU, which
    has no fast bfloat16 product in XLA; `num_bytes` counts them as stored.

    Returns:
      One record per shape: `kind`, `num_tokens`, `num_experts` (of a group), `num_bytes`,
      `num_flops`, `dtype`, `compile_s`, `num_groups_per_sample`, `samples_s` (each for one group),
      `median_s`.
    """
    is_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if is_cpu else jnp.bfloat16
    num_passes = 1 if is_cpu else _NUM_DEVICE_PASSES
    keys = jax.random.split(jax.random.key(seed), _NUM_EXPERTS)
    experts = [_make_expert(key, dtype=dtype) for key in keys]
    tokens = _NUM_QUICK_TOKENS if quick else _NUM_TOKENS
    shapes = [(num_tokens, 1) for num_tokens in tokens]
    shapes += [(num_tokens, 4) for num_tokens in tokens if num_tokens <= _MAX_GROUP_TOKENS]
    probes: list[Probe] = []
    compile_s: list[float] = []
    for num_tokens, num_experts in shapes:
        x = jax.random.normal(jax.random.key(seed), (num_tokens, _HIDDEN_SIZE), dtype)
        start_s = time.perf_counter()
        program = _run_groups.lower(x, experts, num_experts, num_passes).compile()
        compile_s.append(time.perf_counter() - start_s)
        probes.append(partial(_run, program, x, experts))
    samples_s = sample_probes(
        probes,
        num_samples=_NUM_QUICK_SAMPLES if quick else _NUM_SAMPLES,
        seed=seed,
        progress=progress,
        label="experts",
    )
    return [
        _record(shape, num_passes * _NUM_EXPERTS // shape[1], experts[0], seconds, samples)
        for shape, seconds, samples in zip(shapes, compile_s, samples_s, strict=True)
    ]


@partial(jax.jit, static_argnames="dtype")
def _make_expert(key: PRNGKey, dtype: Any) -> Expert:
    """Weights of the size that keeps activations near one; consumes `key`."""
    gate_up_key, down_key = jax.random.split(key)
    gate_up = jax.random.uniform(gate_up_key, (_HIDDEN_SIZE, 2 * _FFN_SIZE), dtype, -0.04, 0.04)
    down = jax.random.uniform(down_key, (_FFN_SIZE, _HIDDEN_SIZE), dtype, -0.04, 0.04)
    return Expert(gate_up, down)


@partial(jax.jit, static_argnames=("num_experts", "num_passes"))
def _run_groups(
    x: Float[Array, "tokens hidden"], experts: list[Expert], num_experts: int, num_passes: int
) -> Float[Array, "tokens hidden"]:
    def one_pass(_: int, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens hidden"]:
        for first in range(0, len(experts), num_experts):
            x = x + 1e-3 * _apply_experts(x, experts[first : first + num_experts])
        return x

    return jax.lax.fori_loop(0, num_passes, one_pass, x)


def _apply_experts(
    x: Float[Array, "tokens hidden"], experts: list[Expert]
) -> Float[Array, "tokens hidden"]:
    total = jnp.zeros_like(x)
    for expert in experts:
        gate, up = jnp.split(x @ expert.gate_up, 2, axis=-1)
        total += (jax.nn.silu(gate) * up) @ expert.down
    return total


def _run(
    program: Any, x: Float[Array, "tokens hidden"], experts: list[Expert], round_index: int
) -> Array:
    del round_index
    return program(x, experts)


def _record(
    shape: tuple[int, int],
    num_groups: int,
    expert: Expert,
    compile_s: float,
    samples_s: list[float],
) -> dict[str, Any]:
    num_tokens, num_experts = shape
    group_samples_s = [sample_s / num_groups for sample_s in samples_s]
    return {
        "kind": "compute",
        "num_tokens": num_tokens,
        "num_experts": num_experts,
        "num_bytes": num_experts * sum(weight.nbytes for weight in expert),
        "num_flops": 6 * num_tokens * num_experts * _HIDDEN_SIZE * _FFN_SIZE,
        "dtype": expert.down.dtype.name,
        "compile_s": compile_s,
        "num_groups_per_sample": num_groups,
        "samples_s": group_samples_s,
        "median_s": float(np.median(group_samples_s)),
    }
