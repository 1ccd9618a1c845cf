"""Divisions, written as XLA runs them.

XLA multiplies by a reciprocal where it can have it for less: where the divisor is a
constant, or varies along fewer axes than what it divides. In a window the divisor is
made at the window's place and nothing of that is left to see, so the compiler would
divide, with other last places: ``x / row``, ``x / table``, and
``x.at[rows].divide(3)``, which JAX makes a division by ones with threes among them
(https://github.com/jax-ml/jax/issues/19162).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from shardinit.core.cut.varying import Varying
from shardinit.core.ir.graph import Node, Subgraph, Value, extract, topological
from shardinit.core.window.analysis import constants_among
from shardinit.core.window.rules.elementwise import elementwise
from shardinit.core.window.rules.rule import MOVES, RULES


def multiply_by_reciprocals(graph: Subgraph) -> Subgraph:
    """Turns ``x / c`` into ``x * (1 / c)`` where XLA does."""
    order = topological(graph.outs)
    divisions = [n for n in order if n.name == "div" and has_own_rounding(n.outputs[0])]
    if not divisions:  # before arrays that the function holds are compared
        return graph
    constants, varying = constants_among(order), Varying(order)
    chosen = {
        node
        for node in divisions
        if not is_known(node.inputs[0], constants)
        and _has_reciprocal(node, constants, varying)
    }
    if not chosen:
        return graph

    def expand(node: Node, inputs: list[Value]) -> list[Value] | None:
        if node not in chosen:
            return None
        value, divisor = inputs
        one = Value((), divisor.dtype, const=np.ones((), divisor.dtype))
        inverse = Node("div", lax.div_p, {}, [one, divisor], [divisor]).outputs
        return list(Node("mul", lax.mul_p, {}, [value, *inverse], node.outputs).outputs)

    return extract(graph.outs, graph.inputs, expand)


def has_own_rounding(value: Value) -> bool:
    """Whether it is rounded to its own dtype: bfloat16 is divided in float32."""
    return jnp.issubdtype(value.dtype, jnp.floating) and value.dtype != jnp.bfloat16


def is_known(value: Value, constants: set[Value]) -> bool:
    """Whether no key reaches a value."""
    return value.const is not None or value in constants


def _has_reciprocal(node: Node, constants: set[Value], varying: Varying) -> bool:
    """Whether XLA has the reciprocal of the divisor for less than the division."""
    divided, divisor = node.inputs
    narrow = varying.is_narrow(divisor, divided.shape)
    if not is_known(divisor, constants):
        return narrow and bool(varying.axes(divisor))
    return narrow or is_folded(divisor, constants)


def is_folded(value: Value, constants: set[Value]) -> bool:
    """Whether XLA computes a value while compiling, not an iota nor a long sum."""
    made = topological([value])
    read = [value, *(v for node in made for v in node.inputs)]
    known = is_known(value, constants) and not any(v.counted for v in read)
    return known and all(map(_is_folded, made))


def _is_folded(node: Node) -> bool:
    return (
        node.name in MOVES
        or node.name.startswith("scatter")
        or RULES.get(node.name) is elementwise
    )
