"""Rules: from what is known of a leaf to where it lies.

Three kinds, of which a plan has one: ``AxisRules`` from logical axis names, with the
meaning that Flax gives them, ``PathRules`` from leaf paths, and ``fsdp``, which needs
no names. ``DefaultRules`` stand in where a plan is given none. Each answers with a
``Choice``: the spec, and what kept it from cutting the leaf.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from shardinit.core.init_fn import Name
from shardinit.core.plan import logical, obstacles
from shardinit.core.plan.divide import divides, fits_of
from shardinit.core.plan.entries import MeshAxes, as_entry, mesh_axes, mesh_axes_of
from shardinit.core.plan.fsdp import Fsdp, fsdp
from shardinit.core.plan.leaf_info import Choice, LeafInfo, Reason
from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.plan.placement import (
    Placement,
    axes_of,
    axis_rule,
    given_rules,
    kind_of,
    path_rule,
)
from shardinit.errors import ShardingError
from shardinit.short import short_repr

_AxisRule = tuple[str, MeshAxes | Placement]


@dataclass(frozen=True, init=False)
class AxisRules:
    """Logical axis names to mesh axes, with the meaning of Flax's logical rules.

    The rules count in order, each for the dimension of its name if that is not settled
    yet and all mesh axes of the rule are free: several rules for one name are
    alternatives, and an earlier rule wins a mesh axis even for a later dimension. Names
    without a rule and leaves without names stay whole, but a name without a rule that
    is itself a free mesh axis means that axis where Flax lets it (NNX variables and
    ``nn.Partitioned``, not logical boxes).

    Attributes:
      rules: pairs of logical axis name and mesh axis, tuple of mesh axes, None, or
        `Placement`.

    Raises:
      ShardingError: what is no pair of a name and mesh axes.

    Example:
      >>> rules = AxisRules([("embed", "data"), ("mlp", ("model",)), ("norm", None)])
    """

    __repr__ = short_repr

    rules: tuple[_AxisRule, ...]

    def __init__(
        self,
        rules: Iterable[tuple[str, MeshAxes | list[str] | Placement]]
        | Mapping[str, MeshAxes | list[str] | Placement],
    ):
        # Mappings and lists are taken too; a frozen class refuses plain assignment.
        object.__setattr__(self, "rules", given_rules(rules, axis_rule))

    def mesh_axes(self) -> set[str]:
        """All mesh axes that the rules name.

        Example:
          >>> rules = AxisRules([("embed", "data"), ("mlp", ("model", "pod"))])
          >>> sorted(rules.mesh_axes())
          ['data', 'model', 'pod']
        """
        return {a for _, value in self.rules for a in mesh_axes(axes_of(value))}

    def choose(self, leaf: LeafInfo, mesh: AnyMesh, indivisible: str) -> Choice:
        """Where one leaf lies.

        Args:
          leaf: the leaf.
          mesh: the mesh.
          indivisible: ``"next"`` passes over a rule whose mesh axes do not divide the
            dimension.

        Raises:
          ShardingError: a name that stands twice, or rules that name two memories.

        Example:
          >>> from jax.sharding import AbstractMesh
          >>> leaf = LeafInfo("w", (8, 32), 1, ("embed", "mlp"))
          >>> mesh = AbstractMesh((2, 4), ("data", "model"))
          >>> AxisRules([("embed", "data")]).choose(leaf, mesh, "error").spec
          P('data', None)
        """
        if leaf.axes is None:
            return Choice(reasons=(obstacles.no_names(leaf, mesh),))
        logical.check_distinct(leaf.axes, f"leaf {leaf.path!r}")
        rules = self.with_own(leaf)
        settled = _settled(leaf, leaf.axes, rules, mesh, indivisible)
        spec = PartitionSpec(*(None if e is logical.UNSETTLED else e for e in settled))
        left = _left(leaf.axes, settled)
        why = list(_undivided(leaf, left, rules, mesh))
        if not any(isinstance(name, str | tuple) for name in leaf.axes):
            why.append(obstacles.no_names(leaf, mesh))
        ruled = {name for name, _ in rules}
        unruled = {dim: name for dim, name in left.items() if name not in ruled}
        why.extend(obstacles.no_rule(leaf, mesh, unruled, spec, self.mesh_axes()))
        used = tuple(rule for rule in rules if rule[0] in leaf.axes)
        return Choice(spec, _one_kind(leaf, used), tuple(why), used)

    def with_own(self, leaf: LeafInfo) -> tuple[_AxisRule, ...]:
        """The rules, then the leaf's own for names that these do not know.

        Example:
          >>> leaf = LeafInfo("w", (8, 32), 1, None, own_rules=(("mlp", "model"),))
          >>> AxisRules([("embed", "data")]).with_own(leaf)
          (('embed', 'data'), ('mlp', 'model'))
        """
        if not leaf.own_rules:
            return self.rules
        known = {name for name, _ in self.rules}
        own = AxisRules(leaf.own_rules).rules
        return (*self.rules, *(rule for rule in own if rule[0] not in known))


@dataclass(frozen=True, init=False)
class PathRules:
    """Regular expression over the leaf path to partition spec, first match first.

    An expression may match anywhere in the path (``re.search``); a leaf that none
    matches stays whole. A pattern that begins with ``*`` is a glob of the whole path:
    ``*.up_proj.weight``, ``**/kernel``.

    Attributes:
      rules: pairs of a pattern and a ``PartitionSpec``, or a `Placement` of one.

    Raises:
      ShardingError: what is no pair of a pattern and a spec.

    Example:
      >>> from jax.sharding import PartitionSpec as P
      >>> rules = PathRules([("embed$", P("data")), (".*", P())])
    """

    __repr__ = short_repr

    rules: tuple[tuple[str, PartitionSpec | Placement], ...]

    def __init__(
        self, rules: Iterable[tuple[str, PartitionSpec | Placement | tuple | None]]
    ):
        object.__setattr__(self, "rules", given_rules(rules, path_rule))

    def matches(self, pattern: str, path: str) -> bool:
        """Whether a rule's pattern is found in a path; a subclass may have its own.

        Example:
          >>> from jax.sharding import PartitionSpec as P
          >>> PathRules([("embed$", P("data"))]).matches("embed$", "layers/0/embed")
          True
        """
        return re.search(pattern, path) is not None

    def mesh_axes(self) -> set[str]:
        """All mesh axes that the rules name.

        Example:
          >>> from jax.sharding import PartitionSpec as P
          >>> PathRules([("embed$", P("data")), (".*", P())]).mesh_axes()
          {'data'}
        """
        specs = [axes_of(value) for _, value in self.rules]
        return {axis for spec in specs for axis in mesh_axes_of(spec)}

    def choose(self, leaf: LeafInfo, mesh: AnyMesh, indivisible: str) -> Choice:
        """Where one leaf lies; see ``AxisRules.choose``.

        With ``indivisible="next"`` the next rule that matches and divides, else the
        first that matches without the axes that do not divide.

        Example:
          >>> from jax.sharding import AbstractMesh, PartitionSpec as P
          >>> leaf = LeafInfo("dense/kernel", (8, 32), 1, None)
          >>> mesh = AbstractMesh((2,), ("data",))
          >>> PathRules([("kernel$", P("data"))]).choose(leaf, mesh, "error").spec
          P('data',)
        """
        matching = [rule for rule in self.rules if self.matches(rule[0], leaf.path)]
        if not matching:
            return Choice(reasons=(obstacles.no_path_rule(leaf, mesh),))
        fits = fits_of(leaf, mesh, indivisible)

        def misfits(rule: tuple[str, PartitionSpec | Placement]) -> dict[int, MeshAxes]:
            entries = enumerate(axes_of(rule[1]))
            return {i: entry for i, entry in entries if not fits(i, mesh_axes(entry))}

        rule = next((rule for rule in matching if not misfits(rule)), matching[0])
        uncut = misfits(rule)
        kept = (None if i in uncut else e for i, e in enumerate(axes_of(rule[1])))
        why = (obstacles.undivided(leaf, i, e, mesh) for i, e in uncut.items())
        return Choice(PartitionSpec(*kept), kind_of(rule[1]), tuple(why), (rule,))


Rules = AxisRules | PathRules | Fsdp


@dataclass(frozen=True)
class DefaultRules:
    """Without rules: a leaf's own rules, names that are mesh axes, else fsdp."""

    def mesh_axes(self) -> set[str]:
        """No mesh axis is named."""
        return set()

    def choose(self, leaf: LeafInfo, mesh: AnyMesh, indivisible: str) -> Choice:
        """Where one leaf lies; see ``AxisRules.choose``."""
        stated = leaf.stated
        if stated is not None and _are_axes(mesh_axes_of(stated.spec), mesh):
            return Choice(stated.spec, stated.memory_kind)
        if leaf.own_rules:
            return AxisRules(leaf.own_rules).choose(leaf, mesh, indivisible)
        if not any(names and _are_axes(names, mesh) for names in _names(leaf)):
            return fsdp().choose(leaf, mesh, indivisible)
        return _by_mesh_names(leaf, mesh, indivisible)


