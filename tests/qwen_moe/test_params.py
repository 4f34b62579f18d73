"""Weights: what is saved comes back from either layout, and every fault is named."""

import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import BadFileError, UsageError
from moejax.qwen_moe import RoutedExperts, params
from moejax.qwen_moe._checkpoint import find_checkpoint, open_checkpoint

from ._tiny_checkpoint import (
    CONFIG,
    edit_json,
    edit_tensors,
    is_same,
    join_file,
    make_model,
    save_tiny,
    split_file,
    weights_of,
)

EXPERT = "model.layers.0.mlp.experts.1.gate_proj.weight"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("layout", params.LAYOUTS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 7000])
def test_what_is_saved_comes_back(tmp_path, layout, max_shard_bytes):
    model = make_model()
    params.save(model, tmp_path / "m", layout=layout, max_shard_bytes=max_shard_bytes)
    loaded = params.load(tmp_path / "m")
    assert is_same(weights_of(loaded), weights_of(model))
    assert loaded.config == model.config
    assert isinstance(loaded.layers[0].mlp.experts.down_proj, RoutedExperts)
    files = sorted(os.listdir(tmp_path / "m"))
    if max_shard_bytes == 10**9:
        assert files == ["config.json", "model.safetensors"]
    else:
        assert [name for name in files if name.startswith("model-")] == [
            f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
        ]


def test_tied_embeddings_and_no_biases_come_back(tmp_path):
    model = make_model(replace(CONFIG, tie_word_embeddings=True, qkv_bias=False))
    params.save(model, tmp_path)
    assert is_same(weights_of(params.load(tmp_path)), weights_of(model))


def test_the_keys_are_the_published_ones(tmp_path):
    save_tiny(tmp_path)
    header, _ = split_file(tmp_path / "model.safetensors")
    assert header.pop("__metadata__") == {"format": "pt"}
    assert header[EXPERT]["shape"] == [6, 16]
    assert header["model.layers.2.mlp.experts.3.down_proj.weight"]["shape"] == [16, 6]
    assert header["model.layers.1.mlp.up_proj.weight"]["shape"] == [10, 16]
    assert {
        "lm_head.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.self_attn.q_proj.bias",
    } <= header.keys()
    # Two layers of four experts, 7 of attention and 2 norms each, a dense layer, and 3 outside.
    assert len(header) == 2 * (4 * 3 + 1 + 3 + 1) + 3 + 3 * (7 + 2) + 3


def test_the_gate_comes_before_up(tmp_path):
    save_tiny(tmp_path, layout="fused")
    stacked = params.load(tmp_path).layers[0].mlp.experts.gate_up_proj[...]
    params.save(make_model(), tmp_path, layout="hub")

    def look(tensors):
        np.testing.assert_array_equal(tensors[EXPERT], stacked[1, :6])
        up = tensors["model.layers.0.mlp.experts.1.up_proj.weight"]
        np.testing.assert_array_equal(up, stacked[1, 6:])

    edit_tensors(tmp_path / "model.safetensors", look)


@pytest.mark.parametrize("dtype", ["float32", "float16", jnp.bfloat16])
def test_weights_are_cast_while_loading(tmp_path, dtype):
    weights = save_tiny(tmp_path)
    cast = {path: array.astype(jnp.dtype(dtype)) for path, array in weights.items()}
    assert is_same(weights_of(params.load(tmp_path, dtype=dtype)), cast)


def test_mixed_types_become_that_of_the_config(tmp_path):
    weights = save_tiny(tmp_path)

    def widen(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)

    edit_tensors(tmp_path / "model.safetensors", widen)
    assert is_same(weights_of(params.load(tmp_path)), weights)


