"""Fences and barriers: what keeps the arithmetic on both sides of it apart."""

from __future__ import annotations

import numpy as np
from jax import lax

from shardinit.core.ir.graph import Node
from shardinit.core.types import Coords, Values, Words
from shardinit.core.window.coordinates import spread
from shardinit.core.window.rules.rule import At, Steps, Zero, rule


@rule("optimization_barrier")
def _barrier(node: Node, which: int, coords: Coords) -> Steps:
    return lax.optimization_barrier((yield At(which, coords)))


@rule("fence")
def _fence(node: Node, which: int, coords: Coords) -> Steps:
    value = yield At(which, coords)
    return fenced(value, (yield Zero()))


def fenced(value: Values, zero: Words) -> Values:
    """The same floats, which the compiler cannot join with what they are made of.

    Args:
      value: elements; floats of 8 bits and what is no float are left as they are.
      zero: a uint32 scalar that is zero whenever the program runs.
    """
    dtype = np.dtype(value.dtype)
    # To numpy bfloat16 and its kin are of kind V.
    word = {2: np.uint16, 4: np.uint32, 8: np.uint64}.get(dtype.itemsize)
    if word is None or dtype.kind not in "fV":
        return value
    # Not an optimization_barrier: on CPU none is left when loops are fused, see
    # ``cut.fences``. Of a zero that is known, the exclusive or itself would be gone.
    bits = lax.bitcast_convert_type(value, word)
    bits = lax.bitwise_xor(*spread([bits, lax.convert_element_type(zero, word)]))
    return lax.bitcast_convert_type(bits, dtype)
