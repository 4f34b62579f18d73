"""Every mistake a user can make ends with its exit code, its cause and a cure, and no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax import cli
from moejax.cards import models_dir
from moejax.trace import save_trace

from ._tiny import NUM_EXPERTS, NUM_LAYERS, TOPK, make_trace

NUM_TOKENS = 60


def pack(header: dict | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def unpack(content: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def change_entry(content: bytes, **entry) -> bytes:
    """The same file, but the header says something else about `experts`."""
    header, data = unpack(content)
    header["experts"] |= entry
    return pack(header, data)


def change_data(content: bytes, tensor: str, value: bytes, *, is_rehashed: bool = False) -> bytes:
    """The same file with other bytes at the start of one tensor."""
    header, data = unpack(content)
    begin, end = header[tensor]["data_offsets"]
    data = data[:begin] + value + data[begin + len(value) :]
    if is_rehashed:
        experts = np.frombuffer(data[begin:end], np.uint8).reshape(header[tensor]["shape"])
        about = json.loads(header["__metadata__"]["moejax"])
        about["sha256"] = make_trace(experts=experts).sha256
        header["__metadata__"]["moejax"] = json.dumps(about)
    return pack(header, data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of sound and unsound files that the cases name."""
    folder = tmp_path_factory.mktemp("bad")
    write_traces(folder)
    write_recordings(folder)
    write_cards(folder)
    write_runs(folder)
    return folder


def write_traces(folder: Path) -> None:
    save_trace(make_trace(), folder / "good.safetensors")
    save_trace(make_trace(seed=1), folder / "other.safetensors")
    few = make_trace(experts=make_trace().experts[:, :5])
    save_trace(few, folder / "few-layers.safetensors")
    save_trace(
        make_trace(routing_weights=np.ones((NUM_TOKENS, NUM_LAYERS, TOPK), np.float16)),
        folder / "weights.safetensors",
    )
    good = (folder / "good.safetensors").read_bytes()
    weights = (folder / "weights.safetensors").read_bytes()
    header, data = unpack(good)
    text = json.dumps(header).encode()
    start = NUM_TOKENS.to_bytes(8, "little")
    contents = {
        "empty": b"",
        "short": good[:5],
        "cut-header": good[:40],
        "cut-data": good[:-9],
        "longer": good + b"\0",
        "huge-header": (2**63 - 1).to_bytes(8, "little") + good[8:],
        "no-json": pack(b"{" + b"\xff" * 30, data),
        "deep-json": pack(b"[" * 100_000, data),
        "twice": pack(b'{"experts": 1, ' + text[1:], data),
        "list": pack(b"[]", data),
        "overlap": change_entry(good, data_offsets=[8, 8 + NUM_TOKENS * NUM_LAYERS * TOPK]),
        "outside": change_entry(good, data_offsets=[2**40, 2**40 + NUM_TOKENS * NUM_LAYERS * TOPK]),
        "negative": change_entry(good, shape=[-1, NUM_LAYERS, TOPK]),
        "overflow": change_entry(good, shape=[2**62, 2**62, 2]),
        "float-ids": change_entry(good, dtype="F32"),
        "other-type": change_entry(good, dtype="I64"),
        "no-metadata": pack({k: v for k, v in header.items() if k != "__metadata__"}, data),
        "changed": change_data(good, "experts", b"\x01"),
        "large-id": change_data(good, "experts", bytes([NUM_EXPERTS]), is_rehashed=True),
        "nan": change_data(weights, "routing_weights", np.float16("nan").tobytes()),
        "late-start": change_data(good, "request_start", start),
    }
    for name, content in contents.items():
        (folder / f"{name}.safetensors").write_bytes(content)


