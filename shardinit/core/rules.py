"""The push-down rules: how a window of a result is a window of its operands.

A window is carried as *coordinates*, one unsigned index array an axis, not as a
rectangle: a reshape of a rectangle is no rectangle. Each rule has two halves. ``pull``
says at which coordinates of each operand a result's elements lie (towards the random
bits); ``push`` makes the result's elements of the operands' elements (back to the
leaf). A primitive that moves elements has only a pull, an elementwise one only a push.

Values broadcast against each other to the grid's shape, as coordinates do. Typed keys
travel as a tuple of their words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax

from shardinit.core import jaxpr as jx
from shardinit.core import threefry
from shardinit.core.coords import (
    ZERO,
    Coords,
    add,
    div,
    equal,
    least,
    less,
    mul,
    ravel,
    ravel_wide,
    rem,
    select,
    spread,
    sub,
    u32,
    unravel,
)
from shardinit.core.graph import Node, Value
from shardinit.core.keys import THREEFRY


@dataclass(frozen=True)
class Rule:
    """How one primitive windows.

    Attributes:
      pull: ``(node, which result, coords) -> coords of each operand`` (None: unused).
      push: ``(node, which result, coords, operand values) -> value``.
      accepts: whether this equation is one that the rule covers.
    """

    pull: Callable[[Node, int, Coords], list[Coords | None]]
    push: Callable[[Node, int, Coords, Sequence[Any]], Any]
    accepts: Callable[[Node], bool] = lambda node: True


# ---- elementwise -------------------------------------------------------------------


def _pull_elementwise(node: Node, which: int, coords: Coords) -> list[Coords | None]:
    """The same coordinates; operands of size one along an axis stay at zero there."""
    out = node.outputs[which].shape
    pulled: list[Coords | None] = []
    for value in node.inputs:
        if value.ndim == 0:
            pulled.append(())
        elif value.shape == out:
            pulled.append(coords)
        else:
            pairs = zip(coords, value.shape, out, strict=True)
            pulled.append(tuple(ZERO if s != o and s == 1 else c for c, s, o in pairs))
    return pulled


def _push_elementwise(node: Node, which: int, coords: Coords, args: Any) -> Any:
    return jx.bind(node.prim, spread(args), node.params)[which]


def _plain(node: Node) -> bool:
    """No keys, and every operand is a scalar or has the result's rank."""
    out = node.outputs[0]
    return not any(jx.is_key(v.dtype) for v in node.inputs) and all(
        v.ndim in (0, out.ndim) for v in node.inputs
    )


