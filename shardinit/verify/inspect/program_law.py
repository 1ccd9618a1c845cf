"""The law of a leaf: which distribution its elements have, read from its program.

A leaf program is followed from its random bits to its result, and what is known of the
elements is carried along: bits become a uniform number as JAX makes it (bits as the
mantissa of a number in [1, 2)), ``erf_inv`` of one in (-1, 1) a normal one, and of one
in a narrower range a truncated one; scalars scale, shift and bound. Whatever else is
done to random numbers makes the law unknown: nothing is guessed from the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from shardinit.core.cut.leaf_program import LeafProgram
from shardinit.core.ir.graph import Node, Subgraph, Value, topological
from shardinit.core.window.rules.rule import MOVES
from shardinit.verify.inspect.law import (
    STANDARD,
    UNKNOWN,
    Law,
    bounded,
    constant,
    is_constant,
    scaled,
    uniform,
)

_FEW: Final = 1 << 16  # elements of a captured array that are held against each other


@dataclass(frozen=True)
class _Bits:
    """Random bits; ``exponent`` what was put above them, None as they were drawn."""

    exponent: float | None = None


_Known = Law | _Bits


def read_law(program: object, words: np.ndarray, result: int = 0) -> Law:
    """The law of a leaf.

    Args:
      program: its leaf program; of a loaded program file nothing can be read.
      words: uint32 vector of the program's operands, as ``operand_words`` gives it.
      result: which result of the program the leaf is.

    Example:
      >>> import jax, shardinit
      >>> cut = shardinit.plan(lambda key: 2 * jax.random.normal(key, (8, 32))).cut
      >>> read_law(cut.programs[0], np.array([0, 0, 0x40000000], np.uint32)).family
      'normal'
    """
    if not isinstance(program, LeafProgram):
        return UNKNOWN
    out = program.graph.outs[result]
    if not jnp.issubdtype(out.dtype, np.floating):
        return UNKNOWN
    known = _inputs(program.graph, words)

    def get(value: Value) -> _Known:
        if value not in known:
            known[value] = _of_const(value.const)
        return known[value]

    for node in topological([out]):
        laws = [get(value) for value in node.inputs]
        found = _after(node, laws)
        known.update(zip(node.outputs, found, strict=True))
    law = get(out)
    return law if isinstance(law, Law) else UNKNOWN


def _inputs(graph: Subgraph, words: np.ndarray) -> dict[Value, _Known]:
    """Laws of the operands: scalars are known, keys are none."""
    known: dict[Value, _Known] = {}
    end = words.size
    for value in reversed(graph.inputs):  # scalars come last
        if not jnp.issubdtype(value.dtype, np.floating) or value.size != 1:
            known[value] = UNKNOWN
            continue
        word = words[end - 1 : end]
        end -= 1
        width = np.dtype(value.dtype).itemsize
        bits = word if width == 4 else word.astype(np.uint16)
        known[value] = constant(float(bits.view(value.dtype)[0]))
    return known


def _of_const(const: Any) -> Law:
    """The law of what is known while tracing: a constant if all of it is one number."""
    if const is None or not hasattr(const, "dtype"):
        return UNKNOWN
    if jnp.issubdtype(const.dtype, np.complexfloating) or not jnp.issubdtype(
        const.dtype, np.number
    ):
        return UNKNOWN
    if not 0 < const.size <= _FEW:
        return UNKNOWN
    array = np.asarray(const).ravel()
    return constant(float(array[0])) if (array == array[0]).all() else UNKNOWN


def _after(node: Node, laws: Sequence[_Known]) -> list[_Known]:
    """The laws of a node's results."""
    if node.name in ("fence", "optimization_barrier"):
        return list(laws)
    if node.name in MOVES:  # the places that some take are numbers of another dtype
        pairs = zip(node.inputs, laws, strict=True)
        moved = [law for v, law in pairs if v.dtype == node.outputs[0].dtype]
        return [_joined(moved)] * len(node.outputs)
    rule = _RULES.get(node.name)
    found = UNKNOWN if rule is None else rule(node, laws)
    return [found] * len(node.outputs)


# ---- rules ---------------------------------------------------------------------------

_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "abs": abs,
    "add": lambda x, y: x + y,
    "div": lambda x, y: x / y,
    "erf": math.erf,
    "exp": math.exp,
    "integer_pow": lambda x, y: x**y,
    "log": math.log,
    "max": max,
    "min": min,
    "mul": lambda x, y: x * y,
    # `truncated_normal` clips to the numbers next to its ends (0.10.2 and 0.12): to a
    # law these are the ends.
    "nextafter": lambda x, y: x,
    "pow": pow,
    "rsqrt": lambda x: 1 / math.sqrt(x),
    "sqrt": math.sqrt,
    "sub": lambda x, y: x - y,
}


