"""Records decode routing of the trained small-moe over the domains of its corpus.

    python scripts/record_small_moe.py --model runs/small/model --corpus .corpus --out runs/record

OUT gets small-moe.safetensors (generated tokens only, domain after domain), statistics.json and
samples.json. A recording that was interrupted goes on.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from train_model import heldout_losses
from training_data import END_OF_TEXT, open_corpus
from training_step import choose_attention, from_model, make_evaluation

from moejax.engine import Engine, Sampling, record
from moejax.errors import BadFileError, MoejaxError
from moejax.qwen_moe import Lookahead
from moejax.qwen_moe.params import load
from moejax.qwen_moe.tokenizer import Tokenizer, open_tokenizer
from moejax.results import capture_environment, to_plain, write_json
from moejax.trace import Trace, load_trace, save_trace, select_requests, statistics

NAME = "small-moe"
SOURCE = (
    "moejax's own small-moe, trained from scratch on public Debian and npm text; "
    "texts sampled at temperature 0.8"
)
LICENCE = "Apache-2.0"
LOOKAHEAD = Lookahead(depth=3, width=6)
SAMPLING = Sampling(temperature=0.8)
MAX_PROMPT_TOKENS = 100
MAX_TRACE_BYTES = 8_000_000
PINNED_RATIOS = (0.25, 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description="Records the routing of small-moe.")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of build_corpus.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-new-tokens", type=int, default=161)
    parser.add_argument("--batch-size", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        record_domains(options)
    except MoejaxError as error:
        print(f"error: {error}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


def record_domains(options: argparse.Namespace) -> None:
    """Does everything the command line asks for."""
    model = load(options.model, dtype=jnp.bfloat16)
    tokenizer = open_tokenizer(options.model)
    prompts = read_prompts(options.corpus / "prompts.jsonl", tokenizer)
    whole = record(
        Engine(model),
        [ids for texts in prompts.values() for ids in texts],
        max_new_tokens=options.max_new_tokens,
        out=options.out / "with-prompts.safetensors",
        batch_size=options.batch_size,
        sampling=SAMPLING,
        seed=options.seed,
        stop_token_ids=(END_OF_TEXT,),
        lookahead=LOOKAHEAD,
        model_name=NAME,
        source=SOURCE,
        licence=LICENCE,
        on_progress=lambda done, total, _: print(f"{done}/{total} requests", file=sys.stderr),
    )
    counts = {domain: len(texts) for domain, texts in prompts.items()}
    write_json(options.out / "samples.json", read_samples(whole, counts, tokenizer))
    decoded, counts = fit(keep_decode(whole), counts, MAX_TRACE_BYTES)
    path = options.out / f"{NAME}.safetensors"
    save_trace(decoded, path)
    corpus = open_corpus(options.corpus, is_bytes=False)
    length = model.config.max_position_embeddings
    attention, _ = choose_attention(model.config, length)
    evaluate = make_evaluation(model.config, attention=attention)
    found = {
        "schema": "moejax.small-moe/1",
        "environment": capture_environment(options.seed),
        "trace": {
            "num_bytes": path.stat().st_size,
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
    write_json(options.out / "statistics.json", found)
    shown = {name: found[name] for name in ("trace", "heldout", "domains", "lookahead_recall")}
    print(json.dumps(to_plain(shown), indent=1))


def read_prompts(path: Path, tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    """Token ids of the prompts by domain, cut to the same greatest length."""
    prompts: dict[str, list[list[int]]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            ids = tokenizer.encode(fields["prompt"])[:MAX_PROMPT_TOKENS]
            prompts.setdefault(fields["domain"], []).append(ids)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFileError(
            f"{path}: {error}", "Build the corpus with scripts/build_corpus.py."
        ) from error
    return prompts


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
    """The generated tokens alone, without the router's weights."""
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
