"""A plan as a table: one row for the leaves of all layers, or one for each leaf."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

from shardinit.core.plan.folded import folded, template

if TYPE_CHECKING:  # a client without JAX prints descriptions
    from jax.sharding import NamedSharding

    from shardinit.core.plan.leaves import PlanLeaf

HEADER = (
    "program",
    "leaves",
    "path",
    "shape",
    "dtype",
    "sharding",
    "bytes a device",
    "whole because of",
)
PATH = HEADER.index("path")

Row = tuple[str, ...]


def rows(leaves: Iterable[PlanLeaf]) -> list[Row]:
    """A row for the selected leaves that differ in the numbers of their paths alone."""
    return [_row(alike) for alike in _alike(leaves)]


def every(leaves: Iterable[PlanLeaf]) -> list[Row]:
    """A row for each selected leaf."""
    return [_row([leaf]) for leaf in leaves if leaf.selected]


def largest(leaves: Iterable[PlanLeaf], most: int) -> tuple[list[Row], int]:
    """At most so many of ``rows``, those of the most bytes, and how many are left."""
    found = _alike(leaves)
    order = sorted(range(len(found)), key=lambda i: -_bytes(found[i]))
    kept = sorted(order[:most])
    return [_row(found[i]) for i in kept], len(found) - len(kept)


def _alike(leaves: Iterable[PlanLeaf]) -> list[list[PlanLeaf]]:
    """The selected leaves that share a row."""
    groups: dict[Hashable, list[PlanLeaf]] = {}
    for leaf in leaves:
        if leaf.selected:
            spec = spec_text(leaf.sharding)
            alike = (leaf.program, leaf.shape, str(leaf.dtype), spec)
            groups.setdefault((*alike, template(leaf.path)), []).append(leaf)
    return list(groups.values())


def _bytes(alike: Sequence[PlanLeaf]) -> int:
    return alike[0].bytes_per_device * len(alike)


def spec_text(sharding: NamedSharding | None) -> str:
    """A sharding as a table shows it."""
    if sharding is None:
        return "-"
    return str(sharding.spec).replace("PartitionSpec", "P")


def _row(alike: Sequence[PlanLeaf]) -> Row:
    leaf = alike[0]
    return (
        "host" if leaf.is_hosted else str(leaf.program),
        str(len(alike)),
        folded([x.path for x in alike]),
        "x".join(map(str, leaf.shape)) or "scalar",
        str(leaf.dtype),
        spec_text(leaf.sharding),
        f"{_bytes(alike):,}",
        leaf.whole,
    )
