"""Reads the forms in which packages hold text: pages, manuals, dictionaries, novels, scripture."""

import gzip
import re
import struct
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from types import MappingProxyType

DICTIONARY_CHARS = 4000


def read_documents(form: str, data: bytes) -> list[str]:
    """Returns the documents of one file, uncleaned; none where it is not valid UTF-8.

    Args:
      form: A key of `FORMS`.
      data: The file's content, gzipped or not.
    """
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    try:
        return list(FORMS[form](data))
    except UnicodeDecodeError:
        return []


def _plain(data: bytes) -> Iterator[str]:
    yield data.decode()


def _source(data: bytes) -> Iterator[str]:
    """A program, without the comments that say whose it is and under which licence."""
    text = data.decode()
    for comment in (r"/\*.*?\*/\s*", r"(?:^(?:#|//)[^\n]*\n)+"):
        text = re.sub(comment, _unless_licence, text, flags=re.M | re.S)
    yield text


def _unless_licence(comment: re.Match[str]) -> str:
    is_licence = re.search(r"copyright|licen[cs]e|warranty|@author", comment[0], re.I)
    return "" if is_licence else comment[0]


def _dictionary(data: bytes) -> Iterator[str]:
    """Runs of consecutive entries; each starts at the margin."""
    text = re.sub(
        r"^ *\[(1913 Webster|WordNet 1\.5|PJC)[^]\n]*\]\n",
        "",
        data.decode(errors="replace"),
        flags=re.M,
    )
    start = 0
    while start < len(text):
        entry = re.compile(r"\n(?=\S)").search(text, start + DICTIONARY_CHARS)
        end = entry.end() if entry else len(text)
        yield text[start:end]
        start = end


def _novels(data: bytes) -> Iterator[str]:
    """Chapters of the character vectors in an R lazy-load database.

    Reference:
      "R Internals", sections 1.8 (serialization) and 4.1 (lazy loading): blocks of a four-byte
      length and a zlib stream; a string is its flags, its length and its bytes.
    """
    while data:
        stream = zlib.decompressobj()
        block, data = stream.decompress(data[4:]), stream.unused_data
        lines, at = [], block.find(b"\x00\x04\x00\x09")
        while at >= 0:
            length = struct.unpack(">i", block[at + 4 : at + 8])[0]
            lines.append(block[at + 8 : at + 8 + length].decode())
            at = block.find(b"\x00\x04\x00\x09", at + 8 + length)
        yield from re.split(r"\n(?=CHAPTER|Chapter|VOLUME)", "\n".join(lines))


def _scripture(data: bytes) -> Iterator[str]:
    """Chapters of a SWORD module: OSIS markup in zlib streams, one a book.

    Reference:
      crosswire.org, "File Formats", zText: streams one after the other, each possibly padded.
    """
    while (start := data.find(b"\x78")) >= 0:
        stream = zlib.decompressobj()
        book, data = stream.decompress(data[start:]).decode(), stream.unused_data
        for chapter in re.split(r"(?=<chapter [^>]*sID=)", book):
            text = re.sub(r"<(note|title)\b.*?</\1>", "", chapter, flags=re.S)
            text = re.sub(r'<(l|lg|div [^>]*type="x-p")\b[^>]*>', "\n", text)
            text = re.sub(r"<[^>]*>", "", text)
            yield re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", text)).strip()


def _page(data: bytes) -> Iterator[str]:
    """A web page or DocBook-like page as text."""
    reader = _PageReader()
    reader.feed(data.decode())
    reader.close()
    yield reader.text()


SKIPPED = frozenset(
    ("script", "style", "head", "nav", "header", "footer", "aside", "info", "noscript", "svg")
)
HEADINGS = ("title", "h1", "h2", "h3", "h4", "h5", "h6")
BLOCKS = frozenset((*HEADINGS, "p", "div", "section", "li", "dt", "dd", "table", "tr", "item"))
VERBATIM = frozenset(("pre", "screen", "programlisting"))
NAVIGATION = re.compile(
    r"\b(\w*nav|nav\w*|toc|footer|sidebar|breadcrumbs?|headerlink|copyright|MAC)\b"
)


