"""Six tiny models whose every weight matters, made without the reference implementation.

Nothing keeps its usual starting value: biases are not 0 and norms are not 1, so that leaving one
out shows. Queries and keys are large enough for attention to look at few positions, and
embeddings small enough for the epsilon of the first norm to count.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "qwen_moe"
"""Where `scripts/make_parity_golden.py` stores what the reference computes."""

NUM_REQUESTS, NUM_TOKENS, NUM_NEW_TOKENS = 2, 24, 32
LAYOUTS = ("hub", "fused")

Weights = dict[str, np.ndarray]

# One of those that leave no choice of experts or tokens close to a tie.
_SEED = 5
_COMMON = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "decoder_sparse_step": 1,
    "eos_token_id": None,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 12,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts": 12,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 24,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 128,
}
# As on the hub since 2024, and as transformers 5 writes it.
_OLD_SPELLING = {"rope_theta": 1e6, "torch_dtype": "float32"}
_NEW_SPELLING = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "mlp_only_layers": [],
    "qkv_bias": True,
    "dtype": "float32",
}
_LOW_THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}

CONFIGS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "mha": _COMMON | _OLD_SPELLING | {"num_key_value_heads": 4},
        "gqa": _COMMON | _NEW_SPELLING,
        "norm-topk": _COMMON | _NEW_SPELLING | _LOW_THETA | {"norm_topk_prob": True},
        "mlp-only-layers": _COMMON | _NEW_SPELLING | {"mlp_only_layers": [1]},
        "sparse-step": _COMMON | _OLD_SPELLING | {"decoder_sparse_step": 2, "num_hidden_layers": 4},
        "tied": _COMMON | _NEW_SPELLING | {"tie_word_embeddings": True, "qkv_bias": False},
    }
)
"""Name to the fields of `config.json`."""


def make_weights(name: str) -> Weights:
    """The tensors of a model in the hub's layout, each drawn from a seed of its own.

    The numbers come from the raw stream of a bit generator, which numpy promises never to change.
    """
    return {
        tensor: mean + spread * _draw(f"{_SEED}/{name}/{tensor}", shape)
        for tensor, shape, mean, spread in _tensors(CONFIGS[name])
    }


def fuse(weights: Weights, num_experts: int) -> Weights:
    """The same tensors in the layout that holds the experts of a layer in two tensors."""
    fused = {tensor: value for tensor, value in weights.items() if ".mlp.experts." not in tensor}
    for router in [tensor for tensor in weights if tensor.endswith(".mlp.gate.weight")]:
        experts = router.removesuffix("gate.weight") + "experts"
        gate, up, down = (
            np.stack([weights[f"{experts}.{e}.{part}_proj.weight"] for e in range(num_experts)])
            for part in ("gate", "up", "down")
        )
        fused[f"{experts}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[f"{experts}.down_proj"] = down
    return fused


def write_checkpoint(folder: Path, config: dict[str, Any], weights: Weights) -> Path:
    """Writes `config.json` and one file of weights, as a download from the hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_reference_model(folder: Path, name: str, layout: str) -> Path:
    """Writes one of the six models in one of the two layouts."""
    weights = make_weights(name)
    if layout == "fused":
        weights = fuse(weights, CONFIGS[name]["num_experts"])
    return write_checkpoint(folder, CONFIGS[name], weights)


def make_token_ids(name: str) -> np.ndarray:
    """The prompts of a model, [requests, tokens]."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(NUM_REQUESTS * NUM_TOKENS)
    token_ids = raw % np.uint64(CONFIGS[name]["vocab_size"])
    return token_ids.astype(np.int32).reshape(NUM_REQUESTS, NUM_TOKENS)


def digest(weights: Weights) -> str:
    """A hash of names, shapes and values, to tell whether two makings agree to the bit."""
    total = hashlib.sha256()
    for tensor in sorted(weights):
        total.update(f"{tensor} {weights[tensor].shape}".encode())
        total.update(np.ascontiguousarray(weights[tensor]).tobytes())
    return total.hexdigest()


def _draw(seed: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers of mean 0 and variance 1."""
    raw = np.random.PCG64(zlib.crc32(seed.encode())).random_raw(int(np.prod(shape)))
    unit = (raw >> np.uint64(11)) * 2.0**-53
    return ((2 * unit - 1) * 3**0.5).astype(np.float32).reshape(shape)


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Name, shape, mean and standard deviation of every tensor of the hub's layout."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden), 0.0, 0.1
    if not config["tie_word_embeddings"]:
        yield from _matrix("lm_head", hidden, vocab, 0.5)
    yield "model.norm.weight", (hidden,), 1.0, 0.2
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,), 1.0, 0.2
        yield f"{at}.post_attention_layernorm.weight", (hidden,), 1.0, 0.2
        yield from _attention(f"{at}.self_attn", config)
        is_sparse = (layer + 1) % config["decoder_sparse_step"] == 0
        if is_sparse and layer not in config.get("mlp_only_layers", []):
            yield from _experts(f"{at}.mlp", config)
        else:
            yield from _mlp(f"{at}.mlp", hidden, config["intermediate_size"])


def _attention(
    at: str, config: dict[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    hidden = config["hidden_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    for part, width, gain in (("q", hidden, 1.2), ("k", keys, 1.2), ("v", keys, 0.8)):
        yield from _matrix(f"{at}.{part}_proj", hidden, width, gain)
        if config.get("qkv_bias", True):
            yield f"{at}.{part}_proj.bias", (width,), 0.0, 0.3
    yield from _matrix(f"{at}.o_proj", hidden, hidden, 0.8)


def _experts(
    at: str, config: dict[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    hidden = config["hidden_size"]
    yield from _matrix(f"{at}.gate", hidden, config["num_experts"], gain=1.5)
    yield from _matrix(f"{at}.shared_expert_gate", hidden, 1)
    yield from _mlp(f"{at}.shared_expert", hidden, config["shared_expert_intermediate_size"])
    for expert in range(config["num_experts"]):
        yield from _mlp(f"{at}.experts.{expert}", hidden, config["moe_intermediate_size"])


def _mlp(at: str, hidden: int, ffn: int) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    yield from _matrix(f"{at}.gate_proj", hidden, ffn)
    yield from _matrix(f"{at}.up_proj", hidden, ffn)
    yield from _matrix(f"{at}.down_proj", ffn, hidden, 0.8)


def _matrix(
    at: str, fan_in: int, fan_out: int, gain: float = 1.0
) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """A linear map whose outputs are about `gain` times its inputs."""
    yield f"{at}.weight", (fan_out, fan_in), 0.0, gain * fan_in**-0.5
