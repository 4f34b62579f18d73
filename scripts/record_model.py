"""Records decode routing of a trained small model over the domains of its corpus.

    python scripts/record_model.py --config small-moe --model runs/small/model --corpus .corpus \
        --out runs/small-record
    python scripts/record_model.py --config tiny-moe --model models/tiny-moe --corpus .corpus \
        --out runs/tiny-record

OUT gets the trace, named like the model (generated tokens only, domain after domain),
statistics.json and samples.json. A recording that was interrupted goes on.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from train_model import RECIPES, heldout_losses
from training_data import END_OF_TEXT, open_corpus
from training_step import choose_attention, from_model, make_evaluation

from moejax.engine import Engine, Sampling, record
from moejax.errors import BadFileError, MoejaxError
from moejax.qwen_moe import Lookahead
from moejax.qwen_moe.params import load
from moejax.qwen_moe.tokenizer import Tokenizer, open_tokenizer
from moejax.results import capture_environment, to_plain, write_json
from moejax.trace import Trace, load_trace, save_trace, select_requests, statistics

SOURCE = (
    "moejax's own {name}, trained from scratch on public Debian and npm text; "
    "texts sampled at temperature {temperature:g}"
)
LICENCE = "Apache-2.0"
SAMPLING = Sampling(temperature=0.8)
PINNED_RATIOS = (0.25, 0.5)


@dataclass(frozen=True)
class Recording:
    """How much of one model is recorded.

    Attributes:
      lookahead: What the next layers' gates are asked: half as much again as a token's experts,
        or twice.
      max_prompt_tokens: Where prompts are cut.
      max_new_tokens: Where texts end.
      prompts_per_domain: The first so many of them; None for all.
      batch_size: Requests that are served at once.
      max_trace_bytes: Requests are dropped, evenly over the domains, until the trace has no more.
    """

    lookahead: Lookahead
    max_prompt_tokens: int
    max_new_tokens: int
    prompts_per_domain: int | None
    batch_size: int
    max_trace_bytes: int


RECORDINGS = {
    "tiny-moe": Recording(Lookahead(depth=3, width=4), 200, 251, 5, 10, 1_500_000),
    "small-moe": Recording(Lookahead(depth=3, width=6), 100, 161, None, 60, 8_000_000),
}


def main() -> int:
    """Records as the command line says; 0 when the trace is written."""
    parser = argparse.ArgumentParser(description="Records the routing of a small model.")
    parser.add_argument("--config", required=True, choices=sorted(RECORDINGS))
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of build_corpus.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    changes = {name: getattr(options, name) for name in ("max_new_tokens", "batch_size")}
    recording = replace(
        RECORDINGS[options.config],
        **{name: value for name, value in changes.items() if value is not None},
    )
    try:
        found = record_domains(
            options.config, recording, options.model, options.corpus, options.out, options.seed
        )
    except MoejaxError as error:
        print(f"error: {error}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    shown = {name: found[name] for name in ("trace", "heldout", "domains", "lookahead_recall")}
    print(json.dumps(to_plain(shown), indent=1))
    return 0


def record_domains(
    name: str, recording: Recording, checkpoint: Path, corpus_folder: Path, out: Path, seed: int
) -> dict[str, Any]:
    """Records a model and describes it; writes everything to `out`.

    Raises:
      BadFileError: The checkpoint or the corpus is damaged, or one text a domain is too much.
      UsageError: The recording was begun with other settings.
    """
    model = load(checkpoint, dtype=jnp.bfloat16)
    tokenizer = open_tokenizer(checkpoint)
    prompts = read_prompts(corpus_folder / "prompts.jsonl", tokenizer, recording)
    whole = record(
        Engine(model),
        [ids for texts in prompts.values() for ids in texts],
        max_new_tokens=recording.max_new_tokens,
        out=out / "with-prompts.safetensors",
        batch_size=recording.batch_size,
        sampling=SAMPLING,
        seed=seed,
        stop_token_ids=(END_OF_TEXT,),
        lookahead=recording.lookahead,
        model_name=name,
        source=SOURCE.format(name=name, temperature=SAMPLING.temperature),
        licence=LICENCE,
        on_progress=lambda done, total, _: print(f"{done}/{total} requests", file=sys.stderr),
    )
    counts = {domain: len(texts) for domain, texts in prompts.items()}
    write_json(out / "samples.json", read_samples(whole, counts, tokenizer))
    decoded, counts = fit(keep_decode(whole), counts, recording.max_trace_bytes)
    path = out / f"{name}.safetensors"
    save_trace(decoded, path)
    corpus = open_corpus(corpus_folder, is_bytes=RECIPES[name].is_bytes)
    length = model.config.max_position_embeddings
    attention, _ = choose_attention(model.config, length)
    evaluate = make_evaluation(model.config, attention=attention)
    found = {
        "schema": "moejax.recording/1",
        "environment": capture_environment(seed),
        "trace": {
            "sha256": decoded.sha256,
            "num_tokens": decoded.num_tokens,
            "num_requests": counts,
            "temperature": SAMPLING.temperature,
        },
        "heldout": heldout_losses(evaluate, from_model(model), corpus, length),
        "statistics": statistics(decoded),
        "domains": describe_domains(load_trace(path), counts),
        "lookahead_recall": lookahead_recall(decoded),
    }
    write_json(out / "statistics.json", found)
    return found


def read_prompts(
    path: Path, tokenizer: Tokenizer, recording: Recording
) -> dict[str, list[list[int]]]:
    """Token ids of the prompts by domain, cut to the same greatest length."""
    prompts: dict[str, list[list[int]]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            ids = tokenizer.encode(fields["prompt"])[: recording.max_prompt_tokens]
            prompts.setdefault(fields["domain"], []).append(ids)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFileError(
            f"{path}: {error}", "Build the corpus with scripts/build_corpus.py."
        ) from error
    return {domain: ids[: recording.prompts_per_domain] for domain, ids in prompts.items()}


def read_samples(
    trace: Trace, counts: dict[str, int], tokenizer: Tokenizer
) -> dict[str, dict[str, str]]:
    """The first text of each domain: what the model was given and what it went on with."""
    assert trace.token_ids is not None
    assert trace.phase is not None
    samples = {}
    first = 0
    for domain, count in counts.items():
        text = slice(*trace.request_start[first : first + 2])
        ids, is_new = trace.token_ids[text], trace.phase[text] == 1
        samples[domain] = {
            "prompt": tokenizer.decode(ids[~is_new].tolist()),
            "text": tokenizer.decode(ids[is_new].tolist()),
        }
        first += count
    return samples


def keep_decode(trace: Trace) -> Trace:
    """The generated tokens alone, without the router's weights.

    Sizes of experts are left to the model's card, so that another model of the same shape may be
    put in its place.
    """
    assert trace.token_ids is not None
    assert trace.phase is not None
    assert trace.lookahead is not None
    kept = np.flatnonzero(trace.phase == 1)
    return replace(
        trace,
        experts=trace.experts[kept],
        request_start=np.searchsorted(kept, trace.request_start).astype(np.int64),
        phase=trace.phase[kept],
        routing_weights=None,
        expert_bytes=None,
        token_ids=trace.token_ids[kept],
        lookahead=trace.lookahead[kept],
        sha256="",
    )


def fit(trace: Trace, counts: dict[str, int], max_bytes: int) -> tuple[Trace, dict[str, int]]:
    """As many requests of every domain as stay within a size, and how many those are."""
    first = np.cumsum([0, *counts.values()])
    for most in range(max(counts.values()), 0, -1):
        kept = {domain: min(most, count) for domain, count in counts.items()}
        chosen = [
            start + request
            for start, count in zip(first, kept.values(), strict=False)
            for request in range(count)
        ]
        part = select_requests(trace, chosen)
        arrays = (part.experts, part.lookahead, part.token_ids, part.phase, part.request_start)
        # The header and the bytes of the experts take a few kilobytes at most.
        if sum(array.nbytes for array in arrays if array is not None) <= max_bytes - 2**14:
            return part, kept
    raise BadFileError(f"one request a domain exceeds {max_bytes} bytes", "Record shorter texts.")


def describe_domains(trace: Trace, counts: dict[str, int]) -> dict[str, Any]:
    """How much the routing depends on what the text is about.

    Every domain's requests are halved, every other one to one half. Distances are total variation
    between expert frequencies, mean of layers: between halves of one domain, which is what chance
    leaves, and between halves of two. A pinned profile keeps the most frequent experts of one
    half and is tried on the other half of the same domain and on those of other domains.
    """
    halves = []
    first = 0
    for count in counts.values():
        requests = first + np.arange(count)
        halves.append([select_requests(trace, requests[part::2]) for part in range(2)])
        first += count
    frequency = np.array([[expert_frequency(half) for half in pair] for pair in halves])
    is_same = np.eye(len(halves), dtype=bool)
    distance = 0.5 * np.abs(frequency[:, None, 0] - frequency[None, :, 1]).sum(-1).mean(-1)
    found: dict[str, Any] = {
        "within_domain_distance": distance[is_same].mean(),
        "between_domains_distance": distance[~is_same].mean(),
        "distance": {
            one: dict(zip(counts, row, strict=True))
            for one, row in zip(counts, distance.tolist(), strict=True)
        },
    }
    for ratio in PINNED_RATIOS:
        hits = _pinned_hits(frequency[:, 0], frequency[:, 1], round(ratio * trace.num_experts))
        found[f"pinned_{ratio:g}"] = {
            "same_domain_hit_ratio": hits[is_same].mean(),
            "other_domain_hit_ratio": hits[~is_same].mean(),
            "chance_ratio": ratio,
        }
    return found


def expert_frequency(trace: Trace) -> Float[np.ndarray, "layers experts"]:
    """Share of a layer's demands that each expert has."""
    return np.array(
        [
            np.bincount(trace.experts[:, layer].reshape(-1), minlength=trace.num_experts)
            / trace.experts[:, layer].size
            for layer in range(trace.num_layers)
        ]
    )


