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

from shardinit.core.graph import Node
from shardinit.core.rules.elementwise import ELEMENTWISE
from shardinit.core.rules.indexed import INDEXED
from shardinit.core.rules.joins import JOINS
from shardinit.core.rules.maps import MAPS
from shardinit.core.rules.moves import MOVES
from shardinit.core.rules.rule import Rule
from shardinit.core.rules.sources import SOURCES
from shardinit.core.rules.sources import elements as elements

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
