"""Tables of text, for a terminal and for a notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

Row = Sequence[str]

# Where a word that is too long may be broken: never inside of a number or its commas.
_BREAK = re.compile(r"(?<=[/.(){}=_])(?!\d)|(?<=,)(?!\d)")

_TIED = "\0"  # a space at which no line ends


def as_text(header: Row, body: Sequence[Row]) -> str:
    """Columns wide enough for their widest cell, two spaces apart."""
    return "\n".join(_aligned([header, *body]))


def fitted(header: Row, body: Sequence[Row], width: int, title: int) -> str:
    """A table no wider than a terminal, which breaks no number.

    Args:
      header: names of the columns; those without any cell are left out.
      body: the rows.
      width: columns of the terminal.
      title: which column gets a line of its own where not all fit beside each other.

    Example:
      >>> print(fitted(("path", "bytes"), [("layers/0/kernel", "16,384")], 20, 0))
      path
        bytes
      layers/0/kernel
        16,384
    """
    used = [i for i in range(len(header)) if i == title or any(row[i] for row in body)]
    table = [[row[i] for i in used] for row in (header, *body)]
    lines = _aligned(table)
    if max(map(len, lines)) <= width:
        return "\n".join(lines)
    place = used.index(title)
    titles = [row.pop(place) for row in table]
    rest = _aligned(table)
    if max(map(len, rest)) + 2 > width:  # no cell stands below its name
        names, titles = table[0], titles[1:]
        rest = [_named(names, row, width - 4) for row in table[1:]]
    pairs = zip(titles, rest, strict=True)
    lines = (
        f"{wrapped(name, width)}\n  {wrapped(cells, width - 2, hang=2)}"
        for name, cells in pairs
    )
    return "\n".join(lines).replace(_TIED, " ")


def wrapped(text: str, width: int, hang: int = 4) -> str:
    """A line as lines of at most so many columns, the further ones set in.

    Words that are longer are broken, and numbers are not.

    Example:
      >>> print(wrapped("holds 54,962,159,616 bytes", 16))
      holds
          54,962,159,616
          bytes
    """
    if len(text) <= width:
        return text
    lines, line = [], ""
    for gap, piece in _pieces(text, width - hang):
        if line.strip() and len(line) + len(gap) + len(piece) > width:
            lines.append(line.rstrip())
            line = " " * hang + piece
        else:
            line += gap + piece
    return "\n".join([*lines, line])


def _pieces(text: str, width: int) -> Iterable[tuple[str, str]]:
    """What a line is made of, each with the space before it."""
    for match in re.finditer(r"( *)([^ ]+)", text):
        gap, word = match.groups()
        for piece in [word] if len(word) <= width else _BREAK.split(word):
            yield gap, piece
            gap = ""


def _named(names: Row, row: Row, width: int) -> str:
    """The cells of a row, each on one line with the name of its column."""
    cells = zip(names, row, strict=True)
    facts = (f"{name} {cell}".strip() for name, cell in cells if cell)
    return "  ".join(x.replace(" ", _TIED) if len(x) <= width else x for x in facts)


def _aligned(table: Sequence[Row]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def as_html(header: Row, body: Sequence[Row]) -> str:
    """The same as an HTML table."""

    def cells(row: Row, tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row)
        return f"<tr>{inner}</tr>"

    lines = "".join(cells(row, "td") for row in body)
    return f"<table><thead>{cells(header, 'th')}</thead><tbody>{lines}</tbody></table>"
