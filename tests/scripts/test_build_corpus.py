"""The corpus builder on packages made here; nothing is downloaded."""

import gzip
import importlib
import io
import json
import random
import struct
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="the corpus builder needs tokenizers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

build_corpus = importlib.import_module("build_corpus")
forms = importlib.import_module("_corpus_forms")
packages = importlib.import_module("_corpus_packages")
text = importlib.import_module("_corpus_text")

SOURCES = """
[npm.tales]
version = "1.0.0"
licence = "public domain"
form = "plain"
take.prose = ["package/tales/*.txt"]

[npm."@code/words"]
version = "2.1.0"
licence = "MIT"
form = "source"
take.javascript = ["package/src/*.js"]
skip = ["*/vendor.js"]
"""
NUM_TRAIN_TOKENS = 4000


def test_manual_page_is_filled_and_its_macros_are_gone():
    page = rb""".\" A comment
.de SO
.SH DEFINED
..
.TH CAT 1
.SH NAME
cat \- concatenate \fIfiles\fR
.SH OPTIONS
.TP
.BR \-A ", " \-\-all
the same as
.B \-vET
.PP
.nf
a   b
.fi
.IP \(bu 2
an item
"""
    (found,) = forms.read_documents("manual", gzip.compress(page))
    assert found.split("\n") == [
        "",
        "NAME",
        "    cat - concatenate files",
        "",
        "OPTIONS",
        "",
        "    -A, --all",
        "        the same as -vET",
        "",
        "        a   b",
        "",
        "    • an item",
        "",
    ]


def test_manual_page_in_mdoc_gives_nothing():
    assert forms.read_documents("manual", b".Dd June 1\n.Sh NAME\n.Nm cat\n") == []


def test_web_page_keeps_paragraphs_and_code_without_navigation():
    page = (
        b"<html><head><title>T</title><style>p {}</style></head><body><nav>Home</nav>"
        b'<div class="navheader"><div>Up</div>Next</div><h1>Pipes</h1><p>One\n  two<br>three</p>'
        b"<pre>a\n   b</pre><ul><li>first</li><li>second</li></ul></body></html>"
    )
    (found,) = forms.read_documents("page", page)
    assert found.strip() == "Pipes\n\nOne two\nthree\n\na\n   b\n\n- first\n\n- second"


def test_dictionary_is_cut_where_an_entry_starts():
    entries = [f"word{i}\n   a definition of number {i}\n" for i in range(400)]
    found = forms.read_documents("dictionary", "".join(entries).encode())
    assert "".join(found) == "".join(entries)
    assert len(found) > 1
    assert all(document.startswith("word") for document in found)


def test_novels_are_read_from_an_r_database():
    lines = ["EMMA", "", "CHAPTER I", "Emma Woodhouse, handsome,", "CHAPTER II", "clever, and rich"]
    block = b"X\n" + b"".join(
        b"\x00\x04\x00\x09" + struct.pack(">i", len(line)) + line.encode() for line in lines
    )
    database = struct.pack(">i", len(block)) + zlib.compress(block)
    assert forms.read_documents("novels", database) == [
        "EMMA\n",
        "CHAPTER I\nEmma Woodhouse, handsome,",
        "CHAPTER II\nclever, and rich",
    ]


def test_scripture_loses_its_markup_and_notes():
    book = (
        '<chapter n="1" sID="a"/><w lemma="x">In the</w> beginning<note>1:1 or so</note>, '
        '<l level="1"/>light. <chapter n="2" sID="b"/>And'
    )
    module = zlib.compress(book.encode()) + b"\0\0" + zlib.compress(b"Another book")
    documents = [document for document in forms.read_documents("scripture", module) if document]
    assert documents == ["In the beginning,\nlight.", "And", "Another book"]


def test_source_loses_licence_comments_and_keeps_others():
    code = b"/* Copyright 1999 Someone */\n/* Adds. */\nint add;\n// MIT License\nint b;\n"
    assert forms.read_documents("source", code) == ["/* Adds. */\nint add;\nint b;\n"]


