"""The push-down rules: how a window of a result is a window of its operands.

A window is carried as *coordinates*, one unsigned index array an axis, not as a
rectangle: a reshape of a rectangle is no rectangle. Each rule has two halves. ``pull``
says at which coordinates of each operand a result's elements lie (towards the random
bits); ``push`` makes the result's elements of the operands' elements (back to the
leaf). A primitive that moves elements has only a pull, an elementwise one only a push.

Values broadcast against each other to the grid's shape, as coordinates do. Typed keys
travel as a tuple of their words.
"""

from __future__ import annotations

from shardinit.core.ir.graph import Node
from shardinit.core.window.rules.elementwise import ELEMENTWISE
from shardinit.core.window.rules.indexed import INDEXED
from shardinit.core.window.rules.joins import JOINS
from shardinit.core.window.rules.maps import MAPS
from shardinit.core.window.rules.moves import MOVES
from shardinit.core.window.rules.rule import Rule
from shardinit.core.window.rules.sources import SOURCES
from shardinit.core.window.rules.sources import elements as elements

RULES: dict[str, Rule] = {
    **ELEMENTWISE,
    **MOVES,
    **JOINS,
    **INDEXED,
    **MAPS,
    **SOURCES,
}


def rule_of(node: Node) -> Rule | None:
    """The rule that windows ``node``, None if it can only be evaluated whole."""
    rule = RULES.get(node.name)
    return rule if rule is not None and rule.accepts(node) else None