def test_a_type_that_cannot_hold_a_weight_is_refused(tmp_path):
    save_tiny(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", lambda t: t["model.norm.weight"].fill(1e30))
    assert params.load(tmp_path).norm.weight[...][0] > 9e29
    with pytest.raises(UsageError, match=r"model\.norm\.weight holds 1e\+30, which does not fit"):
        params.load(tmp_path, dtype="float16")
    with pytest.raises(UsageError, match="type int8"):
        params.load(tmp_path, dtype="int8")
    with pytest.raises(UsageError, match="type bf16"):
        params.load(tmp_path, dtype="bf16")


def test_progress_reaches_the_end(tmp_path):
    weights = save_tiny(tmp_path)
    seen = []
    params.load(tmp_path, on_progress=lambda *told: seen.append(told))
    num_bytes = sum(array.nbytes for array in weights.values())
    assert seen[-1] == (num_bytes, num_bytes)
    assert seen == sorted(seen)
    assert len(seen) > len(weights)


def test_the_device_takes_over_what_was_read(monkeypatch, tmp_path):
    """On the CPU a copy would hold every weight twice for a moment."""
    if jax.default_backend() != "cpu":
        pytest.skip("another device has memory of its own")
    save_tiny(tmp_path)
    addresses = set()

    def note(shape, dtype, make=params._aligned):
        array = make(shape, dtype)
        addresses.add(array.ctypes.data)
        return array

    monkeypatch.setattr(params, "_aligned", note)
    model = params.load(tmp_path)
    arrays = [variable.get_value() for variable in params._variables(model).values()]
    assert {array.unsafe_buffer_pointer() for array in arrays} == addresses


@pytest.mark.parametrize("layout", params.LAYOUTS)
def test_one_layer_can_be_read_alone(tmp_path, layout):
    weights = save_tiny(tmp_path, layout=layout)
    checkpoint = open_checkpoint(tmp_path)
    gate_up, down = params.read_layer_experts(checkpoint, CONFIG, 2)
    experts = ("layers", 2, "mlp", "experts")
    np.testing.assert_array_equal(gate_up, weights[(*experts, "gate_up_proj")])
    np.testing.assert_array_equal(down, weights[(*experts, "down_proj")])
    with pytest.raises(UsageError, match="layer 1 has no routed experts"):
        params.read_layer_experts(checkpoint, CONFIG, 1)
    with pytest.raises(BadFileError, match=r"gate_up_proj|experts\.4\.gate_proj"):
        params.read_layer_experts(checkpoint, replace(CONFIG, num_experts=5), 2)


def test_one_layer_can_be_read_in_another_type(tmp_path):
    weights = save_tiny(tmp_path)
    arrays = params.read_layer_experts(open_checkpoint(tmp_path), CONFIG, 0, "float32")
    for name, array in zip(("gate_up_proj", "down_proj"), arrays, strict=True):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, weights[("layers", 0, "mlp", "experts", name)])


def test_a_model_is_loaded_without_its_routed_experts(monkeypatch, tmp_path):
    weights = save_tiny(tmp_path)
    read, seen = [], []

    def note(name, *arguments, read_tensor=params.read_tensor):
        read.append(name)
        read_tensor(name, *arguments)

    monkeypatch.setattr(params, "read_tensor", note)
    loaded = params.load(
        tmp_path, routed_experts=False, on_progress=lambda *told: seen.append(told)
    )
    shapes = {path: array.shape for path, array in weights_of(loaded).items() if "experts" in path}
    assert shapes == {
        ("layers", layer, "mlp", "experts", name): (0, *shape)
        for layer in (0, 2)
        for name, shape in (("gate_up_proj", (12, 16)), ("down_proj", (16, 6)))
    }
    rest = {path: array for path, array in weights.items() if "experts" not in path}
    assert is_same({path: weights_of(loaded)[path] for path in rest}, rest)
    assert not [name for name in read if ".experts." in name]
    num_bytes = sum(array.nbytes for array in rest.values())
    assert seen[-1] == (num_bytes, num_bytes)


