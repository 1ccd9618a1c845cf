"""Gain by depth, and the leaf that is unlike its sisters.

The gain of a kernel is its standard deviation times the root of its fan-in: what it
does to the size of what goes through it. Sisters are the leaves that differ in the
numbers of their paths alone, the same kernel of every layer. Their gains may follow the
depth, as depth-scaled initialisers have it, so a leaf is held against the trend of its
sisters and not against their mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from shardinit.core.paths import keys_of

UNLIKE = 0.1  # a tenth above or below the trend
ERRORS = 6.0  # and so many standard errors
FEWEST = 4  # sisters that make a trend
# A slope for each pair: of 256 leaves 32,640 of them, of 50,000 more than a billion.
_MOST = 256  # of them that a trend is fitted to
_DEPTH_NAMES = ("layers", "layer", "blocks")
_APART = (*_DEPTH_NAMES, "expert", "experts", "stack")
_TABLES = ("vocab", "position")
_NUMBER = re.compile(r"\d+")


def depth_axis(shape: Sequence[int], names: Sequence[object] | None) -> int | None:
    """The axis along which layers are stacked: a first one that is named so.

    Example:
      >>> depth_axis((12, 64, 64), ("layers", "embed", "mlp"))
      0
    """
    first = names[0] if names else None
    return 0 if first in _DEPTH_NAMES and len(shape) > 1 and shape[0] > 1 else None


def depth_of(path: str) -> int:
    """The layer of a leaf: the first number in its path; -1 if there is none.

    Example:
      >>> depth_of("layers_12/experts/3/up"), depth_of("embed/embedding")
      (12, -1)
    """
    found = _NUMBER.search(path)
    return int(found[0]) if found else -1


def fan_in(path: str, shape: Sequence[int], names: Sequence[object] | None) -> int:
    """How many inputs reach one output of a kernel; 0 for what is no kernel.

    A kernel has its outputs along the last axis, as Flax's, Haiku's and Keras's do; one
    that is called ``weight`` along the first, as Equinox's and torch's do. Of named
    axes, those of layers and experts are left out, and ``embed`` at the front is all
    of the inputs. A table of embeddings gives a row for each token: its fan-in is 1.

    Example:
      >>> fan_in("mlp/kernel", (64, 256), None), fan_in("mlp/weight", (256, 64), None)
      (64, 64)
      >>> fan_in("q/kernel", (64, 8, 16), ("embed", "heads", "head_dim"))
      64
    """
    axes = list(names) if names is not None else [None] * len(shape)
    while axes and axes[0] in _APART:
        axes, shape = axes[1:], shape[1:]
    last = keys_of(path)[-1]
    if len(shape) < 2 or last in ("bias", "scale"):
        return 0
    if last == "embedding" or axes[0] in _TABLES:
        return 1
    if last == "weight":
        return math.prod(shape[1:])
    if axes[0] == "embed":
        return shape[0]
    return math.prod(shape[:-1])


def unlike(
    depths: Sequence[float], values: Sequence[float], errors: Sequence[float]
) -> list[tuple[int, float]]:
    """The few that lie off the trend of all, with what the trend says for them.

    Args:
      depths: of the sisters, or their numbers.
      values: positive numbers.
      errors: their standard errors.

    Returns:
      Pairs of a number among the sisters and the value that was expected. Empty where
      more than a quarter lie off: then there is no trend.

    Example:
      >>> unlike(range(8), [1, 1, 1, 3, 1, 1, 1, 1], [0] * 8)
      [(3, 1.0)]
    """
    x, y = np.asarray(depths, float), np.asarray(values, float)
    usable = np.isfinite(y) & (y > 0)
    if usable.sum() < FEWEST:
        return []
    logs = np.log(np.where(usable, y, 1.0))
    # A scale by each layer is a line over the depth, a power of the depth (as 1/sqrt(2
    # n)) one over its logarithm; the first layer is number 0.
    trends = (_trend(f(x), logs, usable) for f in (lambda d: d, np.log1p))
    best = min(trends, key=lambda trend: np.median(np.abs(logs - trend)[usable]))
    expected = np.exp(best)
    off = np.abs(y - expected)
    found = np.flatnonzero(
        usable
        & (off > UNLIKE * expected)
        & (off > ERRORS * np.nan_to_num(np.asarray(errors, float)))
    )
    if len(found) > usable.sum() / 4:
        return []
    return [(int(i), float(expected[i])) for i in found]


def _trend(x: np.ndarray, y: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """A line through most of the points: the median of slopes (Theil and Sen)."""
    places = np.flatnonzero(usable)
    places = places[:: max(len(places) // _MOST, 1)]
    i, j = np.triu_indices(len(places), 1)
    dx = x[places[j]] - x[places[i]]
    apart = dx != 0
    slopes = (y[places[j]] - y[places[i]])[apart] / dx[apart]
    slope = float(np.median(slopes)) if slopes.size else 0.0
    return slope * x + float(np.median(y[usable] - slope * x[usable]))
