"""Times decoding with experts in host memory, driven layer by layer by the host, to compare with.

    python scripts/baselines/host_driven_decode.py config.json --case 1:8:routing.npz --case 4:16
    python scripts/baselines/host_driven_decode.py --check

needs torch and numpy and nothing of moejax. It is what offloading systems written in PyTorch do:
the router's choice goes to the host in every layer, a dictionary there knows which experts lie in
which slot and which of them was used longest ago, and missing ones are copied from pinned memory,
on a stream of their own while the shared expert and the experts that are there are computed.

A case is BATCH:SLOTS or BATCH:SLOTS:FILE. FILE is an .npz whose `experts` [steps, layers,
batch * topk] are replayed instead of the router's own choice, though it still decides their
weights; without one the model routes itself. Before a case is timed it runs through all of its
steps twice: kernels are loaded, memory is allocated and the slots are full. Every step ends when
the host has read the new tokens.

Every result is one JSON object on a line of stdout; a case that fails says so in its line. Weights
are random. The sizes are those of Qwen1.5-MoE-A2.7B unless a config.json or flags say otherwise.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from host_driven_model import Config, Decoder, Model, make_model

VARIANTS = ("side-stream", "one-stream")
NUM_WARM_UP_PASSES = 2


class Case(NamedTuple):
    """One thing to time; the routing is the model's own where no file is given."""

    batch_size: int
    num_slots: int
    replay: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    started = time.perf_counter()
    if options.check:
        return check(options.device)
    config = read_config(options)
    dtype = getattr(torch, options.dtype)
    model = make_model(config, dtype, options.device, options.distinct_layers)
    synchronize(options.device)
    about = {
        "kind": "environment",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "dtype": options.dtype,
        "config": dataclasses.asdict(config),
        "loading_s": time.perf_counter() - started,
    }
    print(json.dumps(about), flush=True)
    deadline_s = started + options.max_seconds
    for case in options.case:
        for variant in options.variant.split(","):
            row = describe(case, variant, options)
            if time.perf_counter() > deadline_s:
                found: dict[str, Any] = {"error": f"not started in {options.max_seconds} s"}
            else:
                found = attempt(model, case, variant, options, deadline_s)
            print(json.dumps({**row, **found}), flush=True)
    return 0


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times host-driven decoding with PyTorch.")
    parser.add_argument("config", nargs="?", type=Path, help="config.json of the model")
    parser.add_argument("--case", type=read_case, action="append", default=[])
    parser.add_argument("--variant", default=VARIANTS[0], help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--context", type=int, default=96, help="tokens read before decoding")
    parser.add_argument("--num-steps", type=int, help="steps timed; all of a replay, else 64")
    parser.add_argument("--layers", type=int, dest="num_hidden_layers", help="take only so many")
    parser.add_argument(
        "--distinct-layers", type=int, help="layers whose experts are really made; others repeat"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-seconds", type=float, default=240, help="measure no longer")
    parser.add_argument("--check", action="store_true", help="compare small models' logits")
    for field in dataclasses.fields(Config):
        if field.type in (int, float) and field.name != "num_hidden_layers":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type)
    options = parser.parse_args(arguments)
    if not options.check and not options.case:
        parser.error("nothing to time: give --case BATCH:SLOTS[:FILE]")
    if set(options.variant.split(",")) - set(VARIANTS):
        parser.error(f"--variant {options.variant} is not of {', '.join(VARIANTS)}")
    return options


def read_case(text: str) -> Case:
    batch_size, slots, *replay = text.split(":", 2)
    case = Case(int(batch_size), int(slots), *replay)
    if case.batch_size < 1 or case.num_slots < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has no request or no slot")
    return case


def read_config(options: argparse.Namespace) -> Config:
    """The sizes of the file, where flags do not say otherwise."""
    fields: dict[str, Any] = {}
    if options.config is not None:
        fields = json.loads(options.config.read_text(encoding="utf-8"))
        fields = {**(fields.get("rope_parameters") or {}), **fields}
        if fields.get("mlp_only_layers") or fields.get("decoder_sparse_step", 1) != 1:
            sys.exit(f"error: {options.config} has layers without experts")
    known = {field.name for field in dataclasses.fields(Config)}
    given = {name: value for name, value in vars(options).items() if value is not None}
    return Config(**{name: value for name, value in {**fields, **given}.items() if name in known})


def describe(case: Case, variant: str, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "system": "host-driven",
        "variant": variant,
        "batch_size": case.batch_size,
        "slots": case.num_slots,
        "replay": case.replay and Path(case.replay).name,
        "context": options.context,
    }


def attempt(
    model: Model, case: Case, variant: str, options: argparse.Namespace, deadline_s: float
) -> dict[str, Any]:
    try:
        with torch.inference_mode():
            return time_case(model, case, variant, options, deadline_s)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        return {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
    finally:
        if options.device == "cuda":
            torch.cuda.empty_cache()


def time_case(
    model: Model, case: Case, variant: str, options: argparse.Namespace, deadline_s: float
) -> dict[str, Any]:
    """Times every step of a pass, after passes that only warm up.

    Raises:
      ValueError: The replayed routing does not fit, or there was no time for one step.
    """
    replayed = read_replay(case, model) if case.replay else None
    num_steps = options.num_steps or (64 if replayed is None else len(replayed))
    decoder = Decoder(
        model,
        case.batch_size,
        case.num_slots,
        context=options.context,
        num_positions=options.context + num_steps,
        has_side_stream=variant == "side-stream",
    )
    samples_s: list[float] = []
    for _ in range(NUM_WARM_UP_PASSES + 1):
        is_warm = len(samples_s) == num_steps
        decoder.num_demands = decoder.num_misses = 0
        samples_s = list(time_pass(decoder, replayed, options.context, num_steps, deadline_s))
    if not is_warm:
        raise ValueError(f"{options.max_seconds} s ended before the case was warm")
    return summarize(decoder, samples_s)


def time_pass(
    decoder: Decoder, replayed: Any, context: int, num_steps: int, deadline_s: float
) -> Iterator[float]:
    """Seconds of each step; ends early at the deadline."""
    token_ids = torch.arange(decoder.batch_size, device=decoder.model.embedding.device)
    before_s = time.perf_counter()
    for step in range(num_steps):
        chosen = None if replayed is None else replayed[step % len(replayed)]
        token_ids = decoder.step(token_ids, context + step, chosen).argmax(-1)
        token_ids.tolist()
        after_s = time.perf_counter()
        yield after_s - before_s
        if after_s > deadline_s:
            return
        before_s = after_s


def summarize(decoder: Decoder, samples_s: list[float]) -> dict[str, Any]:
    p95_s = float(np.quantile(samples_s, 0.95))
    return {
        "hit_ratio": 1 - decoder.num_misses / decoder.num_demands,
        "misses_per_step": decoder.num_misses / len(samples_s),
        "step_s": {"median": float(np.median(samples_s)), "p95": p95_s, "samples": samples_s},
    }


def read_replay(case: Case, model: Model) -> Any:
    """Experts to replay [steps, layers, batch, topk], on the device.

    Raises:
      ValueError: They are of other sizes than the case or the model.
    """
    config = model.config
    assert case.replay is not None
    with np.load(case.replay) as file:
        experts = file["experts"].astype(np.int64)
    expected = (config.num_hidden_layers, case.batch_size * config.num_experts_per_tok)
    if experts.ndim != 3 or experts.shape[1:] != expected or not len(experts):
        raise ValueError(f"experts of shape {experts.shape} are not [steps, layers, batch * topk]")
    if experts.min() < 0 or experts.max() >= config.num_experts:
        raise ValueError(f"experts are not all from 0 to {config.num_experts - 1}")
    shape = (len(experts), config.num_hidden_layers, case.batch_size, config.num_experts_per_tok)
    return torch.from_numpy(experts).to(model.embedding.device).view(shape)


def check(device: str) -> int:
    """Compares small models' logits, with all experts in slots and with few; 0 if all are equal."""
    config = Config(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=12,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=96,
    )
    model = make_model(config, torch.bfloat16 if device == "cuda" else torch.float32, device)
    is_equal = True
    for batch_size in (1, 4):
        expected, _ = check_logits(model, batch_size, config.num_experts, has_side_stream=False)
        for num_slots in (1, 3, 7):
            for variant in VARIANTS:
                found, misses = check_logits(
                    model, batch_size, num_slots, has_side_stream=variant == "side-stream"
                )
                is_same = bool(torch.equal(found, expected))
                is_equal = is_equal and is_same
                row = {
                    "kind": "check",
                    "variant": variant,
                    "batch_size": batch_size,
                    "slots": num_slots,
                    "misses": misses,
                    "bit_identical": is_same,
                }
                print(json.dumps(row))
    return 0 if is_equal else 1


def check_logits(
    model: Model, batch_size: int, num_slots: int, *, has_side_stream: bool, num_steps: int = 8
) -> tuple[Any, int]:
    """Logits of every step of greedy decoding, and the misses on the way."""
    decoder = Decoder(
        model,
        batch_size,
        num_slots,
        context=0,
        num_positions=num_steps,
        has_side_stream=has_side_stream,
    )
    token_ids = torch.arange(batch_size, device=model.embedding.device)
    steps = []
    with torch.inference_mode():
        for position in range(num_steps):
            steps.append(decoder.step(token_ids, position))
            token_ids = steps[-1].argmax(-1)
    return torch.stack(steps), decoder.num_misses


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
