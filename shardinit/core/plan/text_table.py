"""Tables of text, for a terminal and for a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence

Row = Sequence[str]


def as_text(header: Row, body: Sequence[Row]) -> str:
    """Columns wide enough for their widest cell, two spaces apart."""
    table = [header, *body]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return "\n".join(lines)


def as_html(header: Row, body: Sequence[Row]) -> str:
    """The same as an HTML table."""

    def cells(row: Row, tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row)
        return f"<tr>{inner}</tr>"

    lines = "".join(cells(row, "td") for row in body)
    return f"<table><thead>{cells(header, 'th')}</thead><tbody>{lines}</tbody></table>"
