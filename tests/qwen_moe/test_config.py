"""Every field of a `config.json` is read, known to have no effect, or refused."""

import dataclasses
import json

import pytest

from moejax.cards import models_dir, read_card
from moejax.errors import BadFileError
from moejax.qwen_moe import QwenMoeConfig, read_config, write_config

# As on the hub: the flat spelling of 2024.
QWEN_15_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2_57B = QWEN_15_MOE | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "mlp_only_layers": [],
    "moe_intermediate_size": 2560,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "shared_expert_intermediate_size": 20480,
    "sliding_window": 65536,
    "transformers_version": "4.40.1",
}
PUBLISHED = {"qwen1.5-moe-a2.7b": QWEN_15_MOE, "qwen2-57b-a14b": QWEN2_57B}
OTHER = QwenMoeConfig(
    vocab_size=96,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=5,
    num_attention_heads=3,
    num_key_value_heads=1,
    num_experts=7,
    num_experts_per_tok=3,
    moe_intermediate_size=10,
    shared_expert_intermediate_size=14,
    norm_topk_prob=True,
    decoder_sparse_step=2,
    mlp_only_layers=(3,),
    qkv_bias=False,
    tie_word_embeddings=True,
    rms_norm_eps=1e-5,
    rope_theta=500.0,
    max_position_embeddings=640,
    router_aux_loss_coef=0.0,
    initializer_range=0.5,
    dtype="float16",
    bos_token_id=0,
    eos_token_ids=(1, 2),
    pad_token_id=95,
)


def read(**changes) -> QwenMoeConfig:
    return read_config(QWEN_15_MOE | changes, "config.json")


def without(*names: str) -> dict:
    return {name: value for name, value in QWEN_15_MOE.items() if name not in names}


def with_rope(**table) -> dict:
    return without("rope_theta") | {"rope_parameters": table}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_as_their_cards_say(name):
    config = read_config(PUBLISHED[name], name)
    stated = read_card(models_dir() / f"{name}.toml")["config"]
    assert config.dtype == stated.pop("torch_dtype") == "bfloat16"
    assert stated.pop("model_type") == "qwen2_moe"
    assert {key: getattr(config, key) for key in stated} == {
        key: tuple(value) if isinstance(value, list) else value for key, value in stated.items()
    }
    assert config.head_dim == 128
    assert config.moe_layers == tuple(range(config.num_hidden_layers))
    assert config.eos_token_ids == (151643,)
    assert config.qkv_bias


def test_configs_are_static():
    assert hash(read()) == hash(read())
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().hidden_size = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_both_spellings_of_the_rotary_base_are_one_config():
    nested = with_rope(rope_type="default", rope_theta=1000000.0)
    assert read_config(nested, "new") == read()
    assert read_config(nested | {"rope_theta": 1000000.0}, "both") == read()
    assert read(rope_scaling=None) == read()


def test_types_have_two_spellings_too():
    assert read_config(without("torch_dtype") | {"dtype": "float16"}, "new").dtype == "float16"
    assert read_config(without("torch_dtype"), "none").dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"num_hidden_layers": 5, "decoder_sparse_step": 2}, (1, 3)),
        ({"num_hidden_layers": 5, "mlp_only_layers": [0, 4]}, (1, 2, 3)),
        ({"num_hidden_layers": 6, "decoder_sparse_step": 3, "mlp_only_layers": [2]}, (5,)),
    ],
)
def test_layers_with_experts(changes, layers):
    assert read(**changes).moe_layers == layers


@pytest.mark.parametrize(
    ("value", "tokens"), [(None, ()), (7, (7,)), ([7], (7,)), ([7, 9], (7, 9)), ([], ())]
)
def test_tokens_that_end_a_text(value, tokens):
    config = read(eos_token_id=value)
    assert config.eos_token_ids == tokens
    assert read_config(write_config(config), "written") == config


@pytest.mark.parametrize("config", [read(), read_config(QWEN2_57B, "57b"), OTHER], ids=str)
def test_what_is_written_is_read_back(config):
    written = json.loads(json.dumps(write_config(config)))
    assert read_config(written, "written") == config
    assert written["architectures"] == ["Qwen2MoeForCausalLM"]
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": config.rope_theta}


@pytest.mark.parametrize("name", sorted(set(QWEN_15_MOE) - {"rope_theta"}))
def test_only_fields_with_a_known_default_may_be_missing(name):
    optional = {
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "hidden_act",
        "initializer_range",
        "max_window_layers",
        "output_router_logits",
        "router_aux_loss_coef",
        "sliding_window",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_sliding_window",
    }
    if name in optional:
        assert read_config(without(name), "config.json").hidden_size == 2048
    else:
        with pytest.raises(BadFileError) as caught:
            read_config(without(name), "config.json")
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "qwen3_moe"}, "'qwen3_moe'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"] * 24}, "layer_types"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "default", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": "linear"}, "'linear'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "contradictory"),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            "rope_scaling",
        ),
        ({"rope_parameters": {"rope_type": ["default"]}}, "plain RoPE"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 64}, "head_dim 64"),
        ({"num_attention_heads": 15}, "15 heads"),
        ({"num_attention_heads": 2048}, "even width"),
        ({"num_key_value_heads": 3}, "3 key heads"),
        ({"num_experts_per_tok": 61}, "61"),
        ({"mlp_only_layers": [24]}, "[24]"),
        ({"mlp_only_layers": 3}, "mlp_only_layers"),
        ({"eos_token_id": 151936}, "vocab_size"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"hidden_size": "2048"}, "'2048'"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rope_theta": "1e6"}, "rope_theta"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_the_port_does_not_do_is_refused(changes, complaint):
    with pytest.raises(BadFileError) as caught:
        read(**changes)
    assert str(caught.value).startswith("config.json")
    assert complaint in str(caught.value)
    assert caught.value.hint


def test_a_missing_rotary_base_is_not_guessed():
    with pytest.raises(BadFileError) as caught:
        read_config(without("rope_theta"), "config.json")
    assert "rope_theta" in str(caught.value)


def test_unknown_fields_matter_only_when_they_ask_for_something():
    assert read(attention_sinks=None, use_mrope=False) == read()
    with pytest.raises(BadFileError) as caught:
        read(qk_norm="rms")
    assert "qk_norm = 'rms'" in str(caught.value)