def lookahead_recall(trace: Trace) -> dict[str, dict[str, float]]:
    """Share of a layer's experts that its gate named from the stream some layers before."""
    assert trace.lookahead is not None
    depth, width = trace.lookahead.shape[2:]
    found = {}
    for ahead in range(1, depth + 1):
        demanded = trace.experts[:, ahead:]
        named = trace.lookahead[:, : trace.num_layers - ahead, ahead - 1]
        is_named = (demanded[..., :, None] == named[..., None, :]).any(-1)
        is_named_best = (demanded[..., :, None] == named[..., None, : trace.topk]).any(-1)
        found[str(ahead)] = {
            f"best_{trace.topk}": float(is_named_best.mean()),
            f"best_{width}": float(is_named.mean()),
        }
    return found


def _pinned_hits(
    profile: Float[np.ndarray, "domains layers experts"],
    test: Float[np.ndarray, "domains layers experts"],
    num_pinned: int,
) -> Float[np.ndarray, "domains domains"]:
    """Hit ratio of each profile (row) on each test (column), mean of layers."""
    pinned: Int[np.ndarray, "domains layers pinned"] = np.argsort(-profile, axis=-1, kind="stable")
    pinned = pinned[..., :num_pinned]
    rows: Sequence[Any] = [
        [np.take_along_axis(on, kept, axis=-1).sum(-1).mean() for on in test] for kept in pinned
    ]
    return np.array(rows)


if __name__ == "__main__":
    sys.exit(main())
