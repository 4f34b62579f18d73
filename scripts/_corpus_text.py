"""Cleans documents of the corpus and drops what repeats; used by build_corpus.py."""

import hashlib
import re
from collections import Counter
from types import MappingProxyType

END_OF_TEXT = "<|endoftext|>"
SMALLEST_CHARS, LARGEST_CHARS = 300, 100_000
LONGEST_CODE_LINE = 1000
REPEATED_PARAGRAPH_CHARS = 80
# Lines of a web page that more than this share of a package's pages have are navigation.
NAVIGATION_RATIO = 0.1

# The commonest words that the other languages here do not have.
COMMON_WORDS = MappingProxyType(
    {
        "english": "the of and to is that for with this are from which be",
        "german": "der die das und ist nicht mit eine wird werden für auf sich dem",
        "french": "le les et est une des dans pour que du par avec sur pas",
        "spanish": "el los y es una las del para por con se que su como",
    }
)


def clean(text: str) -> str:
    """Returns the text with plain newlines and without the lines that no person wrote.

    Dropped are lines of numbers or encoded data, long lines without spaces (minified code), runs
    of empty lines and mail addresses. The answer is empty where little, or little of letters, is
    left.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n").replace("\ufeff", "")
    if END_OF_TEXT in text or "\0" in text or "\ufffd" in text:
        return ""
    text = re.sub(r"[ \n]*<[\w.+-]+@[\w.-]+>", "", text)
    text = "\n".join(line.rstrip() for line in text.split("\n") if _is_written(line))
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
    if len(text) > LARGEST_CHARS:
        text = re.sub(r"\s+\S*\Z", "", text[:LARGEST_CHARS])
    return text if len(text) >= SMALLEST_CHARS and _letter_ratio(text) > 0.5 else ""


def drop_repeats(text: str, seen: set[bytes]) -> str:
    """Returns the text without the paragraphs in `seen`, to which it adds its own.

    Only paragraphs of `REPEATED_PARAGRAPH_CHARS` characters or more count, so licence notes and
    other boilerplate go and short lines stay.
    """
    kept = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        if len(words) >= REPEATED_PARAGRAPH_CHARS:
            digest = hashlib.blake2b(words.encode(), digest_size=12).digest()
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(paragraph)
    return "\n\n".join(kept).strip("\n")


def drop_navigation(documents: list[str]) -> list[str]:
    """Returns a package's pages without the lines that many of them share."""
    lines = Counter(line for text in documents for line in set(text.split("\n")) if line.strip())
    largest = max(20, NAVIGATION_RATIO * len(documents))
    return [
        "\n".join(line for line in text.split("\n") if lines[line] <= largest) for text in documents
    ]


def is_language(text: str, language: str) -> bool:
    """Whether the text has more common words of the language than of any other we know."""
    counts = Counter(re.findall(r"\w+", text.lower()))
    scores = {
        name: sum(counts[word] for word in words.split()) for name, words in COMMON_WORDS.items()
    }
    return scores[language] > 1.2 * max(scores[name] for name in scores if name != language)


def _is_written(line: str) -> bool:
    if "SPDX-License-Identifier" in line:
        return False
    if len(line) > LONGEST_CODE_LINE and line.count(" ") < len(line) / 12:
        return False
    if any(len(word) > 120 for word in line.split()):
        return False
    return len(line) <= 40 or _letter_ratio(line) > 0.35 or not line.strip(" -=*#~_+|/.")


def _letter_ratio(text: str) -> float:
    """Share of letters in what is not space."""
    solid = "".join(text.split())
    return sum(map(str.isalpha, solid)) / max(len(solid), 1)
