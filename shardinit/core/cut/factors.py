"""Constant factors beside a row, multiplied as XLA multiplies them.

Before JAX 0.11 XLA moves a constant factor of what is wide to what is narrow, where it
costs less: ``(x * c) * row`` becomes ``x * (c * row)``, not across a transposition. In
a window both are as wide (see ``varying``), so that the product is written so here. It
was measured on JAX 0.10.2, and on 0.12.0.1, where XLA does it no more; between them it
was not tried.
"""

from __future__ import annotations

import jax
from jax import lax

from shardinit.core.cut.reciprocals import has_own_rounding
from shardinit.core.cut.varying import Varying
from shardinit.core.ir.graph import Node, Subgraph, Value, extract, topological
from shardinit.core.window.analysis import constants_among
from shardinit.core.window.rules.rule import MOVES
from shardinit.version import release

_MOVES_FACTORS = release(jax.__version__) < (0, 11)


def move_factors(graph: Subgraph) -> Subgraph:
    """Turns ``(x * c) * row`` into ``x * (c * row)`` where XLA does."""
    if not _MOVES_FACTORS:
        return graph
    order = topological(graph.outs)
    constants, varying = constants_among(order), Varying(order)
    chosen = {
        node: narrow
        for node in order
        if node.name == "mul" and has_own_rounding(node.outputs[0])
        for narrow in (0, 1)
        if _is_moved(node, narrow, constants, varying)
    }
    if not chosen:
        return graph
    copies: dict[Value, Value] = {}

    def expand(node: Node, inputs: list[Value]) -> list[Value] | None:
        copies.update(zip(node.inputs, inputs, strict=True))
        if node not in chosen:
            return None
        row, factors = _stripped(node.inputs[chosen[node]], constants)
        value, others = _stripped(node.inputs[1 - chosen[node]], constants)
        made, *more = (copies[v] for v in (*others, *factors, row))
        for other in more:
            made = _product(made, other)
        return [_product(copies[value], made)]

    return extract(graph.outs, graph.inputs, expand)


def _is_moved(node: Node, narrow: int, constants: set[Value], varying: Varying) -> bool:
    """Whether constant factors of the wide operand go to the other, a row."""
    shape = node.outputs[0].shape
    row, wide = node.inputs[narrow], node.inputs[1 - narrow]
    if not varying.axes(row) or not varying.is_narrow(row, shape) or _is_mask(row):
        return False
    return not varying.is_narrow(wide, shape) and bool(_stripped(wide, constants)[1])


def _is_mask(value: Value) -> bool:
    """Whether a factor was a truth value, of which XLA makes a choice."""
    while value.node is not None and value.node.name in MOVES:
        value = value.node.inputs[0]
    node = value.node
    if node is None or node.name != "convert_element_type":
        return False
    return node.inputs[0].dtype == bool


def _stripped(value: Value, constants: set[Value]) -> tuple[Value, list[Value]]:
    """A value without its constant factors, and they, the innermost first."""
    factors: list[Value] = []
    while value.node is not None and value.node.name == "mul":
        one, other = value.node.inputs
        if _is_factor(one, constants):
            one, other = other, one
        if not _is_factor(other, constants):
            break
        factors.insert(0, other)
        value = one
    return value, factors


def _is_factor(value: Value, constants: set[Value]) -> bool:
    return value.ndim == 0 and (value.const is not None or value in constants)


def _product(one: Value, other: Value) -> Value:
    """A node that multiplies; numbers and rows are spread by the rule of ``mul``."""
    like = max(one, other, key=lambda value: (value.ndim, value.size))
    return Node("mul", lax.mul_p, {}, [one, other], [like]).outputs[0]
