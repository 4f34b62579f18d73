"""Checks a checkpoint, and the port that runs it, against logits that others published.

    python scripts/check_known_answer.py --model Qwen/Qwen1.5-MoE-A2.7B
    python scripts/check_known_answer.py --model tiny-moe -o json
    python scripts/check_known_answer.py --model tiny-moe --write

For eight tokens it compares the mean of the logits at every position, and the first thirty logits
of the first one, with the answer stored in tests/golden/qwen_moe/. A number agrees if it is off by
at most tolerance * (1 + |expected|). Exit code 0: all agree; 1: some do not; otherwise the check
could not be made. Sums are float32 whatever the type of the weights, as they were for the
published numbers.

`--write` stores a new answer, computed by the reference implementation (the extra `parity`).
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from moejax.errors import MoejaxError, UsageError
from moejax.qwen_moe import QwenMoe, QwenMoeConfig, read_config
from moejax.qwen_moe.params import load, open_checkpoint
from moejax.results import read_json, to_plain, write_text

ANSWERS = Path(__file__).resolve().parents[1] / "tests" / "golden" / "qwen_moe"
SCHEMA = "moejax.known-answer/1"
NUM_FIRST_LOGITS = 30
# Our own answers are compared on weights and sums that differ in nothing but their order.
OWN_TOLERANCE = 1e-4
OWN_PROMPT = b"To be or"
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


class Row(NamedTuple):
    """One number beside what it should be."""

    name: str
    expected: float
    found: float
    limit: float

    @property
    def agrees(self) -> bool:
        """Whether the number is close enough; NaN is not."""
        return abs(self.found - self.expected) <= self.limit


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the check and returns the exit code."""
    options = parse_options(argv)
    try:
        checkpoint = open_checkpoint(options.model)
        config = read_config(checkpoint.config, str(checkpoint.path))
        if options.write:
            path = ANSWERS / f"{checkpoint.path.resolve().name.lower()}.json"
            write_text(path, format_answer(ask_reference(checkpoint.path, config)))
            print(f"wrote {path}", file=sys.stderr)
        answer = find_answer(config)
        print(f"loading {checkpoint.path}", file=sys.stderr)
        rows = compare(answer, read_prompt(load(checkpoint), answer["token_ids"]))
    except MoejaxError as error:
        print(f"error: {error.cause}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    is_same = all(row.agrees for row in rows)
    if options.output == "json":
        print(json.dumps(describe(answer, rows), indent=1))
    else:
        print(format_table(answer, rows))
    if not is_same:
        print(
            f"error: {checkpoint.path} does not give the logits of {answer['model']}\n\n"
            "hint: Other weights of the same shape, such as those of a chat model, give others.",
            file=sys.stderr,
        )
    return 0 if is_same else 1


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, metavar="PATH", help="checkpoint folder or name")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument("--write", action="store_true", help="store the reference's answer first")
    return parser.parse_args(argv)


def find_answer(config: QwenMoeConfig) -> dict[str, Any]:
    """The stored answer for a model of these sizes.

    Raises:
      UsageError: There is none.
    """
    answers = [read_json(path) for path in sorted(ANSWERS.glob("*.json"))]
    for answer in answers:
        if answer["sizes"] == sizes_of(config):
            return answer
    raise UsageError(
        f"no known answer for a model of {config.num_hidden_layers} layers, {config.num_experts} "
        f"experts and width {config.hidden_size}",
        f"Known: {', '.join(answer['model'] for answer in answers)}. Store one with --write.",
    )


def sizes_of(config: QwenMoeConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in SIZES}


def read_prompt(model: QwenMoe, token_ids: Sequence[int]) -> Float[np.ndarray, "tokens vocab"]:
    """Logits after every token, computed in float32.

    Activations have the type of the embedding, and products that of the wider factor: to widen
    the embedding is enough, and the other weights stay as small as they are.
    """
    model.embed_tokens.weight = nnx.Param(model.embed_tokens.weight[...].astype(jnp.float32))
    positions = jnp.arange(len(token_ids))[None]
    with jax.default_matmul_precision("highest"):
        logits, _, _ = model(jnp.asarray(token_ids)[None], positions)
    return np.asarray(logits[0])


def ask_reference(folder: Path, config: QwenMoeConfig) -> dict[str, Any]:
    """What the reference implementation answers, as it is stored.

    Raises:
      UsageError: The reference is not installed.
    """
    try:
        torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed", "Install moejax[parity].") from error
    model = transformers.Qwen2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids = list(OWN_PROMPT)
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0].numpy()
    return {
        "schema": SCHEMA,
        "model": folder.resolve().name,
        "source": f"transformers {transformers.__version__} and torch {torch.__version__}, float32",
        "note": "Written by scripts/check_known_answer.py --write; the prompt is in bytes.",
        "sizes": sizes_of(config),
        "token_ids": token_ids,
        "mean_logits": [round(float(mean), 6) for mean in logits.mean(-1)],
        "first_logits": [round(float(logit), 6) for logit in logits[0, :NUM_FIRST_LOGITS]],
        "tolerance": OWN_TOLERANCE,
    }


def compare(answer: dict[str, Any], logits: Float[np.ndarray, "tokens vocab"]) -> list[Row]:
    """Every stored number beside the computed one: means first, then the first logits."""
    named = [
        (f"mean at {position} (token {token})", expected, logits[position].mean())
        for position, (token, expected) in enumerate(
            zip(answer["token_ids"], answer["mean_logits"], strict=True)
        )
    ]
    named += [
        (f"logit {token} at 0", expected, logits[0, token])
        for token, expected in enumerate(answer["first_logits"])
    ]
    return [
        Row(name, expected, float(found), answer["tolerance"] * (1.0 + abs(expected)))
        for name, expected, found in named
    ]


def describe(answer: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """The outcome as it is printed with `-o json`."""
    return {
        "model": answer["model"],
        "source": answer["source"],
        "tolerance": answer["tolerance"],
        "agrees": all(row.agrees for row in rows),
        "rows": [to_plain({**row._asdict(), "agrees": row.agrees}) for row in rows],
    }


def format_table(answer: dict[str, Any], rows: list[Row]) -> str:
    lines = [f"{answer['model']}, as published in {answer['source']}", ""]
    lines += [f"{'':24}{'expected':>10}{'found':>12}{'off by':>10}{'limit':>9}"]
    lines += [
        f"{row.name:24}{row.expected:10.4f}{row.found:12.5f}{abs(row.found - row.expected):10.1e}"
        f"{row.limit:9.0e}  {'ok' if row.agrees else 'DIFFERS'}"
        for row in rows
    ]
    num_agreeing = sum(row.agrees for row in rows)
    return "\n".join([*lines, "", f"{num_agreeing} of {len(rows)} numbers agree"])


def format_answer(answer: dict[str, Any]) -> str:
    """One field a line, as the other answer files are written."""
    fields = (f' "{name}": {json.dumps(value)}' for name, value in answer.items())
    return "{\n" + ",\n".join(fields) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