def _names(leaf: LeafInfo) -> list[tuple[str, ...]]:
    """The names of each dimension, as those of mesh axes."""
    return [
        mesh_axes(name) if isinstance(name, str | tuple) else ()
        for name in leaf.axes or ()
    ]


def _are_axes(names: Iterable[str], mesh: AnyMesh) -> bool:
    return set(names) <= set(mesh.shape)


def _by_mesh_names(leaf: LeafInfo, mesh: AnyMesh, indivisible: str) -> Choice:
    """Where a leaf lies of which some names are mesh axes themselves."""
    fits = fits_of(leaf, mesh, indivisible)
    entries: list[MeshAxes] = []
    why = []
    unruled: dict[int, str] = {}
    for dim, names in enumerate(_names(leaf)):
        entry = None
        if not _are_axes(names, mesh):
            unruled[dim] = "+".join(names)
        elif fits(dim, names):
            entry = as_entry(names)
        else:
            why.append(obstacles.undivided(leaf, dim, names, mesh))
        entries.append(entry)
    spec = PartitionSpec(*entries)
    why.extend(obstacles.no_rule(leaf, mesh, unruled, spec))
    return Choice(spec, None, tuple(why))


def _settled(
    leaf: LeafInfo,
    names: tuple[Name, ...],
    rules: Iterable[_AxisRule],
    mesh: AnyMesh,
    indivisible: str,
) -> logical.Settled:
    """What the rules settle of each dimension, and names that are mesh axes."""
    fits = fits_of(leaf, mesh, indivisible)
    pairs = [(name, axes_of(value)) for name, value in rules]
    settled = logical.assign(names, pairs, fits)
    if not leaf.passes:
        return settled
    ruled = {name for name, _ in pairs}
    unknown = [None if name in ruled else name for name in names]
    return logical.pass_through(unknown, settled, mesh.shape, fits)


