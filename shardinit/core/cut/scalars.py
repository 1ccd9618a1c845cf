"""Scale is data: scalars that only scale, shift or bound a leaf are operands.

Initialisers of a deep model differ by layer in a scale, a bound or a constant and in
nothing else; with those as literals a hundred layers would be a hundred programs. A
leaf is followed from its end towards its draw through bounds, then a shift, then one
factor, in this order, as far as the other side of each is a scalar of constants alone.

Other literals stay where they are, since XLA specialises on them: it joins the factors
of ``x * a * b`` (JAX 0.10.2). As operands they would give other last places:
``power(u, 3.0)`` in a quarter of the elements. A divisor is a factor: its reciprocal
(``reciprocals``), but for bfloat16, which is divided.
Scalar factors, shifts and bounds it treats alike, constant or not, so that the bits are
those of plain ``jax.jit`` (``tests/core/test_scalars.py`` holds it).
"""

from __future__ import annotations

import jax
import numpy as np

from shardinit.core.ir.graph import (
    Node,
    Subgraph,
    Value,
    extract,
    interpret,
    topological,
)
from shardinit.core.prng import derivation as keys
from shardinit.core.types import DType, Values, Words
from shardinit.core.window.rules.rule import MOVES

# A sign changes no rounding: XLA may have it on either side of a factor.
_PASSED = frozenset({"convert_element_type", "neg", "reshape", "transpose"})
# The order in which they may follow each other, from the leaf towards the draw.
_BOUND, _SHIFT, _FACTOR, _END = range(4)
_STAGES = {"max": _BOUND, "min": _BOUND, "add": _SHIFT, "sub": _SHIFT}
_STAGES |= {"mul": _FACTOR, "div": _FACTOR}
_DTYPES = ("float32", "bfloat16", "float16")


def lift_scalars(graph: Subgraph) -> tuple[Subgraph, list[Value]]:
    """Turns the scalars that scale, shift or bound the result into operands.

    Args:
      graph: a leaf program; its first result is looked at.

    Returns:
      The program with the scalars as its last inputs, and for each of them a value
      whose key is its words.
    """
    found = _scalars(graph)
    if not found:
        return graph, []
    lifted = [Value(v.shape, v.dtype, key=_words(v)) for v in found]
    return extract(graph.outs, [*graph.inputs, *found]), lifted


def _scalars(graph: Subgraph) -> list[Value]:
    """The scalars on the way from the result towards its draw, in this order."""
    found: dict[Value, None] = {}
    value, stage = graph.outs[0], _BOUND
    while value.node is not None:
        node = value.node
        if node.name == "broadcast_in_dim" and _is_scalar(node.inputs[0]):
            found[node.inputs[0]] = None
            break
        if node.name in _PASSED:
            value = node.inputs[0]
            continue
        sides = _sides(node)
        if sides is None or _STAGES[node.name] < stage:
            break
        here, (scalars, value) = _STAGES[node.name], sides
        found.update((v, None) for v in scalars if not _removed(node.name, v))
        stage = here if here == _BOUND else here + 1
    return list(found)


def _sides(node: Node) -> tuple[list[Value], Value] | None:
    """The scalars of a bound, a shift or a factor, and what it is applied to.

    None of any other equation, and where XLA treats a constant scalar otherwise.
    """
    if node.name not in _STAGES:
        return None
    scalars = [v for v in node.inputs if _is_scalar(v)]
    others = [v for v in node.inputs if v not in scalars]
    if len(others) != 1 or not scalars:
        return None
    is_shift = _STAGES[node.name] == _SHIFT
    if (is_shift and _is_shifted(others[0])) or not _is_kept(node):
        return None
    return scalars, others[0]


def _is_shifted(value: Value) -> bool:
    """Whether a scalar is added already: XLA adds two constants beforehand."""
    while value.node is not None and value.node.name in _PASSED | MOVES:
        value = value.node.inputs[0]
    return value.node is not None and _STAGES.get(value.node.name) == _SHIFT


def _is_kept(node: Node) -> bool:
    """Whether XLA runs it as it is: of most divisions by a scalar it makes products."""
    if node.name != "div":
        return True
    draw, divisor = node.inputs
    return _is_scalar(divisor) and str(draw.dtype) == "bfloat16"


def _removed(name: str, scalar: Value) -> bool:
    """Whether XLA removes it: in half precision a rounding goes with it."""
    identity = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0}.get(name)
    if str(scalar.dtype) == "float32" or identity is None:
        return False
    return bool(_number(scalar) == identity)


def _is_scalar(value: Value) -> bool:
    """One float of constants alone."""
    if value.size != 1 or str(value.dtype) not in _DTYPES:
        return False
    nodes = topological([value])
    read = [value, *(v for node in nodes for v in node.inputs)]
    return all(v.const is not None or v.node is not None for v in read)


def _number(value: Value) -> np.ndarray:
    scalar = value.const
    if scalar is None:
        with jax.ensure_compile_time_eval():
            (scalar,) = interpret([value], {})
    return np.asarray(scalar, value.dtype)


def _words(value: Value) -> keys.Derivation:
    """A scalar as one 32-bit word."""
    bits = _number(value).reshape(1)
    bits = bits.view(np.uint32 if bits.itemsize == 4 else np.uint16)
    return keys.constant(bits.astype(np.uint32), keys.THREEFRY)


def from_word(word: Words, dtype: DType) -> Values:
    """The scalar that ``lift_scalars`` made a word of."""
    if np.dtype(dtype).itemsize == 4:
        return jax.lax.bitcast_convert_type(word, dtype)
    half = jax.lax.convert_element_type(word, np.uint16)
    return jax.lax.bitcast_convert_type(half, dtype)
