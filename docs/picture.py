"""The picture of the README: ``python docs/picture.py`` writes ``docs/picture.svg``.

What it shows is computed: the leaves and programs of Llama-3.1-405B, and the layout of
one leaf, drawn by what draws the page of a plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shardinit
from shardinit.cli.page.layouts import layout_svg
from shardinit.models import ModelSpec, build

FILE = Path(__file__).with_name("picture.svg")
MESH = {"data": 2, "model": 4}
_CONFIGS = Path(shardinit.__file__).parent / "models" / "configs"
_STYLE = """
  text { font: 11px system-ui, sans-serif; fill: #5c6670; }
  .head { font-size: 14px; fill: #1b1f24; } .cell { stroke: #fff; stroke-width: 1; }
  .arrow { stroke: #5c6670; stroke-width: 1.5; fill: none; }
  @media (prefers-color-scheme: dark) { text { fill: #9aa5b1; } .head { fill: #e6e9ec; }
    .cell { stroke: #15191d; } .arrow { stroke: #9aa5b1; } }
"""


def picture(plan: Any) -> str:
    """Leaves in the colours of their programs, those programs, a leaf on devices."""
    count = len(plan.programs)
    colours = [f"hsl({20 + 300 * n / count:.0f} 55% 58%)" for n in range(count)]
    body = [*_leaves(plan, colours), *_programs(colours)]
    layout = layout_svg(MESH, ("data", "model"), 2)
    layout = layout.replace("<svg ", '<svg x="520" y="36" width="400" height="176" ', 1)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 930 226" role="img" '
        f'aria-label="{len(plan.leaves):,} leaves, {count} programs, shards">\n'
        f"<style>{_STYLE}</style>\n"
        + "\n".join([*body, *_arrows(), layout])
        + "\n</svg>\n"
    )


def _leaves(plan: Any, colours: list[str]) -> Iterator[str]:
    """Every leaf as a small square, in the colour of the program that makes it."""
    columns, size = 48, 6
    said = f"init(key): {len(plan.leaves):,} leaves"
    yield f'<text class="head" x="0" y="16">{said}</text>'
    squares: dict[str, str] = {}
    for number, leaf in enumerate(plan.leaves):
        row, column = divmod(number, columns)
        fill = "#8fa0b3" if leaf.is_hosted else colours[leaf.program]
        square = f"M{column * size} {40 + row * size}h5v5h-5z"
        squares[fill] = squares.get(fill, "") + square
    for fill, path in squares.items():
        yield f'<path fill="{fill}" d="{path}"/>'


def _programs(colours: list[str]) -> Iterator[str]:
    yield f'<text class="head" x="362" y="16">{len(colours)} programs</text>'
    pitch = 144 / len(colours)
    for number, fill in enumerate(colours):
        yield (
            f'<rect x="362" y="{42 + pitch * number:.1f}" width="86" '
            f'height="{pitch - 5:.1f}" rx="4" fill="{fill}"/>'
        )
    yield '<text x="362" y="206">compiled once each</text>'


def _arrows() -> Iterator[str]:
    said = "each device: its shard, and nothing else"
    yield f'<text class="head" x="530" y="16">{said}</text>'
    for x, word in ((300, "cut"), (464, "run")):
        yield f'<path class="arrow" d="M{x} 112 h38 m-7 -5 l7 5 l-7 5"/>'
        yield f'<text x="{x + 6}" y="104">{word}</text>'


def main() -> None:
    """Writes the picture."""
    config = _CONFIGS / "llama-3.1-405b.json"
    FILE.write_text(picture(shardinit.plan(build(ModelSpec.from_file(config)))))


if __name__ == "__main__":
    main()
