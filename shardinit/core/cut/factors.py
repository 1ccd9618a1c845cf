"""Constant factors beside a row, multiplied as XLA multiplies them.

Before JAX 0.11 XLA moves a constant factor of what is wide to what is narrow, where it
costs less: ``(x * c) * row`` becomes ``x * (c * row)``, not across a transposition. In
a window both are as wide (see ``varying``), so that the product is written so here. It
was measured on JAX 0.10.2, and on 0.12.0.1, where XLA does it no more; between them it
was not tried.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax

from shardinit.core.cut.reciprocals import has_own_rounding, is_folded, is_known
from shardinit.core.cut.varying import Varying
from shardinit.core.ir.graph import Node, Subgraph, Value, extract, topological
from shardinit.core.window.analysis import constants_among
from shardinit.core.window.rules.rule import MOVES
from shardinit.version import release

_MOVES_FACTORS = release(jax.__version__) < (0, 11)


def move_factors(graph: Subgraph) -> Subgraph:
    """Turns ``(x * c) * row`` into ``x * (c * row)`` where XLA does."""
    order = topological(graph.outs)
    products = [node for node in order if _is_product(node)]
    if not (_MOVES_FACTORS and products):  # before arrays it holds are compared
        return graph
    chosen = _chosen(products, constants_among(order), Varying(order))
    if not chosen:
        return graph
    copies: dict[Value, Value] = {}

    def expand(node: Node, inputs: list[Value]) -> list[Value] | None:
        copies.update(zip(node.inputs, inputs, strict=True))
        if node not in chosen:
            return None
        value, factors = chosen[node]
        made, *more = (copies[v] for v in factors)
        for other in more:
            made = _product(made, other)
        return [_product(copies[value], made)]

    return extract(graph.outs, graph.inputs, expand)


def _is_product(node: Node) -> bool:
    """Whether an equation multiplies two arrays of floats."""
    arrays = all(v.ndim for v in node.inputs)
    return node.name == "mul" and arrays and has_own_rounding(node.outputs[0])


def _chosen(
    products: Sequence[Node], constants: set[Value], varying: Varying
) -> dict[Node, tuple[Value, list[Value]]]:
    """The products that XLA writes otherwise, each with its two sides by ``_moved``."""
    chosen: dict[Node, tuple[Value, list[Value]]] = {}
    for node in products:
        for row, wide in (node.inputs, node.inputs[::-1]):
            if _is_row(row, wide, varying):
                value, factors = _moved(row, wide, constants)
                if value is not wide:
                    chosen[node] = value, factors
    return chosen


def _is_row(row: Value, wide: Value, varying: Varying) -> bool:
    """Whether an operand is narrower than the other, as XLA sees it."""
    spread = row.const is None or row.size < wide.size  # not a constant written in full
    narrow = bool(varying.axes(row)) and varying.is_narrow(row, wide.shape)
    return (
        narrow
        and spread
        and not _is_mask(row)
        and not varying.is_narrow(wide, wide.shape)
    )


def _moved(row: Value, wide: Value, constants: set[Value]) -> tuple[Value, list[Value]]:
    """What is left of the wide operand, and the product that it is multiplied by.

    Of a row that is known XLA soon makes a constant in full, which draws no factors. By
    then it has joined the factors in pairs, and the one without a pair has gone to it.
    """
    if is_folded(row, constants):
        _, factors = _stripped(wide, constants)
        value, last = _stripped(wide, constants, most=len(factors) % 2)
        return value, [*last, row]
    value, factors = _stripped(wide, constants)
    if not factors:
        return wide, []
    row, others = _stripped(row, constants)
    return value, [*factors, *others, row]


def _is_mask(value: Value) -> bool:
    """Whether a factor was a truth value, of which XLA makes a choice."""
    while value.node is not None and value.node.name in MOVES:
        value = value.node.inputs[0]
    node = value.node
    if node is None or node.name != "convert_element_type":
        return False
    return node.inputs[0].dtype == bool


def _stripped(
    value: Value, constants: set[Value], most: int | None = None
) -> tuple[Value, list[Value]]:
    """A value without its constant factors, and they, the innermost first."""
    factors: list[Value] = []
    while len(factors) != most and value.node is not None and value.node.name == "mul":
        one, other = value.node.inputs
        if _is_factor(one, constants):
            one, other = other, one
        if not _is_factor(other, constants):
            break
        factors.insert(0, other)
        value = one
    return value, factors


def _is_factor(value: Value, constants: set[Value]) -> bool:
    return value.ndim == 0 and is_known(value, constants)


def _product(one: Value, other: Value) -> Value:
    """A node that multiplies; numbers and rows are spread by the rule of ``mul``."""
    like = max(one, other, key=lambda value: (value.ndim, value.size))
    return Node("mul", lax.mul_p, {}, [one, other], [like]).outputs[0]
