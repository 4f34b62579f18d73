"""Lowering a kernel for a GPU on a machine that may have none."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax

_KERNEL = "__gpu$xla.gpu.triton"


def lower_for_gpu(function: Callable[..., Any], *arguments: Any) -> str:
    """The lowered program; arguments may be arrays or their shapes and types."""
    with _known_gpu():
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def count_kernels(program: str) -> int:
    """How many Triton kernels a lowered program calls."""
    return program.count(_KERNEL)


def _known_gpu() -> contextlib.AbstractContextManager[Any]:
    """From 0.11 on jax lowers Triton kernels only for a GPU it knows, real or abstract."""
    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    if version < (0, 11) or jax.default_backend() == "gpu":
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA A10", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)
