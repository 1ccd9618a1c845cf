"""Findings about rules that place nothing: other names than the model's, other paths.

A list of rules is often shared by many models, and its last rule is often a last
resort: neither is a mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from shardinit.core.plan.entries import mesh_axes
from shardinit.core.plan.findings import Finding, finding
from shardinit.core.plan.leaf_info import Placed
from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.plan.placement import axes_of
from shardinit.core.plan.rules import AxisRules, PathRules

_ACTIVATIONS = re.compile("act|batch|length|seq")


def unmatched_names(
    placed: Sequence[Placed], mesh: AnyMesh, rules: AxisRules
) -> Iterator[Finding]:
    """Rules for other names than the model's.

    Where no leaf lacks a rule and many rules are left over, the list is one that models
    share, of dozens; and what names activations is for those.

    Args:
      placed: the leaves.
      mesh: the mesh.
      rules: the rules that placed them.
    """
    names = _names(placed)
    unmatched = [
        (name, value)
        for name, value in rules.rules
        if name not in names and mesh_axes(axes_of(value))
    ]
    missing = _without_rule(placed, mesh, rules)
    if not unmatched or not (missing or _is_for(names, rules, unmatched)):
        return
    near = {n for name, _ in unmatched for n in get_close_matches(name, missing, 1)}
    yield finding(
        "unmatched-rule",
        (),
        f"no axis of the model is called {_quoted({name for name, _ in unmatched})}"
        + (f", and no rule is for {_quoted(missing)}" if missing else ""),
        (f"{_quoted(near)} may be meant. " if near else "")
        + "Write the rules for the model's names, unless these are for activations",
        rules=unmatched,
    )


def _is_for(
    names: set[str], rules: AxisRules, unmatched: Sequence[tuple[str, object]]
) -> bool:
    """Whether the rules were written for this model: most are for names that it has."""
    odd = {name for name, _ in unmatched if not _ACTIVATIONS.search(name)}
    used = {name for name, _ in rules.rules} & names
    return 0 < 2 * len(odd) <= len(used)


def _names(placed: Iterable[Placed]) -> set[str]:
    """The axis names of the leaves."""
    names = {name for x in placed for name in x.leaf.axes or ()}
    return {name for name in names if isinstance(name, str)}


def _without_rule(
    placed: Sequence[Placed], mesh: AnyMesh, rules: AxisRules
) -> set[str]:
    """Names of leaves that lie whole along some axis, for which there is no rule."""
    own = [rule for x in placed for rule in x.leaf.own_rules]
    ruled = {name for name, _ in [*rules.rules, *own]}
    return _names(x for x in placed if x.choice.reasons) - ruled - {*mesh.axis_names}


def unmatched_paths(placed: Sequence[Placed], rules: PathRules) -> Iterator[Finding]:
    """Rules that match no path, and those that earlier ones take all paths from.

    The last resort of a list matches whatever there is, or more than each rule before
    it, and is meant to be left over.

    Args:
      placed: the leaves.
      rules: the rules that placed them.
    """
    used = {rule for x in placed for rule in x.choice.rules}
    for number, rule in enumerate(rules.rules):
        if rule in used:
            continue
        matching = _reached(placed, rules, rule[0])
        if not matching:
            instead = "Remove it"
            if placed:
                path = placed[0].leaf.path
                instead += f", or mend its pattern for paths such as {path!r}"
            reason = f"the path rule {rule[0]!r} matches no path"
            yield finding("unmatched-rule", (), reason, instead, rules=[rule])
            continue
        before = {pattern for x in matching for pattern, _ in _path_rules(x)}
        if not _is_last_resort(placed, rules, rule[0], before):
            yield finding(
                "unmatched-rule",
                [x.leaf.path for x in matching],
                f"the path rule {rule[0]!r} never wins: earlier ones match the same "
                "paths",
                f"Put rule {number} before {_quoted(before)}",
                rules=[rule],
            )


def _path_rules(x: Placed) -> list[tuple[str, object]]:
    """The path rules that placed a leaf."""
    return [rule for rule in x.choice.rules if isinstance(rule, tuple)]


def _reached(placed: Sequence[Placed], rules: PathRules, pattern: str) -> list[Placed]:
    return [x for x in placed if rules.matches(pattern, x.leaf.path)]


def _is_last_resort(
    placed: Sequence[Placed], rules: PathRules, pattern: str, before: set[str]
) -> bool:
    """Whether a rule matches anything, or more than each of the rules before it."""

    def paths(pattern: str) -> set[str]:
        return {x.leaf.path for x in _reached(placed, rules, pattern)}

    return rules.matches(pattern, "") or all(
        paths(other) < paths(pattern) for other in before
    )


def _quoted(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
