"""Model cards against published sizes, and what a bad card is told."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from moejax.cards import MODELS, load_model, models_dir
from moejax.errors import BadFileError, MoejaxError, UsageError

# Parameters of one expert, of the whole model and of one token's path, and bytes of all routed
# experts in bf16: arithmetic on the published configurations, done independently of this package.
_PUBLISHED = {
    "qwen1.5-moe-a2.7b": (8650752, 14315784192, 2689173504, 24914165760),
    "qwen2-57b-a14b": (27525120, 57408658944, 14249270784, 98650030080),
    "deepseek-moe-16b": (8650752, 16375728128, 2828650496, 29896998912),
    "olmoe-1b-7b": (6291456, 6919161856, 1282017280, 12884901888),
    "mixtral-8x7b": (176160768, 46702792704, 12879925248, 90194313216),
    "qwen3-30b-a3b": (4718592, 30532122624, 3353032704, 57982058496),
    "switch-base-128": (4718592, 7415217408, 224083200, 14495514624),
}

_CONFIG = {
    "model_type": "qwen2_moe",
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "intermediate_size": 96,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
}


@pytest.mark.parametrize("name", sorted(_PUBLISHED))
def test_sizes_equal_published_ones(name):
    spec = load_model(name)
    expert, total, active, routed_bytes = _PUBLISHED[name]
    assert spec.expert_params == expert
    assert spec.expert_bytes == 2 * expert
    assert spec.total_params == total
    assert spec.active_params == active
    assert spec.routed_bytes == routed_bytes
    assert spec.dense_bytes + spec.routed_bytes == 2 * total


def test_qwen_moe_bytes():
    spec = load_model("qwen1.5-moe-a2.7b")
    assert spec.expert_bytes == 17301504
    assert spec.num_moe_layers * spec.num_experts_per_tok * spec.expert_bytes == 1660944384
    # K and V of 16 heads of 128 in 24 layers, two bytes each.
    assert spec.kv_bytes_per_token == 24 * 2 * 16 * 128 * 2
    assert spec.head_bytes == 151936 * 2048 * 2
    assert spec.attention_bytes == (4 * 2048**2 + 3 * 2048 + 2 * 2048 + 60 * 2048) * 2
    assert spec.shared_expert_bytes == (3 * 2048 * 5632 + 2048) * 2


def test_gpt_oss_experts_are_quantised():
    spec = load_model("gpt-oss-20b")
    assert spec.total_params == 20914757184
    assert spec.active_params == 4187440704
    # 13,219,200 bytes of weights are also what a recording of gpt-oss-120b states.
    assert spec.expert_bytes == 13219200 + 2 * (2 * 2880 + 2880)


def test_deepseek_v2_lite_has_latent_attention():
    spec = load_model("deepseek-v2-lite")
    assert (spec.num_layers, spec.num_moe_layers, spec.num_experts) == (27, 26, 64)
    assert spec.total_params == 15706484224
    assert spec.kv_bytes_per_token == 27 * (512 + 64) * 2


@pytest.mark.parametrize(
    ("name", "billions", "topk", "num_experts", "num_layers"),
    [("glm-5.3-flash", 313, 8, 288, 42), ("qwen3.8-flash-next", 125, 10, 512, 48)],
)
def test_hybrid_models_have_their_published_size(name, billions, topk, num_experts, num_layers):
    spec = load_model(name)
    assert spec.total_params / 1e9 == pytest.approx(billions, rel=0.01)
    shape = (spec.num_experts_per_tok, spec.num_experts, spec.num_moe_layers)
    assert shape == (topk, num_experts, num_layers)


def test_a_hybrid_model_needs_a_card(tmp_path):
    text = (models_dir() / "glm-5.3-flash.toml").read_text(encoding="utf-8")
    path = tmp_path / "card.toml"
    path.write_text(text.replace("attention_params", "# attention_params"), encoding="utf-8")
    with pytest.raises(BadFileError, match="attend in several ways") as caught:
        load_model(path)
    assert "attention_params" in caught.value.hint


def test_attention_that_the_fields_tell_is_not_stated_again(tmp_path):
    text = (models_dir() / "olmoe-1b-7b.toml").read_text(encoding="utf-8")
    path = tmp_path / "card.toml"
    path.write_text(text.replace("[config]", "attention_params = 9\n[config]"), encoding="utf-8")
    with pytest.raises(BadFileError, match="tell what attention takes"):
        load_model(path)


def test_a_card_may_state_the_bits_of_other_weights(tmp_path):
    whole = load_model("qwen1.5-moe-a2.7b")
    text = (models_dir() / "qwen1.5-moe-a2.7b.toml").read_text(encoding="utf-8")
    path = tmp_path / "card.toml"
    path.write_text(text.replace("[config]", "dense_bits = 4.5\n[config]"), encoding="utf-8")
    quantised = load_model(path)
    assert quantised.dense_bytes == round(whole.dense_params * 4.5 / 8)
    assert quantised.expert_bytes == whole.expert_bytes
    for bits in ("0", "65", '"few"'):
        path.write_text(text.replace("[config]", f"dense_bits = {bits}\n[config]"))
        with pytest.raises(BadFileError, match="dense_bits"):
            load_model(path)


def test_reference_study_geometry():
    spec = load_model("reference-study")
    assert (spec.num_moe_layers, spec.num_experts, spec.num_experts_per_tok) == (28, 64, 8)
    assert spec.expert_bytes == 28_500_000
    assert abs(2 * spec.expert_params / spec.expert_bytes - 1) < 1e-3


def test_tiny_moe_is_tiny():
    spec = load_model("tiny-moe")
    assert spec.vocab_size == 256
    assert spec.routed_bytes + spec.dense_bytes <= 12e6


@pytest.mark.parametrize("name", MODELS)
def test_every_card_is_usable(name):
    spec = load_model(name)
    assert spec.name == name
    assert spec.source
    assert {spec: 1}[load_model(models_dir() / f"{name}.toml")] == 1


def test_hub_id_of_a_card_needs_no_download():
    assert load_model("Qwen/Qwen1.5-MoE-A2.7B").name == "qwen1.5-moe-a2.7b"
    assert load_model("qwen/qwen1.5-moe-a2.7b").name == "qwen1.5-moe-a2.7b"


def test_download_is_the_last_resort(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(_CONFIG))
    asked = []

    def download(hub_id, file):
        asked.append((hub_id, file))
        if hub_id == "Nobody/Nothing":
            raise ConnectionError
        return str(tmp_path / file)

    hub = types.SimpleNamespace(hf_hub_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    spec = load_model("Somebody/Some-MoE", offline=False)
    assert (spec.name, spec.hub_id, spec.num_experts) == ("Some-MoE", "Somebody/Some-MoE", 8)
    with pytest.raises(UsageError, match="ConnectionError"):
        load_model("Nobody/Nothing", offline=False)
    load_model("Qwen/Qwen3-30B-A3B", offline=False)
    assert asked == [("Somebody/Some-MoE", "config.json"), ("Nobody/Nothing", "config.json")]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="not installed"):
        load_model("Somebody/Some-MoE", offline=False)


def test_a_misspelt_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "models").mkdir()
    (tmp_path / "Qwen").mkdir()
    for name in ("models/typo", "./typo", "a/b/c", "/nowhere/typo", "../typo", ".typo"):
        with pytest.raises(BadFileError, match="does not exist"):
            load_model(name, offline=False)
    assert load_model("Qwen/Qwen1.5-MoE-A2.7B").name == "qwen1.5-moe-a2.7b"
    with pytest.raises(UsageError, match="unknown model ''"):
        load_model("")


def test_config_file_and_checkpoint_folder(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    spec = load_model(folder)
    assert spec == load_model(str(folder / "config.json"))
    assert spec.name == "my-model"
    assert spec.expert_bytes == 3 * 64 * 32 * 2


def test_sparse_and_dense_layers(tmp_path):
    assert _read(tmp_path, decoder_sparse_step=2).num_moe_layers == 2
    assert _read(tmp_path, mlp_only_layers=[0, 3]).num_moe_layers == 2
    all_moe, one_dense = _read(tmp_path), _read(tmp_path, mlp_only_layers=[1])
    moe_params = 64 * 8 + 3 * 64 * 48 + 64
    assert all_moe.dense_params - one_dense.dense_params == moe_params - 3 * 64 * 96


def test_spellings_and_types(tmp_path):
    spec = _read(tmp_path)
    renamed = {key: value for key, value in _CONFIG.items() if key != "num_experts"}
    assert _read(tmp_path, renamed, num_local_experts=8) == spec
    assert _read(tmp_path, renamed, n_routed_experts=8) == spec
    assert _read(tmp_path, torch_dtype=None) == spec
    assert _read(tmp_path, torch_dtype=None, dtype="torch.float32").expert_bytes == (
        2 * spec.expert_bytes
    )


def test_deepseek_v2_query_compression(tmp_path):
    latent = {
        "model_type": "deepseek_v2",
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "n_shared_experts": None,
    }
    plain = _read(tmp_path, **latent)
    packed = _read(tmp_path, **latent, q_lora_rank=10)
    assert plain.num_moe_layers == 3
    assert plain.shared_expert_bytes == 0
    q_size = 4 * (8 + 4)
    assert packed.attention_params - plain.attention_params == (
        64 * 10 + 10 + 10 * q_size - 64 * q_size
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts": None}, "num_experts"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size"),
        ({"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size"),
        ({"decoder_sparse_step": None}, "decoder_sparse_step"),
        ({"norm_topk_prob": None}, "norm_topk_prob"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings"),
        ({"vocab_size": None}, "vocab_size"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "qwen3_moe"}, "head_dim"),
        ({"hidden_size": -64}, "-64"),
        ({"hidden_size": 64.0}, "64.0"),
        ({"hidden_size": float("nan")}, "nan"),
        ({"hidden_size": True}, "True"),
        ({"hidden_size": "64"}, "'64'"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"hidden_size": 66}, "66"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_experts_per_tok": 9}, "9"),
        ({"num_local_experts": 9}, "num_local_experts"),
        ({"num_experts": 70000}, "70000"),
        ({"num_key_value_heads": 3}, "3"),
        ({"decoder_sparse_step": 5}, "0 of 4"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
        ({"torch_dtype": "int3"}, "int3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": "gptq"}, "gptq"),
    ],
)
def test_bad_config_is_named(tmp_path, changes, named):
    with pytest.raises(BadFileError, match=named):
        _read(tmp_path, **changes)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"NaN"])
@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_corrupt_file(tmp_path, content, suffix):
    path = tmp_path / f"card{suffix}"
    path.write_bytes(content)
    with pytest.raises(BadFileError, match="card"):
        load_model(path)


@pytest.mark.parametrize(
    "card",
    [
        'name = "x"\nsource = "s"',
        'name = "x"\nsource = "s"\nexpert_byte = 3\n[config]\nmodel_type = "mixtral"',
        'name = "x"\nsource = "s"\nexpert_bytes = -3\n[config]\nmodel_type = "mixtral"',
        'name = 3\nsource = "s"\n[config]\nmodel_type = "mixtral"',
        'source = "s"\n[config]\nmodel_type = "mixtral"',
    ],
)
def test_bad_card(tmp_path, card):
    path = tmp_path / "card.toml"
    path.write_text(card)
    with pytest.raises(BadFileError):
        load_model(path)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("qwen1.5-moe", UsageError, "qwen1.5-moe-a2.7b"),
        ("no-such-model", UsageError, "Known: |Did you mean"),
        ("Nobody/Nothing", UsageError, "--offline"),
        ("no/such/file.toml", BadFileError, ""),
        ("no/such/folder", BadFileError, "path"),
    ],
)
def test_unknown_model(name, error, said):
    with pytest.raises(error) as caught:
        load_model(name)
    assert caught.match(name)
    assert isinstance(caught.value, MoejaxError)
    assert not said or any(text in caught.value.hint for text in said.split("|"))


def test_folder_without_config(tmp_path):
    with pytest.raises(BadFileError, match=r"config\.json"):
        load_model(tmp_path)


def test_a_device_is_no_card():
    with pytest.raises(BadFileError, match="not a file"):
        load_model("/dev/zero")


def test_cards_and_traces_do_without_jax():
    code = "import sys, moejax.cards, moejax.trace; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _read(folder: Path, config: dict | None = None, **changes):
    fields = {**(_CONFIG if config is None else config), **changes}
    # None takes a field out; only here does null differ from a field that is not there.
    kept = {key: value for key, value in fields.items() if value is not None or "shared" in key}
    path = folder / "config.json"
    path.write_text(json.dumps(kept))
    return load_model(path)
