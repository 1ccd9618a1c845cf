"""Settling: what becomes of each leaf of a restored tree, before an array is touched.

Everything follows from paths, shapes and dtypes: what is there and may be kept, cast,
grown or shrunk, what is missing and may be, what nobody asked for. What is not allowed
is refused by the name of its leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from shardinit.core.paths import chosen, glob, nearest
from shardinit.core.plan.leaves import PlanLeaf
from shardinit.core.plan.options import Select
from shardinit.core.plan.padding import Pad, padded_paths
from shardinit.core.plan.plan import Plan
from shardinit.core.run.account import Account, Entry
from shardinit.core.run.growing import POLICIES
from shardinit.core.run.mapped import Mapped, mapped
from shardinit.core.run.renames import Lines
from shardinit.core.run.training_state import parameters_alone, repeats
from shardinit.errors import SelectError, StructureMismatchError

Grow = Select | Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What a completion may do; see ``plan_missing``.

    Attributes:
      missing: leaves that may be missing; None for all.
      unexpected: leaves that may be there though the model has none of their path.
      grow: leaves that may become larger, or globs to policies.
      shrink: leaves that may become smaller.
      cast: leaves that may get another dtype.
      paths: lines of paths of what is there to paths of the model. Parameters that are
        there alone need none, where the model is them with optimizer state.
      pad: globs of leaves that the model pads; they may grow.
    """

    missing: Select | None = None
    unexpected: Select = ()
    grow: Grow = ()
    shrink: Select = ()
    cast: Select = ()
    paths: Lines = ()
    pad: Pad = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Settled:
    """What a completion will do with which leaves.

    Attributes:
      account: the same for people.
      present: leaves that are there, by the model's paths.
      policies: of leaves that grow.
      copies: leaves that repeat another, whose path it is.
    """

    account: Account
    present: Mapping[str, Any]
    policies: Mapping[str, str]
    copies: Mapping[str, str]


def settled(plan: Plan, present: Mapping[str, Any], allowed: Allowed) -> Settled:
    """What a completion will do, from what is there by path.

    Args:
      plan: of the whole result.
      present: what has shape and dtype, by path.
      allowed: what may be done.

    Raises:
      StructureMismatchError: something else would have to be done.
    """
    paths = [leaf.path for leaf in plan.leaves]
    lines = allowed.paths or parameters_alone(plan, present)
    there = mapped(present, lines, {*paths, *plan.unboxed})
    present = dict(zip(plan.paths_of(there), there.values(), strict=True))
    extra = _unexpected(present, paths, allowed)
    policies = _policies(allowed, paths)
    may = {
        "shrink": _chosen(allowed.shrink, paths, "shrink"),
        "cast": _chosen(allowed.cast, paths, "cast"),
    }
    groups: dict[str, list[Entry]] = {}
    for leaf in plan.leaves:
        nbytes, changes = leaf.nbytes, {"filled": ""}
        if leaf.path in present:
            changes = _changes(leaf, present[leaf.path], policies, may)
        for kind, change in changes.items():
            groups.setdefault(kind, []).append(Entry(leaf.path, nbytes, change))
    _check_missing([x.path for x in groups.get("filled", [])], paths, allowed)
    copies = repeats(plan, present)
    kept = {path: present[path] for path in paths if path in present}
    grows = {x.path: policies[x.path] for x in groups.get("grown", [])}
    entries = {kind: tuple(found) for kind, found in groups.items()}
    account = Account(**entries, unexpected=tuple(extra))
    return Settled(account, kept, grows, copies)


def _unexpected(
    present: Mapping[str, Any], paths: list[str], allowed: Allowed
) -> list[Entry]:
    known = set(paths)
    extra = [path for path in present if path not in known]
    taken = _taker(allowed.unexpected)
    refused = [path for path in extra if not taken(path)]
    if refused:
        raise _not_of_the_model(refused, paths)
    return [Entry(path, int(getattr(present[path], "nbytes", 0))) for path in extra]


def _not_of_the_model(refused: list[str], paths: list[str]) -> StructureMismatchError:
    """An error for leaves that the model does not have, where it may have them."""
    first, *others = refused
    inside = sorted((x for x in paths if x.endswith(f"/{first}")), key=len)
    outer = inside[0].removesuffix(first) if inside else ""
    return StructureMismatchError(
        f"leaf {first!r}",
        f"it is not among the {len(set(paths)):,} leaves of the init function"
        + (f", nor are {len(others):,} others" if others else ""),
        nearest(first, inside[:1] or sorted(set(paths))),
        "Remove it, give the tree the keys that the function gives it"
        + (f", as by paths='** -> {outer}**'" if outer else "")
        + f", or allow it with unexpected={first!r}",
    )