def _same_width(node: Node) -> bool:
    return node.inputs[0].shape == node.outputs[0].shape


ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e
    bessel_i1e cbrt ceil clamp clz complex conj convert_element_type cos cosh
    digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag
    integer_pow is_finite le lgamma log log1p log2 logistic lt max min mul mulhi ne
    neg nextafter not one_minus_square or polygamma polynomial population_count pow
    real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    sub tan tanh xor zeta""".split()
)

# ---- moves of elements -------------------------------------------------------------


def _keep(node: Node, which: int, coords: Coords, args: Sequence[Any]) -> Any:
    return args[0]


def _mover(pull: Callable[[Node, int, Coords], Coords]) -> Rule:
    def pull_first(node: Node, which: int, coords: Coords) -> list[Coords | None]:
        return [pull(node, which, coords)]

    return Rule(pull_first, _keep)


def _pull_broadcast(node: Node, which: int, coords: Coords) -> Coords:
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


def _pull_reshape(node: Node, which: int, coords: Coords) -> Coords:
    source, out = node.inputs[0].shape, node.outputs[0].shape
    pulled: list[Any] = []
    for left, right in _groups(source, out):
        from_shape = [source[i] for i in left]
        to_shape = [out[j] for j in right]
        group = tuple(coords[j] for j in right)
        if from_shape == to_shape:
            pulled.extend(group)
        else:
            pulled.extend(unravel(ravel(group, to_shape), from_shape))
    return tuple(pulled)


def _reshape_accepts(node: Node) -> bool:
    """Every merged run of axes has flat places below 2**32."""
    source, out = node.inputs[0].shape, node.outputs[0].shape
    return node.params.get("dimensions") is None and all(
        list(left) == [] or math.prod(source[i] for i in left) < 1 << 32
        for left, _ in _groups(source, out)
    )


def _pull_transpose(node: Node, which: int, coords: Coords) -> Coords:
    pulled: list[Any] = [ZERO] * len(coords)
    for axis, source in enumerate(node.params["permutation"]):
        pulled[source] = coords[axis]
    return tuple(pulled)


def _pull_slice(node: Node, which: int, coords: Coords) -> Coords:
    starts = node.params["start_indices"]
    strides = node.params["strides"] or (1,) * len(starts)
    return tuple(
        add(c if stride == 1 else mul(c, u32(stride)), u32(start))
        if start
        else (c if stride == 1 else mul(c, u32(stride)))
        for c, start, stride in zip(coords, starts, strides, strict=True)
    )


def _pull_rev(node: Node, which: int, coords: Coords) -> Coords:
    shape, dims = node.inputs[0].shape, node.params["dimensions"]
    return tuple(
        sub(u32(shape[axis] - 1), c) if axis in dims else c
        for axis, c in enumerate(coords)
    )


def _pull_squeeze(node: Node, which: int, coords: Coords) -> Coords:
    rank = node.inputs[0].ndim
    gone = {d % rank for d in node.params["dimensions"]}
    left = iter(coords)
    return tuple(ZERO if axis in gone else next(left) for axis in range(rank))


def _pull_expand(node: Node, which: int, coords: Coords) -> Coords:
    new = {d % len(coords) for d in node.params["dimensions"]}
    return tuple(c for axis, c in enumerate(coords) if axis not in new)


def _pull_tile(node: Node, which: int, coords: Coords) -> Coords:
    shape = node.inputs[0].shape
    return tuple(
        ZERO if n == 1 else c if r == 1 else rem(c, u32(n))
        for c, n, r in zip(coords, shape, node.params["reps"], strict=True)
    )


def _pull_split(node: Node, which: int, coords: Coords) -> Coords:
    axis, sizes = node.params["axis"], node.params["sizes"]
    start = sum(sizes[:which])
    return tuple(add(c, u32(start)) if a == axis else c for a, c in enumerate(coords))


def _pull_unstack(node: Node, which: int, coords: Coords) -> Coords:
    axis = node.params["axis"]
    return (*coords[:axis], u32(which), *coords[axis:])


# ---- joins -------------------------------------------------------------------------


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


# ---- sources -----------------------------------------------------------------------


def _push_iota(node: Node, which: int, coords: Coords, args: Sequence[Any]) -> Any:
    coord = coords[node.params["dimension"]]
    return lax.convert_element_type(coord, node.params["dtype"])


def _pull_bits(node: Node, which: int, coords: Coords) -> list[Coords | None]:
    return [coords[: node.inputs[0].ndim]]


def _push_bits(node: Node, which: int, coords: Coords, args: Sequence[Any]) -> Any:
    (key,) = args
    shape = tuple(node.params["shape"])
    high, low = ravel_wide(coords[node.inputs[0].ndim :], shape)
    key0, key1, high, low = spread([*key, high, low])
    return threefry.random_bits(key0, key1, high, low, node.params["bit_width"])


def _push_threefry(node: Node, which: int, coords: Coords, args: Sequence[Any]) -> Any:
    key0, key1, high, low = spread(args)
    return threefry.hash_on_device(key0, key1, high, low)[which]


def _threefry_keys(node: Node) -> bool:
    return jx.key_impl(node.inputs[0].dtype) == THREEFRY


RULES: dict[str, Rule] = {
    **{n: Rule(_pull_elementwise, _push_elementwise, _plain) for n in ELEMENTWISE},
    "bitcast_convert_type": Rule(_pull_elementwise, _push_elementwise, _same_width),
    "broadcast_in_dim": _mover(_pull_broadcast),
    "concatenate": Rule(_pull_concatenate, _push_concatenate),
    "dynamic_slice": Rule(_pull_dynamic_slice, _keep, _known_starts(1)),
    "dynamic_update_slice": Rule(_pull_update, _push_update, _known_starts(2)),
    "expand_dims": _mover(_pull_expand),
    "iota": Rule(lambda node, which, coords: [], _push_iota),
    "pad": Rule(_pull_pad, _push_pad),
    "random_bits": Rule(_pull_bits, _push_bits, _threefry_keys),
    "reshape": Rule(
        lambda node, which, coords: [_pull_reshape(node, which, coords)],
        _keep,
        _reshape_accepts,
    ),
    "rev": _mover(_pull_rev),
    "slice": _mover(_pull_slice),
    "split": _mover(_pull_split),
    "squeeze": _mover(_pull_squeeze),
    "stack": Rule(_pull_stack, _push_stack),
    "threefry2x32": Rule(
        _pull_elementwise,
        _push_threefry,
        _plain,
    ),
    "tile": _mover(_pull_tile),
    "transpose": _mover(_pull_transpose),
    "unstack": _mover(_pull_unstack),
}


def rule_of(node: Node) -> Rule | None:
    """The rule that windows ``node``, None if it can only be evaluated whole."""
    rule = RULES.get(node.name)
    return rule if rule is not None and rule.accepts(node) else None


def gather(whole: Any, value: Value, coords: Coords) -> Any:
    """The elements of an array that is there whole, at ``coords``; keys as words."""
    if jx.is_key(value.dtype):
        words = jax.random.key_data(whole)
        words = words.reshape(-1, words.shape[-1])
        return tuple(
            _take(words[:, i], value.shape, coords) for i in range(words.shape[1])
        )
    return _take(jax.numpy.asarray(whole).reshape(-1), value.shape, coords)


def _take(flat: Any, shape: Sequence[int], coords: Coords) -> Any:
    # Clipped, since the lanes that pad a window lie beyond its end.
    if math.prod(shape) == 1:
        return flat[0]
    return flat.at[ravel(coords, shape)].get(mode="clip")
