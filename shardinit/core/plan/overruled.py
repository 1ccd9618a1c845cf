"""Findings about leaves that lie otherwise than the model itself states."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jax.sharding import Mesh, PartitionSpec

from shardinit.core.plan.entries import mesh_axes
from shardinit.core.plan.findings import Finding, finding
from shardinit.core.plan.leaf_info import LeafInfo, Placed
from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.plan.rules import AxisRules, DefaultRules


class _Statement(enum.Enum):
    """By what a model states where a leaf lies, with the text of a finding."""

    SHARDING = "the function states {}, and they lie by {}"
    MESH = "the model states the mesh {}, and they lie on {}"
    RULES = "the model's own rules put the axis {!r} on {}, and it lies on {}"
    NAMES = "the model states {} on this mesh, and they lie by {}"


@dataclass(frozen=True)
class _Conflict:
    """What a model states, and what its leaf got instead; equal for equal conflicts."""

    statement: _Statement
    facts: tuple[object, ...]

    def __str__(self) -> str:
        return self.statement.value.format(*self.facts)


@dataclass(frozen=True)
class _Sizes:
    """The axes of a mesh, printed as a dict."""

    axes: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return str(dict(self.axes))


def overruled(placed: Sequence[Placed], mesh: AnyMesh) -> Iterator[Finding]:
    """Leaves that rules place otherwise than the model itself states.

    Args:
      placed: the leaves.
      mesh: the mesh.
    """
    groups: dict[_Conflict, list[Placed]] = {}
    for x in placed:
        conflict = _conflict(x, mesh)
        if conflict is not None:
            groups.setdefault(conflict, []).append(x)
    for conflict, found in groups.items():
        yield finding(
            "overruled",
            [x.leaf.path for x in found],
            str(conflict),
            "Drop the rule that overrules the model, or what the model states",
            rules=dict.fromkeys(rule for x in found for rule in x.leaf.own_rules),
        )


def _conflict(x: Placed, mesh: AnyMesh) -> _Conflict | None:
    """How a leaf lies otherwise than the model states; None if it does not."""
    leaf, spec = x.leaf, x.sharding.spec
    if leaf.stated is not None:
        own = leaf.stated
        agree = _entries(own.spec, leaf) == _entries(spec, leaf)
        if agree and _is_same(own.mesh, mesh):
            return None
        return _Conflict(_Statement.SHARDING, (own.spec, spec))
    if leaf.own_mesh is not None and not _is_same(leaf.own_mesh, mesh):
        sizes = [_Sizes(tuple(x.shape.items())) for x in (leaf.own_mesh, mesh)]
        return _Conflict(_Statement.MESH, tuple(sizes))
    if leaf.own_rules and leaf.axes is not None:
        return _with_own_rules(leaf, spec, mesh)
    if leaf.own_mesh is not None:
        stated = DefaultRules().choose(leaf, mesh, "error").spec
        if _entries(stated, leaf) != _entries(spec, leaf):
            return _Conflict(_Statement.NAMES, (stated, spec))
    return None


def _with_own_rules(
    leaf: LeafInfo, spec: PartitionSpec, mesh: AnyMesh
) -> _Conflict | None:
    """The first axis that lies otherwise than the leaf's own rules put it."""
    own = AxisRules(leaf.own_rules)
    stated = own.choose(leaf, mesh, "error").spec
    ruled = {name for name, _ in own.rules}
    entries = zip(_entries(stated, leaf), _entries(spec, leaf), strict=True)
    for name, (want, got) in zip(leaf.axes or (), entries, strict=True):
        if name in ruled and want != got:
            return _Conflict(_Statement.RULES, (name, _on(want), _on(got)))
    return None


def _on(axes: tuple[str, ...]) -> str:
    return " x ".join(axes) if axes else "no mesh axis"


def _entries(spec: PartitionSpec, leaf: LeafInfo) -> list[tuple[str, ...]]:
    entries = [mesh_axes(entry) for entry in spec]
    return entries + [()] * (len(leaf.shape) - len(entries))


def _is_same(one: AnyMesh, other: AnyMesh) -> bool:
    """Whether two meshes have the same axes, and the same devices if both have some."""
    # Not ``one == other``: meshes are unequal too where one has Auto axes and the other
    # Explicit ones, and that moves no byte.
    if isinstance(one, Mesh) and isinstance(other, Mesh):
        return one.shape == other.shape and list(one.devices.flat) == list(
            other.devices.flat
        )
    return dict(one.shape) == dict(other.shape)
