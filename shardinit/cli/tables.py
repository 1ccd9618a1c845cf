"""Tables: plans and models for people on a terminal, plain text for everything else."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardinit.core.plan.entries import mesh_axes

_RIGHT = ("program", "leaves", "bytes a device")


def print_plan(plan: Any) -> None:
    """Prints a plan: one row for each program and shape, then its totals."""
    if not sys.stdout.isatty():
        print(plan)
        return
    from shardinit.core.plan.tables import HEADER

    rows = plan.rows()
    last = -1 if any(row[-1] for row in rows) else len(HEADER) - 1
    shown = HEADER[:last] if last != -1 else HEADER
    table = Table(caption=Text(plan.summary()), caption_justify="left")
    for name in shown:
        justify = "right" if name in _RIGHT else "left"
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row[: len(shown)]))
    console = Console()
    console.print(table)
    for found in plan.findings:
        console.print(Text(str(found)))


def plan_as_data(plan: Any) -> dict[str, Any]:
    """A plan as plain data: totals, and every leaf with its sharding."""
    leaves = []
    for leaf in plan.leaves:
        entries = () if leaf.sharding is None else leaf.sharding.spec
        spec = [list(mesh_axes(entry)) for entry in entries]
        leaves.append(
            {
                "path": leaf.path,
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "sharding": spec,
                "bytes_per_device": leaf.bytes_per_device,
                "program": leaf.program,
                "whole": leaf.whole,
            }
        )
    return {
        "name": plan.name,
        "fingerprint": plan.fingerprint,
        "mesh": plan.mesh_shape,
        "total_bytes": plan.total_bytes,
        "bytes_per_device": plan.bytes_per_device,
        "parameter_count": plan.parameter_count,
        "programs": len(plan.programs),
        "findings": [found.as_data() for found in plan.findings],
        "leaves": leaves,
    }


def print_models() -> None:
    """Prints every registered model with its config keys."""
    from shardinit.models import builder, model_names

    found: dict[str, Mapping[str, Any] | str] = {}
    for name in model_names():
        try:
            found[name] = builder(name).schema
        except ImportError as error:
            found[name] = f"cannot be imported: {error}"
    print_schemas(found)


def print_schemas(found: Mapping[str, Mapping[str, Any] | str]) -> None:
    """Prints models by name with their config keys, or why they have none."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for name, schema in found.items():
        if isinstance(schema, str):
            console.print(Text(f"{name}: {schema}"))
            continue
        required = set(schema.get("required", ()))
        table = Table(title=Text(name), title_justify="left", box=None, pad_edge=False)
        for column in ("key", "type", "default", "meaning"):
            table.add_column(column, overflow="fold")
        for key, about in schema.get("properties", {}).items():
            default = "required" if key in required else about.get("default")
            table.add_row(
                Text(key),
                Text(_type(about.get("type", ""))),
                Text("" if default is None else str(default)),
                Text(str(about.get("description", ""))),
            )
        console.print(table)


def _type(kind: Any) -> str:
    return kind if isinstance(kind, str) else " or ".join(map(str, kind))
