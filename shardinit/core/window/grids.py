"""Grids: the coordinates of a window, along its own axes or along flat lanes.

XLA's CPU code for narrow arrays takes other paths with other last places. Of a
lecun-normal (64, 32) that plain jit makes cut eight ways, 66 of 2,048 elements differ
from the uncut one on JAX 0.12.0.1 (on 0.10.2 none; GPUs have it too:
https://github.com/jax-ml/jax/issues/21232). So a window must look the same to the
compiler wherever it lies and whatever its shape: that is what makes the bits
independent of the mesh. On CPU it is evaluated over flat lanes, in
multiples of 128; with stacked keys in one row a key, so that every lane of a row runs
with the same key. Elsewhere the window keeps its own axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jax import lax

from shardinit.core.types import Coords, Dim, Words
from shardinit.core.window import coordinates as crd

LANES = 128


def axes_grid(start: Sequence[Words], shape: Sequence[Dim]) -> Coords:
    """Coordinates of a window along its own axes."""
    rank = len(shape)
    coords = []
    for axis, size in enumerate(shape):
        dims = tuple(size if a == axis else 1 for a in range(rank))
        line = lax.broadcasted_iota(np.uint32, dims, axis)
        coords.append(line + crd.u32(start[axis]))
    return tuple(coords)


def lanes_grid(
    start: Sequence[Words],
    shape: Sequence[Dim],
    leaf: Sequence[int],
    rows: int,
    first: Dim,
    count: Dim,
) -> Coords:
    """Coordinates of ``count`` flat lanes of a window of a leaf, from ``first`` on.

    With ``rows`` leading axes apart the grid is (product of those, count), otherwise
    it is flat.
    """
    if rows:
        height = math.prod(shape[:rows])
        row = lax.broadcasted_iota(np.uint32, (height, 1), 0)
        lane = lax.broadcasted_iota(np.uint32, (1, count), 1)
    else:
        row, lane = crd.ZERO, lax.iota(np.uint32, count)
    lane = lane + crd.u32(first)
    across = crd.unravel(lane, shape[rows:])
    long = [axis for axis, size in enumerate(leaf[rows:]) if size > 1]
    if long and all(isinstance(n, int) and n == 1 for n in shape[rows:]):
        # One element. Lanes that are all the same would be scalars to the compiler,
        # which has other rules for them, so the others are of its neighbours.
        across[long[-1]] = lane
    places = [*crd.unravel(row, shape[:rows]), *across]
    return tuple(
        lax.add(*crd.spread([p, s])) for p, s in zip(places, start, strict=True)
    )
