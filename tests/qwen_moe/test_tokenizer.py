import json
import random
from pathlib import Path

import pytest

from moejax.errors import BadFileError, MoejaxError, UsageError
from moejax.qwen_moe.tokenizer import has_tokenizer, open_tokenizer, read_eos_ids

from ._byte_tokenizer import END, write_byte_tokenizer

# The template of Qwen1.5's chat models.
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]
TEXTS = [
    "plain",
    "",
    "naïve café",
    "日本語 and 🙂🙃",
    "a\ufffdb\ufffd",
    "tab\tline\nend ",
    "e\u0301 👩‍👩‍👧",
]


def rendered(folder: Path, messages=HELLO) -> str:
    tokenizer = open_tokenizer(folder)
    return tokenizer.decode(tokenizer.chat(messages))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tmp_path, text):
    tokenizer = open_tokenizer(write_byte_tokenizer(tmp_path))
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_and_unknown_tokens_have_no_text(tmp_path):
    tokenizer = open_tokenizer(write_byte_tokenizer(tmp_path))
    assert tokenizer.encode(f"a{END}b") == [97, 0, 98]
    assert tokenizer.decode([97, 0, 5000, 98]) == "ab"


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_never_gives_half_a_character(tmp_path, text):
    stream = open_tokenizer(write_byte_tokenizer(tmp_path)).stream()
    pieces = [stream.push(byte) for byte in text.encode()]
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == text
    assert stream.flush() == ""


def test_a_stream_of_any_bytes_is_their_text(tmp_path):
    """Whatever comes, in the end everything was printed once, and no more than three bytes wait."""
    tokenizer = open_tokenizer(write_byte_tokenizer(tmp_path))
    source = random.Random(0)
    for _ in range(100):
        ids = [source.choice((0, 65, 0x80, 0xC3, 0xE2, 0xF0, 0x9F, 0xFF)) for _ in range(30)]
        stream, text = tokenizer.stream(), ""
        for count, token in enumerate(ids, start=1):
            text += stream.push(token)
            whole = tokenizer.decode(ids[:count])
            assert whole.startswith(text)
            assert len(whole) - len(text) <= 3
        assert text + stream.flush() == tokenizer.decode(ids)


def test_a_stream_keeps_the_context_that_spaces_depend_on(tmp_path):
    """Metaspace drops the space before the first token it is given, not before the others."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import Metaspace as MetaspaceDecoder
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Metaspace

    words = Tokenizer(WordLevel({"▁one": 0, "▁two": 1, "▁three": 2}, unk_token="▁one"))
    words.pre_tokenizer, words.decoder = Metaspace(), MetaspaceDecoder()
    words.save(str(tmp_path / "tokenizer.json"))
    stream = open_tokenizer(tmp_path).stream()
    assert [stream.push(token) for token in (0, 1, 2, 0)] == ["one", " two", " three", " one"]


def test_the_chat_template_of_the_family(tmp_path):
    write_byte_tokenizer(tmp_path, chat_template=QWEN_TEMPLATE, eos_token=END)
    assert rendered(tmp_path) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert rendered(tmp_path, messages).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello"}]'),
        ("{{ '<é>' | tojson }}", '"<é>"'),
        ("{% if true %}\n  {% for m in messages %}\nx\n  {% endfor %}\n{% endif %}\ny", "x\ny"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hello!"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ absent }}{{ eos_token is defined }}{{ bos_token }}", "True<b>"),
        ("{% if strftime_now('%Y') | int > 2000 %}now{% endif %}", "now"),
    ],
)
def test_templates_find_what_they_expect(tmp_path, template, text):
    settings = {"eos_token": {"content": END}, "bos_token": "<b>", "pad_token": None}
    write_byte_tokenizer(tmp_path, chat_template=template, **settings)
    assert rendered(tmp_path) == text


def test_where_the_template_may_stand(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write_byte_tokenizer(tmp_path, chat_template=named)
    assert rendered(tmp_path) == "D"
    (tmp_path / "chat_template.jinja").write_text("of the file", encoding="utf-8")
    assert rendered(tmp_path) == "of the file"


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "the chat template fails"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
    ],
)
def test_a_bad_template_is_a_bad_file(tmp_path, template, cause):
    write_byte_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(BadFileError) as caught:
        rendered(tmp_path)
    assert cause in caught.value.cause


def test_without_a_template_there_is_no_chat(tmp_path):
    tokenizer = open_tokenizer(write_byte_tokenizer(tmp_path))
    with pytest.raises(UsageError) as caught:
        tokenizer.chat(HELLO)
    assert "has no chat template" in caught.value.cause


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({}, ()),
        ({"config": 7}, (7,)),
        ({"config": 7, "generation_config": [8, 9]}, (8, 9)),
        ({"config": 7, "generation_config": None}, (7,)),
    ],
)
def test_end_tokens_come_from_the_first_file_that_names_them(tmp_path, files, ids):
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"eos_token_id": value}))
    assert read_eos_ids(tmp_path) == ids
    write_byte_tokenizer(tmp_path, eos_token=END)
    assert open_tokenizer(tmp_path).eos_ids == (ids or (0,))


@pytest.mark.parametrize("value", ["7", -1, True, [1, None], 1.5])
def test_an_end_token_is_a_number(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(BadFileError) as caught:
        read_eos_ids(tmp_path)
    assert "eos_token_id" in caught.value.cause


def test_an_end_token_is_one_of_the_vocabulary(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 100, "eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [99, 100]}')
    with pytest.raises(BadFileError, match="the vocabulary ends at 99") as caught:
        read_eos_ids(tmp_path)
    assert "generation_config.json: eos_token_id = [99, 100]" in caught.value.cause
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 99}')
    assert read_eos_ids(tmp_path) == (99,)


def test_a_folder_without_a_tokenizer(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(BadFileError) as caught:
        open_tokenizer(tmp_path)
    assert "has no tokenizer.json" in caught.value.cause


def test_text_that_is_not_unicode(tmp_path):
    tokenizer = open_tokenizer(write_byte_tokenizer(tmp_path))
    with pytest.raises(UsageError):
        tokenizer.encode(b"caf\xe9".decode("utf-8", "surrogateescape"))


def test_a_tokenizer_without_a_token_for_the_text(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"a": 0}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadFileError) as caught:
        open_tokenizer(tmp_path).encode("b")
    assert "cannot encode" in caught.value.cause


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "rag", "template": "x"}]}'),
        ("chat_template.jinja", b"\xff"),
        ("generation_config.json", b"nan?"),
        ("tokenizer.json", b"\xff\xfe"),
    ],
)
def test_a_corrupt_file_is_a_bad_file(tmp_path, name, content):
    write_byte_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadFileError) as caught:
        open_tokenizer(tmp_path)
    assert name in caught.value.cause


def test_mutated_tokenizers_are_refused_or_work(tmp_path):
    path = write_byte_tokenizer(tmp_path) / "tokenizer.json"
    sound, source, num_refused = path.read_bytes(), random.Random(0), 0
    for case in range(200):
        content = bytearray(sound)
        if case % 2:
            content = content[: source.randrange(len(sound))]
        else:
            for _ in range(3):
                content[source.randrange(len(sound))] ^= 1 << source.randrange(8)
        path.write_bytes(bytes(content))
        try:
            tokenizer = open_tokenizer(tmp_path)
            tokenizer.decode([*tokenizer.encode("any text"), 300])
        except MoejaxError:
            num_refused += 1
    assert num_refused > 150
