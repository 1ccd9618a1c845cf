"""Which part of each leaf lies on which device: rules in, one sharding a leaf out.

Three kinds of rules, tried in no order, since a plan has one kind: ``AxisRules`` from
logical axis names (as Flax writes them), ``PathRules`` from leaf paths, and ``fsdp``,
which needs no names. All end in a ``NamedSharding`` for each leaf, checked here, where
leaf and axis still have names, and not deep inside the compiler.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from shardinit.core.paths import path_str
from shardinit.errors import ShardingError

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class LeafInfo:
    """What rules look at: a leaf's path, shape and logical axis names (or None)."""

    path: str
    shape: tuple[int, ...]
    itemsize: int
    axes: tuple[str | None, ...] | None = None


@dataclass(frozen=True, init=False)
class AxisRules:
    """Logical axis name to mesh axes, first match first, as Flax's logical rules.

    A mesh axis is used once in a leaf: when an earlier dimension took it, the next
    rule for the name is tried, and without one the dimension stays whole. Names
    without a rule and leaves without names stay whole.

    Attributes:
      rules: pairs of logical axis name and mesh axis, tuple of mesh axes, or None.
    """

    rules: tuple[tuple[str, MeshAxes], ...]

    def __init__(self, rules: Iterable[tuple[str, MeshAxes | list[str]]]):
        fixed = tuple(
            (name, tuple(axes) if isinstance(axes, list) else axes)
            for name, axes in rules
        )
        object.__setattr__(self, "rules", fixed)

    def spec(self, leaf: LeafInfo, mesh: Any) -> PartitionSpec:
        """The partition spec of one leaf."""
        if leaf.axes is None:
            return PartitionSpec()
        used: set[str] = set()
        entries: list[MeshAxes] = []
        for name in leaf.axes:
            entries.append(self._entry(name, used))
        return PartitionSpec(*entries)

    def _entry(self, name: str | None, used: set[str]) -> MeshAxes:
        for rule, axes in self.rules:
            if rule != name:
                continue
            if axes is None:
                return None
            wanted = _names(axes)
            if not used.intersection(wanted):
                used.update(wanted)
                return axes
        return None

    def mesh_axes(self) -> set[str]:
        """All mesh axes that the rules name."""
        return {a for _, axes in self.rules for a in _names(axes)}


@dataclass(frozen=True, init=False)
class PathRules:
    """Regular expression over the leaf path to partition spec, first match first.

    An expression may match anywhere in the path (``re.search``); a leaf that none
    matches stays whole.
    """

    rules: tuple[tuple[str, PartitionSpec], ...]

    def __init__(self, rules: Iterable[tuple[str, PartitionSpec]]):
        fixed = tuple((str(pattern), PartitionSpec(*spec)) for pattern, spec in rules)
        for pattern, _ in fixed:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ShardingError(
                    f"path rule {pattern!r}",
                    f"it is no regular expression ({error})",
                    "a pattern for re.search",
                ) from error
        object.__setattr__(self, "rules", fixed)

    def spec(self, leaf: LeafInfo, mesh: Any) -> PartitionSpec:
        """The partition spec of one leaf."""
        for pattern, spec in self.rules:
            if re.search(pattern, leaf.path):
                return spec
        return PartitionSpec()

    def mesh_axes(self) -> set[str]:
        """All mesh axes that the rules name."""
        return {a for _, spec in self.rules for axes in spec for a in _names(axes)}


