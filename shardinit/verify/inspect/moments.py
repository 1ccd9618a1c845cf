"""Moments of a leaf: sums over all of it, or over windows with standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

BINS = 16


@dataclass(frozen=True)
class Moments:
    """What some numbers are like; NaN where there are none.

    Attributes:
      count: how many numbers were looked at, the finite ones among them.
      mean, std: of the finite ones; std around the mean.
      mean_error, std_error: standard errors, from how the windows differ; 0 where all
        numbers were looked at.
      min, max: least and largest of the finite ones looked at.
      zeros: share of them that is zero; nonfinite: share that is infinite or NaN.
      histogram: counts in 16 bins of equal width from ``min`` to ``max``; empty where
        all are one number.
    """

    count: int = 0
    mean: float = math.nan
    std: float = math.nan
    mean_error: float = 0.0
    std_error: float = 0.0
    min: float = math.nan
    max: float = math.nan
    zeros: float = 0.0
    nonfinite: float = 0.0
    histogram: tuple[int, ...] = ()


def moments(windows: np.ndarray, *, exact: bool) -> Moments:
    """The moments of numbers.

    Args:
      windows: (windows, elements of each); of any dtype of numbers or booleans. Of
        complex numbers the parts count as two.
      exact: whether these are all of the leaf.

    Returns:
      Sums are of float64. With ``w`` windows the standard error of a mean is that of
      the ``w`` means of the windows, of a standard deviation by the delta method.

    Example:
      >>> made = moments(np.array([[0.0, 1.0], [2.0, 3.0]]), exact=True)
      >>> made.mean, round(made.std, 4), made.zeros
      (1.5, 1.118, 0.25)
    """
    values = _as_floats(windows)
    finite = np.isfinite(values)
    good = bool(finite.all())
    flat = values.ravel() if good else values[finite]
    if not flat.size:
        return Moments(values.size, nonfinite=1.0 if values.size else 0.0)
    mean = float(flat.mean(dtype=np.float64))
    centred = flat - flat.dtype.type(mean)
    # The mean was rounded to subtract it: what is left of it is put back.
    left = float(centred.mean(dtype=np.float64))
    var = max(float(np.square(centred).mean(dtype=np.float64)) - left**2, 0.0)
    low, high = float(flat.min()), float(flat.max())
    std = math.sqrt(var) if high > low else 0.0
    errors = (0.0, 0.0)
    if not exact and good and std:
        errors = _errors(centred.reshape(values.shape), std)
    return Moments(
        count=values.size,
        mean=mean,
        std=std,
        mean_error=errors[0],
        std_error=errors[1],
        min=low,
        max=high,
        zeros=1 - int(np.count_nonzero(flat)) / flat.size,
        nonfinite=1 - flat.size / values.size,
        histogram=_histogram(flat, low, high),
    )


def _as_floats(windows: np.ndarray) -> np.ndarray:
    """At least as wide as float32, so that sums of squares neither overflow."""
    if windows.dtype.kind == "c":
        windows = np.stack([np.real(windows), np.imag(windows)], axis=-1)
        windows = windows.reshape(len(windows), -1)
    # float32 holds whole numbers up to 2^24 exactly, so all of int16 and not of int32.
    wide = windows.dtype in (np.float64, np.int64, np.uint64, np.int32, np.uint32)
    return windows.astype(np.float64 if wide else np.float32)


def _errors(centred: np.ndarray, std: float) -> tuple[float, float]:
    """Standard errors of mean and standard deviation, from windows as clusters."""
    count = len(centred)
    if count < 2:
        return math.nan, math.nan
    means = centred.mean(axis=1, dtype=np.float64)
    squares = np.square(centred).mean(axis=1, dtype=np.float64)
    root = math.sqrt(count)
    return (
        float(means.std(ddof=1)) / root,
        float(squares.std(ddof=1)) / root / (2 * std),
    )


def _histogram(flat: np.ndarray, low: float, high: float) -> tuple[int, ...]:
    width = high - low
    if not 0 < width < math.inf:
        return ()
    # The largest number falls at 16, one past the last bin: clipped, it counts there.
    places = ((flat - flat.dtype.type(low)) * flat.dtype.type(BINS / width)).astype(int)
    counts = np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)
    return tuple(map(int, counts))


_BARS = " ▁▂▃▄▅▆▇█"


def sparkline(values: Iterable[float], *, least: float | None = None) -> str:
    """Numbers as a line of bars, one character each.

    Args:
      values: any numbers; NaN is a blank.
      least: what an empty bar stands for; default somewhat below the least number.

    Example:
      >>> sparkline([0, 1, 2, 8], least=0)
      ' ▁▂█'
    """
    found = [float(x) for x in values]
    known = [x for x in found if math.isfinite(x)]
    if not known:
        return " " * len(found)
    top = max(known)
    bottom = min(known) - (top - min(known)) / 7 if least is None else least
    if top - bottom <= 1e-3 * abs(top):  # one number: half of the height
        return "".join("▄" if math.isfinite(x) else " " for x in found)
    steps = (len(_BARS) - 1) / (top - bottom)
    return "".join(
        _BARS[min(max(math.ceil((x - bottom) * steps - 1e-9), 0), len(_BARS) - 1)]
        if math.isfinite(x)
        else " "
        for x in found
    )
