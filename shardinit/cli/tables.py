"""Tables: plans, audits and models, as wide as the terminal they are printed on."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from shardinit.core.plan import tables
from shardinit.core.plan.entries import as_entry, mesh_axes
from shardinit.core.plan.text_table import as_text, fitted, wrapped
from shardinit.short import plural

if TYPE_CHECKING:
    from shardinit.service.wire.description import Description, LeafDescription

_LEAST = 40  # columns: narrower terminals wrap by themselves


def columns() -> int | None:
    """Columns of the terminal that is printed on; None for a file or a pipe."""
    if not sys.stdout.isatty():
        return None
    return max(_LEAST, shutil.get_terminal_size().columns)


def print_plan(plan: Any) -> None:
    """Prints a plan: its totals, one row for the leaves of all layers, its findings."""
    width = columns()
    if width is None:
        print(plan)
        return
    rows, more = plan.screen()
    print(wrapped(plan.summary(), width))
    print(fitted(tables.HEADER, rows, width, tables.PATH))
    for said in filter(None, (more, *map(str, plan.findings))):
        print(wrapped(said, width))


def print_description(found: Description, axes: dict[str, int] | None) -> None:
    """Prints what a service says of a model, as a plan of it is printed.

    Args:
      found: what it said.
      axes: those of the mesh that it was asked for.
    """
    from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

    mesh = None if axes is None else AbstractMesh(tuple(axes.values()), tuple(axes))

    def planned(leaf: LeafDescription) -> Any:
        place = None
        if mesh is not None and leaf.spec is not None:
            spec = PartitionSpec(*map(as_entry, leaf.spec))
            place = NamedSharding(mesh, spec, memory_kind=leaf.memory_kind or None)
        added = {"sharding": place, "selected": True, "is_hosted": leaf.is_hosted}
        return SimpleNamespace(**vars(leaf), **added)

    rows, host = tables.rows(map(planned, found.leaves)), found.host_bytes_per_device
    said = [
        f"{plural(len(found.leaves), 'leaf')} of "
        f"{plural(found.programs, 'program')}, "
        f"{found.total_bytes:,} bytes, {found.bytes_per_device:,} a device"
        + (f" and {host:,} in its host's memory" if host else "")
        + f", fingerprint {found.fingerprint}",
        *map(str, found.findings),
    ]
    width = columns()
    if width is None:
        print("\n".join([as_text(tables.HEADER, rows), *said]))
        return
    print(fitted(tables.HEADER, rows, width, tables.PATH))
    for line in said:
        print(wrapped(line, width))


def print_inspection(found: Any) -> None:
    """Prints an inspection: its rows, layers folded, gains, what stands out."""
    width = columns()
    if width is None:
        print(found)
        return
    rows, more = found.screen()
    for line in found.summary():
        print(wrapped(line, width))
    print(fitted(found.HEADER, rows, width, found.HEADER.index("path")))
    if more:
        print(wrapped(more, width))
    if chart := found.chart():
        print(fitted(found.CHART_HEADER, chart, width, 0))
    for said in found.findings:
        print(wrapped(str(said), width))


def print_audit(report: Any) -> None:
    """Prints an audit: a row for each program, its sums and the verdict."""
    width = columns()
    if width is None:
        print(report)
        return
    path = report.HEADER.index("first path")
    print(fitted(report.HEADER, report.screen(), width, path))
    for line in report.summary():
        print(wrapped(line, width))


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
                "memory_kind": leaf.memory_kind,
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
        "host_bytes_per_device": plan.host_bytes_per_device,
        "parameter_count": plan.parameter_count,
        "programs": len(plan.programs),
        "findings": [found.as_data() for found in plan.findings],
        "leaves": leaves,
    }


def schemas() -> dict[str, Mapping[str, Any] | str]:
    """The config keys of every registered model, or why it has none."""
    from shardinit.models import builder, model_names

    found: dict[str, Mapping[str, Any] | str] = {}
    for name in model_names():
        try:
            found[name] = builder(name).schema
        except ImportError as error:
            found[name] = f"cannot be imported: {error}"
    return found


def print_lines(text: str) -> None:
    """Prints lines, those that are longer than the terminal is wide set in."""
    width = columns()
    for line in text.splitlines():
        print(line if width is None else wrapped(line, width))


def print_examples() -> None:
    """Prints the names that a spec may be."""
    from shardinit.models import example_names

    said = f"specs by name: {', '.join(example_names())}"
    print(wrapped(said, columns() or 88))


def print_schemas(found: Mapping[str, Mapping[str, Any] | str]) -> None:
    """Prints models by name with their config keys, or why they have none."""
    width = columns() or 88
    for name, schema in found.items():
        if isinstance(schema, str):
            print(wrapped(f"{name}: {schema}", width))
            continue
        required = set(schema.get("required", ()))
        print(name)
        for key, about in schema.get("properties", {}).items():
            default = "required" if key in required else about.get("default")
            kind = _type(about.get("type", ""))
            said = kind if default is None else f"{kind}, {default}"
            print(wrapped(f"  {key}: {said}", width))
            meaning = str(about.get("description", ""))
            print(wrapped(f"      {meaning}", width, hang=6))


def _type(kind: Any) -> str:
    return kind if isinstance(kind, str) else " or ".join(map(str, kind))