def test_what_is_not_utf8_gives_no_document():
    assert forms.read_documents("plain", b"caf\xe9") == []


def test_clean_drops_what_no_person_wrote():
    sentence = "It was a bright cold day in April, and the clocks were striking.\n"
    minified = "a=function(b){return(c)};" * 60
    encoded = "QUJDREVGR0g" * 20
    numbers = "0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88"
    found = text.clean("\r\n".join([sentence * 8, minified, encoded, numbers, "", "", "", "end"]))
    assert found == (sentence * 8).replace("\n", "\n").strip("\n") + "\n\nend"


def test_clean_keeps_a_long_paragraph_on_one_line():
    paragraph = "The state of the union is such that we may go on to the next question. " * 30
    assert text.clean(paragraph) == paragraph.strip()


@pytest.mark.parametrize("bad", ["\0", "\ufffd", text.END_OF_TEXT])
def test_clean_refuses_what_the_tokenizer_could_not_give_back(bad):
    assert text.clean(f"a fine sentence {bad} that goes on " * 30) == ""


def test_clean_removes_mail_addresses():
    found = text.clean("Written by Ada Lovelace <ada@example.org>, who knew it. " * 10)
    assert "@" not in found
    assert found.startswith("Written by Ada Lovelace, who knew it.")


def test_repeated_paragraphs_go_and_short_ones_stay():
    notice, seen = "This program is free software, " * 4, set()
    first = text.drop_repeats(f"one\n\n{notice}", seen)
    assert first == f"one\n\n{notice}"
    assert text.drop_repeats(f"two\n\n{notice}\n\none", seen) == "two\n\none"


def test_lines_that_most_pages_share_are_navigation():
    pages = [f"Help\n\npage {i}\n\nNext" for i in range(50)]
    assert text.drop_navigation(pages) == ["\npage " + str(i) + "\n" for i in range(50)]


def test_language_is_told_by_common_words():
    assert text.is_language("Die Datei wird nicht gelesen und das ist der Fehler.", "german")
    assert not text.is_language("The file is not read and this is the error.", "german")


def test_balance_gives_what_a_small_domain_lacks_to_the_others():
    train = {
        "small": [np.ones(9, np.uint16)],
        "large": [np.ones(99, np.uint16)] * 3,
        "huge": [np.ones(999, np.uint16)],
    }
    cut = build_corpus.balance(train, 310)
    sizes = {name: sum(len(ids) + 1 for ids in documents) for name, documents in cut.items()}
    assert sizes == {"small": 10, "large": 150, "huge": 150}
    assert len(build_corpus.join(cut)) == 310


def test_corpus_is_the_same_twice_and_keeps_held_out_text_apart(tmp_path):
    written = []
    for run in ("first", "second"):
        make_packages(tmp_path / run / "cache" / "npm")
        build_corpus.build(tmp_path / run, read_sources(tmp_path), NUM_TRAIN_TOKENS)
        files = ("train.npy", "heldout.npz", "tokenizer.json", "prompts.jsonl")
        written.append([(tmp_path / run / file).read_bytes() for file in files])
    assert written[0] == written[1]

    tokenizer = build_corpus.Tokenizer.from_file(str(tmp_path / "first" / "tokenizer.json"))
    tokens = np.load(tmp_path / "first" / "train.npy")
    assert tokens.dtype == np.uint16
    assert len(tokens) == NUM_TRAIN_TOKENS
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    trained = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    heldout = np.load(tmp_path / "first" / "heldout.npz")
    assert sorted(heldout) == ["javascript", "prose"]
    for ids in heldout.values():
        shown = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        paragraphs = [part for part in shown.split("\n\n") if len(part) >= 80]
        assert len(paragraphs) >= 20
        assert not any(part in trained for part in paragraphs)
    assert "Copyright" not in trained
    assert "vendored" not in trained

    card = json.loads((tmp_path / "first" / "corpus.json").read_text())
    assert [package["version"] for package in card["packages"]] == ["1.0.0", "2.1.0"]
    assert card["domains"]["prose"]["num_heldout_documents"] == build_corpus.SMALLEST_HELDOUT
    lines = (tmp_path / "first" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["domain"] for line in lines] == ["prose"] * 12 + ["javascript"] * 12