class _PageReader(HTMLParser):
    """Collects the text of a page, one paragraph per block element."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping, self.depth, self.verbatim = "", 0, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipping:
            self.depth += tag == self.skipping
            return
        style = " ".join(value or "" for key, value in attrs if key in ("class", "id"))
        if tag in SKIPPED or (
            tag in ("div", "table", "ul", "a", "span") and NAVIGATION.search(style)
        ):
            self.skipping, self.depth = tag, 1
        elif tag in VERBATIM:
            self.verbatim += 1
            self.parts.append("\n\n")
        elif tag in BLOCKS:
            self.parts.append("\n- " if tag == "li" else "\n\n")
        elif tag in ("br", "td", "th"):
            self.parts.append("\n" if tag == "br" else "  ")

    def handle_endtag(self, tag: str) -> None:
        if self.skipping:
            self.depth -= tag == self.skipping
            self.skipping = self.skipping if self.depth else ""
        elif tag in VERBATIM:
            self.verbatim = max(self.verbatim - 1, 0)
            self.parts.append("\n\n")
        elif tag in BLOCKS:
            self.parts.append("\n\n" if tag != "li" else "\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))

    def text(self) -> str:
        text = "".join(self.parts).replace("\xa0", " ").replace("\xad", "")
        text = re.sub(r"- \s*\n\s*", "- ", re.sub(r"[ \t]+\n", "\n", text))
        lines = [line if line.startswith("  ") else line.strip() for line in text.split("\n")]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _manual(data: bytes) -> Iterator[str]:
    """A manual page in man(7) macros as filled text; pages in mdoc(7) give nothing."""
    text = re.sub(r"^\.de .*?^\.\.$", "", data.decode(), flags=re.M | re.S)
    if re.search(r"^\.Dd ", text, re.M) or not re.search(r"^\.SH", text, re.M):
        return
    page = _ManualPage()
    for line in text[text.index("\n.SH") + 1 :].replace("\\\n", "").split("\n"):
        page.read(line)
    page.flush()
    yield "\n".join(page.lines)


class _ManualPage:
    """Fills paragraphs of man(7) source; what it does not know it leaves out."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.words: list[str] = []
        self.indent, self.verbatim, self.is_tag, self.is_table = 0, False, False, False
        self.ending = ""

    def read(self, line: str) -> None:
        if self.ending:
            self.ending = "" if line.startswith(self.ending) else self.ending
            return
        if line[:1] not in (".", "'"):
            self._say(_unescape(line))
            return
        macro, _, rest = line[1:].strip().partition(" ")
        words = [_unescape(word.strip('"')) for word in re.findall(r'"[^"]*"|\S+', rest)]
        if macro in ("SH", "SS"):
            self.flush()
            self.indent = 0
            self.lines += ["", " ".join(words)] if words else [""]
            self.indent = 4
        elif macro in ("PP", "P", "LP", "sp", "HP", "TP", "IP", "TQ", "RS", "RE"):
            self.flush()
            self.lines += [""] if self.lines and self.lines[-1] else []
            self.indent = {"RS": self.indent + 4, "RE": max(self.indent - 4, 4)}.get(macro, 4)
            self.is_tag = macro in ("TP", "TQ")
            if macro == "IP" and words:
                self.is_tag = len(words[0]) > 3
                self._say(words[0])
        elif macro in ("nf", "EX", "Vb", "fi", "EE", "Ve"):
            self.flush()
            self.verbatim = macro in ("nf", "EX", "Vb")
        elif macro == "br":
            self.flush()
        elif macro in ("B", "I", "SM", "SB", "R"):
            self._say(" ".join(words))
        elif macro in ("BR", "BI", "IR", "IB", "RB", "RI"):
            self._say("".join(words))
        elif macro in ("UR", "MT"):
            self._say(" ".join(words[:1]))
        elif macro in ("TS", "TE"):
            self.flush()
            self.is_table = macro == "TS"
        elif macro in ("de", "ig", "ie", "if"):
            braced = rest.rstrip().endswith("\\{") or "\\{" in rest
            self.ending = ".." if macro in ("de", "ig") else (".\\}" if braced else "")

    def flush(self) -> None:
        words, self.words = " ".join(self.words).split(), []
        if words:
            margin = " " * self.indent
            self.lines.append(
                textwrap.fill(
                    " ".join(words),
                    80,
                    initial_indent=margin,
                    subsequent_indent=margin,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )

    def _say(self, text: str) -> None:
        if self.is_table:
            if not re.fullmatch(r"[lcrnLCRNfBIbiwx0-9|()\s.,;:tab@]*[.;]", text):
                cells = text.replace("T{", "").replace("T}", "").replace("\t", "  ").strip()
                self.lines += [" " * 4 + cells] if cells else []
        elif self.verbatim:
            self.lines.append(" " * (self.indent + 4 * bool(text.strip())) + text if text else "")
        elif not text.strip():
            self.flush()
            self.lines.append("")
        else:
            self.words.append(text)
            if self.is_tag:
                self.flush()
                self.indent, self.is_tag = 8, False


ROFF_NAMES = (
    "aq dq oq cq lq rq em en hy bu co ti ha rs ga -> +- mu Fo Fc ss mc"
    " :a :o :u :A :O :U 'e `e 'a 'i 'o 'u ~n ^e `a ,c"
)
ROFF_CHARACTERS: dict[str, str] = dict(
    zip(
        ROFF_NAMES.split(),
        "'\"‘’“”—–-•©~^\\`→±×«»ßµäöüÄÖÜéèáíóúñêàç",  # noqa: RUF001
        strict=True,
    )
)


def _unescape(text: str) -> str:
    """Text of a line of roff: fonts, sizes and comments out, special characters in."""
    text = re.sub(r'\\".*$', "", text)
    text = re.sub(r"\\f(\(..|\[[^]]*\]|.)|\\s[+-]?\d|\\[hvwm]('[^']*'|\[[^]]*\])", "", text)
    text = re.sub(r"\\\[u([0-9A-F]{4,5})\]", lambda found: chr(int(found[1], 16)), text)
    text = re.sub(
        r"\\(?:\((..)|\[([^]]*)\])",
        lambda found: ROFF_CHARACTERS.get(found[1] or found[2] or "", ""),
        text,
    )
    text = re.sub(r"\\\*(\(..|\[[^]]*\]|.)", "", text)
    text = re.sub(r"\\[ 0~]", " ", text)
    text = re.sub(r"\\([-.'`])", r"\1", text).replace("\\e", "\0").replace("\\\\", "\0")
    return re.sub(r"\\[&%|^/,:cdup]?", "", text).replace("\0", "\\")


FORMS: MappingProxyType[str, Callable[[bytes], Iterable[str]]] = MappingProxyType(
    {
        "dictionary": _dictionary,
        "manual": _manual,
        "novels": _novels,
        "page": _page,
        "plain": _plain,
        "scripture": _scripture,
        "source": _source,
    }
)
