"""Times transformers' Qwen2MoeForCausalLM with random weights, to compare with.

    python scripts/baselines/transformers_decode.py config.json --batch-sizes 1,4,16

needs torch and transformers and nothing of moejax. Greedy tokens are fed back on the device and
the clock stops after a synchronisation at the end of each window, as in `bench_model.py`. Every
result is one JSON object on a line of stdout; a case that fails says so in its line.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

# What generate() takes for prompts, and what it switches to for decoding (transformers 5).
PREFILL_EXPERTS, DECODE_EXPERTS = "grouped_mm", "batched_mm"
NUM_PREFILLS = 5


def main() -> None:
    options = read_options()
    started = time.perf_counter()
    torch.manual_seed(0)
    model = make_model(Path(options.config), options.dtype, options.device)
    synchronize(model)
    about = {
        "kind": "environment",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "attention": model.config._attn_implementation,
        "loading_s": time.perf_counter() - started,
    }
    print(json.dumps(about), flush=True)
    for case in cases(options):
        if time.perf_counter() - started > options.max_seconds:
            print(json.dumps({**case, "error": f"not started in {options.max_seconds} s"}))
        else:
            print(json.dumps({**case, **attempt(model, case, options)}), flush=True)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times transformers' Qwen2MoeForCausalLM.")
    parser.add_argument("config", help="config.json of the model")
    parser.add_argument("--batch-sizes", default="1", help="comma-separated")
    parser.add_argument("--prefill", default="2048", help="prompt lengths, comma-separated")
    parser.add_argument("--context", type=int, default=96, help="tokens read before decoding")
    parser.add_argument("--window", type=int, default=16, help="steps between synchronisations")
    parser.add_argument("--num-windows", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-seconds", type=float, default=120, help="start no case after that")
    return parser.parse_args()


def make_model(path: Path, dtype: str, device: str) -> Any:
    """A model with random weights, drawn where they stay."""
    config = transformers.Qwen2MoeConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval()


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The most telling ones first; the plain expert loop only where it takes little time."""
    batch_sizes = [int(size) for size in options.batch_sizes.split(",") if size]
    for batch_size in batch_sizes:
        yield {"kind": "decode", "batch_size": batch_size, "experts": DECODE_EXPERTS}
    for num_tokens in [int(length) for length in options.prefill.split(",") if length]:
        yield {"kind": "prefill", "num_tokens": num_tokens, "experts": PREFILL_EXPERTS}
    for batch_size in batch_sizes:
        yield {"kind": "decode", "batch_size": batch_size, "experts": PREFILL_EXPERTS}
    if 1 in batch_sizes:
        yield {"kind": "decode", "batch_size": 1, "experts": "eager"}


def attempt(model: Any, case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    try:
        model.set_experts_implementation(case["experts"])
        with torch.inference_mode():
            if case["kind"] == "decode":
                return {"samples_s": time_decode(model, case["batch_size"], options)}
            return {"samples_s": time_prefill(model, case["num_tokens"])}
    except (RuntimeError, ValueError, ImportError) as error:
        return {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
    finally:
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def time_decode(model: Any, batch_size: int, options: argparse.Namespace) -> list[float]:
    """Seconds per step, one number a window; the first window is a warm-up."""
    samples_s = []
    for _ in range(1 + options.num_windows):
        cache = make_cache(model, batch_size, options.context)
        token_ids = draw_tokens(model, batch_size, 1)
        synchronize(model)
        start = time.perf_counter()
        for _ in range(options.window):
            logits = model(input_ids=token_ids, past_key_values=cache, use_cache=True).logits
            token_ids = logits[:, -1].argmax(-1, keepdim=True)
        synchronize(model)
        samples_s.append((time.perf_counter() - start) / options.window)
    return samples_s[1:]


def time_prefill(model: Any, num_tokens: int) -> list[float]:
    """Seconds until the token after a prompt is known, without the first two calls."""
    samples_s = []
    for _ in range(2 + NUM_PREFILLS):
        token_ids = draw_tokens(model, 1, num_tokens)
        synchronize(model)
        start = time.perf_counter()
        model(input_ids=token_ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        synchronize(model)
        samples_s.append(time.perf_counter() - start)
    return samples_s[2:]


def make_cache(model: Any, batch_size: int, context: int) -> Any:
    """What a prompt of random tokens would leave behind, without reading one."""
    config, cache = model.config, transformers.DynamicCache()
    head_dim = config.hidden_size // config.num_attention_heads
    shape = (batch_size, config.num_key_value_heads, context, head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = (
            torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)
        )
        cache.update(keys, values, layer)
    return cache


def draw_tokens(model: Any, batch_size: int, num_tokens: int) -> Any:
    shape = (batch_size, num_tokens)
    return torch.randint(model.config.vocab_size, shape, device=model.device)


def synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
