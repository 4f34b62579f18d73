"""What the small models read: a corpus of BPE ids, as it is or as the bytes behind them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moejax.errors import BadFileError, UsageError

END_OF_TEXT = 0
END_OF_TEXT_NAME = "<|endoftext|>"
NUM_BYTES = 256

_HINT = "Build the corpus with scripts/build_corpus.py."
_DECODE_BLOCK = 2**20


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token ids to train on and to be tested on.

    Attributes:
      train: All training documents, each ended by `END_OF_TEXT`.
      heldout: The same of other documents, by domain.
      token_bytes: Bytes of text that each token stands for.
    """

    train: UInt[np.ndarray, " tokens"]
    heldout: dict[str, UInt[np.ndarray, " tokens"]]
    token_bytes: Int[np.ndarray, " vocab"]


def open_corpus(folder: Path, *, is_bytes: bool) -> Corpus:
    """Reads what scripts/build_corpus.py wrote.

    Args:
      folder: Holds train.npy, heldout.npz and tokenizer.json.
      is_bytes: Decode the ids to bytes, which then are the tokens.

    Raises:
      BadFileError: A file is missing or not what it should be.
    """
    spellings = read_spellings(folder / "tokenizer.json")
    try:
        train = np.load(folder / "train.npy")
        with np.load(folder / "heldout.npz") as arrays:
            heldout = {name: arrays[name] for name in sorted(arrays.files)}
    except (OSError, ValueError) as error:
        raise BadFileError(f"{folder}: {error}", _HINT) from error
    for name, ids in {"train.npy": train, **heldout}.items():
        if ids.ndim != 1 or ids.dtype != np.uint16 or not ids.size or ids.max() >= len(spellings):
            raise BadFileError(
                f"{folder}: {name} holds no 16-bit ids below {len(spellings)}", _HINT
            )
    if is_bytes:
        train = to_bytes(train, spellings)
        heldout = {name: to_bytes(ids, spellings) for name, ids in heldout.items()}
        spellings = [bytes([value]) for value in range(NUM_BYTES)]
    return Corpus(train, heldout, np.array([len(spelling) for spelling in spellings]))


def read_spellings(path: Path) -> list[bytes]:
    """The bytes behind every id of a byte-level tokenizer; a single zero byte ends a text."""
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFileError(f"{path} is no BPE tokenizer: {error}", _HINT) from error
    byte_of = {character: value for value, character in enumerate(byte_alphabet())}
    spellings = [b""] * len(vocabulary)
    for text, token in vocabulary.items():
        if token != END_OF_TEXT:
            spellings[token] = bytes(byte_of[character] for character in text)
    spellings[END_OF_TEXT] = bytes([0])
    return spellings


def to_bytes(
    ids: UInt[np.ndarray, " tokens"], spellings: list[bytes]
) -> UInt[np.ndarray, " bytes"]:
    """The text of `ids`, block by block to bound memory."""
    text = np.frombuffer(b"".join(spellings), np.uint8)
    length = np.array([len(spelling) for spelling in spellings])
    first = np.cumsum(length) - length

    def decode(ids: np.ndarray) -> np.ndarray:
        lengths = length[ids]
        shift = first[ids] - (np.cumsum(lengths) - lengths)
        return text[np.arange(lengths.sum()) + np.repeat(shift, lengths)]

    return np.concatenate(
        [decode(ids[at : at + _DECODE_BLOCK]) for at in range(0, ids.size, _DECODE_BLOCK)]
    )


def byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte.

    Reference:
      Radford et al., 2019: `bytes_to_unicode` of the GPT-2 release.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return [chr(byte if byte in printable else next(others)) for byte in range(NUM_BYTES)]


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose ids are the bytes of the text; the zero byte is the end of a text."""
    names = byte_alphabet()
    names[END_OF_TEXT] = END_OF_TEXT_NAME
    tokenizer = Tokenizer(models.BPE({name: byte for byte, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT_NAME, special=True)])
    return tokenizer


def window_starts(
    num_tokens: int, length: int, *, seed: int, first: int, count: int
) -> Int[np.ndarray, " windows"]:
    """Where windows `first` to `first + count` of the whole training begin.

    Every epoch cuts the corpus afresh, at another offset, and reads the pieces in another order,
    so that the n-th window depends on nothing but `seed` and n.

    Args:
      num_tokens: Tokens of the corpus.
      length: Tokens of a window, of which one more is predicted.
      seed: Seed of all cuts and orders.
      first: Windows that were read before.
      count: Windows to read now.

    Raises:
      UsageError: The corpus is too short for two windows.
    """
    per_epoch = (num_tokens - 1) // length - 1
    if per_epoch < 1:
        raise UsageError(
            f"a corpus of {num_tokens} tokens is too short for windows of {length}", _HINT
        )
    numbers = np.arange(first, first + count)
    epochs, places = np.divmod(numbers, per_epoch)
    starts = np.empty(count, np.int32)
    for epoch in np.unique(epochs):
        starts[epochs == epoch] = _cut(per_epoch, length, seed, int(epoch))[places[epochs == epoch]]
    return starts


def heldout_windows(
    ids: UInt[np.ndarray, " tokens"], length: int, batch_size: int
) -> Iterator[tuple[Int[np.ndarray, "batch length_plus_1"], Int[np.ndarray, "batch length"]]]:
    """Batches of adjacent windows, and which of their predictions count: all but the filling."""
    num_windows = -(-(ids.size - 1) // length)
    num_windows = -(-num_windows // batch_size) * batch_size
    padded = np.zeros(num_windows * length + 1, np.int32)
    padded[: ids.size] = ids
    counts = (np.arange(1, padded.size) < ids.size).astype(np.int32).reshape(-1, length)
    places = np.arange(num_windows)[:, None] * length + np.arange(length + 1)[None, :]
    for at in range(0, num_windows, batch_size):
        yield padded[places[at : at + batch_size]], counts[at : at + batch_size]


@lru_cache(maxsize=2)
def _cut(per_epoch: int, length: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.default_rng([seed, epoch])
    offset = generator.integers(length)
    return (offset + length * generator.permutation(per_epoch)).astype(np.int32)