def _check_noise(leaf: PlanLeaf, have: Mapped) -> None:
    if have.tensor.noise and not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise StructureMismatchError(
            f"leaf {leaf.path!r}", f"noise for {leaf.dtype}", "a leaf of floats"
        )


def _chosen(select: Select | None, paths: list[str], argument: str) -> dict[str, bool]:
    """For each path whether ``select`` takes it; no globs take none."""
    found = chosen((lambda _: False) if select == () else select, paths, argument)
    return dict(zip(paths, found, strict=True))


def _taker(select: Select) -> Callable[[str], bool]:
    """A test for paths of which nobody knows beforehand which there are."""
    if callable(select):
        return select
    globs = [glob(x) for x in ([select] if isinstance(select, str) else select)]
    return lambda path: any(matches(path) for matches in globs)


def _policies(allowed: Allowed, paths: list[str]) -> dict[str, str]:
    """The policy of each leaf that may grow; the first glob that matches counts."""
    grow, found = allowed.grow, {}
    if not isinstance(grow, Mapping):
        taken = _chosen(grow, paths, "grow")
        found = {path: "init" for path in paths if taken[path]}
        grow = {}
    for pattern, policy in grow.items():
        if policy not in POLICIES:
            raise SelectError(
                f"grow={{{pattern!r}: {policy!r}}}",
                "there is no such policy",
                ", ".join(map(repr, POLICIES)),
            )
        taken = _chosen(pattern, paths, "grow")
        found = dict.fromkeys((x for x in paths if taken[x]), policy) | found
    return dict.fromkeys(padded_paths(allowed.pad, paths), "zeros") | found


def _check_missing(lacking: list[str], paths: list[str], allowed: Allowed) -> None:
    may = _chosen(allowed.missing, paths, "missing")
    refused = [path for path in lacking if not may[path]]
    if refused:
        others = f", and so are {len(refused) - 1:,} others" if refused[1:] else ""
        raise StructureMismatchError(
            f"leaf {refused[0]!r}",
            f"it is missing{others}",
            f"leaves that may be missing: missing={allowed.missing!r}",
            "Restore it as well, or allow it to be initialised",
        )


def _changes(
    leaf: PlanLeaf,
    array: Any,
    policies: Mapping[str, str],
    may: Mapping[str, Mapping[str, bool]],
) -> dict[str, str]:
    """What has to be done to an array that is there, by kind; refuses what may not."""
    if not hasattr(array, "dtype"):
        raise StructureMismatchError(
            f"leaf {leaf.path!r}",
            f"got {type(array).__name__}",
            f"an array of dtype {leaf.dtype}, or None where it is missing",
        )
    changes: dict[str, str] = {}
    if array.dtype != leaf.dtype:
        if not may["cast"][leaf.path]:
            raise StructureMismatchError(
                f"leaf {leaf.path!r}",
                f"it has dtype {array.dtype}",
                f"{leaf.dtype}: values are never cast unasked",
                f"Cast it, initialise with its dtype, or pass cast={leaf.path!r}",
            )
        changes["cast"] = f"{array.dtype} -> {leaf.dtype}"
    shape = tuple(np.shape(array))
    if shape != leaf.shape:
        grow, shrink = policies.get(leaf.path), may["shrink"][leaf.path]
        changes |= _resizing(leaf, shape, grow, shrink)
    if isinstance(array, Mapped):
        _check_noise(leaf, array)
        changes["mapped"] = array.change
    return changes or {"kept": ""}


def _resizing(
    leaf: PlanLeaf, shape: tuple[int, ...], grow: str | None, shrink: bool
) -> dict[str, str]:
    """How an array of another shape becomes the leaf; refuses what may not be.

    Args:
      leaf: the leaf.
      shape: of the array.
      grow: the policy by which it may grow; None where it may not.
      shrink: whether it may shrink.
    """
    where, expected = f"leaf {leaf.path!r}", str(leaf.shape)
    if len(shape) != len(leaf.shape):
        remedy = "A leaf can grow and shrink; it cannot change its number of axes"
        raise StructureMismatchError(where, f"it has shape {shape}", expected, remedy)
    pairs = list(zip(shape, leaf.shape, strict=True))
    grows, shrinks = any(a < b for a, b in pairs), any(a > b for a, b in pairs)
    if (grows and grow is None) or (shrinks and not shrink):
        wanted = ["grow"] * grows + ["shrink"] * shrinks
        remedy = " and ".join(f"{verb}={leaf.path!r}" for verb in wanted)
        raise StructureMismatchError(
            where,
            f"it has shape {shape}",
            expected,
            f"Pass {remedy} to keep its values at the low end of every axis",
        )
    text = f"{shape} -> {leaf.shape}"
    grown = {"grown": f"{text} by {grow}"} if grows else {}
    return grown | ({"shrunk": text} if shrinks else {})
