"""The whole page: text, contents and records in a template, with its style and its script."""

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from ._records import records_section
from ._render import Heading, render

_RECORDS_HEADING = Heading(2, "records", "Records")


def page_html(text: str, images: Mapping[str, str], contents: Mapping[str, Any]) -> str:
    """A report in Markdown as one HTML file.

    The page loads nothing: figures lie in it as data, and its policy forbids every request and
    every script but its own. What `text` brings is shown, never run.

    Args:
      text: The report; its first line is its title.
      images: SVG by the address that `text` has for the figure; others are left out.
      contents: By file name, what the links of `text` lead into: the records it needs are put
        at the end of the page.

    Raises:
      LookupError: A link leads to a place that `contents` does not have.
    """
    rendered = render(text, {address: _as_address(svg) for address, svg in images.items()})
    records = records_section(rendered.links, contents)
    headings = [*rendered.headings, *([_RECORDS_HEADING] if records else [])]
    style, script = _part("page.css"), _part("page.js")
    return Template(_part("page.html")).substitute(
        policy=_policy(style, script),
        title=html.escape(rendered.title),
        style=style,
        contents=_contents(headings),
        body=rendered.body + records,
        script=script,
    )


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _as_address(svg: str) -> str:
    # Drawings are mostly digits and spaces: a quarter less than base64 takes.
    return "data:image/svg+xml," + quote(" ".join(svg.split()), safe=" /:;=,()!*+-_.~")


def _policy(style: str, script: str) -> str:
    """Nothing may be loaded, and only these very texts are style and script of the page."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def _contents(headings: Sequence[Heading]) -> str:
    """Links to all sections, those of the third level below those of the second."""
    lines: list[str] = []
    for index, heading in enumerate(headings):
        line = f'<li><a href="#{heading.name}">{html.escape(heading.text)}</a>'
        following = headings[index + 1].level if index + 1 < len(headings) else 2
        has_children = heading.level == 2 and following == 3
        closed = line if has_children else f"{line}</li>"
        lines.append(closed + ("<ul>" if has_children else ""))
        if heading.level == 3 and following == 2:
            lines.append("</ul></li>")
    return "\n".join(lines)
