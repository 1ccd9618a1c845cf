"""A plan as a table: one row for the leaves of all layers, or one for each leaf."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from shardinit.core.plan.folded import folded, template

if TYPE_CHECKING:
    from jax.sharding import NamedSharding

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


def rows(leaves: Iterable[Any]) -> list[Row]:
    """A row for the selected leaves that differ in the numbers of their paths alone."""
    groups: dict[Any, list[Any]] = {}
    for leaf in leaves:
        if leaf.selected:
            alike = (
                leaf.program,
                leaf.shape,
                str(leaf.dtype),
                spec_text(leaf.sharding),
            )
            groups.setdefault((*alike, template(leaf.path)), []).append(leaf)
    return [_row(alike) for alike in groups.values()]


def every(leaves: Iterable[Any]) -> list[Row]:
    """A row for each selected leaf."""
    return [_row([leaf]) for leaf in leaves if leaf.selected]


def largest(found: Sequence[Row], most: int) -> tuple[list[Row], int]:
    """At most so many rows, those of the most bytes, and how many are left out."""
    if len(found) <= most:
        return list(found), 0
    size = HEADER.index("bytes a device")
    order = sorted(found, key=lambda row: -int(row[size].replace(",", "")))
    kept = set(order[:most])
    return [row for row in found if row in kept], len(found) - most


def spec_text(sharding: NamedSharding | None) -> str:
    """A sharding as a table shows it."""
    if sharding is None:
        return "-"
    return str(sharding.spec).replace("PartitionSpec", "P")


def _row(alike: Sequence[Any]) -> Row:
    leaf = alike[0]
    return (
        str(leaf.program) if leaf.program >= 0 else "host",
        str(len(alike)),
        folded([x.path for x in alike]),
        "x".join(map(str, leaf.shape)) or "scalar",
        str(leaf.dtype),
        spec_text(leaf.sharding),
        f"{leaf.bytes_per_device * len(alike):,}",
        leaf.whole,
    )
