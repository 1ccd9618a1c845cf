"""A plan as a table: one row for each program and shape, with an example."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

HEADER = (
    "program",
    "leaves",
    "first path",
    "shape",
    "dtype",
    "sharding",
    "bytes a device",
    "whole because of",
)


def rows(leaves: Iterable[Any]) -> list[tuple[str, ...]]:
    """One row for each program and shape among the selected leaves of a plan."""
    groups: dict[Any, list[Any]] = {}
    for leaf in leaves:
        if leaf.selected:
            spec = str(leaf.sharding.spec) if leaf.sharding is not None else "-"
            kind = (leaf.program, leaf.shape, str(leaf.dtype), spec)
            groups.setdefault(kind, []).append(leaf)
    table = []
    for (program, shape, dtype, spec), alike in groups.items():
        size = alike[0].bytes_per_device
        table.append(
            (
                str(program) if program >= 0 else "host",
                str(len(alike)),
                alike[0].path + (" …" if len(alike) > 1 else ""),
                "x".join(map(str, shape)) or "scalar",
                dtype,
                spec.replace("PartitionSpec", "P"),
                f"{size * len(alike):,}",
                alike[0].whole,
            )
        )
    return table
