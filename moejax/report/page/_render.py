"""The report's Markdown as HTML: its own words and tables, figures inside, nothing from outside."""

import html
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

from .._places import PLAN_FILE, RESULTS_FILE, fragment

_FOLD = re.compile(r"<details>\s*<summary>([^<>]*)</summary>\s*|</details>\s*")
"""The only HTML that a report holds."""


_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:[num]?s|[kMGT]?B|GiB|USD|tokens/s|%)(?!\w))")
"""The space between a number and its unit, where no line may break."""


_LONG = 26
"""Characters of a cell that may break; shorter ones stay on one line."""


_OF_THE_PAGE = ("text", "records", "records-heading")
"""Ids that are taken before any heading has one."""


class Heading(NamedTuple):
    """A section: its level, its name in addresses, and its text."""

    level: int
    name: str
    text: str


class RecordLink(NamedTuple):
    """A place of a file that the text leads to."""

    file: str
    place: str

    @property
    def title(self) -> str:
        """What the place is called inside the page."""
        return self.place if self.file == RESULTS_FILE else f"{self.file}{self.place}"

    @property
    def name(self) -> str:
        """The same as the id of an element and as the end of an address."""
        return fragment(self.title)


class Rendered(NamedTuple):
    """A report as HTML.

    Attributes:
      title: Text of its first heading.
      body: All of it.
      headings: Of the second and third level, in order.
      links: Places that the text leads to, each once, in order.
    """

    title: str
    body: str
    headings: tuple[Heading, ...]
    links: tuple[RecordLink, ...]


def render(text: str, images: Mapping[str, str]) -> Rendered:
    """Turns Markdown into the body of a page.

    HTML in the text is shown as text, but for folded sections; an image that is not in `images`
    is replaced by what it shows, in words.

    Args:
      text: The report.
      images: What an image's address becomes.
    """
    parser = MarkdownIt("commonmark").enable("table")
    parser.add_render_rule("html_block", _fold_or_text)
    parser.add_render_rule("html_inline", _as_text)
    tokens = parser.parse(text)
    links: dict[RecordLink, None] = {}
    for token in tokens:
        if token.children:
            token.children = _inline(token.children, images, links)
    headings = _name_headings(tokens)
    _mark_tables(tokens)
    tokens = list(_sections(_figures(tokens)))
    return Rendered(
        title=next((one.text for one in headings if one.level == 1), "Report"),
        body=parser.renderer.render(tokens, parser.options, {}),
        headings=tuple(one for one in headings if one.level in (2, 3)),
        links=tuple(links),
    )


def read_link(address: str) -> RecordLink | None:
    """The record that an address leads to, None where it is another kind of link."""
    file, _, rest = address.partition("#")
    if file not in (RESULTS_FILE, PLAN_FILE) or not rest.startswith("/"):
        return None
    return RecordLink(file, unquote(rest))


def _inline(
    children: Sequence[Token], images: Mapping[str, str], links: dict[RecordLink, None]
) -> list[Token]:
    """Leads links into the page, and puts images into it."""
    shown: list[Token] = []
    dropped = 0
    for token in children:
        if token.type == "link_open":
            address = str(token.attrs["href"])
            record = read_link(address)
            if record is not None:
                links[record] = None
                token.attrs = {"class": "record", "href": f"#{record.name}"}
            elif address.startswith("figures/"):
                dropped += 1  # The figure itself is in the page.
                continue
            else:
                token.attrs["rel"] = "noreferrer"
        elif token.type == "link_close" and dropped:
            dropped -= 1
            continue
        elif token.type == "image":
            source = images.get(str(token.attrs["src"]))
            if source is None:
                shown.append(Token("text", "", 0, content=token.content))
                continue
            token.attrs |= {"src": source, "decoding": "async"}
        elif token.type == "text":
            token.content = _BEFORE_UNIT.sub("\N{NO-BREAK SPACE}", token.content)
        shown.append(token)
    return shown


def _name_headings(tokens: Sequence[Token]) -> list[Heading]:
    """Gives every heading an id of its own, made from its words."""
    headings: list[Heading] = []
    for index, token in enumerate(tokens):
        if token.type != "heading_open":
            continue
        words = _plain(tokens[index + 1])
        base = re.sub(r"[^\w]+", "-", words.lower()).strip("-") or "section"
        taken = {*_OF_THE_PAGE, *(one.name for one in headings)}
        names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
        name = next(name for name in names if name not in taken)
        token.attrs["id"] = name
        headings.append(Heading(int(token.tag[1]), name, words))
    return headings


