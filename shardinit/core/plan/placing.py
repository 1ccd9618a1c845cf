"""Findings about where leaves lie: what rules do not reach, and what they overrule."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from shardinit.core.plan.entries import mesh_axes, mesh_axes_of, parts
from shardinit.core.plan.findings import WARN_BYTES, Finding, finding
from shardinit.core.plan.fsdp import Fsdp
from shardinit.core.plan.leaf_info import LARGE, Choice, LeafInfo
from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.plan.placement import axes_of
from shardinit.core.plan.rules import AxisRules, DefaultRules, PathRules, Rules

_ACTIVATIONS = re.compile("act|batch|length|seq")


@dataclass(frozen=True)
class Placed:
    """One leaf, where it lies, what its rules say of it, and whether it is made."""

    leaf: LeafInfo
    sharding: NamedSharding
    choice: Choice
    selected: bool = True

    @property
    def whole(self) -> bool:
        """Whether it lies whole on every device."""
        return not mesh_axes_of(self.sharding.spec)


def placing(
    placed: Sequence[Placed], mesh: AnyMesh, rules: Rules | None, given: bool
) -> Iterator[Finding]:
    """What is to say of where leaves lie.

    Args:
      placed: the leaves.
      mesh: the mesh.
      rules: the rules that placed them; None for the default.
      given: the caller said where each leaf lies (``out_shardings``).
    """
    made = [x for x in placed if x.selected]
    yield from _explicit_mesh(mesh)
    yield from _short_names(made)
    yield from _overruled(made, mesh)
    if given or mesh.size == 1:
        return
    nameless = all(x.leaf.axes is None for x in placed)
    if isinstance(rules, AxisRules) and made and nameless:
        yield _unnamed(made, rules)
    else:
        yield from _replicated(made)
    yield from _nothing_sharded(made, mesh, rules)
    if isinstance(rules, AxisRules):
        yield from _unmatched_names(placed, mesh, rules)
    if isinstance(rules, PathRules):
        yield from _unmatched_paths(placed, rules)


def unplaced(devices: int, leaf_count: int) -> Iterator[Finding]:
    """What is to say of a plan that has no mesh.

    Args:
      devices: how many there are.
      leaf_count: how many leaves it has.
    """
    if devices > 1 and leaf_count:
        yield finding(
            "no-mesh",
            (),
            f"there are {devices} devices and the plan has no mesh: one device makes "
            "all of it",
            f'mesh=jax.make_mesh(({devices},), ("data",), '
            "axis_types=(jax.sharding.AxisType.Auto,))",
        )


def _nothing_sharded(
    placed: Sequence[Placed], mesh: AnyMesh, rules: Rules | None
) -> Iterator[Finding]:
    """What no other finding names: leaves left whole without a rule that wants that.

    Where a rule was chosen that keeps a leaf whole, it is meant so (plain data
    parallelism); where an axis could not be cut, `_replicated` has said so.
    """
    left = [x for x in placed if not x.choice.reasons and not _meant_whole(x)]
    ways = {parts(entry, mesh.shape) for x in placed for entry in x.sharding.spec}
    if not left or ways - {1}:
        return
    size = sum(x.leaf.nbytes for x in left)
    axes = ", ".join(map(repr, mesh.axis_names))
    remedy = f"rules=shardinit.fsdp({axes}, min_bytes=0)"
    if not all(x.whole for x in left):
        why = "the mesh axes that were chosen for them have size 1"
    elif isinstance(rules, Fsdp):
        why = f"each is smaller than min_bytes={rules.min_bytes:,}"
    else:
        why = f"no rules were given, and fsdp() leaves what is under {LARGE:,} bytes"
    yield finding(
        "nothing-sharded",
        [x.leaf.path for x in left],
        f"no leaf is sharded: each of {mesh.size} devices holds them all, "
        f"{size:,} bytes, since {why}",
        remedy,
        severity=None if size >= WARN_BYTES else "note",
    )


def _meant_whole(x: Placed) -> bool:
    return x.whole and (bool(x.choice.rules) or x.leaf.stated is not None)


def _explicit_mesh(mesh: AnyMesh) -> Iterator[Finding]:
    if AxisType.Explicit not in mesh.axis_types:
        return
    sizes, names = tuple(mesh.shape.values()), tuple(mesh.axis_names)
    yield finding(
        "explicit-mesh",
        (),
        "the mesh has Explicit axes, as jax.make_mesh gives them: a forward pass may "
        "fail on arrays whose type says how they are sharded",
        f"mesh = jax.make_mesh({sizes}, {names}, "
        f"axis_types=(jax.sharding.AxisType.Auto,) * {len(names)})",
    )


def _short_names(placed: Sequence[Placed]) -> Iterator[Finding]:
    groups: dict[tuple[int, int], list[str]] = {}
    for x in placed:
        rank, named = len(x.leaf.shape), x.leaf.named
        if named is not None and 0 < named < rank:
            groups.setdefault((named, rank), []).append(x.leaf.path)
    for (named, rank), paths in groups.items():
        yield finding(
            "short-names",
            paths,
            f"names for {named} of {rank} axes; as in Flax they name the first ones",
            "Name the others as well; the one that a transformation adds, by "
            'nn.scan(..., metadata_params={nn.PARTITION_NAME: "layers"}) or '
            'nnx.vmap(..., transform_metadata={nnx.PARTITION_NAME: "layers"})',
        )


def _unnamed(placed: Sequence[Placed], rules: AxisRules) -> Finding:
    axes = ("embed", "mlp")
    return finding(
        "unnamed",
        [x.leaf.path for x in placed],
        "no leaf has axis names, so axis rules place none of them: all lie whole",
        "rules=shardinit.fsdp(), or names: "
        f"shardinit.InitFn(fn, axes={{{placed[0].leaf.path!r}: {axes}}})",
        rules=rules.rules[:1],
    )


def _replicated(placed: Sequence[Placed]) -> Iterator[Finding]:
    """What no rule reaches, but for a hundredth of the model: biases and scales."""
    worth_saying = sum(x.leaf.nbytes for x in placed) / 100
    groups: dict[tuple[str, bool, bool], list[tuple[Placed, str]]] = {}
    for x in placed:
        for reason in x.choice.reasons:
            large = x.whole and x.leaf.nbytes >= LARGE
            group = groups.setdefault((reason.text, x.whole, large), [])
            group.append((x, reason.remedy))
    for (text, whole, large), found in groups.items():
        if not large and sum(x.leaf.nbytes for x, _ in found) < worth_saying:
            continue
        rules = (rule for x, _ in found for rule in x.choice.rules)
        yield finding(
            "replicated",
            [x.leaf.path for x, _ in found],
            f"{text}: {'whole on every device' if whole else 'not cut there'}",
            found[0][1],
            rules=dict.fromkeys(rules),
            severity="warning" if large else "note",
        )


def _unmatched_names(
    placed: Sequence[Placed], mesh: AnyMesh, rules: AxisRules
) -> Iterator[Finding]:
    """Rules for other names than the model's.

    Where no leaf lacks a rule and many rules are left over, the list is one that models
    share, of dozens; and what names activations is for those.
    """
    names = {name for x in placed for name in x.leaf.axes or ()} - {None}
    lacking = [x for x in placed if x.choice.reasons]
    ruled = {rule[0] for rule in rules.rules} | set(mesh.axis_names)
    ruled |= {rule[0] for x in placed for rule in x.leaf.own_rules}
    unmatched = [
        rule
        for rule in rules.rules
        if rule[0] not in names and mesh_axes(axes_of(rule[1]))
    ]
    missing = {
        name for x in lacking for name in x.leaf.axes or () if isinstance(name, str)
    } - ruled
    odd = {rule[0] for rule in unmatched if not _ACTIVATIONS.search(rule[0])}
    used = {rule[0] for rule in rules.rules if rule[0] in names}
    if unmatched and (missing or 0 < 2 * len(odd) <= len(used)):
        near = {n for r in unmatched for n in get_close_matches(r[0], missing, 1)}
        meant = f"{_quoted(near)} may be meant. " if near else ""
        yield finding(
            "unmatched-rule",
            (),
            f"no axis of the model is called {_quoted({r[0] for r in unmatched})}"
            + (f", and no rule is for {_quoted(missing)}" if missing else ""),
            f"{meant}Write the rules for the model's names, unless these are for "
            "activations",
            rules=unmatched,
        )


def _unmatched_paths(placed: Sequence[Placed], rules: PathRules) -> Iterator[Finding]:
    """Rules that match no path, and those that earlier ones take all paths from.

    The last resort of a list matches whatever there is, or more than each rule before
    it, and is meant to be left over.
    """
    used = {rule for x in placed for rule in x.choice.rules}

    def reach(pattern: str) -> set[str]:
        return {x.leaf.path for x in placed if rules.matches(pattern, x.leaf.path)}

    for number, rule in enumerate(rules.rules):
        if rule in used:
            continue
        paths = reach(rule[0])
        matching = [x for x in placed if x.leaf.path in paths]
        before = {str(r[0]) for x in matching for r in x.choice.rules}  # pyright: ignore[reportIndexIssue]
        if matching and (
            rules.matches(rule[0], "") or all(reach(other) < paths for other in before)
        ):
            continue
        yield finding(
            "unmatched-rule",
            [x.leaf.path for x in matching],
            f"the path rule {rule[0]!r} never wins: earlier ones match the same paths"
            if matching
            else f"the path rule {rule[0]!r} matches no path",
            f"Put rule {number} before {_quoted(before)}"
            if matching
            else f"Remove it, or mend its pattern for paths such as "
            f"{placed[0].leaf.path!r}"
            if placed
            else "Remove it",
            rules=[rule],
        )


def _quoted(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _overruled(placed: Sequence[Placed], mesh: AnyMesh) -> Iterator[Finding]:
    groups: dict[str, list[Placed]] = {}
    for x in placed:
        reason = _conflict(x, mesh)
        if reason:
            groups.setdefault(reason, []).append(x)
    for reason, found in groups.items():
        yield finding(
            "overruled",
            [x.leaf.path for x in found],
            reason,
            "Drop the rule that overrules the model, or what the model states",
            rules=dict.fromkeys(rule for x in found for rule in x.leaf.own_rules),
        )


def _conflict(x: Placed, mesh: AnyMesh) -> str:
    """How a leaf lies otherwise than the model states; empty if it does not."""
    leaf, spec = x.leaf, x.sharding.spec
    if leaf.stated is not None:
        own = leaf.stated
        if _entries(own.spec, leaf) == _entries(spec, leaf) and _same(own.mesh, mesh):
            return ""
        return f"the function states {own.spec}, and they lie by {spec}"
    if leaf.own_mesh is not None and not _same(leaf.own_mesh, mesh):
        own = dict(leaf.own_mesh.shape)
        return f"the model states the mesh {own}, and they lie on {dict(mesh.shape)}"
    if leaf.own_rules and leaf.axes is not None:
        own = AxisRules(leaf.own_rules)
        stated = own.choose(leaf, mesh, "error").spec
        ruled = {name for name, _ in own.rules}
        for name, want, got in zip(
            leaf.axes, _entries(stated, leaf), _entries(spec, leaf), strict=True
        ):
            if name in ruled and want != got:
                return (
                    f"the model's own rules put the axis {name!r} on {_on(want)}, and "
                    f"it lies on {_on(got)}"
                )
    elif leaf.own_mesh is not None:
        stated = DefaultRules().choose(leaf, mesh, "error").spec
        if _entries(stated, leaf) != _entries(spec, leaf):
            return f"the model states {stated} on this mesh, and they lie by {spec}"
    return ""


def _on(axes: tuple[str, ...]) -> str:
    return " x ".join(axes) if axes else "no mesh axis"


def _entries(spec: PartitionSpec, leaf: LeafInfo) -> list[tuple[str, ...]]:
    entries = [mesh_axes(entry) for entry in spec]
    return entries + [()] * (len(leaf.shape) - len(entries))


def _same(one: AnyMesh, other: AnyMesh) -> bool:
    """Whether two meshes have the same axes, and the same devices if both have some."""
    if isinstance(one, Mesh) and isinstance(other, Mesh):
        return one.shape == other.shape and list(one.devices.flat) == list(
            other.devices.flat
        )
    return dict(one.shape) == dict(other.shape)
