"""The evaluator: runs the rules of a leaf program at coordinates.

From the leaf towards the random bits rules ask for their operands at coordinates; on
the way back they make values of them. Each value is made once for each set of
coordinates. Rules are generators and wait on a list, not on Python's stack, which ends
after a thousand calls: a leaf may be a chain of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.graph import Node, Value
from shardinit.core.types import Coords, Dim, Elements, Values, Words
from shardinit.core.window.coordinates import ZERO, sub
from shardinit.core.window.reasons import require
from shardinit.core.window.rules.bits import elements, take
from shardinit.core.window.rules.rule import RULES, At, Full, Later, Steps, Zero

# A value at coordinates. Coordinates count by identity: rules hand on what they got.
_Wanted = tuple[Value, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """A rectangle of a value: what a window of the leaf reads of it.

    Attributes:
      array: the elements there.
      start: uint32 scalars, where it begins along each axis.
    """

    array: Values
    start: Sequence[Words]

    def at(self, coords: Coords) -> Values:
        """The elements at coordinates of the whole value."""
        pairs = zip(coords, self.start, strict=True)
        inside = tuple(sub(coord, start) for coord, start in pairs)
        return take(self.array.reshape(-1), self.array.shape, inside)


class Evaluator:
    """Evaluates values of a graph at coordinates.

    Args:
      arrays: what is there in full: the operands, tables and keys. Typed keys are keys.
      zero: a uint32 scalar that is zero, as the compiler must not know.
      parts: what is there in part: all of it that is read.
    """

    def __init__(
        self,
        arrays: Mapping[Value, Values],
        zero: Words = ZERO,
        parts: Mapping[Value, Part] = MappingProxyType({}),
    ):
        self._arrays = arrays
        self._zero = zero
        self._parts = parts

    def at(self, value: Value, coords: Coords) -> Elements:
        """The elements of ``value`` at ``coords``, broadcastable to the grid's shape.

        Raises:
          NotWindowable: a rule does not cover its equation, or there is none.
        """
        made: dict[_Wanted, tuple[Coords, Elements]] = {}
        waiting: list[tuple[_Wanted, Coords, Node, Steps]] = []

        def answer(value: Value, coords: Coords) -> tuple[bool, Elements | None]:
            """Whether the elements are known, and they; else their rule is begun."""
            wanted = (value, tuple(map(id, coords)))
            if wanted in made:
                return True, made[wanted][1]
            if self._is_there(value):
                made[wanted] = coords, self._read(value, coords)
                return True, made[wanted][1]
            steps = self._begin(value, coords)
            assert value.node is not None
            waiting.append((wanted, coords, value.node, steps))
            return False, None

        known, found = answer(value, coords)
        while waiting:
            wanted, at, node, steps = waiting[-1]
            try:
                request = steps.send(found if known else None)
            except StopIteration as end:
                waiting.pop()
                self._note(wanted[0], end.value)
                made[wanted] = at, end.value
                known, found = True, end.value
                continue
            if isinstance(request, Zero):
                known, found = True, self._zero
            elif isinstance(request, At):
                known, found = answer(node.inputs[request.number], request.coords)
            else:
                known, found = True, self._other(node, request, at)
        return found

    def _begin(self, value: Value, coords: Coords) -> Steps:
        node = value.node
        # Without elements there are no coordinates to ask for.
        require(node is not None and node.name in RULES and value.size > 0)
        assert node is not None
        return RULES[node.name](node, value.index, coords)

    def _is_there(self, value: Value) -> bool:
        there = value in self._arrays or value in self._parts
        return there or value.const is not None

    def _array(self, value: Value) -> Values:
        return self._arrays.get(value, value.const)

    def _read(self, value: Value, coords: Coords) -> Elements:
        """Elements of what is there."""
        if value in self._parts:
            made = self._parts[value].at(coords)
        else:
            made = self._array(value)
            if value.ndim or jx.is_key(value.dtype):
                made = elements(made, value, coords)
        self._note(value, made)
        return made

    def _other(
        self, node: Node, request: Full | Later, coords: Coords
    ) -> Values | Callable[[Coords], Elements]:
        value = node.inputs[request.number]
        if isinstance(request, Full):
            return self._array(value)
        # Values of a loop's step must not be remembered beyond it: each call is new.
        return lambda coords: self.at(value, coords)

    def _note(self, value: Value, made: Elements) -> None:
        """Sees every value that is made."""


def shape_of(made: Elements) -> tuple[Dim, ...]:
    """The shape of elements; keys are tuples of words."""
    return np.shape(made[0] if isinstance(made, tuple) else made)
