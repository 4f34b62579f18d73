import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from moejax import cli, engine
from moejax.trace import load_trace

from ._checkpoint import CONFIG, write_checkpoint

PROMPTS = ["The first", "a", "é\u2028 a line"]
"""As lines of a file; the line separator of Unicode does not end one."""
# All prompts need the same two programs, which each command compiles anew.
OPTIONS = ("--max-new-tokens", 5, "--batch-size", 1, "--source", "a test", "--ignore-eos")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The checkpoint, named as a card is spelled otherwise, and prompts in both forms beside it."""
    folder = tmp_path_factory.mktemp("record")
    write_checkpoint(folder / "Qwen1.5-MoE-A2.7B", chat_template="<{{ messages[0].content }}>")
    (folder / "prompts.txt").write_bytes("\n\n".join(PROMPTS).encode() + b"\r\n")
    objects = [{"prompt": PROMPTS[0], "domain": "x"}]
    objects += [{"prompt_ids": list(prompt.encode())} for prompt in PROMPTS[1:]]
    lines = "\n".join(json.dumps(line) for line in objects)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def record(capsys, folder, monkeypatch):
    monkeypatch.chdir(folder)

    def run(*arguments: str | Path, model: str = "Qwen1.5-MoE-A2.7B") -> tuple[int, str, str]:
        code = cli.main(["trace", "record", "--model", model, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def recorded(folder, tmp_path_factory) -> tuple[Path, int, str, str]:
    """The recording of the text file: its trace, and what the command answered."""
    path = tmp_path_factory.mktemp("recorded") / "t.safetensors"
    given = ("--model", folder / "Qwen1.5-MoE-A2.7B", "--prompts", folder / "prompts.txt")
    arguments = map(str, (*given, *OPTIONS, "--out", path, "-o", "json"))
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = cli.main(["trace", "record", *arguments])
    return path, code, out.getvalue(), err.getvalue()


def test_a_recording_is_a_trace_that_simulate_replays(recorded, folder, capsys, monkeypatch):
    path, code, out, err = recorded
    assert (code, err) == (0, "")
    summary, trace = json.loads(out), load_trace(path)
    lengths = [len(prompt.encode()) + 4 for prompt in PROMPTS]
    assert summary["file"] == str(path)
    assert summary["num_tokens"] == sum(lengths) == trace.num_tokens
    assert (summary["num_requests"], summary["num_decode_tokens"]) == (3, 12)
    assert (summary["model"], summary["source"]) == ("qwen1.5-moe-a2.7b", "a test")
    assert summary["sha256"] == trace.sha256
    prompts = trace.token_ids[trace.phase == 0]
    assert bytes(prompts.tolist()).decode() == "".join(PROMPTS)
    assert trace.request_start.tolist() == [0, *np.cumsum(lengths)]
    # Two layers: one ahead at most, twice as many experts as a token gets.
    assert trace.lookahead.shape[2:] == (1, 4)
    assert trace.expert_bytes.tolist() == [4 * 3 * 16 * 8] * 2

    monkeypatch.chdir(folder)
    command = f"simulate --trace {path} --model Qwen1.5-MoE-A2.7B --strategy lru,gate_look"
    assert cli.main([*command.split(), "--slots", "2,4", "--hardware", "rtx-3090"]) == 0
    assert "gate_look" in capsys.readouterr().out


def test_json_lines_hold_the_same_prompts_and_an_interrupted_run_goes_on(
    record, recorded, tmp_path, monkeypatch
):
    """Text and numbers of the same prompts give the same file, in one go or in two."""
    parts = tmp_path / "parts.safetensors"
    options = ("--prompts", "prompts.jsonl", *OPTIONS)
    generate = engine.Engine.generate

    def fail_in_the_second_batch(self, prompts, *, first_request, **settings):
        if first_request:
            raise KeyboardInterrupt
        return generate(self, prompts, first_request=first_request, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "generate", fail_in_the_second_batch)
        code, out, err = record(*options, "--out", parts)
    assert (code, out, parts.exists()) == (130, "", False)
    assert "the same command goes on from there" in err
    code, _, err = record(*options, "--out", parts)
    assert (code, err) == (0, "")
    assert parts.read_bytes() == recorded[0].read_bytes()


def test_options_reach_the_engine(record, tmp_path, monkeypatch):
    asked = {}

    def stop(model, prompts, **settings):
        asked.update(settings, prompts=prompts)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "record", stop)
    options = ("--temperature", 0.5, "--top-p", 0.9, "--seed", 4, "--licence", "MIT", "--chat")
    options += ("--lookahead-depth", 1, "--lookahead-width", 3, "--max-new-tokens", 2)
    options += ("--batch-size", 2)
    assert record("--prompts", "prompts.txt", *options, "--out", "t.safetensors")[0] == 130
    assert asked["sampling"] == engine.Sampling(0.5, 0.9)
    assert (asked["seed"], asked["licence"], asked["max_new_tokens"]) == (4, "MIT", 2)
    assert asked["batch_size"] == 2
    assert asked["lookahead"] == (1, 3)
    assert asked["stop_token_ids"] == CONFIG.eos_token_ids
    assert asked["source"] == "qwen1.5-moe-a2.7b on prompts.txt"
    assert [bytes(ids).decode() for ids in asked["prompts"]] == [f"<{text}>" for text in PROMPTS]
    options = (
        *options,
        "--lookahead-depth",
        0,
        "--prompts",
        "prompts.txt",
        "--out",
        "t.safetensors",
    )
    assert record(*options)[0] == 130
    assert asked["lookahead"] is None


def test_a_finished_recording_is_replaced_only_by_force(record, tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"hours of work")
    monkeypatch.setattr(engine, "record", _interrupt)
    options = ("--prompts", "prompts.txt", "--max-new-tokens", 2, "--out", path)
    code, out, err = record(*options)
    assert (code, out) == (2, "")
    assert f"--out {path} is there already" in err
    assert "--force" in err
    assert path.read_bytes() == b"hours of work"
    assert record(*options, "--force")[0] == 130


def test_prompts_may_come_from_stdin_and_begin_with_a_mark(record, tmp_path, monkeypatch):
    asked = []

    def stop(model, prompts, *, source, on_note, **settings):
        asked.append((prompts, source))
        on_note("recording again")
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "record", stop)
    content = b"\xef\xbb\xbfab\n\nc\n"
    (tmp_path / "marked.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    options = ("--max-new-tokens", 2, "--out", tmp_path / "t.safetensors", "--prompts")
    assert record(*options, "-")[2].startswith("recording again\n")
    assert record(*options, tmp_path / "marked.txt")[0] == 130
    assert [prompts for prompts, _ in asked] == [[[97, 98], [99]]] * 2
    assert [source.split(" on ")[1] for _, source in asked] == ["stdin", "marked.txt"]


@pytest.mark.parametrize(
    ("prompts", "arguments", "code", "cause"),
    [
        (b"", (), 4, "p.jsonl holds no prompt"),
        (b"\n \n", (), 4, "p.jsonl holds no prompt"),
        (b'{"prompt": "a"}\n{"prompt":\n', (), 4, "p.jsonl:2 is not JSON"),
        (b"[" * 100_000, (), 4, "p.jsonl:1 is not JSON"),
        (b"[1, 2]", (), 4, "p.jsonl:1 has neither"),
        (b'{"text": "a"}', (), 4, "p.jsonl:1 has neither"),
        (b'{"prompt": "a", "prompt_ids": [1]}', (), 4, "p.jsonl:1 has both"),
        (b'{"prompt_ids": [1, true]}', (), 4, "no list of whole numbers: [1, true]"),
        (b'{"prompt_ids": "1,2"}', (), 4, 'no list of whole numbers: "1,2"'),
        (b'{"prompt": 5}', (), 4, "p.jsonl:1 has a `prompt` that is no text: 5"),
        (b'\n{"prompt_ids": []}', (), 2, "p.jsonl:2 holds no tokens"),
        (b'{"prompt": ""}', (), 2, "p.jsonl:1 holds no tokens"),
        (b'{"prompt_ids": [1, 256]}', (), 2, "p.jsonl:1: token 256 is not in the vocabulary"),
        (b'{"prompt": "\\ud800"}', (), 2, "p.jsonl:1: the text is not Unicode"),
        (b'{"prompt": "\xff"}', (), 4, "p.jsonl is not UTF-8"),
        (b'{"prompt": "a"}', ("--max-new-tokens", 33), 2, "p.jsonl:1: 1 tokens and 33 new ones"),
        (b'{"prompt": "a"}', ("--batch-size", 0), 2, "--batch-size"),
        (b'{"prompt": "a"}', ("--temperature", -1), 2, "--temperature: a temperature of -1"),
        (b'{"prompt": "a"}', ("--model", ""), 2, "--model is empty"),
        (b'{"prompt": "a"}', ("--out", "t.npz"), 2, "t.npz is not a .safetensors file"),
        (b'{"prompt": "a"}', ("--prompts", "none.txt"), 4, "none.txt cannot be read"),
        (b'{"prompt": "a"}', ("--model", "no-such"), 2, "no-such"),
        (b'{"prompt": "a"}', ("--lookahead-width", 7), 2, "lookahead of 7 experts"),
        (b'{"prompt": "a"}', ("--lookahead-depth", -1), 2, "--lookahead-depth"),
    ],
)
def test_mistakes_have_their_codes_and_a_cure(record, prompts, arguments, code, cause):
    Path("p.jsonl").write_bytes(prompts)
    options = ("--prompts", "p.jsonl", "--max-new-tokens", 4, "--out", "t.safetensors")
    found, out, err = record(*options, *arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert "\n\nhint: " in err
    assert cause in err
    assert not list(Path().glob("t.*"))


def _interrupt(*_, **__):
    raise KeyboardInterrupt
