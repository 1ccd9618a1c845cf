"""Views replayed: rectangles of a storage that are set and cut by JAX.

They are slices and updates at fixed places, so that any window of the result is made of
windows of the pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardinit.errors import UnsupportedConfigError
from shardinit.frontends.torch.geometry import Geometry, box
from shardinit.frontends.torch.graph import Read, Value

_MOST = 1 << 24  # elements of a view that is no rectangle


def read(node: Read, result: Callable[[Value], Any], dtype: Any) -> Any:
    """What a view holds, of the pieces that its storage was written in.

    Args:
      node: the reading.
      result: from a value to its array.
      dtype: of the result.

    Raises:
      UnsupportedConfigError: a large view is no rectangle of its storage.
    """
    pieces = list(node.pieces)
    if pieces and pieces[0][0].covers(node.length):
        where, value = pieces.pop(0)
        stored = _as_stored(result(value), where)
    else:
        whole = node.geometry.covers(node.length)
        shape = _stored_shape(node.geometry) if whole else (node.length,)
        stored = jnp.zeros(shape, dtype)
    for where, value in pieces:
        stored = _overlaid(stored, where, _as_stored(result(value), where), node.length)
    return _as_viewed(_cut(stored, node.geometry, node.length), node.geometry)


def _stored_shape(view: Geometry) -> tuple[int, ...]:
    return tuple(view.shape[axis] for axis in view.axes)


def _as_stored(array: Any, view: Geometry) -> Any:
    """The elements of a view in the order of their addresses."""
    rest = [axis for axis in range(len(view.shape)) if axis not in view.axes]
    return jnp.transpose(array, (*rest, *view.axes)).reshape(_stored_shape(view))


def _as_viewed(stored: Any, view: Geometry) -> Any:
    """The view, of its elements in the order of their addresses."""
    order = view.axes
    ranked = jnp.reshape(stored, _stored_shape(view))
    turned = jnp.transpose(ranked, [order.index(axis) for axis in sorted(order)])
    sizes = [n if axis in order else 1 for axis, n in enumerate(view.shape)]
    return jnp.broadcast_to(jnp.reshape(turned, sizes), view.shape)


def _gridded(stored: Any, grid: tuple[int, ...]) -> Any:
    size = int(np.prod(grid))
    if size > stored.size:
        stored = jnp.pad(jnp.reshape(stored, -1), (0, size - stored.size))
    return jnp.reshape(stored, grid)


def _places(view: Geometry) -> np.ndarray:
    """The address of every element of a view that is no rectangle, in its order."""
    if view.size > _MOST:
        raise UnsupportedConfigError("a view", f"{view} is no rectangle of its storage")
    axes = view.axes
    steps = np.ix_(*[np.arange(view.shape[a]) * view.stride[a] for a in axes])
    return (view.offset + sum(steps, np.zeros((), np.int64))).astype(np.int32)


def _overlaid(stored: Any, view: Geometry, piece: Any, length: int) -> Any:
    found = box(view, length, stored.shape)
    if found is None:
        flat = jnp.reshape(stored, -1).at[_places(view)].set(piece)
        return jnp.reshape(flat, stored.shape)
    grid = _gridded(stored, found.grid)
    update = jnp.reshape(piece, found.sizes)
    grid = jax.lax.dynamic_update_slice(grid, update, found.starts)
    if grid.size == length:
        return jnp.reshape(grid, stored.shape)
    return jnp.reshape(jnp.reshape(grid, -1)[:length], stored.shape)


def _cut(stored: Any, view: Geometry, length: int) -> Any:
    if view.covers(length):
        return stored
    found = box(view, length, stored.shape)
    if found is None:
        return jnp.reshape(stored, -1)[_places(view)]
    ends = [start + n for start, n in zip(found.starts, found.sizes, strict=True)]
    return jax.lax.slice(_gridded(stored, found.grid), found.starts, ends)
