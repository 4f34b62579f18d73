"""Recording routing: many prompts, batch by batch, into one trace; an interrupted run goes on."""

import hashlib
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.errors import UsageError
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
) -> Trace:
    """Lets the model continue every prompt and writes where its router sent the tokens.

    After each batch its part of the trace goes to the folder `OUT.parts`. A call with the same
    arguments goes on behind the last part, and in the end gives the same file, byte for byte, as
    one that was not interrupted. The folder is removed when the trace is written.

    A request's tokens are its prompt (phase 0) and its new tokens but the last (phase 1), which
    is never read and so never routed. Its text does not depend on the size of the batch, as far
    as rounding leaves the choice of the same token.

    Args:
      engine: The model.
      prompts: Token ids of each request; requests of the trace are in this order.
      max_new_tokens: Tokens after which a text ends.
      out: Trace file to write.
      batch_size: Requests that are served at once.
      sampling: How the next token is chosen.
      seed: Seed of all draws.
      stop_token_ids: Tokens that end a text.
      lookahead: How far to ask the next layers' gates; see `default_lookahead`.
      model_name: What the trace calls the model.
      source: Where the recording comes from.
      licence: Licence of the recording.
      on_progress: Told the number of requests done, at the start and after each batch.

    Returns:
      The trace that was written.

    Raises:
      UsageError: An argument is out of range, the parts are of a recording with other settings,
        or nothing can be written there.
      BadFileError: A part was damaged.
    """
    if batch_size < 1:
        raise UsageError(f"a batch of {batch_size} requests is empty", "Use 1 or more.")
    # Everything is checked before there is anything on disk that a corrected call would not fit.
    arrays = check_prompts(engine.config, prompts, max_new_tokens)
    check_seed(seed)
    check_recording(engine.config, lookahead)
    folder = _open_parts(
        Path(out),
        {
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
        },
    )
    starts = range(0, len(arrays), batch_size)
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


def _open_parts(out: Path, settings: dict[str, Any]) -> Path:
    """The folder of the parts, new or with those of an interrupted run with the same settings."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder", "Name a file for the trace.")
    folder = out.with_name(f"{out.name}.parts")
    path = folder / _SETTINGS
    settings = to_plain(settings)
    if path.exists():
        before = read_json(path)
        if before == settings:
            return folder
        has_parts = any(folder.glob(_PATTERN))
    else:
        before, has_parts = {}, folder.exists() and any(folder.iterdir())
    if has_parts:
        changed = [name for name in settings if before.get(name) != settings[name]]
        raise UsageError(
            f"{folder} holds parts of another recording: other {', '.join(changed)}",
            f"Delete {folder} to begin anew, or give another --out.",
        )
    write_json(path, settings)
    return folder


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
