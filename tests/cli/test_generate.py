import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import cli, engine
from moejax.cli.generate import _print_now
from moejax.qwen_moe.params import load

from ._checkpoint import write_checkpoint

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
BYTES = [*"né".encode(), 0xE2, 0x82, 0xAC, 0xFF, *b"!"]
"""Tokens of the stub below: whole characters, one in three pieces, a byte of none, and more."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("generate") / "tiny", chat_template=TEMPLATE)


@pytest.fixture
def generate(capsys, folder):
    def run(*arguments: str | Path, model: Path = folder) -> tuple[int, str, str]:
        code = cli.main(["generate", "--model", str(model), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def read(generate):
    """What a run with `-o json` says."""

    def run(*arguments: str | Path, **options) -> dict:
        code, out, err = generate(*arguments, "-o", "json", **options)
        assert (code, err) == (0, "")
        return json.loads(out)

    return run


class StubEngine:
    """Keeps what it was asked for and always says `BYTES`; fails after `num_steps` of them."""

    calls: list[dict]
    failure: BaseException | None = None
    num_steps = len(BYTES)
    step_s = (0.1, 0.2, 0.3)

    def __init__(self, model):
        self.model = model

    def generate(self, prompts, **settings):
        self.calls.append({"prompts": prompts, **settings})
        return StubGeneration(self)


class StubGeneration:
    def __init__(self, stub):
        self.stub = stub
        self.token_ids, self.finish_reasons = [BYTES], ["length"]
        self.timing = SimpleNamespace(compile_s=2.0, ttft_s=0.5, step_s=list(stub.step_s))

    def __iter__(self):
        for token in BYTES[: self.stub.num_steps]:
            yield SimpleNamespace(token_ids=np.array([token]), is_live=np.array([True]))
        if self.stub.failure is not None:
            raise self.stub.failure


@pytest.fixture
def stub(monkeypatch) -> type[StubEngine]:
    """In place of the engine, where only the command itself is tested."""
    own = type("OwnStub", (StubEngine,), {"calls": []})
    monkeypatch.setattr(engine, "Engine", own)
    return own


@pytest.fixture(scope="module")
def whole(folder) -> dict:
    """What the model says after `The `, with logits."""
    command = ["generate", "--model", str(folder), "--prompt-ids", "84,104,101,32", "--logits"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main([*command, "--max-new-tokens", "8", "-o", "json"]) == 0
    return json.loads(out.getvalue())


def test_the_record_holds_what_was_computed(whole, folder):
    assert (whole["model"], whole["dtype"], whole["prompt"]) == ("tiny", "float32", None)
    assert whole["prompt_ids"] == list(b"The ")
    assert (len(whole["token_ids"]), whole["finish_reason"]) == (8, "length")
    assert len(whole["tpot_s"]["samples"]) == 7
    assert min(whole["ttft_s"], whole["compile_s"], whole["tpot_s"]["median"]) > 0
    assert whole["environment"]["seed"] == 0
    ids = [*whole["prompt_ids"], *whole["token_ids"][:-1]]
    forward = nnx.jit(lambda model, *inputs: model(*inputs)[0])
    logits = forward(load(folder), jnp.array([ids]), jnp.arange(len(ids))[None])[0, 3:]
    assert whole["token_ids"] == logits.argmax(-1).tolist()
    np.testing.assert_allclose(whole["logits"], logits[0], atol=1e-5)


def test_text_goes_to_stdout_and_times_to_stderr(generate, whole):
    code, out, err = generate("--prompt", "The ", "--max-new-tokens", 8)
    assert (code, out) == (0, whole["text"] + "\n")
    assert bytes(whole["token_ids"]).decode("utf-8", "replace") == whole["text"]
    times, compiled = err.splitlines()
    assert times.startswith("prompt 4 tokens, TTFT ")
    assert all(word in times for word in ("new 8 tokens (length)", "TPOT median", "tokens/s"))
    assert compiled.startswith("compiled in ")


def test_an_end_token_ends_the_text_and_is_not_shown(read, whole, folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    end = whole["token_ids"][3]
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 0]}))
    cut = read("--prompt", "The ", "--max-new-tokens", 8, model=other)
    expected = whole["token_ids"][: whole["token_ids"].index(end) + 1]
    assert (cut["token_ids"], cut["finish_reason"]) == (expected, "stop")
    assert cut["text"] == bytes(expected[:-1]).decode("utf-8", "replace")


def test_drawn_texts_follow_the_seed(read):
    options = ("--prompt", "a", "--max-new-tokens", 12, "--temperature", 2, "--top-p", 0.9)
    first, second = (read(*options, "--seed", seed) for seed in (7, 8))
    assert first["token_ids"] != second["token_ids"]
    assert (first["temperature"], first["top_p"]) == (2.0, 0.9)
    assert (first["seed"], first["environment"]["seed"]) == (7, 7)


def test_text_comes_character_by_character(generate, stub, monkeypatch):
    written = []
    monkeypatch.setattr("moejax.cli.generate._print_now", written.append)
    assert generate("--prompt", "a")[0] == 0
    assert written == ["n", "", "é", "", "", "€", "", "\ufffd!", "", "\n"]


def test_without_a_second_token_there_is_no_time_per_token(generate, read, stub):
    stub.step_s = []
    record = read("--prompt", "a")
    assert (record["tpot_s"], record["decode_tokens_per_s"]) == (None, None)
    assert "TPOT" not in generate("--prompt", "a")[2]


def test_an_interrupt_keeps_the_text_so_far(generate, stub):
    stub.failure, stub.num_steps = KeyboardInterrupt(), 4
    code, out, err = generate("--prompt", "a")
    assert (code, out, err) == (130, "né\ufffd\n", "")
    code, out, err = generate("--prompt", "a", "-o", "json")
    assert (code, out, err) == (130, "", "")


def test_a_terminal_without_the_letters_gets_question_marks(generate, stub, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert generate("--prompt", "a")[0] == 0
    narrow.seek(0)
    assert narrow.buffer.read() == b"n???!\n"


def test_a_terminal_shows_control_characters_and_does_not_obey_them(capsys, monkeypatch):
    text = "a\tb\n\x1b[2J\x07\r\x9b\x7f"
    _print_now(text)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _print_now(text)
    assert capsys.readouterr().out == text + "a\tb\n\u241b[2J\u2407\u240d\ufffd\u2421"


def test_where_a_prompt_may_come_from(generate, stub, tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_text("from a file\n", encoding="utf-8-sig")
    standard = io.TextIOWrapper(io.BytesIO("été".encode()), encoding="latin-1")
    monkeypatch.setattr(sys, "stdin", standard)
    for arguments in (
        ("--prompt", "plain"),
        ("--prompt-file", path),
        ("--prompt", "-"),
        ("--prompt-ids", "7, 7,255"),
        ("--prompt", "Hi", "--chat"),
    ):
        code, _, err = generate(*arguments)
        assert code == 0, err
    texts = [bytes(call["prompts"][0]).decode("latin-1") for call in stub.calls]
    assert texts[:2] == ["plain", "from a file\n"]
    assert texts[2].encode("latin-1").decode() == "été"
    assert texts[3:] == ["\x07\x07ÿ", "<user>Hi<answer>"]


def test_options_reach_the_engine(generate, stub):
    options = ("--max-new-tokens", 5, "--temperature", 0.5, "--top-p", 0.25, "--seed", 3)
    assert generate("--prompt", "a", *options, "--dtype", "bfloat16")[0] == 0
    assert generate("--prompt", "a", "--ignore-eos")[0] == 0
    first, second = stub.calls
    assert first["sampling"] == engine.Sampling(0.5, 0.25)
    assert (first["max_new_tokens"], first["seed"], first["stop_token_ids"]) == (5, 3, (0,))
    assert second["sampling"].is_greedy
    assert (second["max_new_tokens"], second["stop_token_ids"]) == (32, ())


def test_without_a_tokenizer_numbers_go_in_and_out(generate, read, stub, folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.json").unlink()
    code, out, _ = generate("--prompt-ids", "1,2", model=bare)
    assert (code, out) == (0, " ".join(map(str, BYTES)) + "\n")
    assert read("--prompt-ids", "1,2", model=bare)["text"] is None
    code, out, err = generate("--prompt", "a", model=bare)
    assert (code, out) == (4, "")
    assert "has no tokenizer.json" in err


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        ((), 2, "there is no prompt"),
        (("--prompt", ""), 2, "there is no prompt"),
        (("--prompt", "a", "--prompt-ids", "1"), 2, "--prompt and --prompt-ids exclude each"),
        (("--prompt-ids", "1,,2"), 2, "'1,,2' is not a list of token numbers"),
        (("--prompt-ids", "256"), 2, "token 256 is not in the vocabulary"),
        (("--prompt-ids", "1,-1"), 2, "token -1 is not in the vocabulary"),
        (("--prompt-ids", "9" * 30), 2, "is not in the vocabulary"),
        (("--prompt-ids", "1", "--chat"), 2, "--chat needs a text"),
        (("--prompt-file", "none.txt"), 4, "none.txt cannot be read"),
        (("--prompt-file", "latin.txt"), 4, "latin.txt is not UTF-8 at byte 3"),
        (("--prompt-file", "empty.txt"), 2, "the prompt of empty.txt holds no tokens"),
        (("--prompt", "caf\udce9"), 2, "not Unicode at character 3"),
        (("--prompt", "x" * 33), 2, "33 tokens and 4 new ones exceed the 32 positions"),
        (("--prompt", "x" * 30), 2, "Take --max-new-tokens 3 at most"),
        (("--prompt", "a", "--max-new-tokens", "0"), 2, "--max-new-tokens"),
        (("--prompt", "a", "--temperature", "-1"), 2, "--temperature: a temperature of -1"),
        (("--prompt", "a", "--temperature", "nan"), 2, "temperature of nan"),
        (("--prompt", "a", "--top-p", "0"), 2, "--top-p: top-p 0"),
        (("--prompt", "a", "--dtype", "int8"), 2, "--dtype"),
        (("--prompt", "a", "--logits"), 2, "Add -o json"),
        (("--prompt", "a", "--model", "no-such"), 2, "no-such"),
        (("--prompt", "a", "--model", ""), 2, "--model is empty"),
        (("--prompt", "a", "--model", "small-moe"), 2, "small-moe is a card without weights"),
        (("--prompt", "a", "--model", "empty"), 4, "config.json"),
    ],
)
def test_mistakes_are_told_before_any_weight_is_read(
    generate, tmp_path, monkeypatch, arguments, code, cause
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moejax.qwen_moe.params.load", None)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty").mkdir()
    found, out, err = generate("--max-new-tokens", "4", *arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert "\n\nhint: " in err
    assert cause in err


def test_chat_needs_a_template(generate, folder, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "tokenizer_config.json").unlink()
    code, _, err = generate("--prompt", "a", "--chat", model=plain)
    assert code == 2
    assert "has no chat template" in err
