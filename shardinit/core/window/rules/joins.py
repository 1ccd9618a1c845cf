"""Joins: each element of the result comes from one of several operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax

from shardinit.core.ir.graph import Node
from shardinit.core.window.coordinates import (
    ZERO,
    Coords,
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
from shardinit.core.window.rules.rule import Rule, keep


def _pull_concatenate(node: Node, which: int, coords: Coords) -> list[Coords | None]:
    axis = node.params["dimension"]
    pulled: list[Coords | None] = []
    offset = 0
    for value in node.inputs:
        size = value.shape[axis]
        if size == 0:
            pulled.append(None)
            continue
        # Below the operand's start the difference wraps to a large number: clamped.
        here = least(sub(coords[axis], u32(offset)), u32(size - 1))
        pulled.append((*coords[:axis], here, *coords[axis + 1 :]))
        offset += size
    return pulled


def _push_concatenate(node: Node, which: int, coords: Coords, args: Any) -> Any:
    axis = node.params["dimension"]
    parts, end = [], 0
    for value, arg in zip(node.inputs, args, strict=True):
        end += value.shape[axis]
        if value.shape[axis]:
            parts.append((end, arg))
    out = parts[-1][1]
    for limit, arg in reversed(parts[:-1]):
        out = select(less(coords[axis], u32(limit)), arg, out)
    return out


def _pull_stack(node: Node, which: int, coords: Coords) -> list[Coords | None]:
    axis = node.params["axis"]
    return [(*coords[:axis], *coords[axis + 1 :])] * len(node.inputs)


def _push_stack(node: Node, which: int, coords: Coords, args: Any) -> Any:
    out = args[-1]
    for number, arg in reversed(list(enumerate(args[:-1]))):
        is_this = equal(coords[node.params["axis"]], u32(number))
        out = select(is_this, arg, out)
    return out


def _pad_inside(node: Node, coords: Coords) -> tuple[list[Any], list[Any]]:
    """For each axis the operand's coordinate and whether it is no padding."""
    places, inside = [], []
    shape = node.inputs[0].shape
    config = node.params["padding_config"]
    for c, size, (low, _, interior) in zip(coords, shape, config, strict=True):
        step = interior + 1
        spaced = sub(c, u32(low)) if low else c
        place = div(spaced, u32(step)) if step > 1 else spaced
        inside.append(less(place, u32(size)))
        if step > 1:
            inside.append(lax.eq(*spread([rem(spaced, u32(step)), ZERO])))
        places.append(least(place, u32(max(size - 1, 0))))
    return places, inside


def _pull_pad(node: Node, which: int, coords: Coords) -> list[Coords | None]:
    if 0 in node.inputs[0].shape:
        return [None, ()]
    return [tuple(_pad_inside(node, coords)[0]), ()]


def _push_pad(node: Node, which: int, coords: Coords, args: Sequence[Any]) -> Any:
    if args[0] is None:
        return args[1]
    out = args[0]
    for inside in _pad_inside(node, coords)[1]:
        out = select(inside, out, args[1])
    return out


def _update_starts(node: Node) -> list[int]:
    operand, update = node.inputs[0], node.inputs[1]
    return [
        min(max(int(np.asarray(v.const)), 0), whole - part)
        for v, whole, part in zip(
            node.inputs[2:], operand.shape, update.shape, strict=True
        )
    ]


def _known_starts(first: int) -> Callable[[Node], bool]:
    return lambda node: all(v.const is not None for v in node.inputs[first:])


def _pull_update(node: Node, which: int, coords: Coords) -> list[Coords | None]:
    update = node.inputs[1]
    if update.size == 0:
        inner = None
    else:
        inner = tuple(
            least(sub(c, u32(start)), u32(size - 1))
            for c, start, size in zip(
                coords, _update_starts(node), update.shape, strict=True
            )
        )
    return [coords, inner, *[None] * update.ndim]


def _push_update(node: Node, which: int, coords: Coords, args: Sequence[Any]) -> Any:
    update = node.inputs[1]
    if args[1] is None:
        return args[0]
    out = args[1]
    for c, start, size in zip(coords, _update_starts(node), update.shape, strict=True):
        out = select(less(sub(c, u32(start)), u32(size)), out, args[0])
    return out


def _pull_dynamic_slice(node: Node, which: int, coords: Coords) -> list[Coords | None]:
    sizes = node.params["slice_sizes"]
    moved = []
    for c, v, whole, size in zip(
        coords, node.inputs[1:], node.inputs[0].shape, sizes, strict=True
    ):
        start = min(max(int(np.asarray(v.const)), 0), whole - size)
        moved.append(add(c, u32(start)) if start else c)
    return [tuple(moved), *[None] * len(moved)]


JOINS: dict[str, Rule] = {
    "concatenate": Rule(_pull_concatenate, _push_concatenate),
    "dynamic_slice": Rule(_pull_dynamic_slice, keep, _known_starts(1)),
    "dynamic_update_slice": Rule(_pull_update, _push_update, _known_starts(2)),
    "pad": Rule(_pull_pad, _push_pad),
    "stack": Rule(_pull_stack, _push_stack),
}
