"""Mirrors: which parameter a leaf of optimizer state belongs to, and by which axes.

An optimizer keeps trees that repeat the tree of the parameters (moments, accumulated
gradients), so a leaf of it belongs to the parameter at the end of whose path its own
path ends: ``opt_state/0/mu/dense/kernel`` to ``params/dense/kernel``. Shapes say which
axes of the parameter it keeps and no more: parameters of one shape are told apart, and
an array of some parameter's shape that is no state of it is not taken for any.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.tree_util import GetAttrKey, SequenceKey

Keys = tuple[Any, ...]
Dims = tuple[int | None, ...]
Shape = Sequence[int]


def mirrors(
    states: Mapping[Keys, Shape], params: Mapping[Keys, Shape]
) -> dict[Keys, tuple[Keys, Dims]]:
    """The parameter of each leaf of optimizer state that has one, and the axes kept.

    Args:
      states: shapes of the optimizer's leaves by key path.
      params: shapes of all other leaves by key path.
    """
    ends: dict[Keys, list[Keys]] = {}
    for path in params:
        bare = _unboxed(path)
        for start in range(len(bare)):
            ends.setdefault(bare[start:], []).append(path)
    found = {}
    for path, shape in states.items():
        for match in _matches(_unboxed(path), shape, ends, params):
            found[path] = match
            break
    return found


def _unboxed(path: Keys) -> Keys:
    """A key path without the box around an array, which either side may lack."""
    return path[:-1] if path[-1:] == (GetAttrKey("value"),) else path


def _matches(
    path: Keys,
    shape: Shape,
    ends: Mapping[Keys, list[Keys]],
    params: Mapping[Keys, Shape],
) -> Iterable[tuple[Keys, Dims]]:
    """Parameters with the longest common end first, of which the leaf has axes."""
    # optax's SM3 keeps a list of vectors where the parameter was: its path is longer by
    # the index.
    for stop in (len(path), len(path) - 1):
        rest = path[stop:]
        if not all(isinstance(key, SequenceKey) for key in rest):
            return
        for start in range(stop):
            for param in ends.get(path[start:stop], ()):
                dims = kept_axes(shape, params[param], path[:start], rest)
                if dims is not None:
                    yield param, dims


def kept_axes(
    shape: Shape, param: Shape, field: Keys = (), rest: Keys = ()
) -> Dims | None:
    """For each axis of a leaf which of its parameter's it is; None if none can say.

    Args:
      shape: of the leaf.
      param: of the parameter.
      field: the way to the tree that repeats the parameters'.
      rest: the way from the parameter's place in it to the leaf.
    """
    shape, param = tuple(shape), tuple(param)
    if shape == param:
        return tuple(range(len(shape)))
    if math.prod(shape) == 1:  # a scalar, or the stand-in of a moment that is not kept
        return (None,) * len(shape)
    extra = len(shape) - len(param)
    if extra > 0 and param and shape[extra:] == param:  # a history of it, as of L-BFGS
        return (*[None] * extra, *range(len(param)))
    if rest and isinstance(rest[0], SequenceKey):
        dim = rest[0].idx  # SM3 keeps a list with a vector for each axis
        if len(rest) == 1 and shape == param[dim : dim + 1]:
            return (dim,)
    elif rest and not _is_box(rest[0]):
        return None  # beside what repeats the parameter, as the scales of 8-bit moments
    return _chosen(shape, param, field)


def _chosen(shape: tuple[int, ...], param: tuple[int, ...], field: Keys) -> Dims | None:
    """The axes of a parameter that have a leaf's sizes, where these or optax tell."""
    kept = list(_of_sizes(shape, param))
    if len(kept) == 1:
        return kept[0]
    dropped = _factored(param, field)
    return dropped if dropped in kept else None


def _is_box(key: Any) -> bool:
    """Whether a key leads into a box, as Flax has them around an array."""
    return isinstance(key, GetAttrKey) and key.name == "value"


def _of_sizes(shape: tuple[int, ...], param: tuple[int, ...]) -> Iterator[Dims]:
    """All choices of a parameter's axes, in order, that have a leaf's sizes."""
    for dims in itertools.combinations(range(len(param)), len(shape)):
        if tuple(param[dim] for dim in dims) == shape:
            yield dims


def _factored(param: tuple[int, ...], field: Keys) -> Dims | None:
    """The axes that a factored moment keeps where sizes do not tell.

    As ``optax.scale_by_factored_rms`` chooses them: rows lack the largest axis, columns
    the second largest, the last one of equals.
    """
    names = [key.name for key in field[-1:] if isinstance(key, GetAttrKey)]
    names += [str(getattr(key, "key", "")) for key in field[-1:]]
    # As optax itself does: of equal sizes it decides which axes count as the largest
    # two, and Python's `sorted` need not agree.
    order = np.argsort(param)
    for name, place in (("v_row", -1), ("v_col", -2)):
        if name in names and len(param) > 1:
            gone = int(order[place])
            return tuple(dim for dim in range(len(param)) if dim != gone)
    return None