@dataclass(frozen=True)
class Fsdp:
    """Shards the largest axis that divides of every leaf above a size (see fsdp)."""

    axes: tuple[str, ...]
    min_bytes: int

    def spec(self, leaf: LeafInfo, mesh: Any) -> PartitionSpec:
        """The partition spec of one leaf."""
        axes = self.axes or tuple(mesh.axis_names)
        if math.prod(leaf.shape) * leaf.itemsize < self.min_bytes:
            return PartitionSpec()
        # All axes on one dimension if one divides; otherwise fewer axes, last first.
        for first in range(len(axes)):
            wanted = axes[first:]
            ways = math.prod(mesh.shape[a] for a in wanted)
            sizes = [
                (size, -dim)
                for dim, size in enumerate(leaf.shape)
                if size % ways == 0 and size
            ]
            if sizes and ways > 1:
                dim = -max(sizes)[1]
                entry = wanted[0] if len(wanted) == 1 else wanted
                return PartitionSpec(*[None] * dim, entry)
        return PartitionSpec()

    def mesh_axes(self) -> set[str]:
        """All mesh axes that the rule names."""
        return set(self.axes)


def fsdp(*axes: str, min_bytes: int = 1 << 16) -> Fsdp:
    """Fully sharded: every leaf's largest divisible axis over ``axes``.

    Args:
      *axes: mesh axes to shard over together; none means all axes of the mesh.
      min_bytes: leaves smaller than this stay whole on every device.
    """
    return Fsdp(tuple(axes), min_bytes)


Rules = AxisRules | PathRules | Fsdp


def _names(axes: Any) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def default_spec(leaf: LeafInfo, mesh: Any) -> PartitionSpec:
    """Without rules: names that are mesh axes count, else fsdp over all axes."""
    if leaf.axes is not None and any(a is not None for a in leaf.axes):
        known = set(mesh.axis_names)
        if all(a is None or set(_names(a)) <= known for a in leaf.axes):
            return PartitionSpec(*leaf.axes)
    return fsdp().spec(leaf, mesh)


def resolve(
    leaves: Sequence[LeafInfo], mesh: Any, rules: Rules | None
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


def _placed(mesh: Any, spec: PartitionSpec, leaf: LeafInfo) -> NamedSharding:
    """A spec on a mesh; what JAX would refuse is refused with the leaf's name."""
    names = [name for entry in spec for name in _names(entry)]
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


def check_mesh(mesh: Any) -> None:
    """Holds what was passed as a mesh against what is one.

    Raises:
      ShardingError: it is none.
    """
    if mesh is not None and not isinstance(mesh, Mesh | AbstractMesh):
        raise ShardingError(
            "mesh",
            f"got {type(mesh).__name__}",
            "a jax.sharding.Mesh or AbstractMesh",
            'Make one with jax.make_mesh((2, 4), ("data", "model"))',
        )


def _short(spec: PartitionSpec, leaf: LeafInfo) -> PartitionSpec:
    """A spec longer than the leaf's rank is fine where the rest says nothing."""
    entries = list(spec)
    while len(entries) > len(leaf.shape) and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _check_rules(rules: Any, mesh: Any) -> None:
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
        names = _names(entry)
        missing = [n for n in names if n not in mesh.shape]
        if missing:
            raise ShardingError(
                where,
                f"{spec} names the mesh axis {missing[0]!r}",
                f"axes of the mesh: {', '.join(map(repr, mesh.axis_names))}",
            )
        ways = math.prod(mesh.shape[n] for n in names)
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
    tree: Any, leaves: Sequence[LeafInfo], structure: Any, mesh: Any
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


def _named(entry: Any, leaf: LeafInfo, path: str, mesh: Any) -> NamedSharding:
    if isinstance(entry, NamedSharding):
        return entry
    if isinstance(entry, jax.sharding.SingleDeviceSharding):
        (device,) = entry.device_set
        return NamedSharding(jax.sharding.Mesh([device], ("one",)), PartitionSpec())
    if (entry is None or isinstance(entry, PartitionSpec)) and mesh is not None:
        return _placed(mesh, entry or PartitionSpec(), leaf)
    raise ShardingError(
        f"out_shardings at {path!r}, leaf {leaf.path!r}",
        f"got {entry!r}",
        "a NamedSharding" + ("" if mesh is not None else ", or pass mesh=..."),
    )
