"""A plan as a table: one row for the leaves of all layers, or one for each leaf."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

from shardinit.core.plan.entries import other_memory
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
Kind = tuple[Hashable, tuple[int, ...], str, str, int]


def rows(leaves: Iterable[PlanLeaf]) -> list[Row]:
    """A row for the selected leaves that differ in the numbers of their paths alone."""
    return [_row(group) for group in alike(leaves).values()]


def every(leaves: Iterable[PlanLeaf]) -> list[Row]:
    """A row for each selected leaf."""
    return [_row([leaf]) for leaf in leaves if leaf.selected]


def largest(leaves: Iterable[PlanLeaf], most: int) -> tuple[list[Row], int]:
    """At most so many of ``rows``, those of the most bytes, and how many are left."""
    found = list(alike(leaves).values())
    order = sorted(range(len(found)), key=lambda i: -_bytes(found[i]))
    kept = sorted(order[:most])
    return [_row(found[i]) for i in kept], len(found) - len(kept)


def alike(leaves: Iterable[PlanLeaf]) -> dict[Kind, list[PlanLeaf]]:
    """The selected leaves that share a row, by what they have in common.

    That is the pattern of their paths, their shape, dtype and sharding as text, and
    their program.
    """
    groups: dict[Kind, list[PlanLeaf]] = {}
    for leaf in leaves:
        if leaf.selected:
            where = spec_text(leaf.sharding)
            kind = (template(leaf.path), leaf.shape, str(leaf.dtype), where)
            groups.setdefault((*kind, leaf.program), []).append(leaf)
    return groups


def _bytes(group: Sequence[PlanLeaf]) -> int:
    return group[0].bytes_per_device * len(group)


def spec_text(sharding: NamedSharding | None) -> str:
    """A sharding as a table shows it."""
    if sharding is None:
        return "-"
    kind = other_memory(sharding)
    return f"{sharding.spec} in {kind}" if kind else str(sharding.spec)


def _row(group: Sequence[PlanLeaf]) -> Row:
    leaf = group[0]
    return (
        "host" if leaf.is_hosted else str(leaf.program),
        str(len(group)),
        folded([x.path for x in group]),
        "x".join(map(str, leaf.shape)) or "scalar",
        str(leaf.dtype),
        spec_text(leaf.sharding),
        f"{_bytes(group):,}",
        leaf.whole,
    )
