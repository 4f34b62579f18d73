"""The host-driven baseline in miniature: it computes the model, and counts what it copies."""

import importlib
import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "baselines"))

host_driven_decode: Any = importlib.import_module("host_driven_decode")
host_driven_model: Any = importlib.import_module("host_driven_model")
Config, Decoder = host_driven_model.Config, host_driven_model.Decoder
ExpertCache, make_model = host_driven_model.ExpertCache, host_driven_model.make_model

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products this small take longest to share."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
FLAGS = [
    word
    for name, value in SIZES.items()
    for word in (f"--{'layers' if 'layers' in name else name.replace('_', '-')}", str(value))
]


@pytest.fixture(scope="module")
def model():
    return make_model(Config(**SIZES), torch.float32, "cpu")


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = host_driven_decode.main(
            [*FLAGS, "--dtype", "float32", "--device", "cpu", *arguments]
        )
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert code == 0
        assert lines[0]["kind"] == "environment"
        return lines[1:]

    return call


def draw_routing(batch_size, num_steps=9):
    rng = np.random.default_rng(0)
    shape = (num_steps, SIZES["num_hidden_layers"], batch_size)
    rows = [rng.permutation(SIZES["num_experts"])[:3] for _ in range(int(np.prod(shape)))]
    return np.array(rows, np.uint8).reshape(*shape[:2], batch_size * 3)


def decode(decoder, num_steps, replayed=None):
    """Logits of greedy decoding from position 0."""
    token_ids, steps = torch.arange(decoder.batch_size) + 5, []
    with torch.inference_mode():
        for position in range(num_steps):
            chosen = None if replayed is None else replayed[position]
            steps.append((token_ids, decoder.step(token_ids, position, chosen)))
            token_ids = steps[-1][1].argmax(-1)
    return steps


def new_decoder(model, batch_size, num_slots):
    return Decoder(model, batch_size, num_slots, context=0, num_positions=12)


def test_logits_do_not_depend_on_what_lies_in_slots(capsys):
    assert host_driven_decode.main(["--check", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(row["bit_identical"] for row in rows)
    misses = {(row["batch_size"], row["slots"]): row["misses"] for row in rows}
    assert misses[1, 1] > misses[1, 3] > misses[1, 7] > 0
    assert misses[4, 1] > misses[4, 3] > misses[4, 7] > 0


def test_the_check_notices_an_expert_that_was_not_copied(capsys, monkeypatch):
    copy = ExpertCache.copy

    def forget_one(cache, expert):
        if expert:
            copy(cache, expert)

    monkeypatch.setattr(ExpertCache, "copy", forget_one)
    assert host_driven_decode.main(["--check", "--device", "cpu"]) == 1
    assert '"bit_identical": false' in capsys.readouterr().out


@pytest.mark.parametrize("is_normalized", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_it_computes_what_transformers_computes(is_normalized, batch_size):
    transformers = pytest.importorskip("transformers")
    config = Config(**SIZES, norm_topk_prob=is_normalized, rope_theta=1e4)
    model = make_model(config, torch.float32, "cpu")
    # Larger weights than a trained model's, so that attention and routing are far from uniform.
    for layer in model.layers:
        for weights in (layer.qkv, layer.qkv_bias, layer.router, layer.experts):
            weights.mul_(15)
    reference = make_reference(transformers, model)
    steps = decode(new_decoder(model, batch_size, 4), num_steps=8)
    token_ids = torch.stack([token_ids for token_ids, _ in steps], 1)
    logits = torch.stack([logits for _, logits in steps], 1)
    with torch.inference_mode():
        expected = reference(token_ids).logits
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def make_reference(transformers, model):
    config = model.config
    settings = {name: getattr(config, name) for name in (*SIZES, "rms_norm_eps", "norm_topk_prob")}
    reference = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **settings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
        )
    ).eval()
    weights = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.final_norm,
        "lm_head.weight": model.head,
    }
    num_kv = config.num_key_value_heads * config.head_dim
    num_shared, ffn = config.shared_expert_intermediate_size, config.moe_intermediate_size
    for number, layer in enumerate(model.layers):
        parts = zip(
            "qkv",
            layer.qkv.split((config.hidden_size, num_kv, num_kv)),
            layer.qkv_bias.split((config.hidden_size, num_kv, num_kv)),
            strict=True,
        )
        named = {
            "input_layernorm.weight": layer.input_norm,
            "post_attention_layernorm.weight": layer.post_norm,
            "self_attn.o_proj.weight": layer.output,
            "mlp.gate.weight": layer.router,
            "mlp.shared_expert_gate.weight": layer.shared_gate,
            "mlp.shared_expert.gate_proj.weight": layer.shared_gate_up[:num_shared],
            "mlp.shared_expert.up_proj.weight": layer.shared_gate_up[num_shared:],
            "mlp.shared_expert.down_proj.weight": layer.shared_down,
            "mlp.experts.gate_up_proj": layer.experts[:, : 2 * ffn],
            "mlp.experts.down_proj": layer.experts[:, 2 * ffn :].reshape(
                config.num_experts, config.hidden_size, ffn
            ),
        }
        for letter, matrix, bias in parts:
            named[f"self_attn.{letter}_proj.weight"] = matrix
            named[f"self_attn.{letter}_proj.bias"] = bias
        weights |= {f"model.layers.{number}.{name}": value for name, value in named.items()}
    reference.load_state_dict(weights)
    return reference


