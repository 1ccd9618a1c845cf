"""Axis names in a program's message: the names, and what a framework attaches to them.

What is lost here is lost in silence: a leaf of which the file forgot the model's own
rules would lie otherwise than the same leaf of the function. A mesh of the model's own
is the one thing that stays behind: its devices are not there where the file is read.
"""

from __future__ import annotations

from shardinit.core.init_fn import AxisNames
from shardinit.core.plan.entries import as_entry, mesh_axes
from shardinit.core.plan.leaf_info import LeafInfo
from shardinit.v1 import program_pb2 as pb


def write_axes(info: LeafInfo, out: pb.Leaf) -> None:
    """Writes the names of a leaf's axes into its message."""
    if info.axes is None:
        return
    out.has_axes = True
    out.axes.extend(name if isinstance(name, str) else "" for name in info.axes)
    groups = {i: name for i, name in enumerate(info.axes) if isinstance(name, tuple)}
    named = len(info.axes) if info.named is None else info.named
    if not (groups or info.passes or info.own_rules or named != len(info.axes)):
        return
    metadata = out.axis_metadata
    metadata.named, metadata.passes = named, info.passes
    for dimension, axes in groups.items():
        metadata.groups.add(dimension=dimension, mesh_axes=axes)
    for logical, axes in info.own_rules:
        metadata.rules.add(logical=logical, mesh_axes=mesh_axes(axes))


def read_axes(leaf: pb.Leaf) -> AxisNames | None:
    """The names that ``write_axes`` wrote; None where none are known.

    Raises:
      ValueError: they contradict each other.
    """
    if not leaf.has_axes:
        return None
    names: list[str | tuple[str, ...] | None] = [name or None for name in leaf.axes]
    if not leaf.HasField("axis_metadata"):
        return AxisNames(names, len(names))
    metadata = leaf.axis_metadata
    if metadata.named > len(names):
        raise ValueError(f"leaf {leaf.path!r} names {metadata.named} dimensions")
    for group in metadata.groups:
        if group.dimension >= len(names):
            raise ValueError(f"leaf {leaf.path!r} names dimension {group.dimension}")
        names[group.dimension] = tuple(group.mesh_axes)
    rules = [(rule.logical, as_entry(rule.mesh_axes)) for rule in metadata.rules]
    named = names[: metadata.named]
    return AxisNames(named, len(names), passes=metadata.passes, rules=rules)
