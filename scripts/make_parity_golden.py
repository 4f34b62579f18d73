"""Stores what the reference implementation computes, for tests to compare with.

    python scripts/make_parity_golden.py

needs transformers and torch (the extra `parity`) and writes tests/golden/qwen_moe/*.safetensors,
one file for each of the six tiny models of tests/qwen_moe/_reference_models.py. Numbers are
float32, computed on a CPU by the reference's plain attention and expert loop.
"""

import importlib
import importlib.util
import json
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[1]
# A choice closer than this could fall the other way on another machine.
CLOSEST_EXPERTS, CLOSEST_TOKENS = 1e-4, 1e-4


def main() -> None:
    """Writes every golden file and a line on each."""
    models = load_models()
    models.GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in models.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            models.write_reference_model(Path(folder), name, "hub")
            golden = run_reference(Path(folder), models.make_token_ids(name))
        check_margins(name, golden)
        path = models.GOLDEN / f"{name}.safetensors"
        versions = {
            package: importlib.import_module(package).__version__
            for package in ("torch", "transformers")
        }
        # One field only: the file format writes several in no fixed order.
        made = {"weights_sha256": models.digest(models.make_weights(name)), **versions}
        save_file(golden, path, metadata={"made_with": json.dumps(made)})
        print(f"{path.name}: {path.stat().st_size} bytes")


def load_models() -> ModuleType:
    """The module that makes the tiny models; it lies with the tests that also make them."""
    path = ROOT / "tests" / "qwen_moe" / "_reference_models.py"
    spec = importlib.util.spec_from_file_location("_reference_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_reference(folder: Path, token_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Every array of a golden file, from the reference's own forward pass and generation.

    Returns:
      `token_ids` [requests, tokens]; `hidden_states` [layers, requests, tokens, hidden], the
      output of each layer; `router_logits` [moe_layers, requests * tokens, experts];
      `selected_experts` [moe_layers, requests * tokens, topk], best first; `logits` [requests,
      tokens, vocab]; `greedy_token_ids` [requests, new tokens] and the `greedy_logits` [requests,
      new tokens, vocab] that chose them.
    """
    torch = importlib.import_module("torch")
    model, faults = importlib.import_module("transformers").Qwen2MoeForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(faults.values()), faults
    prompt = torch.tensor(token_ids.astype(np.int64))
    seen: dict[str, list[Any]] = {"layers": [], "routers": []}
    _listen(model, seen)
    with torch.no_grad():
        logits = model(prompt).logits
        layers, routers = list(seen["layers"]), list(seen["routers"])
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=load_models().NUM_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return {
        "token_ids": token_ids,
        "hidden_states": np.stack([layer.numpy() for layer in layers]),
        "router_logits": np.stack([router[0].numpy() for router in routers]),
        "selected_experts": np.stack([router[2].numpy() for router in routers]).astype(np.int32),
        "logits": logits.numpy(),
        "greedy_token_ids": generated.sequences[:, prompt.shape[1] :].numpy().astype(np.int32),
        "greedy_logits": np.stack([step.numpy() for step in generated.logits], axis=1),
    }


def check_margins(name: str, golden: dict[str, np.ndarray]) -> None:
    """Refuses models whose choices hang on the last bits of a sum."""
    num_ranked = golden["selected_experts"].shape[-1] + 1
    ranked = -np.sort(-golden["router_logits"], axis=-1)[..., :num_ranked]
    experts = (ranked[..., :-1] - ranked[..., 1:]).min()
    best = -np.sort(-golden["greedy_logits"], axis=-1)[..., :2]
    tokens = (best[..., 0] - best[..., 1]).min()
    print(f"{name}: closest experts {experts:.1e}, closest tokens {tokens:.1e}")
    if experts < CLOSEST_EXPERTS or tokens < CLOSEST_TOKENS:
        raise SystemExit(f"error: {name} has choices too close to call\n\nhint: Change its seed.")


def _listen(model: Any, seen: dict[str, list[Any]]) -> None:
    """Collects what decoder layers and routers return."""
    for module in model.modules():
        if type(module).__name__ == "Qwen2MoeDecoderLayer":
            module.register_forward_hook(lambda _, __, out: seen["layers"].append(out))
        elif type(module).__name__ == "Qwen2MoeTopKRouter":
            module.register_forward_hook(lambda _, __, out: seen["routers"].append(out))


if __name__ == "__main__":
    main()