def _left(names: tuple[Name, ...], settled: logical.Settled) -> dict[int, str]:
    """The names of the dimensions that nothing has settled."""
    return {
        dim: name
        for dim, name in enumerate(names)
        if isinstance(name, str) and settled[dim] is logical.UNSETTLED
    }


def _undivided(
    leaf: LeafInfo, left: Mapping[int, str], rules: Iterable[_AxisRule], mesh: AnyMesh
) -> Iterator[Reason]:
    """Dimensions that no rule settled though there are some: they do not divide."""
    tried: dict[str, list[MeshAxes]] = {}
    for name, value in rules:
        tried.setdefault(name, []).append(axes_of(value))
    for dim, name in left.items():
        entries = tried.get(name, [])
        if not all(divides(leaf, dim, entry, mesh) for entry in entries):
            yield obstacles.undivided(leaf, dim, entries[0], mesh)


def _one_kind(leaf: LeafInfo, rules: Iterable[_AxisRule]) -> str | None:
    """The one kind of memory that the rules for a leaf name, or None."""
    kinds = {name: kind_of(value) for name, value in rules}
    named = {name: kind for name, kind in kinds.items() if kind is not None}
    if len(set(named.values())) > 1:
        raise ShardingError(
            f"leaf {leaf.path!r}",
            f"the rules for its axes name several memories, {named}",
            "one kind of memory a leaf",
        )
    return next(iter(named.values()), None)
