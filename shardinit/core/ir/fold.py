"""Folding while tracing: key derivations and the small integers that steer them.

The graph builder offers every equation here first. Integer arithmetic on constants
(Flax counts the keys it has handed out) is done at once in numpy; an equation that
only derives, slices, stacks or re-wraps keys becomes a step of ``keys.Derivation``.
Everything else is declined and stays an equation. Floating point is never folded: XLA
specialises on constants, and the bits must stay what ``jax.jit`` gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from shardinit.core.ir.jaxpr import IDENTITY, Aval, is_key, key_impl
from shardinit.core.prng import derivation as keys

MAX_FOLDED = 1 << 16  # elements; a larger integer array is better made on the device


def _slice(a: np.ndarray, p: Mapping[str, Any]) -> np.ndarray:
    strides = p["strides"] or (1,) * a.ndim
    spans = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    return a[tuple(slice(*span) for span in spans)]


def _broadcast_in_dim(a: np.ndarray, p: Mapping[str, Any]) -> np.ndarray:
    shape = [1] * len(p["shape"])
    for size, dim in zip(a.shape, p["broadcast_dimensions"], strict=True):
        shape[dim] = size
    return np.broadcast_to(a.reshape(shape), p["shape"])


def _reshape(a: np.ndarray, p: Mapping[str, Any]) -> np.ndarray:
    order = p.get("dimensions")  # ``order="F"`` reads the axes in another order
    return (a if order is None else np.transpose(a, order)).reshape(p["new_sizes"])


def _dynamic_slice(a: np.ndarray, *starts: np.ndarray, **p: Any) -> np.ndarray:
    sizes = p["slice_sizes"]
    begin = [
        min(max(int(s), 0), n - size)
        for s, n, size in zip(starts, a.shape, sizes, strict=True)
    ]
    return a[tuple(slice(b, b + n) for b, n in zip(begin, sizes, strict=True))]


def _unstack(a: np.ndarray, p: Mapping[str, Any]) -> list[np.ndarray]:
    rows = range(a.shape[p["axis"]])
    return [np.asarray(np.take(a, i, p["axis"])) for i in rows]


def _split(a: np.ndarray, p: Mapping[str, Any]) -> list[np.ndarray]:
    return np.split(a, np.cumsum(p["sizes"])[:-1], axis=p["axis"])


# Moves of whole elements: the same on integers and on the places of keys.
_MOVES: dict[str, Callable[[np.ndarray, Mapping[str, Any]], Any]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "expand_dims": lambda a, p: np.expand_dims(a, p["dimensions"]),
    "reshape": _reshape,
    "rev": lambda a, p: np.flip(a, p["dimensions"]),
    "slice": _slice,
    "split": _split,
    "squeeze": lambda a, p: np.squeeze(a, tuple(p["dimensions"])),
    "transpose": lambda a, p: np.transpose(a, p["permutation"]),
    "unstack": _unstack,
    **{name: (lambda a, p: a) for name in sorted(IDENTITY)},
    "optimization_barrier": lambda a, p: a,
}
_ARITHMETIC: dict[str, Callable[..., Any]] = {
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
    name: str, params: Mapping[str, Any], args: Sequence[np.ndarray], out_aval: Aval
) -> list[np.ndarray] | None:
    """Evaluates an integer equation on constants, or returns None to decline."""
    dtype = out_aval.dtype
    if is_key(dtype) or np.dtype(dtype).kind not in "iub":
        return None
    if (
        any(a.dtype.kind not in "iub" for a in args)
        or math.prod(out_aval.shape) > MAX_FOLDED
    ):
        return None
    with np.errstate(over="ignore"):
        if name == "iota":
            size, dim = params["shape"], params["dimension"]
            line = np.arange(size[dim]).astype(dtype)
            shape = [1] * len(size)
            shape[dim] = size[dim]
            out = np.broadcast_to(line.reshape(shape), size)
        elif name == "convert_element_type":
            out = args[0].astype(dtype)
        elif name == "concatenate":
            out = np.concatenate(args, params["dimension"])
        elif name == "stack":
            out = np.stack(args, params["axis"])
        elif name == "dynamic_slice":
            out = _dynamic_slice(*args, **params)
        elif name in _MOVES:
            out = _MOVES[name](args[0], params)
        elif name in _ARITHMETIC:
            out = _ARITHMETIC[name](*args)
        else:
            return None
    many = out if isinstance(out, list) else [out]
    return [np.asarray(o, dtype) for o in many]


def fold_keys(
    name: str, params: Mapping[str, Any], args: Sequence[Any], out_aval: Aval
) -> list[keys.Derivation] | None:
    """Turns an equation on keys into derivations, or returns None to decline.

    Args:
      name: the primitive.
      params: its parameters.
      args: the operands; each has ``shape``, ``dtype`` and either ``key`` (a
        derivation) or ``const`` (a numpy array).
      out_aval: shape and dtype of the first result.
    """
    if name == "random_seed":
        return _seed(args[0], out_aval)
    if name == "concatenate":
        return _join(args, lambda parts: np.concatenate(parts, params["dimension"]))
    if name == "stack":
        return _join(args, lambda parts: np.stack(parts, params["axis"]))
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
        return _fold_in(args, out_aval)
    moved = _moved(name, params, args, out_aval)
    if moved is None:
        return None
    width = _width(args[0])
    return [keys.take([key], _to_words(m, width)) for m in moved]


def _seed(seed: Any, out_aval: Aval) -> list[keys.Derivation] | None:
    if seed.const is None or seed.shape:
        return None
    impl = key_impl(out_aval.dtype)
    key = jax.random.key(int(seed.const), impl=impl)
    return [keys.constant(np.asarray(jax.random.key_data(key)), impl)]


def _moved(
    name: str, params: Mapping[str, Any], args: Sequence[Any], out_aval: Aval
) -> list[np.ndarray] | None:
    """For each result of a move which element of the first operand stands where."""
    places, others = _places(args[0].shape), [a.const for a in args[1:]]
    if any(other is None for other in others):
        return None
    if name == "dynamic_slice":
        return [_dynamic_slice(places, *others, **params)]
    if name == "gather":
        rows = jax.lax.gather_p.bind(places.astype(np.int32), *others, **params)
        return [np.asarray(rows)]
    if name in _MOVES:
        moved = _MOVES[name](places, params)
        return moved if isinstance(moved, list) else [moved]
    if name == "convert_element_type" and out_aval.dtype == args[0].dtype:
        return [places]
    return None


def _width(value: Any) -> int:
    """Words an element: a typed key has several, a raw uint32 is one."""
    if is_key(value.dtype):
        return keys.words_per_key(key_impl(value.dtype))
    return 1


def _to_words(places: np.ndarray, width: int) -> np.ndarray:
    if width == 1:
        return places
    return places[..., None] * width + np.arange(width)


def _fold_in(args: Sequence[Any], out_aval: Aval) -> list[keys.Derivation] | None:
    key, data = args
    if data.const is None:
        return None
    shape = tuple(out_aval.shape)
    spread = np.broadcast_to(_places(key.shape), shape)
    parent = keys.take([key.key], _to_words(spread, _width(key)))
    return [keys.fold_in(parent, np.broadcast_to(data.const, shape))]


def _join(
    args: Sequence[Any], join: Callable[[list[np.ndarray]], np.ndarray]
) -> list[keys.Derivation] | None:
    if any(a.key is None and a.const is None for a in args):
        return None
    if all(a.key is None for a in args):
        return None
    impl = next(a.key.impl for a in args if a.key is not None)
    parents, offset, parts = [], 0, []
    width = _width(args[0])
    for arg in args:
        parents.append(arg.key or keys.constant(arg.const, impl))
        parts.append(_places(arg.shape) + offset)
        offset += math.prod(arg.shape)
    return [keys.take(parents, _to_words(join(parts), width), impl)]