def test_experts_that_are_not_read_are_checked_all_the_same(tmp_path):
    save_tiny(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(BadFileError, match=f"{EXPERT} is missing"):
        params.load(tmp_path, routed_experts=False)


def test_a_head_beside_tied_embeddings_must_be_the_embedding(tmp_path):
    params.save(make_model(replace(CONFIG, tie_word_embeddings=True)), tmp_path)
    path = tmp_path / "model.safetensors"

    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(path, copy)
    assert params.load(tmp_path).lm_head is None
    edit_tensors(path, lambda t: t["lm_head.weight"].__setitem__((3, 3), 7))
    with pytest.raises(BadFileError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        params.load(tmp_path)


def test_rotary_frequencies_of_old_files_are_ignored(tmp_path):
    weights = save_tiny(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tmp_path / "model.safetensors", lambda t: t.update({name: np.ones(2, np.float32)}))
    assert is_same(weights_of(params.load(tmp_path)), weights)


def _rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def _set(name, array):
    return lambda tensors: tensors.update({name: array})


def _poison(name, value):
    return lambda tensors: tensors[name].reshape(-1).__setitem__(-1, value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.pop(EXPERT), f"{EXPERT} is missing"),
        (_rename("lm_head.weight", "head.weight"), "lm_head.weight is missing; head.weight belong"),
        (_set("model.layers.3.mlp.gate.weight", np.ones((4, 16), "f4")), "belongs to no parameter"),
        (_set("model.layers.1.mlp.gate.weight", np.ones((4, 16), "f4")), "belongs to no parameter"),
        (_set("model.norm.weight", np.ones(15, "f4")), "has shape [15], not [16]"),
        (_set("model.norm.weight", np.ones((1, 16), "f4")), "has shape [1, 16], not [16]"),
        (_set(EXPERT, np.ones((16, 6), "f4")), "has shape [16, 6], not [6, 16]"),
        (_set(FUSED, np.ones((4, 12, 16), "f4")), "mixes two layouts"),
        (_poison("model.norm.weight", np.nan), "model.norm.weight holds a number that is not fin"),
        (_poison(EXPERT, -np.inf), f"{EXPERT} holds a number that is not finite"),
        (lambda t: [t.popitem() for _ in range(len(t) - 3)], "too few for the 3 layers"),
    ],
)
def test_wrong_weights_are_refused(tmp_path, edit, said):
    save_tiny(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", edit)
    with pytest.raises(BadFileError) as caught:
        params.load(tmp_path)
    assert said in caught.value.cause
    assert caught.value.hint


def test_all_faults_are_told_at_once(tmp_path):
    save_tiny(tmp_path)

    def damage(tensors):
        for name in [name for name in tensors if ".layers.2.mlp.experts." in name]:
            tensors[f"{name}.old"] = tensors.pop(name)
        tensors["model.norm.weight"] = np.ones(3, np.float32)

    edit_tensors(tmp_path / "model.safetensors", damage)
    with pytest.raises(BadFileError) as caught:
        params.load(tmp_path)
    assert caught.value.cause.count("is missing") == 8
    assert "and 17 more" in caught.value.cause  # 12 missing, 12 unused, one shape


@pytest.mark.parametrize("dtype", ["F64", "I16", "F8_E4M3", "bf16"])
def test_types_other_than_known_floats_are_refused(tmp_path, dtype):
    save_tiny(tmp_path)
    path = tmp_path / "model.safetensors"
    header, data = split_file(path)
    header["model.norm.weight"]["dtype"] = dtype
    join_file(path, header, data)
    with pytest.raises(BadFileError, match=f"has type '{dtype}', which is none of BF16, F16, F32"):
        params.load(tmp_path)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"model_type": "qwen3_moe"}, "another architecture"),
        ({"model_type": None}, "another architecture"),
        ({"architectures": ["Qwen2MoeForSequenceClassification"]}, "another architecture"),
        ({"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight belongs to no"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 10**7}, "too few for the 10000000 layers"),
        ({"num_experts": 10**7}, "and 10000000 experts"),
        ({"num_experts": 5}, "experts.4.down_proj.weight is missing"),
        ({"hidden_size": 2**20}, "not [24, 1048576]"),
        ({"qkv_bias": False}, "q_proj.bias belongs to no parameter"),
        ({"mlp_only_layers": []}, "model.layers.1.mlp.experts.0.down_proj.weight is missing"),
        ({"num_key_value_heads": 4}, "has shape [8], not [16]"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, edit, said):
    save_tiny(tmp_path)
    edit_json(tmp_path / "config.json", lambda fields: fields.update(edit))
    with pytest.raises(BadFileError) as caught:
        params.load(tmp_path)
    assert said in caught.value.cause


SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def _point(name, file):
    return lambda index: index["weight_map"].update({name: file})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_point("lm_head.weight", "model-00001-of-00003.safetensors"), "lm_head.weight is not in"),
        (_point("surprise", SHARD), f"surprise is not in {SHARD}"),
        (_point("lm_head.weight", "model-00009-of-00003.safetensors"), "is missing"),
        (_point("lm_head.weight", "../model.safetensors"), "no .safetensors file name"),
        (_point("lm_head.weight", "/etc/passwd"), "no .safetensors file name"),
        (_point("lm_head.weight", "a\\b.safetensors"), "no .safetensors file name"),
        (_point("lm_head.weight", "a\0.safetensors"), "no .safetensors file name"),
        (_point("lm_head.weight", 3), "no .safetensors file name"),
        (lambda index: index["weight_map"].pop("lm_head.weight"), "not indexed"),
        (lambda index: index["weight_map"].clear(), "no weight_map"),
        (lambda index: index.update(weight_map=[]), "no weight_map"),
    ],
)
def test_an_index_that_contradicts_its_files_is_refused(tmp_path, edit, said):
    save_tiny(tmp_path, max_shard_bytes=7000)
    edit_json(tmp_path / INDEX, edit)
    with pytest.raises(BadFileError) as caught:
        params.load(tmp_path)
    assert said in caught.value.cause


def test_a_key_in_two_shards_is_refused(tmp_path):
    save_tiny(tmp_path, max_shard_bytes=7000)
    edit_tensors(tmp_path / SHARD, _set("lm_head.weight", np.ones((24, 16), "f4")))
    edit_tensors(
        tmp_path / "model-00001-of-00003.safetensors",
        _set("lm_head.weight", np.ones((24, 16), "f4")),
    )
    with pytest.raises(BadFileError, match="the index puts it into"):
        params.load(tmp_path)


