"""Trains tiny-moe or small-moe on a corpus made by build_corpus.py.

    python scripts/train_model.py --config tiny-moe --corpus .corpus --out runs/tiny --minutes 4.5
    python scripts/train_model.py --config small-moe --corpus .corpus --out runs/small \
        --minutes 8 --total-minutes 14          and later the same again with --resume

The learning rate warms up, stays, and decays over the last fifth of all steps. How many steps
there are follows from the steps per second that are measured after the first ones, and is fixed
when the decay begins. OUT gets log.jsonl, state/ to resume from, and model/, the checkpoint
folder, once the last step is done.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from training_data import (
    END_OF_TEXT,
    END_OF_TEXT_NAME,
    Corpus,
    byte_tokenizer,
    heldout_windows,
    open_corpus,
    window_starts,
)
from training_run import (
    Limits,
    Log,
    Pace,
    Progress,
    open_state,
    save_state,
    watch_for_termination,
)
from training_step import (
    Weights,
    choose_attention,
    make_evaluation,
    make_step,
    to_model,
)

from moejax.cards import models_dir, read_card
from moejax.errors import MoejaxError, UsageError
from moejax.qwen_moe import QwenMoeConfig, read_config
from moejax.qwen_moe.params import save
from moejax.results import capture_environment, to_plain, write_bytes, write_json, write_text

LOG_STEPS = 20
HELDOUT_INTERVAL_S = 180
CHECKPOINT_INTERVAL_S = 120
EVALUATION_WINDOWS = 16


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    The smaller the model, the higher its best learning rate; 2e-3 at width 256 and 3e-3 at 128
    follow from 6e-4 at 768 (GPT-3, table 2.1) by 1 / width, rounded.

    Attributes:
      is_bytes: Whether its tokens are bytes.
      batch_size: Windows of a step.
      sequence_length: Tokens of a window.
      learning_rate: After warm-up.
      warmup_steps: Over which it rises from zero.
      capacity_ratio: Room in an expert's bucket over its mean need.
      initializer_range: Standard deviation of fresh weights: about 0.6 / sqrt(width).
    """

    is_bytes: bool
    batch_size: int
    sequence_length: int
    learning_rate: float
    warmup_steps: int
    capacity_ratio: float
    initializer_range: float


RECIPES = {
    "tiny-moe": Recipe(True, 128, 512, 3e-3, 200, 2.0, 0.05),
    "small-moe": Recipe(False, 128, 512, 2e-3, 200, 1.5, 0.04),
}


