"""What stands out: leaves unlike their sisters, kernels of one value, NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from shardinit.core.plan.findings import Finding, finding
from shardinit.core.plan.folded import template
from shardinit.verify.inspect.gain import depth_of, unlike
from shardinit.verify.inspect.report import LeafStatistics

_BY_DESIGN = ("bias", "scale", "offset", "b", "beta", "gamma")


def findings(leaves: Sequence[LeafStatistics]) -> Iterator[Finding]:
    """What is to be said of some leaves, warnings and notes."""
    broken = [leaf.path for leaf in leaves if leaf.moments.nonfinite]
    if broken:
        yield finding(
            "not-finite",
            broken,
            "some of its numbers are infinite or NaN",
            "Look at the scale that the initialiser is given, and at its dtype",
            severity="warning",
        )
    yield from _of_one_value(leaves)
    groups: dict[Any, list[LeafStatistics]] = {}
    for leaf in leaves:
        if leaf.windows:
            alike = (template(leaf.path), leaf.shape, leaf.dtype)
            groups.setdefault(alike, []).append(leaf)
    for group in groups.values():
        yield from _unlike_their_sisters(group)
        for leaf in group:
            yield from _unlike_layers(leaf)


def _of_one_value(leaves: Sequence[LeafStatistics]) -> Iterator[Finding]:
    """Kernels of one value, and random leaves that came out as one."""
    by_value: dict[float, list[str]] = {}
    for leaf in leaves:
        found = leaf.moments
        if not leaf.windows or found.count < 1 or found.min != found.max:
            continue
        last = leaf.path.rpartition("/")[2]
        rank = len(leaf.shape) - leaf.stacked
        meant = leaf.law.family == "constant" or leaf.law.family == "unknown"
        if math.prod(leaf.shape) > 1 and (
            not meant or (rank > 1 and last not in _BY_DESIGN)
        ):
            by_value.setdefault(found.min, []).append(leaf.path)
    for value, paths in by_value.items():
        what = (
            "dead: every element is 0"
            if value == 0
            else f"every element is {value:.4g}"
        )
        yield finding(
            "one-value",
            paths,
            what,
            "A kernel of one value learns one feature; draw it, unless it is meant so, "
            "as the last of a residual branch may be",
            severity="note",
        )


def _unlike_their_sisters(group: Sequence[LeafStatistics]) -> Iterator[Finding]:
    depths = [depth_of(leaf.path) for leaf in group]
    if len(set(depths)) < 2:
        depths = list(range(len(group)))
    for what in ("std", "mean"):
        values = [abs(getattr(leaf.moments, what)) for leaf in group]
        errors = [getattr(leaf.moments, f"{what}_error") for leaf in group]
        if what == "mean":  # of random leaves it is an accident of the draw
            noise = [x.moments.std / math.sqrt(max(x.moments.count, 1)) for x in group]
            errors = [max(e, n) for e, n in zip(errors, noise, strict=True)]
            if not all(v > 6 * e for v, e in zip(values, errors, strict=True)):
                continue
        for number, expected in unlike(depths, values, errors):
            yield _stands_out(group[number].path, what, values[number], expected)
    yield from _of_another_family(group)


def _of_another_family(group: Sequence[LeafStatistics]) -> Iterator[Finding]:
    families = [leaf.law.family for leaf in group]
    most = max(set(families), key=families.count)
    others = [leaf for leaf in group if leaf.law.family != most]
    if others and len(group) >= 4 and len(others) <= len(group) / 4:
        for leaf in others:
            yield finding(
                "unlike-sisters",
                [leaf.path],
                f"it is {leaf.law}, and {len(group) - len(others):,} of its sisters "
                f"are {most}",
                "Give it the initialiser of the others, unless it is meant so",
                severity="warning",
            )


def _unlike_layers(leaf: LeafStatistics) -> Iterator[Finding]:
    """Layers of a stack that are unlike the others."""
    if not leaf.layers:
        return
    share = leaf.moments.count / len(leaf.layers)
    errors = [x / math.sqrt(2 * max(share, 1)) for x in leaf.layers]
    depths = range(len(leaf.layers))
    for number, expected in unlike(list(depths), leaf.layers, errors):
        where = f"{leaf.path}[{number}]"
        yield _stands_out(where, "std", leaf.layers[number], expected)


def _stands_out(path: str, what: str, value: float, expected: float) -> Finding:
    return finding(
        "unlike-sisters",
        [path],
        f"its {what} is {value:.4g}, that of its sisters at its depth {expected:.4g} "
        f"({value / expected:.3g} times)",
        "Look at the scale of this layer, unless it is meant so",
        severity="warning",
    )
