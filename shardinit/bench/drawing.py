"""Drawing: ratios as bars on one logarithmic axis, as text of an SVG.

Made as the page of a plan makes its pictures: a few rectangles with a style of their
own, dark where the reader's screen is, and nothing to install.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence

from shardinit.bench.case import Row

_WIDE, _HIGH = 900, 34  # of the picture; of a row
_LEFT, _RIGHT, _TOP = 330, 820, 34  # where the axis begins and ends, in points
_STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #1b1f24; }
  .soft { fill: #5c6670; } .line { stroke: #d9dee3; } .one { stroke: #5c6670; }
  .bar { fill: #8fa0b3; } .bar.yes { fill: #3f8f5b; } .bar.no { fill: #c2554a; }
  .must, .goal { stroke: #1b1f24; stroke-width: 2.5; } .goal { stroke: #2458c5; }
  @media (prefers-color-scheme: dark) { text { fill: #e6e9ec; } .soft { fill: #9aa5b1; }
    .line { stroke: #343c45; } .must { stroke: #e6e9ec; } .goal { stroke: #86aaf5; } }
"""


def ratios_svg(rows: Sequence[Row]) -> str:
    """Every ratio with what it must reach and shall reach; no rows in other units.

    Bars begin at 1x: to the right where shardinit is ahead of what it is held against.

    Example:
      >>> from shardinit.bench.case import Sample
      >>> row = Row("cold", "cold init", 14.6, "x", Sample((2.3,)), against="jit")
      >>> "14.6x" in ratios_svg([row])
      True
    """
    ratios = [row for row in rows if row.unit == "x"]
    high = _TOP + _HIGH * len(ratios) + 12
    body = "\n".join(_axis(*_span(ratios), high)) + "\n"
    for number, row in enumerate(ratios):
        body += "\n".join(_bar(row, _TOP + _HIGH * number, *_span(ratios))) + "\n"
    label = f"ratios of {len(ratios)} measurements"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE} {high}" '
        f'role="img" aria-label="{label}">\n<style>{_STYLE}</style>\n{body}</svg>\n'
    )


def _span(rows: Sequence[Row]) -> tuple[int, int]:
    """Powers of ten that hold all ratios and marks, and 1."""
    found = [1.0, *(row.value for row in rows)]
    found += [
        x for row in rows if row.target for x in (row.target.must, row.target.goal)
    ]
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    return low, max(high, low + 1)


def _at(value: float, low: int, high: int) -> float:
    return _LEFT + (_RIGHT - _LEFT) * (math.log10(value) - low) / (high - low)


def _axis(low: int, high: int, bottom: int) -> Iterator[str]:
    for power in range(low, high + 1):
        x = _at(10.0**power, low, high)
        kind = "one" if power == 0 else "line"
        yield (
            f'<line class="{kind}" x1="{x:.1f}" y1="24" x2="{x:.1f}" '
            f'y2="{bottom - 6}"/>'
        )
        yield (
            f'<text class="soft" x="{x:.1f}" y="16" text-anchor="middle">'
            f"{10.0**power:,g}x</text>"
        )


def _bar(row: Row, top: int, low: int, high: int) -> Iterator[str]:
    one, end = _at(1.0, low, high), _at(row.value, low, high)
    met = {None: "", True: " yes", False: " no"}[row.met]
    yield (
        f'<text x="{_LEFT - 12}" y="{top + 14}" text-anchor="end">'
        f"{html.escape(row.name)}</text>"
        f'<text class="soft" x="{_LEFT - 12}" y="{top + 27}" text-anchor="end">'
        f"against {html.escape(row.against)}</text>"
    )
    yield (
        f'<rect class="bar{met}" x="{min(one, end):.1f}" y="{top + 6}" '
        f'width="{abs(end - one):.1f}" height="18"/>'
    )
    places = [end, one]
    if row.target is not None:
        for kind, value in (("must", row.target.must), ("goal", row.target.goal)):
            x = _at(value, low, high)
            places.append(x)
            yield (
                f'<line class="{kind}" x1="{x:.1f}" y1="{top + 3}" x2="{x:.1f}" '
                f'y2="{top + 27}"><title>{kind} {value:g}x</title></line>'
            )
    yield f'<text x="{max(places) + 7:.1f}" y="{top + 19}">{row.value:.3g}x</text>'
