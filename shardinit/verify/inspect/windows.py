"""Windows of many leaves at once: where they lie, and one executable for each program.

A large leaf is cut into strata, blocks of equal size over all of its axes, and one
window lies at random inside of each: so every layer of a stack, every expert and every
end of a matrix is seen. Leaves of one program have windows of one shape, and one call
computes a thousand of them, each with the keys of its leaf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from shardinit.core.cut.leaf_program import Program
from shardinit.core.plan.mesh import alone_on, one_device
from shardinit.core.region import Region
from shardinit.core.types import Device, Values, Words
from shardinit.verify.digest.host import mix

EXACT = 1 << 18  # elements of a leaf that is read whole
STRATA = 64  # windows of one that is not
ELEMENTS = 1 << 11  # of one window
WIDTH = 512  # of one window along the last axis
_CALL = 1 << 21  # elements of one call


@dataclass(frozen=True)
class Layout:
    """The windows of a leaf.

    Attributes:
      shape: of each window.
      starts: where each begins, (windows, rank).
      exact: whether they are all of the leaf.
    """

    shape: tuple[int, ...]
    starts: np.ndarray
    exact: bool

    @property
    def regions(self) -> list[Region]:
        """The windows, each where it lies in the leaf."""
        return [Region(tuple(start), self.shape) for start in self.starts.tolist()]


def layout(shape: Sequence[int], *, depth: int | None = None) -> Layout:
    """Where the windows of a leaf lie: all of it, or one in each stratum.

    Args:
      shape: of the leaf.
      depth: an axis along which a layer stands beside the next; windows of a large
        leaf lie inside one layer, as many in each, in the order of the layers.

    Example:
      >>> layout((64, 64)).starts.shape, layout((16384, 16384)).starts.shape
      ((1, 2), (64, 2))
    """
    shape = tuple(shape)
    if math.prod(shape) <= EXACT:
        return Layout(shape, np.zeros((1, len(shape)), np.uint32), True)
    window = _window(shape, depth)
    counts = _strata(shape, window, depth)
    grid = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1)
    cells = grid.reshape(-1, len(shape))
    edges = [n // c for n, c in zip(shape, counts, strict=True)]
    room = np.array(edges) - np.array(window) + 1
    # The same on all machines: files say what some windows held.
    places = mix(np.arange(cells.size, dtype=np.uint32)).reshape(cells.shape)
    starts = cells * np.array(edges) + places % np.maximum(room, 1)
    return Layout(window, starts.astype(np.uint32), False)


def _window(shape: tuple[int, ...], depth: int | None) -> tuple[int, ...]:
    left, sizes = ELEMENTS, [1] * len(shape)
    for axis in reversed(range(len(shape))):
        if axis != depth:
            most = WIDTH if axis == len(shape) - 1 else left
            sizes[axis] = min(shape[axis], most, left)
            left //= sizes[axis]
    return tuple(sizes)


def _strata(
    shape: tuple[int, ...], window: tuple[int, ...], depth: int | None
) -> list[int]:
    """How many strata along each axis: the largest blocks are halved first."""
    counts = [1] * len(shape)
    if depth is not None:
        counts[depth] = shape[depth]
    while math.prod(counts) < STRATA:
        blocks = [n / w / c for n, w, c in zip(shape, window, counts, strict=True)]
        axis = max(range(len(shape)), key=blocks.__getitem__)
        if blocks[axis] < 2:
            break
        counts[axis] *= 2
    return counts


def evaluate(
    program: Program,
    shape: tuple[int, ...],
    words: np.ndarray,
    starts: np.ndarray,
    device: Device,
) -> Iterator[np.ndarray]:
    """The windows of some leaves of one program, leaf by leaf.

    Args:
      program: a windowed one.
      shape: of each window.
      words: (leaves, words of a leaf), uint32.
      starts: (windows, rank), uint32; the same for each leaf.
      device: where they are computed.

    Yields:
      For each leaf its windows, (windows, elements of each).
    """
    count, each = len(starts), math.prod(shape)
    leaves = max(min(_CALL // max(count * each, 1), len(words)), 1)
    run = _executable(program, shape, leaves, count, device)
    for first in range(0, len(words), leaves):
        some = words[first : first + leaves]
        # The last call is filled up: for fewer leaves it would be another executable.
        filled = np.zeros((leaves, words.shape[1]), np.uint32)
        filled[: len(some)] = some
        with alone_on(one_device(device)):
            made = np.asarray(run(filled, starts))
        yield from made.reshape(leaves, count, each)[: len(some)]


@lru_cache(maxsize=256)
def _executable(
    program: Program, shape: tuple[int, ...], leaves: int, count: int, device: Device
) -> Any:
    """Compiled ``(words, starts) -> windows``: (leaves * count, *shape)."""
    lanes = device.platform == "cpu"
    rank = len(shape)

    def windows(words: Words, starts: Words) -> Values:
        def one(number: Words) -> Values:
            leaf, place = number // np.uint32(count), number % np.uint32(count)
            start = [starts[place, axis] for axis in range(rank)]
            return program.window(words[leaf], [start], [shape], lanes=lanes)[0]

        numbers = jax.lax.iota(np.uint32, leaves * count)
        return jax.lax.map(one, numbers)

    place = jax.sharding.SingleDeviceSharding(device)
    arguments = [
        jax.ShapeDtypeStruct(size, np.uint32, sharding=place)
        for size in ((leaves, program.words), (count, rank))
    ]
    with alone_on(one_device(device)):
        lowered = jax.jit(windows, out_shardings=place).lower(*arguments)
    return lowered.compile()
