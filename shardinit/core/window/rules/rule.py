"""What a push-down rule is: its two halves and what its operands may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shardinit.core.ir.graph import Node
from shardinit.core.window.coordinates import Coords


@dataclass(frozen=True)
class Rule:
    """How one primitive windows.

    Most operands are wanted at coordinates that are known when the sweep goes down;
    their values are arrays. Two kinds are not. A *table* is read at places that depend
    on other operands: it must be made of constants alone (``keyed``: or of keys), is
    evaluated whole and comes as that array. A *later* operand is wanted at places that
    only the way up can say, once for each step of a loop: it comes as a function from
    coordinates to values.

    Attributes:
      pull: ``(node, which result, coords) -> coords of each operand`` (None: unused,
        a table or later).
      push: ``(node, which result, coords, operand values) -> value``.
      accepts: whether this equation is one that the rule covers.
      table: which operands are tables.
      keyed: whether tables may also be keys, or derived from keys.
      later: which operands are wanted later.
      folds: whether an element costs a whole axis of the later operand, which does
        not pay where the result is broadcast along that axis again.
    """

    pull: Callable[[Node, int, Coords], list[Coords | None]]
    push: Callable[[Node, int, Coords, Sequence[Any]], Any]
    accepts: Callable[[Node], bool] = lambda node: True
    table: Callable[[Node], tuple[int, ...]] = lambda node: ()
    keyed: bool = False
    later: tuple[int, ...] = ()
    folds: bool = False


def keep(node: Node, which: int, coords: Coords, args: Sequence[Any]) -> Any:
    """The push of a primitive that only moves elements."""
    return args[0]


def mover(pull: Callable[[Node, int, Coords], Coords]) -> Rule:
    """A rule for a primitive that moves the elements of its only operand."""

    def pull_first(node: Node, which: int, coords: Coords) -> list[Coords | None]:
        return [pull(node, which, coords)]

    return Rule(pull_first, keep)
