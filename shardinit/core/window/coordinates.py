"""Coordinates: which elements of an array a window asks for, as index arrays.

One unsigned 32-bit array an axis. They broadcast against each other to the shape of the
grid on which a window is evaluated, so that an index that varies along one axis alone
stays small. Sizes may be symbolic dimensions. Flat places beyond 32 bits are pairs of
words, since 64-bit integers need a JAX setting that is not ours to change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import lax

from shardinit.core.types import Coords, Dim, Elements, Values, Words

ZERO = np.uint32(0)


def u32(value: Dim) -> Words:
    """A dimension, an index or a number as a uint32 scalar (or array)."""
    if isinstance(value, (int, np.integer)):
        # Negative ones wrap (the low padding of ``pad``): numpy 2 refuses them.
        return np.uint32(int(value) % (1 << 32))
    return jax.numpy.asarray(value).astype(np.uint32)  # a symbolic dimension


def spread(values: Sequence[Values]) -> list[Values]:
    """Broadcasts values, each of the grid's rank or a scalar, to one shape."""
    # ``jax.numpy`` would do it, but promotes dtypes; ``lax`` wants equal shapes.
    shapes = [np.shape(v) for v in values]
    rank = max((len(s) for s in shapes), default=0)
    if all(s == shapes[0] for s in shapes):
        return list(values)
    common = tuple(
        next((s[axis] for s in shapes if s and not is_one(s[axis])), 1)
        for axis in range(rank)
    )
    return [spread_to(v, common) for v in values]


def spread_to(value: Values, shape: Sequence[Dim]) -> Values:
    """Broadcasts a scalar or a value of the grid's rank to ``shape``."""
    shape = tuple(shape)
    if np.shape(value) == shape:
        return value
    dims = range(len(shape)) if np.ndim(value) else ()
    return lax.broadcast_in_dim(value, shape, tuple(dims))


def is_one(dim: Dim) -> bool:
    """Whether a dimension, maybe a symbolic one, is known to be one."""
    return isinstance(dim, int) and dim == 1


def ravel(coords: Coords, shape: Sequence[Dim]) -> Words:
    """The flat place of ``coords`` in an array of ``shape`` below 2**32 elements."""
    place: Words = ZERO
    stride: Dim = 1
    for coord, size in reversed(list(zip(coords, shape, strict=True))):
        if not is_one(size):
            term = coord if is_one(stride) else mul(coord, u32(stride))
            place = term if place is ZERO else add(place, term)
        stride *= size
    return place


def unravel(place: Words, shape: Sequence[Dim]) -> list[Words]:
    """Coordinates in ``shape`` of a flat place; sizes may be symbolic."""
    coords: list[Words] = []
    for number, size in enumerate(reversed(list(shape))):
        if is_one(size):
            coords.append(ZERO)
        elif number == len(shape) - 1:
            coords.append(place)
        else:
            coords.append(rem(place, u32(size)))
            place = div(place, u32(size))
    return coords[::-1]


def ravel_wide(coords: Coords, shape: Sequence[int]) -> tuple[Words, Words]:
    """High and low words of the 64-bit flat place of ``coords`` in ``shape``."""
    if math.prod(shape) <= 1 << 32:
        return ZERO, ravel(coords, shape)
    high: Words = ZERO
    low: Words = ZERO
    stride = 1
    for coord, size in reversed(list(zip(coords, shape, strict=True))):
        term_high, term_low = _mul_wide(coord, stride)
        high, low = _add_wide(high, low, term_high, term_low)
        stride *= size
    return high, low


def _mul_wide(x: Words, factor: int) -> tuple[Words, Words]:
    """64-bit product of a uint32 and a number below 2**64, by 16-bit halves."""
    low_factor, high_factor = factor & 0xFFFFFFFF, factor >> 32
    a, b = bit_and(x, u32(0xFFFF)), shift_right(x, 16)
    c, d = u32(low_factor & 0xFFFF), u32(low_factor >> 16)
    low, mid0, mid1, top = mul(a, c), mul(a, d), mul(b, c), mul(b, d)
    carry = add(
        add(shift_right(low, 16), bit_and(mid0, u32(0xFFFF))),
        bit_and(mid1, u32(0xFFFF)),
    )
    high = add(
        add(top, shift_right(carry, 16)),
        add(shift_right(mid0, 16), shift_right(mid1, 16)),
    )
    return add(high, mul(x, u32(high_factor))), mul(x, u32(low_factor))


def _add_wide(
    high: Words, low: Words, more_high: Words, more_low: Words
) -> tuple[Words, Words]:
    total = add(low, more_low)
    carry = lax.lt(*spread([total, more_low])).astype(np.uint32)
    return add(add(high, more_high), carry), total


def _binary(
    op: Callable[[Values, Values], jax.Array],
) -> Callable[[Values, Values], Values]:
    def apply(x: Values, y: Values) -> Values:
        return op(*spread([x, y]))

    return apply


add, sub, mul = _binary(lax.add), _binary(lax.sub), _binary(lax.mul)
div, rem, bit_and = _binary(lax.div), _binary(lax.rem), _binary(lax.bitwise_and)
least, less, equal = _binary(lax.min), _binary(lax.lt), _binary(lax.eq)


def shift_right(x: Words, distance: int) -> Words:
    """Logical shift to the right."""
    return _binary(lax.shift_right_logical)(x, u32(distance))


def select(which: Values, on_true: Elements, on_false: Elements) -> Elements:
    """Chooses element by element; keys word by word."""
    if isinstance(on_true, tuple):
        pairs = zip(on_true, on_false, strict=True)
        return tuple(select(which, t, f) for t, f in pairs)
    return lax.select(*spread([which, on_true, on_false]))