def write_recordings(folder: Path) -> None:
    ids = make_trace().experts.astype(np.int16)
    np.savez(folder / "good.npz", expert_ids=ids)
    np.savez(folder / "pickle.npz", expert_ids=np.array([{"a": 1}], dtype=object))
    np.savez(folder / "no-ids.npz", tokens=ids)
    np.savez(folder / "flat.npz", expert_ids=ids.ravel())
    np.savez(folder / "offsets.npz", expert_ids=ids, offsets=np.array([0, 99]))
    content = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(content[: len(content) // 2])
    (folder / "spoilt.npz").write_bytes(content[:200] + b"\xff" * 64 + content[264:])
    texts = {
        "columns.csv": "token,expert\n0,1\n",
        "letters.csv": "token,layer,expert\n0,0,many\n",
        "rowless.csv": "token,layer,expert\n",
        "broken.jsonl": '{"token_idx": 0, "layer_idx": 0, "selected_ids": [1]}\n{"token_idx": 1,\n',
        "fields.jsonl": '{"token_idx": 0, "selected_ids": [1]}\n',
    }
    for name, text in texts.items():
        (folder / name).write_text(text)


def write_cards(folder: Path) -> None:
    card = (models_dir() / "tiny-moe.toml").read_text()
    profile = (models_dir() / "hardware" / "rtx-3090.toml").read_text()
    first_value = "value = 25769803776.0"
    assert "num_hidden_layers = 8" in card
    assert first_value in profile
    texts = {
        "cut.toml": card[: card.index("num_hidden_layers") + 20],
        "negative.toml": card.replace("num_hidden_layers = 8", "num_hidden_layers = -8"),
        "words.toml": card.replace("num_hidden_layers = 8", 'num_hidden_layers = "eight"'),
        "nan-profile.toml": profile.replace(first_value, "value = nan"),
        "zero-profile.toml": profile.replace(first_value, "value = 0"),
        "odd-profile.toml": profile.replace("[constants.vram_bytes]", "[constants.vram]"),
        "lacking.json": '{"model_type": "qwen2_moe", "hidden_size": 64}',
        "odd-type.json": '{"model_type": "gpt2"}',
        "list.json": "[1, 2]",
        "settings.toml": "[bench]\nbatch-sise = 4\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)


def write_runs(folder: Path) -> None:
    contents = {
        "no-run": None,
        "cut-run": '{"schema": "moejax.bench/1", "grid": [',
        "old-run": '{"schema": "moejax.bench/0"}',
        "empty-grid": json.dumps(
            {"schema": "moejax.bench/1"}
            | {name: {"name": "x", "expert_bytes": 1} for name in ("model", "hardware", "trace")}
            | {name: {} for name in ("environment", "settings", "hit_curve", "measured")}
            | {"grid": []}
        ),
    }
    for name, text in contents.items():
        (folder / name).mkdir()
        if text is not None:
            (folder / name / "results.json").write_text(text)


REPLAY = "simulate --trace good.safetensors"
TINY = "bench --no-measure --quick --model tiny-moe --out new --trace good.safetensors"

USAGE = [
    ("bogus", "no such command 'bogus'"),
    ("bench --bogus", "no such option: --bogus"),
    ("bench surplus", "surplus"),
    ("bench -o xml", "'xml'"),
    ("bench --model", "--model"),
    ("bench --model no-such-model", "unknown model 'no-such-model'"),
    ("bench --model Some/Model --offline", "Some/Model has no card"),
    ("bench --hardware no-such-card", "unknown hardware 'no-such-card'"),
    ("bench --workload no-such", "'no-such' is not known"),
    ("bench --strategies lru,no-such", "'no-such' is not known"),
    ("bench --strategies lru,lru", "different names"),
    ("bench --strategies ,", "different names"),
    ("bench --runs 0", "--runs"),
    ("bench --runs -3", "--runs"),
    ("bench --runs many", "--runs"),
    ("bench --batch-sizes 0", "--batch-sizes: 0 is out of range"),
    ("bench --batch-sizes 256", "--batch-sizes: 256 is out of range"),
    ("bench --batch-sizes a", "--batch-sizes: 'a' is not a list"),
    ("bench --batch-sizes 1,1", "repeats a number"),
    ("bench --slots -1", "--slots"),
    ("bench --slots 61", "--slots 61 exceeds the 60 experts"),
    ("bench --slots 4 --budget 2GB", "--slots and --budget exclude each other"),
    ("bench --budget x", "'x' is not a size"),
    ("bench --budget -2GB", "-2GB"),
    ("bench --budget nan", "'nan' is not a size"),
    ("bench --budget 2QB", "'2QB' is not a size"),
    ("bench --dispatch neither", "'neither'"),
    ("bench --seed -1", "--seed"),
    ("bench --trace good.safetensors --workload uniform", "exclude each other"),
    (f"{TINY} --strategies gate_look", "`lookahead`"),
    ("bench --out good.npz", "good.npz is a file"),
    ("bench --out good.npz/run", "good.npz is a file"),
    ("simulate --strategy no-such", "'no-such' is not known"),
    (f"{REPLAY} --slots -1", "--slots"),
    (f"{REPLAY} --slots 17", "--slots: 17 is out of range"),
    (f"{REPLAY} --slots 4 --capacity 1MB", "--slots and --capacity exclude"),
    (f"{REPLAY} --capacity big", "--capacity: 'big' is not a size"),
    (f"{REPLAY} --scope both", "'both'"),
    (f"{REPLAY} --scope pool --hardware rtx-3090", "not a pool"),
    (f"{REPLAY} --scope pool --strategy lru,sieve", "sieve keeps each layer apart"),
    (f"{REPLAY} --reset-per-request --batch-size 2", "--reset-per-request"),
    (f"{REPLAY} --max-steps 0", "--max-steps"),
    (f"{REPLAY} --workload uniform", "exclude each other"),
    (f"{REPLAY} --strategy top_k", "top_k learns from a profile"),
    (f"{REPLAY} --strategy top_k --profile good.safetensors", "the profile is the trace itself"),
    (f"{REPLAY} --strategy top_k --profile few-layers.safetensors", "the profile has"),
    (f"{REPLAY} --strategy gate_look --profile other.safetensors", "`lookahead`"),
    ("tune-cache", "--budget"),
    ("tune-cache --budget x", "'x' is not a size"),
    ("tune-cache --budget 2GB --pinned-budget x", "--pinned-budget: 'x' is not a size"),
    ("tune-cache --budget 2GB --objective best", "'best' is not known"),
    ("tune-cache --budget 2GB --strategy no-such", "'no-such' is not known"),
    ("tune-cache --budget 2GB --workload no-such", "'no-such' is not known"),
    ("tune-cache --budget 2GB --out plan.toml", "plan.toml is not a .json file"),
    ("tune-cache --budget 2GB --trace good.safetensors --workload uniform", "exclude each other"),
    ("trace make --out t.safetensors --workload no-such", "'no-such' is not known"),
    ("trace import good.npz --num-experts 0", "--num-experts"),
    ("trace import good.npz --out good.npz/t.safetensors", "cannot be written"),
    ("tune-cache --budget 2GB --model tiny-moe", "the workload 'qwen1.5-moe' routes 24 layers"),
    ("bench --model tiny-moe", "the workload 'qwen1.5-moe' routes 24 layers"),
    ("validate -o xml", "'xml'"),
]

INFEASIBLE = [
    ("bench --budget 0.001GB", "17301504"),
    ("tune-cache --budget 0.001GB", "17301504"),
    ("tune-cache --budget 0", "17301504"),
    ("tune-cache --budget 2GB --include-dense", "3.8"),
    ("estimate --budget 2GB --include-dense", "3.8"),
    (f"{REPLAY} --capacity 1kB", "49152"),
]

BAD_TRACES = [
    ("missing", "No such file"),
    ("empty", "does not begin like"),
    ("short", "does not begin like"),
    ("cut-header", "header is cut off"),
    ("cut-data", "the header announces"),
    ("longer", "the header announces"),
    ("huge-header", "does not begin like"),
    ("no-json", "is not a sound trace"),
    ("deep-json", "is not a sound trace"),
    ("twice", "names something twice"),
    ("list", "it holds no table"),
    ("overlap", "overlap or leave a hole"),
    ("outside", "overlap or leave a hole"),
    ("negative", "no list of whole numbers"),
    ("overflow", "does not fill bytes"),
    ("float-ids", "has type 'F32'"),
    ("other-type", "does not fill bytes"),
    ("no-metadata", "no metadata of moejax"),
    ("changed", "have the hash"),
    ("large-id", f"hold {NUM_EXPERTS}, but there are {NUM_EXPERTS} experts"),
    ("nan", "not finite"),
    ("late-start", "request_start does not rise from 0"),
]

BAD_FILES = [
    *((f"simulate --trace {name}.safetensors", cause) for name, cause in BAD_TRACES),
    ("simulate --trace .", "not a file"),
    ("simulate --trace good.npz", "it is a zip archive"),
    ("trace info cut-data.safetensors", "the header announces"),
    (f"{REPLAY} --strategy top_k --profile missing.safetensors", "No such file"),
    ("bench --trace few-layers.safetensors --model tiny-moe --out new", "routes 5 layers"),
    ("tune-cache --budget 2GB --trace good.safetensors -m olmoe-1b-7b", "routes 8 layers"),
    (f"{REPLAY} --hardware rtx-3090 --model mixtral-8x7b", "routes 8 layers"),
    ("trace import missing.npz", "No such file"),
    ("trace import .", "is not a file"),
    ("trace import empty.safetensors", "is empty"),
    ("trace import good.safetensors", "looks like a safetensors file"),
    ("trace import pickle.npz", "not a sound .npz"),
    ("trace import cut.npz", "not a sound .npz"),
    ("trace import spoilt.npz", "not a sound .npz"),
    ("trace import no-ids.npz", "lacks expert_ids"),
    ("trace import flat.npz", "expert_ids is int16 of shape"),
    ("trace import offsets.npz", "request_start does not rise"),
    ("trace import good.npz --num-experts 9", "but there are 9 experts"),
    ("trace import columns.csv", "no column 'layer'"),
    ("trace import letters.csv", "many"),
    ("trace import rowless.csv", "no row"),
    ("trace import broken.jsonl", "record 2"),
    ("trace import fields.jsonl", "record 1"),
    ("estimate --model missing.toml", "missing.toml is not a file"),
    ("estimate --model no-run", "config.json is not a file"),
    ("estimate --model cut.toml", "cannot be read"),
    ("estimate --model negative.toml", "num_hidden_layers = -8 is not in"),
    ("estimate --model words.toml", "'eight' is not a whole number"),
    ("estimate --model lacking.json", "lacks"),
    ("estimate --model odd-type.json", "gpt2"),
    ("estimate --model list.json", "not a table of fields"),
    ("estimate --hardware missing.toml", "missing.toml is not a file"),
    ("estimate --hardware nan-profile.toml", "vram_bytes = nan is not finite"),
    ("estimate --hardware zero-profile.toml", "must be positive"),
    ("estimate --hardware odd-profile.toml", "vram is not a known constant"),
    ("report missing", "missing"),
    ("report no-run", "no-run"),
    ("report cut-run", "is not JSON"),
    ("report old-run", "'moejax.bench/0'"),
    ("report empty-grid", "grid"),
    ("fit no-run", "no-run"),
    ("fit columns.csv", "columns.csv"),
    ("validate missing.toml", "1 of 1 path is not sound"),
    ("--config settings.toml env", "'batch-sise' is no option of bench"),
    ("--config missing.toml env", "missing.toml cannot be read"),
]

CASES = [
    *((2, *case) for case in USAGE),
    *((3, *case) for case in INFEASIBLE),
    *((4, *case) for case in BAD_FILES),
]


@pytest.mark.parametrize(("code", "command", "cause"), CASES, ids=[case[1] for case in CASES])
def test_a_mistake_has_its_code_cause_and_cure(folder, monkeypatch, capsys, code, command, cause):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    found = cli.main(command.split())
    out, err = capsys.readouterr()
    assert found == code, err
    if not command.startswith("validate missing"):
        assert out == ""
    check_message(err, cause, code)
    assert sorted(folder.rglob("*")) == before


def check_message(err: str, cause: str, code: int) -> None:
    error, empty, hint = err.splitlines()
    assert error.startswith("error: ")
    assert empty == ""
    assert hint.startswith("hint: ")
    assert len(hint) > len("hint: ") + 8
    assert cause in (err if code == 3 else error)


@pytest.mark.parametrize(
    ("variable", "value", "cause"),
    [
        ("MOEJAX_BENCH_RUNS", "0", "--runs"),
        ("MOEJAX_BATCH_SIZES", "a", "--batch-sizes: 'a'"),
        ("MOEJAX_QUICK", "perhaps", "MOEJAX_QUICK='perhaps'"),
        ("MOEJAX_BUDGET", "x", "--budget: 'x' is not a size"),
    ],
)
def test_a_variable_is_checked_like_an_option(folder, monkeypatch, capsys, variable, value, cause):
    monkeypatch.chdir(folder)
    monkeypatch.setenv(variable, value)
    assert cli.main(["bench"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    check_message(err, cause, 2)


@pytest.mark.parametrize("command", ["bench --out run", "bench --out new/run"])
def test_a_read_only_folder_is_refused_before_the_work(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    # Root may write anywhere, so the answer of the system is given by hand.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert cli.main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    check_message(err, "is read-only", 2)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("bench --no-measure --quick --runs 1 --out new", "moejax.bench.run_bench"),
        ("tune-cache --budget 2GB --out new.json", "moejax.cli.tune_cache.make_plan"),
        ("trace import good.npz --num-experts 16 --out new.safetensors", "moejax.trace.save_trace"),
        ("simulate --trace good.safetensors", "moejax.simulate.sweep"),
    ],
)
def test_an_interrupt_leaves_nothing_behind(folder, monkeypatch, capsys, command, place):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(folder)
    monkeypatch.setattr(place, interrupt)
    before = sorted(folder.rglob("*"))
    assert cli.main(command.split()) == 130
    assert capsys.readouterr().out == ""
    assert sorted(folder.rglob("*")) == before


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    profile = tmp_path / "profile.toml"
    profile.write_text("old")
    measurements = models_dir() / "hardware" / "measurements" / "transfer.csv"
    monkeypatch.setattr(os, "replace", interrupt)
    assert cli.main(["fit", str(measurements), "--out", str(profile)]) == 130
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["profile.toml"]
    assert profile.read_text() == "old"


@pytest.mark.parametrize(
    ("command", "code"),
    [("bench --runs 0", 2), ("estimate --budget 1kB", 3), ("trace info cut-data.safetensors", 4)],
)
def test_the_process_ends_the_same_way(folder, command, code):
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "moejax", *command.split()],
        env={**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    check_message(done.stderr, "", code)


def test_a_p99_objective_is_no_mistake(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    command = "tune-cache --budget 2MB --trace good.safetensors --objective p99 -o json"
    assert cli.main(command.split()) == 0
    assert json.loads(capsys.readouterr().out)["used_bytes"] <= 2_000_000