def test_files_that_are_too_large_to_travel_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(build_corpus, "LARGEST_OUTPUT_BYTES", 1000)
    make_packages(tmp_path / "cache" / "npm")
    with pytest.raises(build_corpus.BackendError) as caught:
        build_corpus.build(tmp_path, read_sources(tmp_path), NUM_TRAIN_TOKENS)
    assert "over the 1,000" in caught.value.cause
    assert not (tmp_path / "train.npy").exists()


def test_missing_client_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(packages.UsageError) as caught:
        packages.fetch(read_sources(tmp_path)[0], tmp_path / "cache")
    assert "npm is not installed" in caught.value.cause
    assert "tales-1.0.0.tgz" in caught.value.hint


def test_damaged_package_is_refused(tmp_path):
    path = tmp_path / "tales-1.0.0.tgz"
    path.write_bytes(b"not an archive")
    with pytest.raises(packages.BadFileError):
        list(packages.members(path, "", ["*"]))


def test_package_without_the_files_is_refused(tmp_path):
    path = tmp_path / "tales-1.0.0.tgz"
    path.write_bytes(archive({"package/README": "nothing here"}))
    with pytest.raises(packages.BadFileError) as caught:
        packages.read_packages([(read_sources(tmp_path)[0], path)])
    assert "no document for prose" in caught.value.cause


@pytest.mark.parametrize(
    ("table", "cause"),
    [
        ('[npm.a]\nform = "plain"\ntake.x = ["*"]', "has no 'licence'"),
        ('[npm.a]\nlicence = "MIT"\nform = "pdf"\ntake.x = ["*"]', "form 'pdf'"),
        ('[cargo.a]\nlicence = "MIT"\nform = "plain"\ntake.x = ["*"]', "registry 'cargo'"),
        ("[npm", "cannot read"),
    ],
)
def test_bad_list_of_packages_is_refused(tmp_path, table, cause):
    path = tmp_path / "sources.toml"
    path.write_text(table)
    with pytest.raises(packages.BadFileError) as caught:
        packages.read_sources(path)
    assert cause in caught.value.cause


def test_our_list_of_packages_is_well_formed():
    sources = packages.read_sources(build_corpus.SOURCES)
    domains = {domain for source in sources for domain in source.take}
    assert len(domains) >= 8
    assert all(source.version for source in sources if source.registry == "npm")
    assert set(text.COMMON_WORDS) - domains == {"english"}


def read_sources(folder: Path) -> Any:
    (folder / "sources.toml").write_text(SOURCES)
    return packages.read_sources(folder / "sources.toml")


def make_packages(folder: Path) -> None:
    """Two packages of 80 documents of random words; the code shares a licence and a paragraph."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    tales = {
        f"package/tales/{i}.txt": "\n\n".join(prose(rng) for _ in range(12)) for i in range(80)
    }
    licence = "/* Copyright 2001 The Authors. All rights reserved. */\n"
    code = {
        f"package/src/{i}.js": licence + tales[f"package/tales/{i}.txt"][::-1] for i in range(80)
    }
    code["package/src/vendor.js"] = "vendored code of others " * 40
    (folder / "tales-1.0.0.tgz").write_bytes(archive(tales))
    (folder / "code-words-2.1.0.tgz").write_bytes(archive(code))


def prose(rng: random.Random) -> str:
    words = ("".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(20))
    return " ".join(words)


def archive(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            packed.addfile(info, io.BytesIO(content.encode()))
    return buffer.getvalue()
