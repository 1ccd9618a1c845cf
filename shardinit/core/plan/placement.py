"""The two sides of a rule: how one may be written, and what its value says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from jax.sharding import PartitionSpec

from shardinit.core.paths import glob_text
from shardinit.core.plan.entries import MeshAxes
from shardinit.errors import ArgumentError, ShardingError

Pair = TypeVar("Pair")


@dataclass(frozen=True)
class Placement:
    """The value of a rule that names a kind of memory beside the mesh axes.

    Attributes:
      axes: what the rule's value would be otherwise: mesh axes in ``AxisRules``, a
        ``PartitionSpec`` in ``PathRules``.
      memory_kind: such as ``"pinned_host"``; None for the device's own.

    Example:
      >>> import shardinit
      >>> host = shardinit.Placement("data", memory_kind="pinned_host")
      >>> rules = shardinit.AxisRules([("embed", host)])
    """

    axes: Any
    memory_kind: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.memory_kind, str | None):
            raise ArgumentError(
                "memory_kind", repr(self.memory_kind), "a name such as 'pinned_host'"
            )


def axes_of(value: object) -> Any:
    """What a rule's value says of the mesh, whatever kind of memory it names."""
    return value.axes if isinstance(value, Placement) else value


def kind_of(value: object) -> str | None:
    """The kind of memory that a rule's value names, or None."""
    return value.memory_kind if isinstance(value, Placement) else None


def _wrong(what: str, got: object, expected: str) -> ShardingError:
    return ShardingError(what, f"got {got!r}", expected)


def given_rules(rules: Any, check: Callable[[object], Pair]) -> tuple[Pair, ...]:
    """Rules from pairs or from a mapping, each of them checked.

    Raises:
      ShardingError: they are neither, or ``check`` refuses one.
    """
    if isinstance(rules, Mapping):
        rules = rules.items()
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        check(rules)
    return tuple(check(rule) for rule in rules)


def _pair(rule: Any, what: str, expected: str) -> tuple[Any, Any]:
    # A string of two letters would pass for a pair.
    if isinstance(rule, str) or not hasattr(rule, "__len__") or len(rule) != 2:
        raise _wrong(what, rule, expected)
    return rule[0], rule[1]


_AXIS_RULE = (
    "pairs of a logical axis name and a mesh axis, a tuple of mesh axes, None or "
    "Placement, such as AxisRules([('embed', 'data')])"
)
_PATH_RULE = (
    "pairs of a regular expression and a PartitionSpec of mesh axes, such as "
    "PathRules([('kernel$', PartitionSpec('data'))])"
)


def axis_rule(rule: object) -> tuple[str, MeshAxes | Placement]:
    """One of ``AxisRules``, checked.

    Raises:
      ShardingError: it is no pair of a name and mesh axes.
    """
    name, value = _pair(rule, "AxisRules", _AXIS_RULE)
    axes = axes_of(value)
    if isinstance(axes, list) and not isinstance(value, Placement):
        value = axes = tuple(axes)
    if not isinstance(name, str) or not _is_entry(axes):
        raise _wrong("AxisRules", rule, _AXIS_RULE)
    return name, value


def path_rule(rule: object) -> tuple[str, PartitionSpec | Placement]:
    """One of ``PathRules``, checked.

    Raises:
      ShardingError: it is no pair of a regular expression and a spec.
    """
    pattern, value = _pair(rule, "PathRules", _PATH_RULE)
    spec = axes_of(value)
    spec = PartitionSpec() if spec is None else spec
    # ``PartitionSpec(*"data")`` would be a spec of four axes, each a letter.
    if isinstance(spec, str) or not hasattr(spec, "__iter__"):
        raise _wrong("PathRules", rule, _PATH_RULE)
    spec = PartitionSpec(*spec)
    if not all(_is_entry(entry) for entry in spec):
        raise _wrong("PathRules", rule, _PATH_RULE)
    pattern = str(pattern)
    if pattern.startswith("*"):  # no expression begins so: it is a glob
        pattern = f"^{glob_text(pattern)}$"
    try:
        re.compile(pattern)
    except re.error as error:
        raise ShardingError(
            f"path rule {pattern!r}",
            f"it is no regular expression ({error})",
            "a pattern for re.search",
        ) from error
    kind = kind_of(value)
    return pattern, spec if kind is None else Placement(spec, kind)


def _is_entry(entry: object) -> bool:
    """Whether it is mesh axes: None, a name, or a tuple of names."""
    return (
        entry is None
        or isinstance(entry, str)
        or (isinstance(entry, tuple) and all(isinstance(axis, str) for axis in entry))
    )