def _mark_tables(tokens: Sequence[Token]) -> None:
    """Tables say what they are, their cells what they hold; a row's link serves its numbers."""
    heading, start = "", 0
    for index, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = _plain(tokens[index + 1])
        elif token.type == "table_open":
            token.meta["label"] = heading
        elif token.type in ("th_open", "td_open"):
            is_number = token.attrs.pop("style", None) is not None
            is_long = token.type == "td_open" and len(_plain(tokens[index + 1])) > _LONG
            kinds = [name for name, holds in (("number", is_number), ("long", is_long)) if holds]
            if kinds:
                token.attrs["class"] = " ".join(kinds)
        if token.type == "th_open":
            token.attrs["scope"] = "col"
        elif token.type == "tr_open":
            start = index + 1
        elif token.type == "tr_close" and tokens[start].type == "td_open":
            _mark_row(tokens[start:index])


def _mark_row(cells: Sequence[Token]) -> None:
    first, close = cells[0], next(token for token in cells if token.type == "td_close")
    first.tag = close.tag = "th"
    first.attrs["scope"] = "row"
    children = cells[1].children or []
    if not children or children[-1].type != "link_close":
        return
    if children[0].attrs.get("class") != "record":
        return
    for cell, inline in itertools.pairwise(cells):
        is_number = cell.type == "td_open" and "number" in str(cell.attrs.get("class"))
        if is_number and re.search(r"\d", inline.content) and not _has_link(inline):
            inline.children = [children[0], *(inline.children or []), children[-1]]


def _has_link(inline: Token) -> bool:
    return any(child.type == "link_open" for child in inline.children or [])


def _figures(tokens: Sequence[Token]) -> Iterator[Token]:
    """An image alone in a paragraph and the emphasised paragraph behind it are a figure."""
    index = 0
    while index < len(tokens):
        group = tokens[index : index + 6]
        if _is_figure(group):
            figure, image, _, caption, words, end = group
            figure.tag, caption.tag, end.tag = "figure", "figcaption", "figcaption"
            words.children = (words.children or [])[1:-1]
            yield from (figure, image, caption, words, end)
            yield Token("figure_close", "figure", -1, block=True)
            index += 6
        else:
            yield tokens[index]
            index += 1


def _is_figure(group: Sequence[Token]) -> bool:
    shape = ["paragraph_open", "inline", "paragraph_close"] * 2
    if [token.type for token in group] != shape:
        return False
    image, words = (group[index].children or [] for index in (1, 4))
    return (
        [child.type for child in image] == ["image"]
        and len(words) > 2
        and words[0].type == "em_open"
        and words[-1].type == "em_close"
        and sum(child.type == "em_open" for child in words) == 1
    )


def _sections(tokens: Iterator[Token]) -> Iterator[Token]:
    """Headings of the second level open sections that last until the next; tables scroll."""
    is_open = False
    for token in tokens:
        if token.type == "heading_open" and token.tag == "h2":
            if is_open:
                yield Token("section_close", "section", -1, block=True)
            is_open = True
            section = Token("section_open", "section", 1, block=True)
            section.attrs = {"aria-labelledby": token.attrs["id"]}
            yield section
        if token.type == "table_open":
            box = Token("scroll_open", "div", 1, block=True)
            box.attrs = {"class": "scroll", "role": "region", "tabindex": "0"}
            box.attrs["aria-label"] = f"Table: {token.meta['label']}"
            yield box
            token.attrs["class"] = "sortable"
        yield token
        if token.type == "table_close":
            yield Token("scroll_close", "div", -1, block=True)
    if is_open:
        yield Token("section_close", "section", -1, block=True)


def _plain(inline: Token) -> str:
    kinds = ("text", "code_inline", "html_inline")
    return "".join(child.content for child in inline.children or [] if child.type in kinds)


def _fold_or_text(_, tokens: Sequence[Token], index: int, *__) -> str:
    content = tokens[index].content
    found = _FOLD.fullmatch(content)
    if found is None:
        return f"<p>{html.escape(content)}</p>\n"
    if found[1] is None:
        return "</details>\n"
    return f"<details><summary>{html.escape(html.unescape(found[1]))}</summary>\n"


def _as_text(_, tokens: Sequence[Token], index: int, *__) -> str:
    return html.escape(tokens[index].content)
