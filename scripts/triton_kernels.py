"""Triton kernels of a lowered jax program, and what a GPU's compiler makes of them.

Used by `check_kernels_sm86.py`. No GPU is needed: Triton IR is taken out of the program and
compiled with the `triton` package, which has a compiler and NVIDIA's assembler.
"""

import contextlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxlib.mlir import ir
from jaxlib.triton import dialect

from moejax.errors import BackendError

# Of the 100 KB that a block can have on sm_86, CUDA keeps one (programming guide, 20.4).
MOST_SHARED_BYTES = 99 * 1024
MOST_SPILL_BYTES = 64
HOPPER = re.compile(
    r"\b(wgmma|cp\.async\.bulk|cp\.reduce\.async|tensormap|setmaxnreg|griddepcontrol"
    r"|barrier\.cluster|mapa|multimem|fence\.proxy)\b"
)
# How XLA is told to compile a Triton kernel, in jax 0.10 to 0.12.
_CUSTOM_CALL = "__gpu$xla.gpu.triton"


class TritonModule(NamedTuple):
    """One kernel as jax hands it to XLA.

    Attributes:
      ttir: Triton IR, as text.
      num_warps: Warps of a program.
      num_stages: Depth of software pipelining.
    """

    ttir: str
    num_warps: int
    num_stages: int


class Compiled(NamedTuple):
    """What one target makes of a kernel.

    Attributes:
      capability: Compute capability of the target, 86 for sm_86.
      registers: Registers of a thread.
      spill_bytes: Bytes that a thread stores because it has no register for them.
      shared_bytes: Shared memory of a program.
      hopper: Instructions that no GPU before Hopper has.
    """

    capability: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    hopper: tuple[str, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """Why the kernel cannot do on an RTX 3090, in words."""
        found = []
        if self.spill_bytes > MOST_SPILL_BYTES:
            found.append(f"spills {self.spill_bytes} bytes")
        # What only newer GPUs are given is their compiler's choice.
        if self.capability < 90 and self.shared_bytes > MOST_SHARED_BYTES:
            found.append(f"asks for {self.shared_bytes} bytes of shared memory")
        if self.capability < 90 and self.hopper:
            found.append(f"uses {', '.join(self.hopper)}")
        return tuple(found)


def lower_for_cuda(function: Callable[..., Any], *arguments: Any) -> jax.stages.Lowered:
    """Lowers a jitted function for CUDA on a machine that may have no GPU.

    Args:
      function: What `jax.jit` returns.
      arguments: Arrays, or their shapes and types.
    """
    with _pretended_gpu():
        return function.trace(*arguments).lower(lowering_platforms=("cuda",))


def triton_modules(lowered: jax.stages.Lowered) -> dict[str, TritonModule]:
    """The Triton kernels of a lowered program, by name.

    A kernel called many times counts once; of different kernels with one name, the second is
    called `name.2`.
    """
    program = lowered.compiler_ir()
    if program is None:
        return {}
    dialect.register_dialect(program.context)
    found: dict[str, TritonModule] = {}

    def visit(operation):
        attributes = operation.attributes
        if _is_kernel(operation):
            config = ir.DictAttr(attributes["mhlo.backend_config"])
            module = _read_kernel(config, program.context)
            name = unique = ir.StringAttr(config["name"]).value
            number = 1
            while found.get(unique, module) != module:
                number += 1
                unique = f"{name}.{number}"
            found[unique] = module
        return ir.WalkResult.ADVANCE

    program.operation.walk(visit)
    return found


def compile_kernel(module: TritonModule, capability: int) -> Compiled:
    """Compiles a kernel for one target, with all passes that precede the assembler.

    Args:
      module: From `triton_modules`.
      capability: Compute capability, such as 86.

    Raises:
      BackendError: The compiler or the assembler refuses the kernel.
    """
    ptx, shared_bytes = _make_ptx(module, capability)
    log = _assemble(ptx, capability)
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise BackendError("ptxas does not say what the kernel uses", log.strip())
    return Compiled(
        capability,
        registers=int(registers[1]),
        spill_bytes=max(int(spills[1]), int(spills[2])),
        shared_bytes=shared_bytes,
        hopper=hopper_instructions(ptx),
    )


def hopper_instructions(ptx: str) -> tuple[str, ...]:
    """Names of instructions in the code that need compute capability 9.0."""
    code = "\n".join(line.partition("//")[0] for line in ptx.splitlines())
    return tuple(sorted(set(HOPPER.findall(code))))


def _is_kernel(operation: Any) -> bool:
    attributes = operation.attributes
    return (
        "mhlo.backend_config" in attributes
        and ir.StringAttr(attributes["call_target_name"]).value == _CUSTOM_CALL
    )


def _read_kernel(config: Any, context: Any) -> TritonModule:
    code = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes, context)
    return TritonModule(
        ttir=str(code.operation.get_asm(enable_debug_info=False)),
        num_warps=ir.IntegerAttr(config["num_warps"]).value,
        num_stages=ir.IntegerAttr(config["num_stages"]).value,
    )


def _pretended_gpu() -> contextlib.AbstractContextManager[Any]:
    """From 0.11 on jax lowers Triton kernels only for a GPU it knows, real or abstract."""
    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    if version < (0, 11) or jax.default_backend() == "gpu":
        return contextlib.nullcontext()
    # The one card of compute capability 8.6 in jax's own list.
    device = jax.sharding.AbstractDevice("NVIDIA A10", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def _make_ptx(module: TritonModule, capability: int) -> tuple[str, int]:
    """The kernel for the assembler, and the bytes of shared memory that its launch asks for."""
    triton_ir = importlib.import_module("triton._C.libtriton").ir
    backends = importlib.import_module("triton.backends.compiler")
    compiler = importlib.import_module("triton.compiler.compiler")
    backend = compiler.make_backend(backends.GPUTarget("cuda", capability, 32))
    context, stages, metadata = triton_ir.context(), {}, {}
    triton_ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(
        {"num_warps": module.num_warps, "num_stages": module.num_stages}
    )
    # `triton.compile` would skip the passes on the IR itself, which XLA does not.
    backend.add_stages(stages, options, backends.Language.TRITON)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttir"
        path.write_text(module.ttir, encoding="utf-8")
        try:
            code = triton_ir.parse_mlir_module(str(path), context)
            code.context = context
            for name, stage in stages.items():
                if name == "cubin":
                    break
                code = stage(code, metadata)
        except RuntimeError as error:
            cause = f"triton does not compile the kernel for sm_{capability}: {error}"
            raise BackendError(cause, "Its log is above.") from error
    return str(code), metadata["shared"]


def _assemble(ptx: str, capability: int) -> str:
    knobs = importlib.import_module("triton").knobs
    # As triton does: `a` admits what later GPUs need not have, such as wgmma.
    target = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", str(path)]
        command += ["-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"ptxas refuses a kernel for {target}", done.stderr.strip()[-2000:])
    return done.stderr