def count_misses(routing, batch_size, num_slots):
    """Misses of an LRU cache a layer, where whoever is demanded by a step is not evicted by it."""
    caches = [OrderedDict() for _ in range(routing.shape[1])]
    passes = []
    for _ in range(1 + host_driven_decode.NUM_WARM_UP_PASSES):
        misses = 0
        for step in routing:
            for cache, experts in zip(caches, step.tolist(), strict=True):
                distinct = list(dict.fromkeys(experts)) if batch_size == 1 else sorted({*experts})
                missing = [expert for expert in distinct if expert not in cache]
                for expert in distinct:
                    if expert in cache:
                        cache.move_to_end(expert)
                for expert in missing:
                    if len(cache) == num_slots:
                        cache.popitem(last=False)
                    cache[expert] = None
                misses += len(missing)
        passes.append(misses)
    return passes[-1]


@pytest.mark.parametrize(("batch_size", "num_slots"), [(1, 3), (1, 5), (2, 7), (2, 10)])
def test_misses_are_those_of_lru_on_the_replayed_routing(run, tmp_path, batch_size, num_slots):
    routing = draw_routing(batch_size)
    np.savez(tmp_path / "routing.npz", experts=routing)
    case = f"{batch_size}:{num_slots}:{tmp_path / 'routing.npz'}"
    (row,) = run("--case", case, "--context", "3")
    misses = count_misses(routing, batch_size, num_slots)
    demands = sum(len({*experts}) for step in routing.tolist() for experts in step)
    assert row["misses_per_step"] == misses / len(routing)
    assert row["hit_ratio"] == pytest.approx(1 - misses / demands)
    assert (row["hit_ratio"] == 1) == (num_slots == 10)
    assert len(row["step_s"]["samples"]) == len(routing)
    samples = row["step_s"]["samples"]
    assert 0 < min(samples) <= row["step_s"]["median"] <= row["step_s"]["p95"] <= max(samples)
    about = {key: row[key] for key in ("system", "batch_size", "slots", "replay", "context")}
    assert about == {
        "system": "host-driven",
        "batch_size": batch_size,
        "slots": num_slots,
        "replay": "routing.npz",
        "context": 3,
    }


def test_replayed_experts_are_the_ones_computed_with(model):
    routing = torch.from_numpy(draw_routing(2).astype(np.int64)).view(9, 2, 2, 3)
    logits = decode(new_decoder(model, 2, 10), 3, routing)[0][1]
    again = decode(new_decoder(model, 2, 10), 3, routing.flip(-1))[0][1]
    other = decode(new_decoder(model, 2, 10), 3, (routing + 1) % 10)[0][1]
    torch.testing.assert_close(logits, again)
    assert not torch.allclose(logits, other, atol=1e-5)


def test_more_experts_than_slots_are_computed_in_waves(model):
    routing = torch.arange(9).view(1, 1, 3, 3).expand(2, 2, 3, 3)
    decoder = new_decoder(model, 3, 2)
    few = decode(decoder, 2, routing)
    many = decode(new_decoder(model, 3, 10), 2, routing)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(few, many, strict=True))
    assert decoder.num_demands == 2 * 2 * 9
    # What lies in the two slots after a step are hits of the next.
    assert decoder.num_misses == 2 * (9 + 7)


