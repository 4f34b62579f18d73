"""What a training run needs beside its steps: when it ends, what it logs, how it is resumed."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from training_step import TrainState, init_state

from moejax.errors import BadFileError, UsageError
from moejax.qwen_moe import QwenMoeConfig
from moejax.results import to_plain, write_text

# Steps whose time is not that of others, then steps that are timed.
FIRST_STEPS, TIMED_STEPS = 5, 30
DECAY_RATIO = 0.2
# Kept for the last held-out loss, the last checkpoint and the model's files.
RESERVED_S = 20
# Of the time that is left, what the steps are planned to take.
_PLANNED_RATIO = 0.98


@dataclass(frozen=True)
class Limits:
    """When a run ends.

    Attributes:
      run_s: Wall-clock time of this run, counted from `started_s`, all included.
      total_s: The same of all runs together.
      num_steps: Steps of the whole training; None to find out from the time.
      stop_after: Steps after which this run ends, to be resumed; None for all.
      started_s: `time.monotonic()` at which the run began.
    """

    run_s: float = float("inf")
    total_s: float = float("inf")
    num_steps: int | None = None
    stop_after: int | None = None
    started_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Progress:
    """How far the training is and how far it will go.

    Attributes:
      step: Steps done.
      elapsed_s: Wall-clock time of earlier runs.
      num_steps: Steps of the whole training; None as long as that is open.
      decay_from: Step at which the learning rate begins to fall.
    """

    step: int = 0
    elapsed_s: float = 0.0
    num_steps: int | None = None
    decay_from: int | None = None


class Pace:
    """Decides how many steps there will be, and when this run is over."""

    def __init__(self, limits: Limits, progress: Progress):
        self.limits = limits
        self.first_step = progress.step
        self.elapsed_s = progress.elapsed_s
        self.timed_from: tuple[int, float] | None = None

    def plan(self, progress: Progress, wait: Callable[[], Any]) -> Progress:
        """Fixes the number of steps: after the timed ones, and again when the decay begins."""
        if self.limits.num_steps is not None:
            num_steps = self.limits.num_steps
            return replace(
                progress, num_steps=num_steps, decay_from=int(num_steps * (1 - DECAY_RATIO))
            )
        num_done = progress.step - self.first_step
        if num_done == FIRST_STEPS:
            wait()
            self.timed_from = (progress.step, time.monotonic())
        is_decaying = progress.decay_from is not None and progress.step > progress.decay_from
        is_due = num_done == FIRST_STEPS + TIMED_STEPS or progress.step == progress.decay_from
        if self.timed_from is None or is_decaying or not is_due:
            return progress
        wait()
        step, time_s = self.timed_from
        step_s = (time.monotonic() - time_s) / (progress.step - step)
        left_s = self.limits.total_s - self.elapsed_s - self._run_s() - RESERVED_S
        num_steps = progress.step + max(1, int(_PLANNED_RATIO * left_s / step_s))
        decay_from = progress.decay_from
        if progress.step != decay_from:
            decay_from = max(progress.step + 1, int(num_steps * (1 - DECAY_RATIO)))
        return replace(progress, num_steps=num_steps, decay_from=decay_from)

    def is_complete(self, progress: Progress) -> bool:
        """Whether the last step is done, or no time is left in which another run could do it."""
        is_last = progress.num_steps is not None and progress.step >= progress.num_steps
        return is_last or self.elapsed_s + self._run_s() > self.limits.total_s - RESERVED_S

    def is_over(self, progress: Progress) -> bool:
        """Whether this run must end although steps are left."""
        num_done = progress.step - self.first_step
        is_enough = self.limits.stop_after is not None and num_done >= self.limits.stop_after
        return is_enough or self._run_s() > self.limits.run_s - RESERVED_S

    def _run_s(self) -> float:
        return time.monotonic() - self.limits.started_s


class Log:
    """Appends one JSON object a line to a file, and shows it on stderr."""

    def __init__(self, path: Path, progress: Progress, limits: Limits):
        self.path = path
        self.progress = progress
        self.limits = limits
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # What came after the state that is resumed will happen again.
        kept = [line for line in lines if json.loads(line)["step"] <= progress.step]
        write_text(path, "".join(line + "\n" for line in kept if progress.step))

    def __call__(self, kind: str, **fields: Any) -> None:
        """Writes one line; the time is that of all runs."""
        elapsed_s = self.clocked(self.progress).elapsed_s
        line = json.dumps(to_plain({"kind": kind, "elapsed_s": elapsed_s, **fields}))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, file=sys.stderr, flush=True)

    def clocked(self, progress: Progress) -> Progress:
        """Progress with the time of this run added to that of earlier ones."""
        run_s = time.monotonic() - self.limits.started_s
        return replace(progress, elapsed_s=self.progress.elapsed_s + run_s)


def watch_for_termination() -> Callable[[], bool]:
    """Whether the process was asked to end; its checkpoint is written first."""
    asked = []
    with contextlib.suppress(ValueError):  # Only the main thread may ask for signals.
        signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    return lambda: bool(asked)


def open_state(
    path: Path, config: QwenMoeConfig, seed: int, identity: str, is_resumed: bool
) -> tuple[TrainState, Progress]:
    """A fresh state, or that of an earlier run."""
    if path.exists() != is_resumed:
        raise UsageError(
            f"{path} {'is there already' if path.exists() else 'is not there'}",
            "Go on with --resume, begin anew in another --out or without --resume.",
        )
    key = jax.random.key(seed)
    if not is_resumed:
        return jax.jit(init_state, static_argnums=0)(config, key), Progress()
    names, treedef = _named_leaves(jax.eval_shape(lambda key: init_state(config, key), key))
    try:
        with safe_open(path, "numpy") as file:
            meta = file.metadata()
            if meta["identity"] != identity:
                raise BadFileError(
                    f"{path} is of a training with other settings: {meta['identity']}",
                    "Resume with the same configuration, corpus and options.",
                )
            leaves = [jnp.asarray(file.get_tensor(name)) for name in names]
            progress = Progress(**json.loads(meta["progress"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadFileError(f"{path} is damaged: {error}", "Begin anew in another --out.") from error
    return jax.tree.unflatten(treedef, leaves), progress


def save_state(path: Path, state: TrainState, progress: Progress, identity: str) -> None:
    """Writes everything a later run needs; a crash leaves the state before it."""
    names, _ = _named_leaves(state)
    arrays = [np.asarray(leaf) for leaf in jax.device_get(jax.tree.leaves(state))]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    meta = {"identity": identity, "progress": json.dumps(to_plain(progress))}
    save_file(dict(zip(names, arrays, strict=True)), scratch, meta)
    os.replace(scratch, path)


def _named_leaves(state: Any) -> tuple[list[str], Any]:
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    return [jax.tree_util.keystr(path) for path, _ in paths], treedef
