"""What an inspection found: the moments of every leaf, its law, and what stands out."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardinit.core.plan import text_table as table
from shardinit.core.plan.findings import Finding, as_text
from shardinit.core.plan.folded import folded, template
from shardinit.short import plural, short_repr
from shardinit.verify.inspect.gain import depth_of
from shardinit.verify.inspect.law import Law
from shardinit.verify.inspect.moments import Moments, sparkline

_CHART = 32  # characters of a chart
_SCREEN = 40  # rows


@dataclass(frozen=True)
class LeafStatistics:
    """One leaf as it will be.

    Attributes:
      path: its key path; shape: of the leaf; dtype: its dtype, as text.
      law: the distribution that its program draws from, as read from the function.
      moments: of the numbers that were looked at.
      windows: how many windows they are from; 0 where nothing was looked at.
      exact: whether they are all of the leaf.
      stacked: whether layers lie along its first axis.
      fan_in: inputs that reach one output; 0 for what is no kernel.
      layers: of a leaf that stacks layers the standard deviation in each of them.
      unread: why nothing was looked at; empty if something was.

    Example:
      >>> import jax, shardinit
      >>> made = shardinit.inspect(lambda key: jax.numpy.ones((8, 32)), 0)
      >>> leaf = made.leaves[0]
      >>> leaf.law.family, leaf.moments.mean, leaf.exact
      ('constant', 1.0, True)
    """

    __repr__ = short_repr

    path: str
    shape: tuple[int, ...]
    dtype: str
    law: Law
    moments: Moments
    windows: int
    exact: bool
    stacked: bool = False
    fan_in: int = 0
    layers: tuple[float, ...] = ()
    unread: str = ""

    @property
    def gain(self) -> float:
        """Standard deviation times the root of the fan-in; NaN for no kernel."""
        if not self.fan_in:
            return math.nan
        return self.moments.std * math.sqrt(self.fan_in)

    def to_data(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        law = dataclasses.asdict(self.law) | {"text": str(self.law)}
        return dataclasses.asdict(self) | {"law": law, "gain": self.gain}


@dataclass(frozen=True)
class Inspection:
    """Statistics of every leaf of an init function at a key.

    Attributes:
      name: of the model; fingerprint: of the function, in hex; key: words of the key.
      leaves: in the order of the pytree.
      findings: what stands out: leaves unlike their sisters, kernels of one value,
        numbers that are not finite.

    Example:
      >>> import jax, shardinit
      >>> init = lambda key: {"w": 0.02 * jax.random.normal(key, (256, 256))}
      >>> seen = shardinit.inspect(init, 0)
      >>> str(seen.leaves[0].law), round(seen.leaves[0].moments.std, 3)
      ('normal 0.02', 0.02)
    """

    name: str
    fingerprint: str
    key: tuple[int, ...]
    leaves: tuple[LeafStatistics, ...]
    findings: tuple[Finding, ...]

    # Without annotations, with which a dataclass takes them for fields.
    HEADER = (
        "leaves",
        "path",
        "drawn",
        "mean",
        "std",
        "range",
        "zeros",
        "histogram",
    )
    CHART_HEADER = ("path", "gain", "by depth")

    def rows(self) -> list[tuple[str, ...]]:
        """A row for the leaves that differ in numbers of their paths alone."""
        groups: dict[Any, list[LeafStatistics]] = {}
        for leaf in self.leaves:
            alike = (template(leaf.path), leaf.shape, leaf.dtype, leaf.law.family)
            groups.setdefault((*alike, leaf.unread), []).append(leaf)
        return [_row(alike) for alike in groups.values()]

    def table(self) -> str:
        """A row for each leaf, as text; ``print`` folds the layers.

        Example:
          >>> import shardinit, jax
          >>> print(shardinit.inspect(lambda key: jax.numpy.ones(3), 0).table())
          leaves  path  drawn       mean  std  range   zeros  histogram
          1             constant 1  1     0    1 to 1  0%
        """
        return table.as_text(self.HEADER, [_row([leaf]) for leaf in self.leaves])

    def chart(self) -> list[tuple[str, str, str]]:
        """The gain by depth: path, least and largest gain, and a line of bars.

        One row for each kernel that several layers have, layers from left to right.
        """
        groups: dict[str, list[tuple[float, float]]] = {}
        paths: dict[str, list[str]] = {}
        for leaf in self.leaves:
            if not leaf.fan_in or not leaf.windows:
                continue
            name = template(leaf.path)
            root = math.sqrt(leaf.fan_in)
            points = list(enumerate(x * root for x in leaf.layers))
            points = points or [(depth_of(leaf.path), leaf.gain)]
            groups.setdefault(name, []).extend(points)
            paths.setdefault(name, []).append(leaf.path)
        return [
            (folded(paths[name]), _extent([y for _, y in points]), _line(points))
            for name, points in groups.items()
            if len({x for x, _ in points}) > 2
        ]

    def summary(self) -> list[str]:
        """How it was read, a line each."""
        exact = sum(leaf.exact for leaf in self.leaves)
        sampled = [x for x in self.leaves if x.windows and not x.exact]
        unread = [leaf for leaf in self.leaves if leaf.unread]
        leaves = plural(len(self.leaves), "leaf")
        lines = [f"{self.name}: {leaves}; {exact:,} summed exactly"]
        if sampled:
            count = sampled[0].windows
            worst = max(x.moments.std_error / (x.moments.std or 1) for x in sampled)
            lines.append(
                f"{len(sampled):,} by {count:,} stratified windows and more: standard "
                f"deviations to {worst:.2%} (one standard error), ranges and zeros of "
                "what was seen"
            )
        if unread:
            lines.append(f"{len(unread):,} not looked at: {unread[0].unread}")
        return lines

    def screen(self) -> tuple[list[tuple[str, ...]], str]:
        """The first rows, as many as a screen has, and what to say of the others."""
        rows = self.rows()
        more = len(rows) - _SCREEN
        said = f"… and {more:,} more rows: table() has every leaf" if more > 0 else ""
        return rows[:_SCREEN], said

    def to_data(self) -> dict[str, Any]:
        """The inspection as plain data."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "key": list(self.key),
            "findings": [found.as_data() for found in self.findings],
            "leaves": [leaf.to_data() for leaf in self.leaves],
        }

    def to_json(self) -> str:
        """The inspection as JSON; numbers that are not finite are null."""
        return json.dumps(_jsonable(self.to_data()), indent=1)

    def __repr__(self) -> str:
        return (
            f"<Inspection of {self.name}: {plural(len(self.leaves), 'leaf')}, "
            f"{plural(len(self.findings), 'finding')}>"
        )

    def __str__(self) -> str:
        rows, more = self.screen()
        chart = self.chart()
        parts = [*self.summary(), table.as_text(self.HEADER, rows), more]
        if chart:
            parts.append(table.as_text(self.CHART_HEADER, chart))
        return "\n".join(filter(None, [*parts, as_text(self.findings)]))

    def _repr_html_(self) -> str:
        rows, more = self.screen()
        said = [*self.summary(), more, *map(str, self.findings)]
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in said if line)
        return table.as_html(self.HEADER, rows) + lines


