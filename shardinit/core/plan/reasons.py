"""Why an axis lies whole that no rule keeps whole, each with what would help."""

from __future__ import annotations

import re
from typing import Any

from shardinit.core.plan.entries import mesh_axes
from shardinit.core.plan.leaf_info import LeafInfo, Reason
from shardinit.core.plan.mesh import AnyMesh


def no_names(leaf: LeafInfo, mesh: AnyMesh) -> Reason:
    """The leaf has no axis names that a rule could be for."""
    return Reason(
        "it has no axis names",
        f"Name its axes in the model, or {_path_rule(leaf, mesh)}",
    )


def no_rule(name: str, mesh: AnyMesh) -> Reason:
    """No rule is for one of its names."""
    return Reason(
        f"no rule for the axis name {name!r}",
        f"Add ({name!r}, {mesh.axis_names[0]!r}) to the rules, or ({name!r}, None)",
    )


def no_path_rule(leaf: LeafInfo, mesh: AnyMesh) -> Reason:
    """No path rule matches its path."""
    return Reason("no path rule matches", _path_rule(leaf, mesh))


def indivisible(leaf: LeafInfo, mesh: AnyMesh, axes: tuple[str, ...]) -> Reason:
    """Of none of its axes the size divides by the mesh axes."""
    ways = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
    return Reason(
        f"no axis of {leaf.shape} divides by any of {ways}",
        f"Pad one of its axes, or keep it whole: PathRules([..., ({_pattern(leaf)!r}, "
        "PartitionSpec())])",
    )


def undivided(leaf: LeafInfo, dim: int, entry: Any, mesh: AnyMesh) -> Reason:
    """One axis does not divide by the mesh axes of its rule."""
    name = leaf.axes[dim] if leaf.axes else None
    sizes = {axis: mesh.shape[axis] for axis in mesh_axes(entry)}
    ways = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    axis = f"axis {dim}" + (f" ({name!r})" if name else "")
    rule = (name, None) if name else (_pattern(leaf), "PartitionSpec()")
    return Reason(
        f"{axis} of size {leaf.shape[dim]} does not divide by {ways}",
        f"Pad the axis, or keep it whole with a rule {rule}",
    )


def _path_rule(leaf: LeafInfo, mesh: AnyMesh) -> str:
    axis = mesh.axis_names[0]
    rule = f"({_pattern(leaf)!r}, PartitionSpec({axis!r}))"
    return f"PathRules([..., {rule}]); PartitionSpec() keeps it whole"


def _pattern(leaf: LeafInfo) -> str:
    return f"^{re.escape(leaf.path)}$"
