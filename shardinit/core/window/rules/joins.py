"""Joins: each element of the result comes from one of several operands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax import lax

from shardinit.core.ir.graph import Node
from shardinit.core.types import Coords, Words
from shardinit.core.window.coordinates import (
    ZERO,
    add,
    div,
    equal,
    least,
    less,
    rem,
    select,
    spread,
    sub,
    u32,
)
from shardinit.core.window.reasons import require
from shardinit.core.window.rules.rule import At, Steps, rule


@rule("concatenate", moves=True)
def _concatenate(node: Node, which: int, coords: Coords) -> Steps:
    axis = int(node.params["dimension"])  # numpy's, where the caller's was
    parts, end = [], 0
    for number, value in enumerate(node.inputs):
        size = value.shape[axis]
        if size == 0:
            continue
        # Below the operand's start the difference wraps to a large number: clamped.
        here = least(sub(coords[axis], u32(end)), u32(size - 1))
        end += size
        parts.append((end, (yield At(number, _replaced(coords, axis, here)))))
    out = parts[-1][1]
    for limit, part in reversed(parts[:-1]):
        out = select(less(coords[axis], u32(limit)), part, out)
    return out


def _replaced(coords: Coords, axis: int, coord: Words) -> Coords:
    return (*coords[:axis], coord, *coords[axis + 1 :])


@rule("stack", picks=True)
def _stack(node: Node, which: int, coords: Coords) -> Steps:
    axis = node.params["axis"]
    inner = (*coords[:axis], *coords[axis + 1 :])
    parts = []
    for number in range(len(node.inputs)):
        parts.append((yield At(number, inner)))
    out = parts[-1]
    for number, part in reversed(list(enumerate(parts[:-1]))):
        out = select(equal(coords[axis], u32(number)), part, out)
    return out


@rule("pad", moves=True)
def _pad(node: Node, which: int, coords: Coords) -> Steps:
    filler = 1
    if 0 in node.inputs[0].shape:
        return (yield At(filler, ()))
    places, inside = [], []
    config = node.params["padding_config"]
    for c, size, (low, _, interior) in zip(
        coords, node.inputs[0].shape, config, strict=True
    ):
        step = interior + 1
        spaced = sub(c, u32(low)) if low else c
        place = div(spaced, u32(step)) if step > 1 else spaced
        inside.append(less(place, u32(size)))
        if step > 1:
            inside.append(lax.eq(*spread([rem(spaced, u32(step)), ZERO])))
        places.append(least(place, u32(size - 1)))
    out = yield At(0, tuple(places))
    fill = yield At(filler, ())
    for is_inside in inside:
        out = select(is_inside, out, fill)
    return out


@rule("dynamic_slice", picks=True)
def _dynamic_slice(node: Node, which: int, coords: Coords) -> Steps:
    starts = _starts(node, 1, node.params["slice_sizes"])
    moved = (add(c, u32(s)) if s else c for c, s in zip(coords, starts, strict=True))
    return (yield At(0, tuple(moved)))


@rule("dynamic_update_slice")
def _dynamic_update_slice(node: Node, which: int, coords: Coords) -> Steps:
    update = node.inputs[1]
    starts = _starts(node, 2, update.shape)
    old = yield At(0, coords)
    if update.size == 0:
        return old
    shifted = [sub(c, u32(start)) for c, start in zip(coords, starts, strict=True)]
    inner = zip(shifted, update.shape, strict=True)
    out = yield At(1, tuple(least(c, u32(size - 1)) for c, size in inner))
    for c, size in zip(shifted, update.shape, strict=True):
        out = select(less(c, u32(size)), out, old)
    return out


def _starts(node: Node, first: int, sizes: Sequence[int]) -> list[int]:
    """Where a slice of ``sizes`` begins; the operands from ``first`` on, clamped."""
    given = node.inputs[first:]
    require(all(v.const is not None for v in given))
    return [
        min(max(int(np.asarray(v.const)), 0), full - size)
        for v, full, size in zip(given, node.inputs[0].shape, sizes, strict=True)
    ]
