"""Recording routing: many prompts, batch by batch, into one trace; an interrupted run goes on."""

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.errors import BadFileError, UsageError
from moejax.qwen_moe import Lookahead, QwenMoeConfig
from moejax.results import read_json, to_plain, write_json
from moejax.trace import Trace, load_trace, save_trace

from ._check import check_prompts, check_recording, check_seed
from ._engine import Engine
from ._generate import RequestRouting
from ._sampling import GREEDY, Sampling

Progress = Callable[[int, int, str], None]
"""Called as `progress(num_done, num_all, label)`."""

_SETTINGS = "settings.json"
_LOCK = "lock"
_PATTERN = "*.safetensors"
_DEPTH = 3


def record(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    out: str | Path,
    batch_size: int = 1,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_token_ids: Collection[int] = (),
    lookahead: Lookahead | None = None,
    model_name: str = "",
    source: str = "",
    licence: str = "",
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Trace:
    """Lets the model continue every prompt and writes where its router sent the tokens.

    After each batch its part of the trace goes to the folder `OUT.parts`. A call with the same
    arguments goes on behind the last part, and in the end gives the same file, byte for byte, as
    one that was not interrupted; a part that is damaged or gone is recorded again. The folder is
    removed when the trace is written, and until then no other run can use it.

    A request's tokens are its prompt (phase 0) and its new tokens but the last (phase 1), which
    is never read and so never routed. Its text does not depend on the size of the batch, as far
    as rounding leaves the choice of the same token.

    Args:
      engine: The model.
      prompts: Token ids of each request; requests of the trace are in this order.
      max_new_tokens: Tokens after which a text ends.
      out: Trace file to write; an older one is replaced.
      batch_size: Requests that are served at once.
      sampling: How the next token is chosen.
      seed: Seed of all draws.
      stop_token_ids: Tokens that end a text.
      lookahead: How far to ask the next layers' gates; see `default_lookahead`.
      model_name: What the trace calls the model.
      source: Where the recording comes from.
      licence: Licence of the recording.
      on_progress: Told the number of requests done, at the start and after each batch.
      on_note: Told of each part that has to be recorded again.

    Returns:
      The trace that was written.

    Raises:
      UsageError: An argument is out of range, `OUT.parts` is not ours, in use or of a recording
        with other settings, or nothing can be written there.
    """
    if batch_size < 1:
        raise UsageError(f"a batch of {batch_size} requests is empty", "Use 1 or more.")
    # Everything is checked before there is anything on disk that a corrected call would not fit.
    arrays = check_prompts(engine.config, prompts, max_new_tokens)
    check_seed(seed)
    check_recording(engine.config, lookahead)
    settings = {
        "weights": engine.fingerprint(),
        "prompts": _digest(arrays),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "sampling": sampling,
        "seed": seed,
        "stop_token_ids": sorted(stop_token_ids),
        "lookahead": lookahead,
        "model_name": model_name,
        "source": source,
        "licence": licence,
    }
    starts = range(0, len(arrays), batch_size)
    with _open_parts(Path(out), settings) as folder:
        _drop_damaged(folder, starts, on_note)
        for start in starts:
            if on_progress is not None:
                on_progress(start, len(arrays), "")
            part = _part(folder, start)
            if part.exists():
                continue
            generation = engine.generate(
                prompts[start : start + batch_size],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=seed,
                stop_token_ids=stop_token_ids,
                record=True,
                lookahead=lookahead,
                first_request=start,
            )
            save_trace(_one_trace(engine.config, generation.finish().routing), part)
        parts = [load_trace(_part(folder, start)) for start in starts]
        trace = _merge(parts, model=model_name, source=source, licence=licence)
        save_trace(trace, out)
        shutil.rmtree(folder)
    if on_progress is not None:
        on_progress(len(arrays), len(arrays), "")
    return trace


def default_lookahead(config: QwenMoeConfig, depth: int = _DEPTH) -> Lookahead | None:
    """Twice as many experts as a token gets, up to three layers ahead; None for a single layer."""
    depth = min(depth, len(config.moe_layers) - 1)
    if depth < 1:
        return None
    return Lookahead(depth, min(config.num_experts, 2 * config.num_experts_per_tok))


@contextmanager
def _open_parts(out: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """The folder of the parts, new or of an interrupted run with the same settings, locked."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder", "Name a file for the trace.")
    folder = out.with_name(f"{out.name}.parts")
    settings = to_plain(settings)
    _check_ours(folder, settings)
    with _lock(folder, out):
        path = folder / _SETTINGS
        before = read_json(path) if path.exists() else settings
        changed = [name for name in settings if before[name] != settings[name]]
        if changed and any(folder.glob(_PATTERN)):
            raise UsageError(
                f"{folder} holds parts of another recording: other {', '.join(changed)}",
                f"Delete {folder} to begin anew, or give another --out.",
            )
        write_json(path, settings)
        yield folder


def _check_ours(folder: Path, settings: dict[str, Any]) -> None:
    """Refuses a place that no recording has made: nothing in it may be lost."""
    try:
        if not folder.exists() or _is_ours(folder, settings):
            return
    except (OSError, BadFileError):
        pass  # What cannot be read was not left by a recording either.
    raise UsageError(
        f"{folder} is there already and was not made by a recording",
        "Give another --out: parts of the trace go to the folder OUT.parts beside it.",
    )


def _is_ours(folder: Path, settings: dict[str, Any]) -> bool:
    path = folder / _SETTINGS
    if path.exists():
        before = read_json(path)
        return isinstance(before, dict) and set(before) == set(settings)
    # A run that is just beginning, or was cut off there, has no more than its lock.
    return all(entry.name == _LOCK for entry in folder.iterdir())


@contextmanager
def _lock(folder: Path, out: Path) -> Iterator[None]:
    """Keeps other runs out of the folder; the lock of a run that was killed is taken over."""
    path = folder / _LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _write_lock(path)
        except FileExistsError:
            owner = _running_owner(path)
            if owner is not None:
                raise UsageError(
                    f"another run, process {owner}, is writing {out}",
                    "Wait until it has ended, or give another --out. If that process is no "
                    f"moejax, remove {path}.",
                ) from None
            path.unlink(missing_ok=True)
            _write_lock(path)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror or error}",
            "Give an --out in a folder that you may write to, on a disk with room.",
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _write_lock(path: Path) -> None:
    with open(path, "x", encoding="ascii") as file:
        file.write(str(os.getpid()))


def _running_owner(path: Path) -> int | None:
    """The process that holds a lock, if it is still there."""
    try:
        owner = int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    # Our own number is left over from a process that had it before us, as in a container.
    return owner if owner != os.getpid() and _is_running(owner) else None


def _is_running(process: int) -> bool:
    if process <= 0:
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _drop_damaged(
    folder: Path, starts: Sequence[int], on_note: Callable[[str], None] | None
) -> None:
    """Removes parts that cannot be read before hours are spent on those behind them."""
    parts = [_part(folder, start) for start in starts]
    num_begun = max((number for number, part in enumerate(parts, 1) if part.exists()), default=0)
    for part in parts[:num_begun]:
        try:
            load_trace(part)
        except BadFileError as error:
            part.unlink(missing_ok=True)
            if on_note is not None:
                on_note(f"recording again: {error.cause}")


def _part(folder: Path, start: int) -> Path:
    return folder / f"{start:08}.safetensors"


def _digest(prompts: Sequence[np.ndarray]) -> str:
    return hashlib.sha256(repr([prompt.tolist() for prompt in prompts]).encode()).hexdigest()


def _one_trace(config: QwenMoeConfig, routing: Sequence[RequestRouting]) -> Trace:
    """The trace of one batch."""

    def join(name: str) -> np.ndarray:
        return np.concatenate([getattr(request, name) for request in routing])

    sizes = [request.token_ids.size for request in routing]
    expert_bytes = 3 * config.hidden_size * config.moe_intermediate_size
    expert_bytes *= jnp.dtype(config.dtype).itemsize
    return Trace(
        experts=join("experts"),
        num_experts=config.num_experts,
        request_start=np.cumsum([0, *sizes], dtype=np.int64),
        phase=join("phase"),
        routing_weights=join("routing_weights").astype(np.float16),
        token_ids=join("token_ids"),
        lookahead=None if routing[0].lookahead is None else join("lookahead"),
        expert_bytes=np.full(len(config.moe_layers), expert_bytes, np.int64),
        is_router_order=True,
    )


def _merge(parts: Sequence[Trace], *, model: str, source: str, licence: str) -> Trace:
    """The requests of all parts, one after another."""
    per_token = ("experts", "phase", "routing_weights", "token_ids", "lookahead")
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in per_token
        if getattr(parts[0], name) is not None
    }
    sizes = np.concatenate([np.diff(part.request_start) for part in parts])
    return replace(
        parts[0],
        **joined,
        request_start=np.cumsum([0, *sizes], dtype=np.int64),
        model=model,
        source=source,
        licence=licence,
        sha256="",
    )
