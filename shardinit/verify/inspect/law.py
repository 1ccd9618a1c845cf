"""Laws: distributions of numbers, and what scaling and bounding make of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Final

import jax.numpy as jnp

from shardinit.core.types import DType

STANDARD: Final = NormalDist()


@dataclass(frozen=True)
class Law:
    """A distribution of numbers.

    Attributes:
      family: ``"normal"``, ``"truncated normal"``, ``"uniform"``, ``"constant"`` or
        ``"unknown"``.
      center: mean of the normal that is drawn from, or the constant.
      scale: its standard deviation (before it is truncated); of a uniform half of its
        width; 0 for a constant, NaN for an unknown law.
      low: least number that it gives; high: the largest.

    Example:
      >>> law = Law("truncated normal", 0.0, 1.0, -2.0, 2.0)
      >>> str(law), round(law.std, 4)
      ('truncated normal 1 at ±2', 0.8796)
    """

    family: str = "unknown"
    center: float = math.nan
    scale: float = math.nan
    low: float = -math.inf
    high: float = math.inf

    @property
    def std(self) -> float:
        """Standard deviation of the numbers; NaN for an unknown law.

        Of a truncated normal by Johnson, Kotz and Balakrishnan, *Continuous Univariate
        Distributions* 1, section 10.1.
        """
        if self.family == "uniform":
            return self.scale / math.sqrt(3)
        if self.family != "truncated normal":
            return self.scale
        a, b = ((x - self.center) / self.scale for x in (self.low, self.high))
        mass = STANDARD.cdf(b) - STANDARD.cdf(a)
        at_a, at_b = STANDARD.pdf(a), STANDARD.pdf(b)
        # ``x * pdf(x)`` goes to 0 at infinity; in floats inf * 0 is NaN.
        a, b = (0.0 if math.isinf(x) else x for x in (a, b))
        tilt = (a * at_a - b * at_b) / mass
        return self.scale * math.sqrt(1 + tilt - ((at_a - at_b) / mass) ** 2)

    def __str__(self) -> str:
        if self.family == "unknown":
            return self.family
        if self.family == "constant":
            return f"constant {self.center:.4g}"
        if self.family == "uniform":
            return f"uniform {_range(self.low, self.high)}"
        center = f" around {self.center:.4g}" if self.center else ""
        text = f"{self.family} {self.scale:.4g}{center}"
        if self.family == "normal":
            return text
        return f"{text} at {_range(self.low, self.high)}"

    @property
    def short(self) -> str:
        """A family and its scale, as they fit a column."""
        if self.family in ("unknown", "constant"):
            return str(self)
        if self.family == "uniform":
            return f"uniform {_range(self.low, self.high, 3)}"
        name = self.family.removesuffix(" normal")
        center = f" {self.center:+.3g}" if self.center else ""
        return f"{name} {self.scale:.3g}{center}"


UNKNOWN: Final = Law()


def _range(low: float, high: float, digits: int = 4) -> str:
    if math.isclose(low, -high, rel_tol=1e-2):
        return f"±{high:.{digits}g}"
    return f"{low:.{digits}g} to {high:.{digits}g}"


def constant(value: float) -> Law:
    """The law of one number."""
    return Law("constant", value, 0.0, value, value)


def uniform(low: float, high: float) -> Law:
    """The law of numbers that are alike likely from one end to the other."""
    low, high = min(low, high), max(low, high)
    return Law("uniform", (low + high) / 2, (high - low) / 2, low, high)


def is_constant(law: Law) -> bool:
    """Whether it gives one number."""
    return law.family == "constant"


def scaled(law: Law, factor: float, shift: float = 0.0) -> Law:
    """The law of numbers that are multiplied, then shifted."""
    if law.family == "unknown" or factor == 0 or not math.isfinite(factor):
        return constant(shift) if factor == 0 else UNKNOWN
    low, high = sorted((law.low * factor + shift, law.high * factor + shift))
    center = law.center * factor + shift
    return Law(law.family, center, law.scale * abs(factor), low, high)


def bounded(dtype: DType, law: Law, bound: float, *, below: bool) -> Law:
    """A law that is bounded where it has no mass beyond, but for rounding."""
    sign = 1.0 if below else -1.0
    limit = law.low if below else law.high
    eps = float(jnp.finfo(dtype).eps)
    if law.family == "unknown" or sign * (bound - limit) <= 0:
        return law
    # `jax.random.uniform` ends in ``max(minval, x)`` and `truncated_normal` in a clip
    # to the numbers next to its ends: neither takes any of the draws away.
    near = abs(bound - limit) <= 4 * eps * max(law.scale, abs(bound))
    if law.family in ("normal", "truncated normal"):
        beyond = STANDARD.cdf(sign * (bound - law.center) / law.scale)
        if near or beyond <= 4 * eps:
            ends = {"low" if below else "high": bound}
            return replace(law, family="truncated normal", **ends)
    return law if near else UNKNOWN