def test_missing_files_are_named(tmp_path):
    save_tiny(tmp_path, max_shard_bytes=7000)
    os.remove(tmp_path / SHARD)
    with pytest.raises(BadFileError, match=f"{SHARD} is missing"):
        params.load(tmp_path)
    os.remove(tmp_path / INDEX)
    with pytest.raises(UsageError, match=r"neither model\.safetensors nor"):
        params.load(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UsageError, match=r"as model\.gguf"):
        params.load(tmp_path)
    (tmp_path / "model-1-of-2.bin").touch()
    with pytest.raises(UsageError) as caught:
        params.load(tmp_path)
    assert "save_pretrained" in caught.value.hint
    os.remove(tmp_path / "config.json")
    with pytest.raises(BadFileError, match=r"config\.json is missing"):
        params.load(tmp_path)


def test_two_sets_of_weights_are_refused(tmp_path):
    save_tiny(tmp_path, max_shard_bytes=7000)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(BadFileError, match="both"):
        params.load(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    for name in ("tiny-mow", tmp_path / "absent" / "x", "a\0b", "x" * 5000):
        with pytest.raises(UsageError, match="neither a checkpoint folder nor the name of one"):
            find_checkpoint(name)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a folder"):
        find_checkpoint(tmp_path / "file")


def test_a_card_without_weights_says_so():
    with pytest.raises(UsageError, match="small-moe is a card without weights") as caught:
        params.open_checkpoint("small-moe")
    assert "--trace small-moe" in caught.value.hint
    with pytest.raises(UsageError, match="card without weights") as caught:
        params.open_checkpoint("reference-study")
    assert "--trace" not in caught.value.hint


def test_no_name_is_not_the_working_folder(monkeypatch, tmp_path):
    save_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is empty"):
        params.open_checkpoint("")


def test_a_checkpoint_can_be_checked_without_reading_a_weight(monkeypatch, tmp_path):
    save_tiny(tmp_path, max_shard_bytes=2000)
    monkeypatch.setattr(params, "read_tensor", None)
    assert params.check(tmp_path).path == tmp_path
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_key_value_heads"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFileError, match=r"k_proj.weight has shape \[8, 16\], not \[16, 16\]"):
        params.check(tmp_path)


def test_a_model_of_the_hub_is_found_where_it_was_downloaded(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(hub_id, local_files_only):
        asked.append((hub_id, local_files_only))
        if hub_id != "Qwen/Qwen1.5-MoE-A2.7B":
            raise FileNotFoundError(hub_id)
        return str(tmp_path)

    hub = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    # By its own name and by that of its card, and never from the network.
    for name in ("Qwen/Qwen1.5-MoE-A2.7B", "qwen1.5-moe-a2.7b"):
        assert find_checkpoint(name) == tmp_path
    with pytest.raises(UsageError) as caught:
        find_checkpoint("Qwen/Other")
    assert caught.value.hint == "Download it with: hf download Qwen/Other"
    assert all(is_local for _, is_local in asked)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError) as caught:
        find_checkpoint("Qwen/Other")
    assert "moejax[hub]" in caught.value.hint


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="thesis"):
        save_tiny(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="something else"):
        save_tiny(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "thesis.tex"]
    with pytest.raises(UsageError, match="not a folder"):
        save_tiny(tmp_path / "thesis.tex")
    with pytest.raises(UsageError, match="cannot be written"):
        save_tiny(tmp_path / "thesis.tex" / "m")


def test_an_older_checkpoint_is_replaced_and_its_tokenizer_stays(tmp_path):
    (tmp_path / "tokenizer.json").touch()
    save_tiny(tmp_path, max_shard_bytes=7000)
    weights = save_tiny(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert is_same(weights_of(params.load(tmp_path)), weights)


def test_a_failed_save_leaves_the_older_checkpoint(monkeypatch, tmp_path):
    weights = save_tiny(tmp_path)
    files = sorted(os.listdir(tmp_path))
    module = sys.modules["moejax.qwen_moe._checkpoint_write"]

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_json", fail)
    with pytest.raises(UsageError, match="No space left"):
        save_tiny(tmp_path)
    assert sorted(os.listdir(tmp_path)) == files
    assert is_same(weights_of(params.load(tmp_path)), weights)


def test_settings_of_save_are_checked(tmp_path):
    model = make_model()
    with pytest.raises(UsageError, match="unknown layout 'flat'"):
        params.save(model, tmp_path, layout="flat")
    with pytest.raises(UsageError, match="holds nothing"):
        params.save(model, tmp_path, max_shard_bytes=0)
    assert not os.listdir(tmp_path)


def test_the_config_states_the_type_of_the_weights(tmp_path):
    params.save(make_model(dtype=jnp.float32), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
