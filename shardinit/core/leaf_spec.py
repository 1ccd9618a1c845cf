"""What one leaf is: the part that every record of a leaf begins with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardinit.core.types import DType


@dataclass(frozen=True, eq=False)
class LeafSpec:
    """Where a leaf stands in its tree, and what kind of array it is.

    Attributes:
      path: its key path, ``/``-joined; empty if the leaf is the whole tree.
      shape: its global shape.
      dtype: its dtype; a key dtype for a leaf of typed keys.
    """

    path: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def size(self) -> int:
        """Number of elements; a typed key is one."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it; those of its key data for typed keys."""
        return self.size * self.dtype.itemsize
