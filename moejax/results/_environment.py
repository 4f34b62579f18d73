"""Where, when and with what a result was made."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import moejax

_VERSIONED = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy")


@dataclasses.dataclass(frozen=True)
class Environment:
    """Enough to tell two runs apart and to repeat either.

    Args:
      device: Kind of the accelerator, or the processor's name where there is none.
      backend: JAX's name for it: `cpu`, `gpu` or `tpu`.
      num_devices: How many of them JAX sees.
      num_cpus: Processors that this process may use.
      platform: Operating system and architecture.
      versions: Version of Python, of moejax and of each library that shapes the result.
      commit: Git commit of the checkout, `+dirty` after it when files differ. Where there is no
        checkout, what MOEJAX_COMMIT says the files were copied from; else `unknown`.
      argv: The command as given, with the home folder written `~`.
      seed: The run's seed; None when nothing was drawn.
      date: UTC, ISO 8601, to the second.
    """

    device: str
    backend: str
    num_devices: int
    num_cpus: int
    platform: str
    versions: Mapping[str, str]
    commit: str
    argv: Sequence[str]
    seed: int | None
    date: str


def capture_environment(seed: int | None = None) -> Environment:
    """Records this process's environment; starts JAX's backend if nothing has yet.

    Raises:
      RuntimeError: JAX finds no backend to start (raised by JAX itself).
    """
    import jax

    devices = jax.devices()
    is_cpu = devices[0].platform == "cpu"
    return Environment(
        device=_processor_name() if is_cpu else devices[0].device_kind,
        backend=jax.default_backend(),
        num_devices=len(devices),
        num_cpus=_num_cpus(),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions=_versions(),
        commit=_commit(),
        argv=tuple(_argv()),
        seed=seed,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine() or "cpu"


def _num_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "moejax": moejax.__version__}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _argv() -> list[str]:
    home = str(Path.home())
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return [word.replace(home, "~") if len(home) > 1 else word for word in words]


def _commit() -> str:
    copied_from = os.environ.get("MOEJAX_COMMIT", "unknown")
    checkout = Path(moejax.__file__).resolve().parents[1]
    try:
        # An environment inside some other project's checkout must not report that one's commit.
        if Path(_git(checkout, "rev-parse", "--show-toplevel")).resolve() != checkout:
            return copied_from
        commit = _git(checkout, "rev-parse", "HEAD")
        is_dirty = bool(_git(checkout, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return copied_from
    return f"{commit}+dirty" if is_dirty else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