def _arithmetic(node: Node, laws: Sequence[_Known]) -> Law:
    """Of constants alone the number; of one law and a constant the law moved."""
    given = [law for law in laws if isinstance(law, Law)]
    if len(given) < len(laws):
        return UNKNOWN
    if all(map(is_constant, given)):
        return _of_numbers(node, [law.center for law in given])
    if len(given) != 2 or node.name not in _TWO:
        return UNKNOWN
    one, two = given
    if is_constant(two):
        return _TWO[node.name](node, one, two.center, False)
    return _TWO[node.name](node, two, one.center, True) if is_constant(one) else UNKNOWN


def _of_numbers(node: Node, numbers: Sequence[float]) -> Law:
    """The number that an operation makes of others."""
    exponent = [node.params["y"]] if node.name == "integer_pow" else []
    try:
        return constant(float(_FUNCTIONS[node.name](*numbers, *exponent)))
    except (ArithmeticError, ValueError):
        return UNKNOWN


def _divided(_: Node, law: Law, by: float, swapped: bool) -> Law:
    return UNKNOWN if swapped or by == 0 else scaled(law, 1 / by)


def _at_least(node: Node, law: Law, bound: float, _: bool) -> Law:
    return bounded(node.outputs[0].dtype, law, bound, below=True)


def _at_most(node: Node, law: Law, bound: float, _: bool) -> Law:
    return bounded(node.outputs[0].dtype, law, bound, below=False)


_TWO: Final[dict[str, Callable[[Node, Law, float, bool], Law]]] = {
    "add": lambda _, law, x, swapped: scaled(law, 1.0, x),
    "div": _divided,
    "max": _at_least,
    "min": _at_most,
    "mul": lambda _, law, x, swapped: scaled(law, x),
    "sub": lambda _, law, x, swapped: (
        scaled(law, -1.0, x) if swapped else scaled(law, 1.0, -x)
    ),
}


def _clamped(node: Node, laws: Sequence[_Known]) -> Law:
    low, law, high = (x if isinstance(x, Law) else UNKNOWN for x in laws)
    if not (is_constant(low) and is_constant(high)):
        return UNKNOWN
    return _at_most(node, _at_least(node, law, low.center, False), high.center, False)


def _erf_inv(node: Node, laws: Sequence[_Known]) -> Law:
    (law,) = laws
    if not isinstance(law, Law) or law.family != "uniform":
        return UNKNOWN
    if law.low < -1 or law.high > 1:
        return UNKNOWN
    eps = float(jnp.finfo(node.outputs[0].dtype).eps)

    def end(x: float) -> float:
        if abs(x) >= 1 - eps:
            return math.copysign(math.inf, x)
        return STANDARD.inv_cdf((x + 1) / 2) / math.sqrt(2)

    low, high = end(law.low), end(law.high)
    whole = math.isinf(low) and math.isinf(high)
    family = "normal" if whole else "truncated normal"
    return Law(family, 0.0, 1 / math.sqrt(2), low, high)


def _converted(node: Node, laws: Sequence[_Known]) -> _Known:
    (law,) = laws
    # Bits stay bits: JAX draws 8 for a bfloat16 and widens them to 16.
    if isinstance(law, _Bits) or jnp.issubdtype(node.outputs[0].dtype, np.floating):
        return law
    return law if isinstance(law, Law) and is_constant(law) else UNKNOWN


def _shifted(_: Node, laws: Sequence[_Known]) -> _Known:
    return laws[0] if laws[0] == _Bits() else UNKNOWN


def _exponent(_: Node, laws: Sequence[_Known]) -> _Known:
    """Bits below a constant exponent."""
    for one, other in (laws, laws[::-1]):
        if one == _Bits() and isinstance(other, Law) and is_constant(other):
            return _Bits(other.center)
    return UNKNOWN


def _bitcast(node: Node, laws: Sequence[_Known]) -> _Known:
    """Numbers in [1, 2), where the exponent is that of 1."""
    (law,) = laws
    dtype = np.dtype(node.outputs[0].dtype)
    if not isinstance(law, _Bits) or law.exponent is None:
        return UNKNOWN
    one = int(np.ones((), dtype).view(f"u{dtype.itemsize}"))
    return uniform(1.0, 2.0) if law.exponent == one else UNKNOWN


def _joined(laws: Sequence[_Known]) -> _Known:
    return laws[0] if all(law == laws[0] for law in laws) else UNKNOWN


def _negated(_: Node, laws: Sequence[_Known]) -> Law:
    (law,) = laws
    return scaled(law, -1.0) if isinstance(law, Law) else UNKNOWN


_RULES: Final[dict[str, Callable[[Node, Sequence[_Known]], _Known]]] = {
    **dict.fromkeys(_FUNCTIONS, _arithmetic),
    "bitcast_convert_type": _bitcast,
    "clamp": _clamped,
    "convert_element_type": _converted,
    "erf_inv": _erf_inv,
    "neg": _negated,
    "or": _exponent,
    "random_bits": lambda node, laws: _Bits(),
    "reduce_precision": lambda node, laws: laws[0],
    "select_n": lambda node, laws: _joined(laws[1:]),
    "shift_right_logical": _shifted,
}