def _row(alike: Sequence[LeafStatistics]) -> tuple[str, ...]:
    seen = [leaf for leaf in alike if leaf.windows]
    path = folded([leaf.path for leaf in alike])
    if not seen:
        return (str(len(alike)), path, alike[0].law.short, *["-"] * 4, "")
    many = [leaf.moments for leaf in seen]
    laws = list(dict.fromkeys(leaf.law.short for leaf in seen))
    law = laws[0] + (" …" if len(laws) > 1 else "")
    return (str(len(alike)), path, law, *_moments(many))


def _moments(many: Sequence[Moments]) -> tuple[str, ...]:
    """The moments of sisters together, and their histogram."""
    error = max(m.std_error for m in many)
    return (
        f"{sum(m.mean for m in many) / len(many):.2g}",
        _extent([m.std for m in many], error),
        f"{min(m.min for m in many):.3g} to {max(m.max for m in many):.3g}",
        f"{100 * sum(m.zeros for m in many) / len(many):.3g}%",
        _bars(many),
    )


def _bars(many: Sequence[Moments]) -> str:
    """The histograms of sisters over each other, two bins a character."""
    counts = [m.histogram for m in many if m.histogram]
    if not counts:
        return ""
    total = [sum(column) for column in zip(*counts, strict=True)]
    return sparkline(map(sum, zip(total[::2], total[1::2], strict=True)), least=0)


def _extent(values: Sequence[float], error: float = 0.0) -> str:
    """The least and the largest; one number where they differ by chance alone."""
    low, high = min(values), max(values)
    if not high - low > max(8 * error, 2e-2 * abs(high)):
        return f"{sum(values) / len(values):.3g}"
    first, last = f"{low:.3g}", f"{high:.3g}"
    return first if first == last else f"{first} to {last}"


def _line(points: Sequence[tuple[float, float]]) -> str:
    """Gains by depth, as many depths together as a line asks for."""
    by_depth: dict[float, list[float]] = {}
    for depth, value in sorted(points):
        by_depth.setdefault(depth, []).append(value)
    means = [sum(values) / len(values) for values in by_depth.values()]
    if len(means) > _CHART:
        edges = [round(i * len(means) / _CHART) for i in range(_CHART + 1)]
        pairs = itertools.pairwise(edges)
        # The farthest from the middle: one layer that stands out is to be seen.
        middle = sorted(means)[len(means) // 2]
        means = [max(means[a:b], key=lambda x: abs(x - middle)) for a, b in pairs]
    if max(means) - min(means) <= 0.05 * max(means):
        return "▄" * len(means)
    return sparkline(means, least=0)


def _jsonable(value: Any) -> Any:
    # `json.dumps` writes NaN and Infinity, which JSON does not have: other readers
    # refuse the whole text.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _jsonable(x) for key, x in value.items()}
    return [_jsonable(x) for x in value] if isinstance(value, list | tuple) else value
