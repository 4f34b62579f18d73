"""The records that a report's links lead to, put at the end of its page."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .._places import RESULTS_FILE, Found, resolve
from ._render import RecordLink

_INTRODUCTION = (
    "What the linked numbers above were made from, as it stands in the files beside this page; "
    "open one, or follow a link to it. Names of fields end with their unit: <code>_s</code> is "
    "seconds, <code>_bytes</code> bytes, <code>_ratio</code> a share of one."
)


def records_section(links: Sequence[RecordLink], contents: Mapping[str, Any]) -> str:
    """A folded entry for each place, and for each place that these name as their sources.

    Raises:
      LookupError: A link leads to a place that `contents` does not have.
    """
    entries: dict[RecordLink, str] = {}
    waiting = list(dict.fromkeys(links))
    while waiting:
        link = waiting.pop(0)
        if link in entries:
            continue
        if link.file not in contents:
            raise LookupError(f"there is no {link.file} to read {link.place} from")
        parts = [RecordLink(link.file, part) for part in link.place.split(";")]
        found = resolve(contents[link.file], link.place)
        waiting += parts if len(parts) > 1 else _sources(link.file, found)
        entries[link] = _joined(parts) if len(parts) > 1 else _table(link.file, found)
    if not entries:
        return ""
    folded = [_entry(link, entries[link]) for link in sorted(entries, key=_order)]
    return (
        '<section id="records" aria-labelledby="records-heading">\n'
        f'<h2 id="records-heading">Records</h2>\n<p>{_INTRODUCTION}</p>\n'
        + "\n".join(folded)
        + "\n</section>\n"
    )


def _order(link: RecordLink) -> tuple:
    """Places by file, list and number; those made of several behind them."""
    words = re.split(r"[/-]", link.place)
    numbers = [(0, int(word), "") if word.isdecimal() else (1, 0, word) for word in words]
    return link.file != RESULTS_FILE, ";" in link.place, numbers


def _entry(link: RecordLink, body: str) -> str:
    name, title = html.escape(link.name), html.escape(link.title)
    return (
        f'<details class="record"><summary><code>{title}</code></summary>'
        f'<div id="{name}" class="scroll">{body}</div></details>'
    )


def _joined(parts: Sequence[RecordLink]) -> str:
    items = "".join(f"<li>{_link(part)}</li>" for part in parts)
    return f"<p>Made from the records of</p><ul>{items}</ul>"


def _link(link: RecordLink) -> str:
    return (
        f'<a class="record" href="#{html.escape(link.name)}">'
        f"<code>{html.escape(link.place)}</code></a>"
    )


def _table(file: str, found: Sequence[Found]) -> str:
    """Fields down the page for one record, a line each for several."""
    rows = [_flat(one.value) for one in found]
    if len(rows) == 1:
        cells = "".join(
            f"<tr><th>{html.escape(name or 'value')}</th>"
            f"<td>{_written(file, name, value)}</td></tr>"
            for name, value in rows[0].items()
        )
        return f"<table><tbody>{cells}</tbody></table>"
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f'<th scope="col">{html.escape(name or "value")}</th>' for name in names)
    lines = "".join(
        f'<tr><th scope="row"><code>{html.escape(one.pointer)}</code></th>'
        + "".join(f"<td>{_written(file, name, row.get(name))}</td>" for name in names)
        + "</tr>"
        for one, row in zip(found, rows, strict=True)
    )
    return f'<table><thead><tr><th scope="col">place</th>{head}</tr></thead>{lines}</table>'


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Fields of fields by their whole name, `latency_s.mean`; a value alone has no name."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    fields: dict[str, Any] = {}
    for name, item in value.items():
        fields |= _flat(item, f"{prefix}.{name}" if prefix else name)
    return fields


def _written(file: str, name: str, value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    if name == "sources" and isinstance(value, list):
        return ", ".join(_link(RecordLink(file, str(one))) for one in value)
    text = value if isinstance(value, str) else json.dumps(value)
    return html.escape(text)


def _sources(file: str, found: Sequence[Found]) -> list[RecordLink]:
    """Places that a record says it was made from."""
    lists = (one.value.get("sources") for one in found if isinstance(one.value, Mapping))
    return [
        RecordLink(file, place) for places in lists if isinstance(places, list) for place in places
    ]