def main() -> int:
    """Trains as the command line says; 0 when the training is complete or may be resumed."""
    started_s = time.monotonic()
    parser = argparse.ArgumentParser(description="Trains one of the small models.")
    parser.add_argument("--config", required=True, choices=sorted(RECIPES))
    parser.add_argument("--corpus", type=Path, required=True, help="folder of build_corpus.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="time of this run, all included")
    parser.add_argument(
        "--total-minutes",
        type=float,
        help="of all runs; give the last run more --minutes than are left",
    )
    parser.add_argument("--steps", type=int, help="steps in all, instead of a time")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state")
    parser.add_argument("--batch-size", type=int, help="windows a step")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        limits = _limits(options, started_s)
        changes = {name: getattr(options, name) for name in ("batch_size", "learning_rate")}
        recipe = replace(
            RECIPES[options.config], **{k: v for k, v in changes.items() if v is not None}
        )
        config = read_training_config(models_dir() / f"{options.config}.toml", recipe)
        corpus = open_corpus(options.corpus, is_bytes=recipe.is_bytes)
        is_complete = train(
            config,
            recipe,
            corpus,
            options.out,
            limits,
            seed=options.seed,
            is_resumed=options.resume,
        )
        if is_complete:
            write_tokenizer(options.out / "model", recipe, options.corpus / "tokenizer.json")
    except MoejaxError as error:
        print(f"error: {error}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


def read_training_config(card: Path, recipe: Recipe) -> QwenMoeConfig:
    """The model of a card, with what only training decides."""
    return read_config(
        {
            **read_card(card)["config"],
            "max_position_embeddings": recipe.sequence_length,
            "initializer_range": recipe.initializer_range,
            "eos_token_id": END_OF_TEXT,
        },
        str(card),
    )


def train(
    config: QwenMoeConfig,
    recipe: Recipe,
    corpus: Corpus,
    out: Path,
    limits: Limits,
    *,
    seed: int = 0,
    is_resumed: bool = False,
) -> bool:
    """Trains until the last step, or until this run must end.

    Returns:
      Whether the training is complete, and OUT/model written; otherwise it may be resumed.

    Raises:
      UsageError: There is a state in OUT and `is_resumed` is not set, or the other way round.
      BadFileError: The state is damaged or of another training.
    """
    if corpus.token_bytes.size > config.vocab_size:
        raise UsageError(
            f"the corpus has {corpus.token_bytes.size} tokens, the model {config.vocab_size}"
        )
    path = out / "state" / "state.safetensors"
    identity = json.dumps(to_plain([config, recipe, seed, corpus.train.size]))
    state, progress = open_state(path, config, seed, identity, is_resumed)
    log = Log(out / "log.jsonl", progress, limits)
    attention, fault = choose_attention(config, recipe.sequence_length)
    step_once = make_step(
        config,
        sequence_length=recipe.sequence_length,
        capacity_ratio=recipe.capacity_ratio,
        attention=attention,
    )
    log(
        "start",
        step=progress.step,
        attention=attention,
        attention_fault=fault,
        num_weights=sum(weight.size for weight in state.weights.values()),
        environment=to_plain(capture_environment(seed)),
        recipe=to_plain(recipe),
    )
    evaluate = make_evaluation(config, attention=attention)

    def heldout() -> dict[str, Any]:
        return heldout_losses(evaluate, state.weights, corpus, recipe.sequence_length)

    tokens = jnp.asarray(corpus.train)
    pace = Pace(limits, progress)
    is_ending = watch_for_termination()
    last_checkpoint_s = last_heldout_s = time.monotonic()
    pending, reported_s, reported_step = [], time.monotonic(), progress.step
    while not pace.is_complete(progress):
        if is_ending() or pace.is_over(progress):
            break
        rate = learning_rate(progress, recipe)
        starts = window_starts(
            corpus.train.size,
            recipe.sequence_length,
            seed=seed,
            first=progress.step * recipe.batch_size,
            count=recipe.batch_size,
        )
        state, metrics = step_once(state, tokens, jnp.asarray(starts), jnp.float32(rate))
        pending.append(metrics)
        progress = replace(progress, step=progress.step + 1)
        progress = pace.plan(progress, lambda metrics=metrics: jax.block_until_ready(metrics))
        if progress.step % LOG_STEPS == 0 or pace.is_complete(progress):
            means = {
                name: float(np.mean(jax.device_get([getattr(one, name) for one in pending])))
                for name in metrics._fields
            }
            now = time.monotonic()
            num_read = (progress.step - reported_step) * recipe.batch_size * recipe.sequence_length
            log(
                "train",
                step=progress.step,
                num_steps=progress.num_steps,
                learning_rate=rate,
                num_tokens=progress.step * recipe.batch_size * recipe.sequence_length,
                tokens_per_s=num_read / (now - reported_s),
                **means,
            )
            pending, reported_s, reported_step = [], now, progress.step
        if time.monotonic() - last_heldout_s > HELDOUT_INTERVAL_S:
            log("heldout", step=progress.step, **heldout())
            last_heldout_s = reported_s = time.monotonic()
        if time.monotonic() - last_checkpoint_s > CHECKPOINT_INTERVAL_S:
            save_state(path, state, log.clocked(progress), identity)
            last_checkpoint_s = reported_s = time.monotonic()
    log("heldout", step=progress.step, **heldout())
    save_state(path, state, log.clocked(progress), identity)
    is_complete = pace.is_complete(progress)
    if is_complete:
        save(to_model(config, state.weights), out / "model")
    log("end", step=progress.step, is_complete=is_complete)
    return is_complete


def learning_rate(progress: Progress, recipe: Recipe) -> float:
    """The rate of the next step: linear warm-up, constant, and a fall with one minus the root.

    Reference:
      Hägele et al., "Scaling laws and compute-optimal training beyond fixed training durations",
      arXiv:2405.18392, section 3.
    """
    rate = recipe.learning_rate * min(1.0, (progress.step + 1) / recipe.warmup_steps)
    if progress.num_steps is None or progress.decay_from is None:
        return rate
    num_decay = max(1, progress.num_steps - progress.decay_from)
    done = (progress.step - progress.decay_from) / num_decay
    return rate * (1 - max(0.0, done) ** 0.5)


def heldout_losses(
    evaluate: Callable[[Weights, jax.Array], jax.Array],
    weights: Weights,
    corpus: Corpus,
    sequence_length: int,
) -> dict[str, Any]:
    """Mean loss in nats a token and bits a byte of every domain, and of all of them together."""
    sums = {}
    for domain, ids in corpus.heldout.items():
        losses = 0.0
        for windows, counts in heldout_windows(ids, sequence_length, EVALUATION_WINDOWS):
            found = evaluate(weights, jnp.asarray(windows))
            losses += float((np.asarray(found, np.float64) * counts).sum())
        sums[domain] = np.array([losses, ids.size - 1, corpus.token_bytes[ids[1:]].sum()])
    sums["all"] = np.sum(list(sums.values()), axis=0)
    return {
        "loss": {name: losses / tokens for name, (losses, tokens, _) in sums.items()},
        "bits_per_byte": {
            name: losses / np.log(2) / size for name, (losses, _, size) in sums.items()
        },
    }


def write_tokenizer(folder: Path, recipe: Recipe, corpus_tokenizer: Path) -> None:
    """Completes a checkpoint folder with its tokenizer and the token that ends a text."""
    if recipe.is_bytes:
        write_text(folder / "tokenizer.json", byte_tokenizer().to_str(pretty=True) + "\n")
    else:
        write_bytes(folder / "tokenizer.json", corpus_tokenizer.read_bytes())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT_NAME,
        "clean_up_tokenization_spaces": False,
        "model_max_length": recipe.sequence_length,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", {"eos_token_id": END_OF_TEXT})


def _limits(options: argparse.Namespace, started_s: float) -> Limits:
    if options.minutes is None and options.steps is None:
        raise UsageError("neither a time nor a number of steps", "Give --minutes or --steps.")
    run_s = float("inf") if options.minutes is None else 60 * options.minutes
    total_s = run_s if options.total_minutes is None else 60 * options.total_minutes
    return Limits(run_s, total_s, options.steps, started_s=started_s)


if __name__ == "__main__":
    sys.exit(main())
