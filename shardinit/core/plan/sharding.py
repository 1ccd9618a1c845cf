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
from shardinit.core.plan.entries import mesh_axes, mesh_axes_of, parts
from shardinit.core.plan.leaf_info import Choice, LeafInfo
from shardinit.core.plan.mesh import AnyMesh, one_device
from shardinit.core.plan.optimizer import for_optimizer, mirrored, names_itself
from shardinit.core.plan.placement import Placement, axes_of
from shardinit.core.plan.rules import (
    AxisRules,
    DefaultRules,
    Fsdp,
    PathRules,
    Rules,
)
from shardinit.core.types import Tree, TreeDef
from shardinit.errors import ShardingError


def resolve(
    leaves: Sequence[LeafInfo], mesh: AnyMesh, rules: Rules | None
) -> list[NamedSharding]:
    """One checked sharding for each leaf, from rules; see ``choose``."""
    return [sharding for sharding, _ in choose(leaves, mesh, rules)]


def choose(
    leaves: Sequence[LeafInfo],
    mesh: AnyMesh,
    rules: Rules | None,
    indivisible: str = "error",
    opt_rules: Rules | Placement | None = None,
) -> list[tuple[NamedSharding, Choice]]:
    """One checked sharding for each leaf, with what the rules say of it.

    Args:
      leaves: the leaves.
      mesh: the mesh.
      rules: None for what the leaves themselves say, else fsdp.
      indivisible: what happens where an axis does not divide: ``"error"``, or
        ``"next"`` for the next rule, else whole.
      opt_rules: rules for optimizer state, on top.

    Raises:
      ShardingError: a rule names a mesh axis that the mesh lacks, an axis of a leaf
        does not divide by its mesh axes, or a name stands twice in a leaf.
    """
    if rules is not None:
        _check_rules(rules, mesh)
    if axes_of(opt_rules) is not None:
        _check_rules(axes_of(opt_rules), mesh, "opt_rules")
    chooser = DefaultRules() if rules is None else rules
    look_at_paths = any(isinstance(r, PathRules) for r in (rules, axes_of(opt_rules)))
    by_path = {leaf.path: leaf for leaf in leaves}
    known: dict[object, tuple[NamedSharding, Choice]] = {}
    chosen = []
    for leaf in leaves:
        source = by_path[leaf.mirrors.path] if leaf.mirrors is not None else None
        # A model of 50,000 leaves has ten kinds of them.
        kind = (leaf.kind, source and source.kind)
        if look_at_paths:  # which may be equal, as those of the keys 1 and "1" are
            kind += (leaf.path, source and source.path)
        if kind not in known:
            choice = _choice(leaf, source, chooser, mesh, indivisible)
            choice = for_optimizer(leaf, choice, opt_rules, mesh, indivisible)
            spec = _short(choice.spec, leaf)
            sharding = _placed(mesh, spec, leaf, choice.memory_kind)
            check(leaf, sharding)
            known[kind] = sharding, choice
        chosen.append(known[kind])
    return chosen


def _choice(
    leaf: LeafInfo,
    source: LeafInfo | None,
    chooser: Rules | DefaultRules,
    mesh: AnyMesh,
    indivisible: str,
) -> Choice:
    """What rules choose for a leaf, or for the ``source`` that it mirrors."""
    if source is None or names_itself(chooser, leaf, source):
        return chooser.choose(leaf, mesh, indivisible)
    return mirrored(leaf, chooser.choose(source, mesh, indivisible))


def _placed(
    mesh: AnyMesh, spec: PartitionSpec, leaf: LeafInfo, memory_kind: str | None = None
) -> NamedSharding:
    """A spec on a mesh; what JAX would refuse is refused with the leaf's name."""
    names = mesh_axes_of(spec)
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
    try:
        return NamedSharding(mesh, spec, memory_kind=memory_kind)
    except ValueError as error:  # a kind of memory that the devices do not have
        raise ShardingError(
            f"leaf {leaf.path!r}", str(error), "a memory kind"
        ) from error


def _short(spec: PartitionSpec, leaf: LeafInfo) -> PartitionSpec:
    """A spec longer than the leaf's rank is fine where the rest says nothing."""
    entries = list(spec)
    # ``jax.jit`` refuses such a spec as "incompatible with its sharding annotation",
    # though ``shard_shape`` takes it (0.10.2 and 0.12.0.1).
    while len(entries) > len(leaf.shape) and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _check_rules(rules: object, mesh: AnyMesh, where: str = "rules") -> None:
    if not isinstance(rules, AxisRules | PathRules | Fsdp):
        raise ShardingError(
            where,
            f"got {type(rules).__name__}",
            "AxisRules([...]), PathRules([...]) or fsdp(...)",
        )
    unknown = sorted(rules.mesh_axes() - set(mesh.axis_names))
    if unknown:
        raise ShardingError(
            where,
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
    tree: Tree,
    leaves: Sequence[LeafInfo],
    structure: TreeDef,
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

    def is_leaf(node: object) -> bool:
        return node is None or isinstance(node, jax.sharding.Sharding | PartitionSpec)

    full = jax.tree.unflatten(structure, list(range(len(leaves))))
    given: list[Any] = [None] * len(leaves)

    def place(path: Sequence[object], entry: object, part: Tree) -> None:
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
        # Programs are compiled for a mesh: an array on one device is one on a mesh of
        # it.
        (device,) = entry.device_set
        return NamedSharding(one_device(device), PartitionSpec())
    if (entry is None or isinstance(entry, PartitionSpec)) and mesh is not None:
        return _placed(mesh, entry or PartitionSpec(), leaf)
    raise ShardingError(
        f"out_shardings at {path!r}, leaf {leaf.path!r}",
        f"got {entry!r}",
        "a NamedSharding" + ("" if mesh is not None else ", or pass mesh=..."),
    )
