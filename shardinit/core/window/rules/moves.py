"""Moves: each element of the result is one element of the operand, found elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shardinit.core.ir.graph import Node
from shardinit.core.types import Coords, Words
from shardinit.core.window.coordinates import (
    ZERO,
    add,
    mul,
    ravel,
    rem,
    sub,
    u32,
    unravel,
)
from shardinit.core.window.reasons import require
from shardinit.core.window.rules.rule import mover


@mover("broadcast_in_dim")
def _broadcast_in_dim(node: Node, which: int, coords: Coords) -> Coords:
    dims = node.params["broadcast_dimensions"]
    source, out = node.inputs[0].shape, node.outputs[0].shape
    return tuple(
        ZERO if size == 1 and out[dim] != 1 else coords[dim]
        for size, dim in zip(source, dims, strict=True)
    )


def _groups(source: Sequence[int], out: Sequence[int]) -> list[tuple[range, range]]:
    """Shortest runs of axes of equal product: what a reshape merges and splits."""
    groups = []
    i = j = 0
    while i < len(source) or j < len(out):
        i0, j0 = i, j
        left = right = 1
        while True:
            if left == right and (i > i0 or j > j0):
                break
            if (left <= right and i < len(source)) or j >= len(out):
                left *= source[i]
                i += 1
            else:
                right *= out[j]
                j += 1
        groups.append((range(i0, i), range(j0, j)))
    return groups


@mover("reshape")
def _reshape(node: Node, which: int, coords: Coords) -> Coords:
    # ``order="F"`` reads the operand's axes in another order: ``dimensions``.
    order = node.params.get("dimensions") or range(node.inputs[0].ndim)
    source = [node.inputs[0].shape[axis] for axis in order]
    out = node.outputs[0].shape
    groups = _groups(source, out)
    # Flat places within a merged run of axes are words of 32 bits.
    require(all(math.prod(source[i] for i in left) < 1 << 32 for left, _ in groups))
    pulled: list[Words] = []
    for left, right in groups:
        from_shape = [source[i] for i in left]
        to_shape = [out[j] for j in right]
        group = tuple(coords[j] for j in right)
        if from_shape == to_shape:
            pulled.extend(group)
        else:
            pulled.extend(unravel(ravel(group, to_shape), from_shape))
    return tuple(pulled[list(order).index(axis)] for axis in range(len(pulled)))


@mover("transpose")
def _transpose(node: Node, which: int, coords: Coords) -> Coords:
    pulled: list[Words] = [ZERO] * len(coords)
    for axis, source in enumerate(node.params["permutation"]):
        pulled[source] = coords[axis]
    return tuple(pulled)


@mover("slice", picks=True)
def _slice(node: Node, which: int, coords: Coords) -> Coords:
    starts = node.params["start_indices"]
    strides = node.params["strides"] or (1,) * len(starts)
    return tuple(
        add(c if stride == 1 else mul(c, u32(stride)), u32(start))
        if start
        else (c if stride == 1 else mul(c, u32(stride)))
        for c, start, stride in zip(coords, starts, strides, strict=True)
    )


@mover("rev")
def _rev(node: Node, which: int, coords: Coords) -> Coords:
    shape, dims = node.inputs[0].shape, node.params["dimensions"]
    return tuple(
        sub(u32(shape[axis] - 1), c) if axis in dims else c
        for axis, c in enumerate(coords)
    )


@mover("squeeze")
def _squeeze(node: Node, which: int, coords: Coords) -> Coords:
    rank = node.inputs[0].ndim
    gone = {d % rank for d in node.params["dimensions"]}
    left = iter(coords)
    return tuple(ZERO if axis in gone else next(left) for axis in range(rank))


@mover("expand_dims")
def _expand_dims(node: Node, which: int, coords: Coords) -> Coords:
    new = {d % len(coords) for d in node.params["dimensions"]}
    return tuple(c for axis, c in enumerate(coords) if axis not in new)


@mover("tile")
def _tile(node: Node, which: int, coords: Coords) -> Coords:
    shape = node.inputs[0].shape
    return tuple(
        ZERO if n == 1 else c if r == 1 else rem(c, u32(n))
        for c, n, r in zip(coords, shape, node.params["reps"], strict=True)
    )


@mover("split", picks=True)
def _split(node: Node, which: int, coords: Coords) -> Coords:
    axis, sizes = node.params["axis"], node.params["sizes"]
    start = sum(sizes[:which])
    return tuple(add(c, u32(start)) if a == axis else c for a, c in enumerate(coords))


@mover("unstack", picks=True)
def _unstack(node: Node, which: int, coords: Coords) -> Coords:
    axis = node.params["axis"]
    return (*coords[:axis], u32(which), *coords[axis:])
