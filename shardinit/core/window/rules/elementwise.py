"""Elementwise primitives: the operands' elements lie where the result's do."""

from __future__ import annotations

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.graph import Node, Value
from shardinit.core.types import Coords
from shardinit.core.window.coordinates import ZERO, spread
from shardinit.core.window.reasons import require
from shardinit.core.window.rules.rule import At, Steps, rule


def same_place(value: Value, out: Value, coords: Coords) -> Coords:
    """An operand's coordinates; along an axis of size one they stay at zero."""
    if value.ndim == 0:
        return ()
    if value.shape == out.shape:
        return coords
    pairs = zip(coords, value.shape, out.shape, strict=True)
    return tuple(ZERO if s != o and s == 1 else c for c, s, o in pairs)


def require_plain(node: Node) -> None:
    """No keys, and every operand is a scalar or has the result's rank."""
    out = node.outputs[0]
    require(not any(jx.is_key(v.dtype) for v in node.inputs))
    require(all(v.ndim in (0, out.ndim) for v in node.inputs))


@rule("convert_element_type", "select_n", exact=True)
@rule(
    *"""abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e
    bessel_i1e cbrt ceil clamp clz complex conj cos cosh digamma div eq eq_to erf
    erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow
    is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi ne
    neg nextafter not one_minus_square or polygamma polynomial population_count pow
    real reduce_precision regularized_incomplete_beta rem round rsqrt shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan
    tanh xor zeta""".split()
)
def elementwise(node: Node, which: int, coords: Coords) -> Steps:
    """The primitive itself, of the operands' elements."""
    require_plain(node)
    args = []
    for number, value in enumerate(node.inputs):
        args.append((yield At(number, same_place(value, node.outputs[which], coords))))
    assert node.prim is not None  # the rule is that of primitives
    return jx.bind(node.prim, spread(args), node.params)[which]


@rule("bitcast_convert_type")
def _bitcast(node: Node, which: int, coords: Coords) -> Steps:
    # Between dtypes of different widths an axis of words comes or goes.
    require(node.inputs[0].shape == node.outputs[0].shape)
    return (yield from elementwise(node, which, coords))
