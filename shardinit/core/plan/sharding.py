"""Which part of each leaf lies on which device: one checked sharding a leaf.

Whatever the rules or the caller say ends here in a ``NamedSharding`` for each leaf,
held against the leaf where it and its axes still have names, and not deep inside the
compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from shardinit.core.paths import path_str
from shardinit.core.plan.entries import mesh_axes, parts
from shardinit.core.plan.mesh import AnyMesh, one_device
from shardinit.core.plan.rules import (
    AxisRules,
    Fsdp,
    LeafInfo,
    PathRules,
    Rules,
    default_spec,
)
from shardinit.errors import ShardingError


def resolve(
    leaves: Sequence[LeafInfo], mesh: AnyMesh, rules: Rules | None
) -> list[NamedSharding]:
    """One checked sharding for each leaf, from rules.

    Raises:
      ShardingError: a rule names a mesh axis that the mesh lacks, or an axis of a
        leaf does not divide by its mesh axes.
    """
    if rules is not None:
        _check_rules(rules, mesh)
    shardings = []
    for leaf in leaves:
        spec = default_spec(leaf, mesh) if rules is None else rules.spec(leaf, mesh)
        sharding = _placed(mesh, _short(spec, leaf), leaf)
        check(leaf, sharding)
        shardings.append(sharding)
    return shardings


def _placed(mesh: AnyMesh, spec: PartitionSpec, leaf: LeafInfo) -> NamedSharding:
    """A spec on a mesh; what JAX would refuse is refused with the leaf's name."""
    names = [name for entry in spec for name in mesh_axes(entry)]
    twice = next((n for n in names if names.count(n) > 1), None)
    unknown = next((n for n in names if n not in mesh.shape), None)
    if twice is not None or unknown is not None:
        raise ShardingError(
            f"leaf {leaf.path!r}",
            f"{spec} names the mesh axis {unknown or twice!r}"
            + ("" if unknown else " twice"),
            f"axes of the mesh, each at most once: "
            f"{', '.join(map(repr, mesh.axis_names))}",
        )
    return NamedSharding(mesh, spec)


def _short(spec: PartitionSpec, leaf: LeafInfo) -> PartitionSpec:
    """A spec longer than the leaf's rank is fine where the rest says nothing."""
    entries = list(spec)
    while len(entries) > len(leaf.shape) and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _check_rules(rules: object, mesh: AnyMesh) -> None:
    if not isinstance(rules, AxisRules | PathRules | Fsdp):
        raise ShardingError(
            "rules",
            f"got {type(rules).__name__}",
            "AxisRules([...]), PathRules([...]) or fsdp(...)",
        )
    unknown = sorted(rules.mesh_axes() - set(mesh.axis_names))
    if unknown:
        raise ShardingError(
            "rules",
            f"they name the mesh axes {', '.join(map(repr, unknown))}",
            f"axes of the mesh: {', '.join(map(repr, mesh.axis_names))}",
            "Rename the axis in the rules or in the mesh",
        )


def check(leaf: LeafInfo, sharding: NamedSharding) -> None:
    """Holds a sharding against the leaf it is for.

    Raises:
      ShardingError: more entries than axes, an unknown mesh axis, or an axis that
        does not divide.
    """
    spec, mesh = sharding.spec, sharding.mesh
    where = f"leaf {leaf.path!r}"
    if len(spec) > len(leaf.shape):
        raise ShardingError(
            where,
            f"{spec} has {len(spec)} entries for the shape {leaf.shape}",
            f"at most {len(leaf.shape)}",
        )
    for dim, entry in enumerate(spec):
        names = mesh_axes(entry)
        missing = [n for n in names if n not in mesh.shape]
        if missing:
            raise ShardingError(
                where,
                f"{spec} names the mesh axis {missing[0]!r}",
                f"axes of the mesh: {', '.join(map(repr, mesh.axis_names))}",
            )
        ways = parts(entry, mesh.shape)
        if leaf.shape[dim] % ways:
            logical = leaf.axes[dim] if leaf.axes else None
            axis = f"axis {dim}" + (f" ({logical!r})" if logical else "")
            size, up = leaf.shape[dim], -(-leaf.shape[dim] // ways) * ways
            rule = (
                f"a rule ({logical!r}, None)"
                if logical
                else "None at that place of its spec"
            )
            raise ShardingError(
                where,
                f"{axis} of size {size} does not divide by the mesh axes "
                f"{' x '.join(f'{n}={mesh.shape[n]}' for n in names)} = {ways}",
                f"a multiple of {ways}",
                f"Pad the axis to {up}, shard another axis, or keep it whole with "
                f"{rule}",
            )


def from_tree(
    tree: Any,
    leaves: Sequence[LeafInfo],
    structure: Any,
    mesh: AnyMesh | None,
) -> list[NamedSharding]:
    """One checked sharding for each leaf, from ``out_shardings``.

    Args:
      tree: a pytree prefix of the result; leaves are NamedShardings, or
        PartitionSpecs or None (whole) when ``mesh`` is given.
      leaves: the leaves of the result.
      structure: the pytree structure of the result.
      mesh: the mesh, or None to take the shardings' own.

    Raises:
      ShardingError: the tree does not match, or a sharding does not fit its leaf.
    """

    def is_leaf(node: Any) -> bool:
        return node is None or isinstance(node, jax.sharding.Sharding | PartitionSpec)

    full = jax.tree.unflatten(structure, list(range(len(leaves))))
    given: list[Any] = [None] * len(leaves)

    def place(path: Any, entry: Any, part: Any) -> None:
        for number in jax.tree.leaves(part):
            given[number] = (path, entry)

    try:
        jax.tree_util.tree_map_with_path(place, tree, full, is_leaf=is_leaf)
    except ValueError as error:
        raise ShardingError(
            "out_shardings",
            f"its structure differs from the init function's result "
            f"({str(error).splitlines()[0][:200]})",
            "a pytree prefix of the result",
            f"The result has {len(leaves)} leaves, the first is "
            f"{leaves[0].path if leaves else ''!r}",
        ) from error
    shardings = []
    for leaf, (path, entry) in zip(leaves, given, strict=True):
        sharding = _named(entry, leaf, path_str(path), mesh)
        check(leaf, sharding)
        shardings.append(sharding)
    return shardings


def _named(
    entry: object, leaf: LeafInfo, path: str, mesh: AnyMesh | None
) -> NamedSharding:
    if isinstance(entry, NamedSharding):
        return entry
    if isinstance(entry, jax.sharding.SingleDeviceSharding):
        (device,) = entry.device_set
        return NamedSharding(one_device(device), PartitionSpec())
    if (entry is None or isinstance(entry, PartitionSpec)) and mesh is not None:
        return _placed(mesh, entry or PartitionSpec(), leaf)
    raise ShardingError(
        f"out_shardings at {path!r}, leaf {leaf.path!r}",
        f"got {entry!r}",
        "a NamedSharding" + ("" if mesh is not None else ", or pass mesh=..."),
    )
