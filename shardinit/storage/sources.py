"""What a checkpoint is written from: leaves that are computed by window, or arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from shardinit.core.ir.jaxpr import is_key
from shardinit.core.paths import named_leaves
from shardinit.core.run.lazy import LazyArray, LazyTree
from shardinit.errors import CheckpointError


class Leaf(Protocol):
    """What a leaf must be to be written: a ``LazyArray`` is one.

    Example:
      >>> import jax, shardinit
      >>> init = lambda key: jax.random.normal(key, (8, 32))
      >>> leaf: Leaf = shardinit.open(init, 0)[""]
      >>> leaf.read((2, 0), (1, 32)).shape
      (1, 32)
    """

    path: str
    whole: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """The window of ``shape`` that begins at ``start``."""
        ...


class Held:
    """A leaf that is there as an array: windows are copied from its shards."""

    whole = ""

    def __init__(self, path: str, array: Any):
        if isinstance(array, jax.Array) and is_key(array.dtype):
            array = jax.random.key_data(array)
        if isinstance(array, jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"leaf {path!r}", "it has a shape and no values", "an array"
            )
        if not isinstance(array, jax.Array) and np.asarray(array).dtype == object:
            raise CheckpointError(
                f"leaf {path!r}",
                f"got {type(array).__name__}",
                "an array or a number",
                "Leave it out of the tree",
            )
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise CheckpointError(
                f"leaf {path!r}",
                "this process holds a part of it",
                "leaves that one process can reach in full",
                "In a job of several processes use the orbax format",
            )
        self.path = path
        if isinstance(array, jax.Array):
            # Of a leaf that lies whole on eight devices there are eight equal shards.
            parts = [s for s in array.addressable_shards if s.replica_id == 0]
            self._parts = [(part.index, part.data) for part in parts]
        else:
            array = np.asarray(array)
            self._parts = [((slice(None),) * array.ndim, array)]
        self.shape = tuple(array.shape)
        self.dtype = np.dtype(array.dtype).newbyteorder("=")

    def read(self, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """The window of ``shape`` that begins at ``start``."""
        window = np.empty(tuple(shape), self.dtype)
        for index, data in self._parts:
            inner, outer = [], []
            for part, size, first, count in zip(
                index, self.shape, start, shape, strict=True
            ):
                low, high, _ = part.indices(size)
                begin, end = max(low, first), min(high, first + count)
                inner.append(slice(begin - low, max(end, begin) - low))
                outer.append(slice(begin - first, max(end, begin) - first))
            if all(s.stop > s.start for s in outer):
                window[tuple(outer)] = np.asarray(data)[tuple(inner)]
        return window


def leaves_of(source: Any) -> list[Leaf]:
    """The leaves of a ``LazyTree`` or of a pytree of arrays, lazy ones among them."""
    if isinstance(source, LazyTree):
        return list(source.values())
    return [
        leaf if isinstance(leaf, LazyArray) else Held(path, leaf)
        for path, leaf in named_leaves(source)
    ]


def nbytes_of(leaf: Leaf) -> int:
    """A leaf's bytes in full."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize
