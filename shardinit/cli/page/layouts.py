"""Layouts as pictures: how a leaf is cut, and which device holds which piece."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from shardinit.core.plan.entries import mesh_axes

_MOST = 16  # cells along one side of a picture
_SIZE = 150.0  # points


def layout_svg(mesh: Mapping[str, int], spec: Sequence[Any], rank: int) -> str:
    """A leaf in its pieces beside the devices that hold them, in one colour each.

    Devices of one colour hold the same. The two dimensions that are cut most are
    drawn, or the last two; of a mesh two axes, those that cut the leaf first; others
    stand in one cell. More than 16 along a side are drawn as 16.

    Args:
      mesh: size of each mesh axis, in order.
      spec: the partition spec's entries.
      rank: of the leaves.

    Example:
      >>> layout_svg({"data": 2, "model": 4}, ("data", None), 2).count('class="cell"')
      10
    """
    entries = [mesh_axes(spec[i]) if i < len(spec) else () for i in range(rank)]
    parts = [math.prod(mesh[a] for a in names) for names in entries]
    dims = _drawn(parts)
    axes = _axes(mesh, [name for names in entries for name in names])
    left = _leaf(parts, dims, rank)
    right = _devices(mesh, axes, entries, parts, dims)
    label = f"{_parts_text(parts)}; each on {_copies(mesh, parts):,} device(s)"
    return (
        f'<svg viewBox="0 0 400 190" role="img" aria-label="{html.escape(label)}">'
        f"{left}{right}</svg>"
    )


def described(mesh: Mapping[str, int], spec: Sequence[Any], rank: int) -> str:
    """The same in a sentence."""
    entries = [mesh_axes(spec[i]) if i < len(spec) else () for i in range(rank)]
    parts = [math.prod(mesh[a] for a in names) for names in entries]
    copies = _copies(mesh, parts)
    if math.prod(parts) == 1:
        return f"whole on each of {copies:,} devices" if copies > 1 else "on one device"
    held = f", each piece on {copies:,} devices" if copies > 1 else ""
    return f"{_parts_text(parts)}{held}"


def _parts_text(parts: Sequence[int]) -> str:
    shown = " x ".join(f"{n:,}" for n in parts) or "1"
    return f"{math.prod(parts):,} pieces ({shown})"


def _copies(mesh: Mapping[str, int], parts: Sequence[int]) -> int:
    return math.prod(mesh.values()) // max(math.prod(parts), 1)


def _drawn(parts: Sequence[int]) -> list[int]:
    """Which dimensions are drawn: those cut most, else the last; at most two."""
    order = sorted(range(len(parts)), key=lambda i: (-parts[i], -i))
    return sorted(order[:2])


def _axes(mesh: Mapping[str, int], used: Sequence[str]) -> list[str]:
    """Which mesh axes are drawn: two of more than one device, those that cut first."""
    many = [name for name, size in mesh.items() if size > 1]
    first = sorted(many, key=lambda name: name not in used)[:2]
    return [name for name in many if name in first]


def _colour(piece: Sequence[int], parts: Sequence[int]) -> str:
    """A hue by the first drawn dimension, lightness by the second."""
    rows, columns = (*parts, 1, 1)[:2]
    row, column = (*piece, 0, 0)[:2]
    if rows * columns == 1:
        return "hsl(215 12% 62%)"
    if rows == 1:
        return f"hsl({20 + 300 * column / columns:.0f} 55% 58%)"
    light = 48 + 26 * column / max(columns - 1, 1)
    return f"hsl({20 + 300 * row / rows:.0f} 55% {light:.0f}%)"


def _grid(x: float, colours: Sequence[Sequence[str]]) -> str:
    rows, columns = len(colours), len(colours[0])
    wide, high = _SIZE / columns, _SIZE * 0.8 / rows
    return "".join(
        f'<rect class="cell" x="{x + c * wide:.1f}" y="{30 + r * high:.1f}" '
        f'width="{wide:.1f}" height="{high:.1f}" fill="{colours[r][c]}"/>'
        for r in range(rows)
        for c in range(columns)
    )


def _rows_columns(sizes: Sequence[int]) -> tuple[int, int]:
    """Two sizes at most as those of a grid; one alone lies along the columns."""
    rows, columns = (1, 1, *sizes)[-2:]
    return rows, columns


def _leaf(parts: Sequence[int], dims: Sequence[int], rank: int) -> str:
    counts = [parts[d] for d in dims]
    rows, columns = _rows_columns(counts)
    shown = [min(rows, _MOST), min(columns, _MOST)]
    both = len(counts) == 2
    colours = [
        [
            _colour(
                (r * rows // shown[0], c * columns // shown[1])
                if both
                else (c * columns // shown[1],),
                counts,
            )
            for c in range(shown[1])
        ]
        for r in range(shown[0])
    ]
    axis = ", ".join(f"{parts[d]:,} along axis {d}" for d in dims if parts[d] > 1)
    text = axis or "not cut"
    return (
        f'<text x="10" y="14">a leaf of rank {rank}</text>'
        f'<text x="10" y="170">{text}</text>' + _grid(10, colours)
    )


def _piece(
    mesh: Mapping[str, int], place: Mapping[str, int], names: Sequence[str]
) -> int:
    """Which piece of a dimension that mesh axes cut a device has."""
    number = 0
    for name in names:
        number = number * mesh[name] + place[name]
    return number


def _devices(
    mesh: Mapping[str, int],
    axes: Sequence[str],
    entries: Sequence[Sequence[str]],
    parts: Sequence[int],
    dims: Sequence[int],
) -> str:
    sizes = [mesh[a] for a in axes]
    rows, columns = _rows_columns(sizes)
    shown = [min(rows, _MOST), min(columns, _MOST)]

    def colour(r: int, c: int) -> str:
        place = dict.fromkeys(mesh, 0)
        at = (r * rows // shown[0], c * columns // shown[1])
        place.update(zip(axes, at if len(axes) == 2 else at[1:], strict=False))
        pieces = [_piece(mesh, place, entries[d]) for d in dims]
        return _colour(pieces, [parts[d] for d in dims])

    colours = [[colour(r, c) for c in range(shown[1])] for r in range(shown[0])]
    named = " x ".join(f"{html.escape(a)} {mesh[a]:,}" for a in axes) or "one device"
    rest = math.prod(mesh.values()) // max(math.prod(sizes), 1)
    more = f"x {rest:,} more in each cell" if rest > 1 else ""
    coarse = '<text x="220" y="184">drawn coarser than it is</text>'
    fewer = coarse if max(rows, columns) > _MOST else ""
    return (
        f'<text x="220" y="14">devices: {named}</text>'
        f'<text x="220" y="170">{more or "one colour, one piece"}</text>{fewer}'
        + _grid(220, colours)
    )
