"""Elementwise primitives: the operands' elements lie where the result's do."""

from __future__ import annotations

from typing import Any

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.graph import Node
from shardinit.core.window.coordinates import ZERO, Coords, spread
from shardinit.core.window.rules.rule import Rule


def pull_elementwise(node: Node, which: int, coords: Coords) -> list[Coords | None]:
    """The same coordinates; operands of size one along an axis stay at zero there."""
    out = node.outputs[which].shape
    pulled: list[Coords | None] = []
    for value in node.inputs:
        if value.ndim == 0:
            pulled.append(())
        elif value.shape == out:
            pulled.append(coords)
        else:
            pairs = zip(coords, value.shape, out, strict=True)
            pulled.append(tuple(ZERO if s != o and s == 1 else c for c, s, o in pairs))
    return pulled


def _push_elementwise(node: Node, which: int, coords: Coords, args: Any) -> Any:
    return jx.bind(node.prim, spread(args), node.params)[which]


def plain(node: Node) -> bool:
    """No keys, and every operand is a scalar or has the result's rank."""
    out = node.outputs[0]
    return not any(jx.is_key(v.dtype) for v in node.inputs) and all(
        v.ndim in (0, out.ndim) for v in node.inputs
    )


def _same_width(node: Node) -> bool:
    return node.inputs[0].shape == node.outputs[0].shape


NAMES = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp clz complex conj convert_element_type cos cosh digamma div eq
    eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag
    integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min
    mul mulhi ne neg nextafter not one_minus_square or polygamma polynomial
    population_count pow real reduce_precision regularized_incomplete_beta rem round
    rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin
    sinh sqrt square sub tan tanh xor zeta""".split()
)

ELEMENTWISE: dict[str, Rule] = {
    **{name: Rule(pull_elementwise, _push_elementwise, plain) for name in NAMES},
    "bitcast_convert_type": Rule(pull_elementwise, _push_elementwise, _same_width),
}
