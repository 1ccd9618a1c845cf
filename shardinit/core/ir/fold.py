"""Folding while tracing: key derivations and the small integers that steer them.

The graph builder offers every equation here first. Integer arithmetic on constants
(Flax counts the keys it has handed out) is done at once in numpy; an equation that
only derives, slices, stacks or re-wraps keys becomes a step of ``keys.Derivation``.
Everything else is declined and stays an equation, for a rule to window: a primitive
that is not here has the same values, computed on the devices. Floating point is never
folded: XLA specialises on constants, and the bits must stay what ``jax.jit`` gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TypeAlias

import jax
import numpy as np

from shardinit.core.ir.graph import Value
from shardinit.core.ir.jaxpr import IDENTITY, Aval, Params, is_key, key_impl
from shardinit.core.prng import derivation as keys
from shardinit.core.types import DType

MAX_FOLDED = 1 << 16  # elements; a larger integer array is better made on the device


def _slice(p: Params, a: np.ndarray) -> np.ndarray:
    strides = p["strides"] or (1,) * a.ndim
    spans = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    return a[tuple(slice(*span) for span in spans)]


def _broadcast_in_dim(p: Params, a: np.ndarray) -> np.ndarray:
    shape = [1] * len(p["shape"])
    for size, dim in zip(a.shape, p["broadcast_dimensions"], strict=True):
        shape[dim] = size
    return np.broadcast_to(a.reshape(shape), p["shape"])


def _reshape(p: Params, a: np.ndarray) -> np.ndarray:
    order = p.get("dimensions")  # ``order="F"`` reads the axes in another order
    return (a if order is None else np.transpose(a, order)).reshape(p["new_sizes"])


def _dynamic_slice(p: Params, a: np.ndarray, *starts: np.ndarray) -> np.ndarray:
    sizes = p["slice_sizes"]
    begin = [
        min(max(int(s), 0), n - size)
        for s, n, size in zip(starts, a.shape, sizes, strict=True)
    ]
    return a[tuple(slice(b, b + n) for b, n in zip(begin, sizes, strict=True))]


def _unstack(p: Params, a: np.ndarray) -> list[np.ndarray]:
    axis = p["axis"]
    return [np.asarray(np.take(a, i, axis)) for i in range(a.shape[axis])]


def _split(p: Params, a: np.ndarray) -> list[np.ndarray]:
    return np.split(a, np.cumsum(p["sizes"])[:-1], axis=p["axis"])


def _iota(p: Params) -> np.ndarray:
    shape, dimension = p["shape"], p["dimension"]
    line = np.arange(shape[dimension]).astype(p["dtype"])
    line = line.reshape([-1 if a == dimension else 1 for a in range(len(shape))])
    # A view whose strides are zero: JAX lowers it to a broadcast of the line, and an
    # array of its own to all of its numbers (0.10.2), so that a program would grow.
    return np.broadcast_to(line, shape)


_Fold: TypeAlias = Callable[..., np.ndarray | list[np.ndarray]]
"""An equation in numpy: of its parameters and operands, or of its operands alone."""

# Moves of whole elements: the same on integers and on the places of keys.
_MOVES: dict[str, _Fold] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "dynamic_slice": _dynamic_slice,
    "expand_dims": lambda p, a: np.expand_dims(a, p["dimensions"]),
    "reshape": _reshape,
    "rev": lambda p, a: np.flip(a, p["dimensions"]),
    "slice": _slice,
    "split": _split,
    "squeeze": lambda p, a: np.squeeze(a, tuple(p["dimensions"])),
    "transpose": lambda p, a: np.transpose(a, p["permutation"]),
    "unstack": _unstack,
    **dict.fromkeys([*sorted(IDENTITY), "optimization_barrier"], lambda p, a: a),
}
# Joins of them: of integers, of keys, or of both.
_JOINS: dict[str, Callable[..., np.ndarray]] = {
    "concatenate": lambda p, *parts: np.concatenate(parts, p["dimension"]),
    "stack": lambda p, *parts: np.stack(parts, p["axis"]),
}
# All that is of integers alone.
_INTEGERS: dict[str, _Fold] = {
    "convert_element_type": lambda p, a: a.astype(p["new_dtype"]),
    "iota": _iota,
    **_MOVES,
    **_JOINS,
}
_ARITHMETIC: dict[str, _Fold] = {
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "select_n": lambda which, *cases: np.choose(np.asarray(which, np.intp), cases),
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}


@lru_cache(maxsize=256)
def _places(shape: tuple[int, ...]) -> np.ndarray:
    places = np.arange(math.prod(shape)).reshape(shape)
    places.flags.writeable = False
    return places


def fold_integers(
    name: str, params: Params, args: Sequence[np.ndarray], out_aval: Aval
) -> list[np.ndarray] | None:
    """Evaluates an integer equation on constants, or returns None to decline."""
    dtypes = [out_aval.dtype, *(a.dtype for a in args)]
    if not all(map(_is_integer, dtypes)) or math.prod(out_aval.shape) > MAX_FOLDED:
        return None
    # Silent, as XLA is: integers that are too large wrap.
    with np.errstate(over="ignore"):
        if name in _ARITHMETIC:
            out = _ARITHMETIC[name](*args)
        elif name in _INTEGERS:
            out = _INTEGERS[name](params, *args)
        else:
            return None
    many = out if isinstance(out, list) else [out]
    return [np.asarray(o, out_aval.dtype) for o in many]


def _is_integer(dtype: DType) -> bool:
    return not is_key(dtype) and np.dtype(dtype).kind in "iub"


def fold_keys(
    name: str, params: Params, args: Sequence[Value], out_aval: Aval
) -> list[keys.Derivation] | None:
    """Turns an equation on keys into derivations, or returns None to decline.

    Args:
      name: the primitive.
      params: its parameters.
      args: the operands.
      out_aval: shape and dtype of the first result.
    """
    if name == "random_seed":
        return _seed(args[0], out_aval)
    if name in _JOINS:
        return _join(args, partial(_JOINS[name], params))
    if not args or args[0].key is None:
        return None
    key = args[0].key
    if name == "random_wrap":
        return [keys.take([key], np.arange(key.words), key_impl(out_aval.dtype))]
    if name == "random_unwrap":
        return [key]
    if name == "random_split":
        return [keys.split(key, params["shape"])]
    if name == "random_fold_in":
        return _fold_in(key, args, out_aval)
    moved = _moved(name, params, args, out_aval)
    if moved is None:
        return None
    width = _width(args[0])
    return [keys.take([key], _to_words(m, width)) for m in moved]


def _seed(seed: Value, out_aval: Aval) -> list[keys.Derivation] | None:
    if seed.const is None or seed.shape:
        return None
    # Each implementation makes keys of seeds in its own way: JAX does it.
    impl = key_impl(out_aval.dtype)
    key = jax.random.key(int(seed.const), impl=impl)
    return [keys.constant(np.asarray(jax.random.key_data(key)), impl)]


def _moved(
    name: str, params: Params, args: Sequence[Value], out_aval: Aval
) -> list[np.ndarray] | None:
    """For each result of a move which element of the first operand stands where."""
    places, others = _places(args[0].shape), [a.const for a in args[1:]]
    if any(other is None for other in others):
        return None
    if name == "gather":
        rows = jax.lax.gather_p.bind(places.astype(np.int32), *others, **params)
        return [np.asarray(rows)]
    if name in _MOVES:
        moved = _MOVES[name](params, places, *others)
        return moved if isinstance(moved, list) else [moved]
    if name == "convert_element_type" and out_aval.dtype == args[0].dtype:
        return [places]
    return None


def _width(value: Value) -> int:
    """Words an element: a typed key has several, a raw uint32 is one."""
    if is_key(value.dtype):
        return keys.words_per_key(key_impl(value.dtype))
    return 1


def _to_words(places: np.ndarray, width: int) -> np.ndarray:
    if width == 1:
        return places
    return places[..., None] * width + np.arange(width)


def _fold_in(
    derived: keys.Derivation, args: Sequence[Value], out_aval: Aval
) -> list[keys.Derivation] | None:
    key, data = args
    if data.const is None:
        return None
    shape = tuple(out_aval.shape)
    spread = np.broadcast_to(_places(key.shape), shape)
    parent = keys.take([derived], _to_words(spread, _width(key)))
    return [keys.fold_in(parent, np.broadcast_to(data.const, shape))]


def _join(
    args: Sequence[Value], join: Callable[..., np.ndarray]
) -> list[keys.Derivation] | None:
    impl = next((a.key.impl for a in args if a.key is not None), None)
    if impl is None or any(a.key is None and a.const is None for a in args):
        return None
    parents, offset, parts = [], 0, []
    width = _width(args[0])
    for arg in args:
        parents.append(arg.key or keys.constant(np.asarray(arg.const), impl))
        parts.append(_places(arg.shape) + offset)
        offset += math.prod(arg.shape)
    return [keys.take(parents, _to_words(join(*parts), width), impl)]
