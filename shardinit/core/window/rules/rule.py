"""What a rule is: one generator function for each primitive.

A rule says what the elements of a primitive's result are at given *coordinates*: one
unsigned index array an axis, not a rectangle, since a reshape of a rectangle is none.
It asks for what it needs by yielding a request, and is sent the answer:

- ``At(number, coords)``: the elements of that operand at those coordinates;
- ``Full(number)``: all of that operand, made once for all windows. It has to be made of
  constants alone (``of_keys``: or derived from keys), as it is no part of the window;
- ``Later(number)``: a function from coordinates to the operand's elements, for places
  that are known only while the values are made, once for each step of a loop;
- ``Zero()``: a zero that the compiler does not know to be one.

What it returns are the elements. A rule raises ``NotWindowable`` (``require``) before
its first request where it does not cover an equation. The evaluator runs rules without
Python's stack, so a chain of any length can be windowed.

Values broadcast against each other to the grid's shape, as coordinates do. Typed keys
travel as a tuple of their words.

A new primitive is one function:

    @rule("neg")
    def _neg(node, which, coords):
        return lax.neg((yield At(0, coords)))

What else is known of a primitive, as that it only moves elements, is said where its
rule is registered: see ``rule``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from shardinit.core.ir.graph import Node
from shardinit.core.types import Coords


@dataclass(frozen=True)
class At:
    """Asks for elements of operand ``number`` at ``coords``."""

    number: int
    coords: Coords


@dataclass(frozen=True)
class Full:
    """Asks for all of operand ``number``, which no key reaches.

    Attributes:
      number: which operand.
      of_keys: whether it may also be keys, or derived from keys.
    """

    number: int
    of_keys: bool = False


@dataclass(frozen=True)
class Later:
    """Asks for operand ``number`` as a function from coordinates to its elements.

    Attributes:
      number: which operand.
      reads_axis: whether an element of the result costs a whole axis of the operand.
        Where the result is broadcast again, a window makes its part of it beforehand.
    """

    number: int
    reads_axis: bool = False


@dataclass(frozen=True)
class Zero:
    """Asks for a uint32 zero that the compiler does not know to be one."""


Request = At | Full | Later | Zero
Steps = Generator[Request, Any, Any]
RuleFn = Callable[[Node, int, Coords], Steps]

RULES: dict[str, RuleFn] = {}
"""The rules by the primitive's name."""

MOVES: set[str] = set()
"""The primitives that make no elements and only move those of their operands."""

PICKS: set[str] = set()
"""Those of them that keep elements and not their neighbours."""

EXACT: set[str] = set()
"""The primitives that do no arithmetic on floats: the moves, and a few others."""

FOLDS: set[str] = set()
"""The primitives that make one number of all that lies along an axis."""


def rule(
    *names: str,
    moves: bool = False,
    picks: bool = False,
    exact: bool = False,
    folds: bool = False,
) -> Callable[[RuleFn], RuleFn]:
    """Registers a function as the rule of the primitives of these names.

    Args:
      *names: the primitives.
      moves: whether they only move elements (``cut.fences`` asks).
      picks: whether they do, and take neighbours apart.
      exact: whether they do no arithmetic on floats (``window.constants`` asks); what
        only moves elements does none.
      folds: whether they make one number of all that lies along an axis: a small result
        that no key reaches is then made once, in full (``window.analysis`` asks), and
        what else is made of their operand lies behind a fence (``cut.fences``).
    """

    def register(fn: RuleFn) -> RuleFn:
        for name in names:
            if name in RULES:
                raise ValueError(f"{name} has a rule already: {RULES[name]}")
            RULES[name] = fn
        MOVES.update(names if moves or picks else ())
        PICKS.update(names if picks else ())
        EXACT.update(names if moves or picks or exact else ())
        FOLDS.update(names if folds else ())
        return fn

    return register


def mover(
    *names: str, picks: bool = False
) -> Callable[[Callable[[Node, int, Coords], Coords]], RuleFn]:
    """Registers where the elements of the only operand of a primitive lie.

    The function returns the operand's coordinates; the elements stay what they are.

    Args:
      *names: the primitives.
      picks: whether they take neighbours apart.
    """

    def register(place: Callable[[Node, int, Coords], Coords]) -> RuleFn:
        def moved(node: Node, which: int, coords: Coords) -> Steps:
            return (yield At(0, place(node, which, coords)))

        return rule(*names, moves=True, picks=picks)(moved)

    return register
