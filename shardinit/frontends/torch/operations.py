"""The operations that can follow a random draw, one function each, as JAX has them.

What no random number enters is torch's own to compute (``evaluate``), unless it is
large. So the functions here are the arithmetic that initialisations do on draws, and
the tables that are long. Each is called like the operation of ``torch.ops.aten`` of the
name that it is registered for, with arrays of JAX in the place of tensors; the caller
casts the result to the dtype that torch gave it. An operation that is missing is one
function more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special as special

Operation = Callable[..., Any]
OPERATIONS: dict[str, Operation] = {}


def operation(*names: str) -> Callable[[Operation], Operation]:
    """Registers a function for operations of ``torch.ops.aten``.

    Args:
      *names: without overloads; an operation in place is found without its underscore.

    Example:
      >>> @operation("twice")
      ... def twice(x):
      ...     return x + x
      >>> OPERATIONS.pop("twice") is twice
      True
    """

    def register(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register


_UNARY: dict[str, Operation] = {
    "abs": jnp.abs,
    "acos": jnp.arccos,
    "asin": jnp.arcsin,
    "atan": jnp.arctan,
    "bitwise_not": jnp.bitwise_not,
    "ceil": jnp.ceil,
    "cos": jnp.cos,
    "cosh": jnp.cosh,
    "erf": special.erf,
    "erfc": special.erfc,
    "erfinv": special.erfinv,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "floor": jnp.floor,
    "frac": lambda x: x - jnp.trunc(x),
    "isfinite": jnp.isfinite,
    "isinf": jnp.isinf,
    "isnan": jnp.isnan,
    "lgamma": special.gammaln,
    "log": jnp.log,
    "log10": jnp.log10,
    "log1p": jnp.log1p,
    "log2": jnp.log2,
    "log_sigmoid_forward": lambda x: (jax.nn.log_sigmoid(x), jnp.zeros_like(x)),
    "logical_not": jnp.logical_not,
    "neg": jnp.negative,
    "reciprocal": jnp.reciprocal,
    "relu": jax.nn.relu,
    "round": jnp.round,
    "rsqrt": lambda x: jax.lax.rsqrt(jnp.asarray(x)),
    "sigmoid": jax.nn.sigmoid,
    "sign": jnp.sign,
    "silu": jax.nn.silu,
    "sin": jnp.sin,
    "sinh": jnp.sinh,
    "special_ndtri": special.ndtri,
    "sqrt": jnp.sqrt,
    "square": jnp.square,
    "tan": jnp.tan,
    "tanh": jnp.tanh,
    "trunc": jnp.trunc,
}
_BINARY: dict[str, Operation] = {
    "atan2": jnp.arctan2,
    "bitwise_and": jnp.bitwise_and,
    "bitwise_or": jnp.bitwise_or,
    "eq": jnp.equal,
    "fmod": jnp.fmod,
    "ge": jnp.greater_equal,
    "gt": jnp.greater,
    "le": jnp.less_equal,
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "lt": jnp.less,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "mul": jnp.multiply,
    "ne": jnp.not_equal,
    "pow": jnp.power,
    "remainder": jnp.remainder,
}
OPERATIONS.update(_UNARY)
OPERATIONS.update(_BINARY)


@operation("add")
def _add(x: Any, y: Any, alpha: Any = 1) -> Any:
    return x + (y if alpha == 1 else alpha * y)


@operation("sub")
def _sub(x: Any, y: Any, alpha: Any = 1) -> Any:
    return x - (y if alpha == 1 else alpha * y)


@operation("rsub")
def _rsub(x: Any, y: Any, alpha: Any = 1) -> Any:
    return y - (x if alpha == 1 else alpha * x)


@operation("div")
def _div(x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "floor":
        return jnp.floor_divide(x, y)
    whole = jnp.true_divide(x, y)
    return jnp.trunc(whole) if rounding_mode == "trunc" else whole


@operation("floor_divide")
def _floor_divide(x: Any, y: Any) -> Any:
    return jnp.floor_divide(x, y)


@operation("addcmul")
def _addcmul(x: Any, one: Any, two: Any, value: Any = 1) -> Any:
    return x + value * one * two


@operation("addcdiv")
def _addcdiv(x: Any, one: Any, two: Any, value: Any = 1) -> Any:
    return x + value * one / two


@operation("lerp")
def _lerp(x: Any, end: Any, weight: Any) -> Any:
    return x + weight * (end - x)


@operation("clamp")
def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    return jnp.clip(x, min, max)


@operation("clamp_min")
def _clamp_min(x: Any, least: Any) -> Any:
    return jnp.maximum(x, least)


@operation("clamp_max")
def _clamp_max(x: Any, most: Any) -> Any:
    return jnp.minimum(x, most)


@operation("logit")
def _logit(x: Any, eps: float | None = None) -> Any:
    return special.logit(x if eps is None else jnp.clip(x, eps, 1 - eps))


@operation("softplus")
def _softplus(x: Any, beta: Any = 1, threshold: Any = 20) -> Any:
    return jnp.where(x * beta > threshold, x, jnp.log1p(jnp.exp(x * beta)) / beta)


@operation("where")
def _where(condition: Any, x: Any, y: Any) -> Any:
    return jnp.where(condition, x, y)


@operation("masked_fill")
def _masked_fill(x: Any, mask: Any, value: Any) -> Any:
    return jnp.where(mask, value, x)