def test_the_least_recently_used_expert_makes_room(model):
    cache = ExpertCache(model.layers[0], model.config, 3)
    assert cache.place([4, 5, 6]) == [4, 5, 6]
    assert cache.place([4]) == []
    assert cache.place([7, 6]) == [7]
    assert set(cache.slot_of) == {4, 6, 7}
    assert list(cache.waves([1, 6, 2, 7])) == [[6, 7, 1], [2]]
    slots = {slot.packed.data_ptr() for slot in cache.slot_of.values()}
    assert slots == {slot.packed.data_ptr() for slot in cache.slots}


def test_each_case_is_timed_in_each_variant(run):
    rows = run("--case", "1:4", "--case", "2:10", "--variant", "side-stream,one-stream",
               "--num-steps", "3")  # fmt: skip
    assert [(row["batch_size"], row["slots"], row["variant"]) for row in rows] == [
        (1, 4, "side-stream"),
        (1, 4, "one-stream"),
        (2, 10, "side-stream"),
        (2, 10, "one-stream"),
    ]
    assert [len(row["step_s"]["samples"]) for row in rows] == [3] * 4


def test_a_case_that_fails_says_so_and_the_next_one_runs(run, tmp_path):
    np.savez(tmp_path / "wide.npz", experts=draw_routing(2))
    np.savez(tmp_path / "high.npz", experts=draw_routing(1) + 1)
    rows = run("--case", f"1:4:{tmp_path / 'wide.npz'}", "--case", f"1:4:{tmp_path / 'high.npz'}",
               "--case", "1:4:absent.npz", "--case", "1:4", "--num-steps", "2")  # fmt: skip
    assert "(9, 2, 6)" in rows[0]["error"]
    assert "0 to 9" in rows[1]["error"]
    assert "absent.npz" in rows[2]["error"]
    assert "step_s" in rows[3]


def test_nothing_runs_past_its_time(run):
    (row,) = run("--case", "1:4", "--max-seconds", "0")
    assert "not started" in row["error"]


def test_a_case_cut_short_before_it_is_warm_has_no_times(model):
    options = host_driven_decode.read_options(["--case", "1:4", "--device", "cpu"])
    row = host_driven_decode.attempt(model, options.case[0], "one-stream", options, deadline_s=0)
    assert "before the case was warm" in row["error"]


def test_sizes_come_from_the_file_unless_flags_say_otherwise(tmp_path):
    path = tmp_path / "config.json"
    fields = {**SIZES, "rope_parameters": {"rope_theta": 500.0}, "architectures": ["x"]}
    path.write_text(json.dumps(fields))
    options = [str(path), "--case", "1:4", "--layers", "1", "--num-experts", "6"]
    config = host_driven_decode.read_config(host_driven_decode.read_options(options))
    expected = {**SIZES, "num_hidden_layers": 1, "num_experts": 6, "rope_theta": 500.0}
    assert config == Config(**expected)
    path.write_text(json.dumps({**fields, "mlp_only_layers": [1]}))
    with pytest.raises(SystemExit, match="layers without experts"):
        host_driven_decode.read_config(host_driven_decode.read_options(options))


@pytest.mark.parametrize("case", ["0:4", "1:0", "1", "a:b"])
def test_cases_that_make_no_sense_are_refused(case, capsys):
    with pytest.raises(SystemExit):
        host_driven_decode.read_options(["--case", case])
    assert "--case" in capsys.readouterr().err


def test_layers_repeat_the_experts_that_were_made():
    model = make_model(Config(**{**SIZES, "num_hidden_layers": 3}), torch.float32, "cpu", 2)
    first, second, third = (layer.experts for layer in model.layers)
    assert third is first
    assert second is not first
    assert not torch.equal(first, second)


def test_rows_of_an_expert_follow_each_other():
    ranges = host_driven_model.expert_ranges([3, 1, 3, 0], is_sorted=True)
    assert ranges == {0: (0, 1), 1: (1, 2), 3: (2, 4)}
    assert host_driven_model.expert_ranges([3, 1], is_sorted=False) == {3: (0, 1), 1: (1, 2)}
