"""Windows: a file's tensors cut into parts of bounded size, each one run of bytes.

Trailing axes are kept whole as far as they fit, the next one is cut into equal parts,
those before it are walked one by one. Equal parts matter: windows of one shape share
one executable, whether they are computed or digested.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shardinit.core.region import Region
from shardinit.storage.layout import File, Tensor

LARGEST = 64 << 20  # bytes of a window, where nothing else is asked for


@dataclass(frozen=True)
class Window:
    """A region of a tensor that is one run of bytes in its file."""

    tensor: Tensor
    region: Region
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the window."""
        return self.region.size * self.tensor.dtype.itemsize


def windows(file: File, most: int) -> Iterator[Window]:
    """The windows of a file's tensors, each of at most ``most`` bytes, in order."""
    for tensor in file.tensors:
        if not tensor.nbytes:
            continue
        # Trailing axes are kept whole as long as they fit; the next one is cut.
        axis, run = len(tensor.shape), tensor.dtype.itemsize
        while axis and run * tensor.shape[axis - 1] <= most:
            axis -= 1
            run *= tensor.shape[axis]
        rows = _rows(tensor.shape[axis - 1], max(1, most // run)) if axis else 1
        tail = tensor.shape[axis:]
        offset = tensor.offset
        for outer in np.ndindex(*tensor.shape[: max(axis - 1, 0)]):
            whole = tensor.shape[axis - 1] if axis else 1
            for row in range(0, whole, rows):
                count = min(rows, whole - row)
                middle = ((row,), (count,)) if axis else ((), ())
                start = (*map(int, outer), *middle[0], *[0] * len(tail))
                shape = (*[1] * len(outer), *middle[1], *tail)
                yield Window(tensor, Region(start, shape), offset)
                offset += count * run


def _rows(whole: int, most: int) -> int:
    """Rows of a window: a divisor, so that all are equal, unless it is far smaller."""
    for parts in range(-(-whole // most), min(whole, -(-whole // most) * 4) + 1):
        if whole % parts == 0:
            return whole // parts
    return min(whole, most)
