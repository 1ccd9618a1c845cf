"""The operations that can follow a random draw, one function each, as JAX has them.

What no random number enters is torch's own to compute (``evaluate``), unless it is
large. So the functions here are the arithmetic that initialisations do on draws, and the
tables that are long. Each is called like the operation of ``torch.ops.aten`` of the name
that it is registered for, with arrays of JAX in the place of tensors; the caller casts
the result to the dtype that torch gave it. An operation that is missing is one function
more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def _number_of(dims: Any) -> Any:
    return tuple(dims) if isinstance(dims, list | tuple) and dims else dims or None


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
    "log_sigmoid_forward": lambda x: (jax.nn.log_sigmoid(x), jnp.zeros((0,))),
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


@operation("clone", "copy", "_to_copy", "contiguous", "alias", "lift_fresh")
def _clone(x: Any, **kwargs: Any) -> Any:
    return x


@operation("_unsafe_view", "view_copy", "_reshape_copy")
def _view(x: Any, shape: Sequence[int]) -> Any:
    return jnp.reshape(x, tuple(shape))


@operation("cat")
def _cat(parts: Sequence[Any], dim: int = 0) -> Any:
    ranked = [part for part in parts if part.shape != (0,)]
    return jnp.concatenate(ranked, dim)


@operation("stack")
def _stack(parts: Sequence[Any], dim: int = 0) -> Any:
    return jnp.stack(parts, dim)


@operation("repeat")
def _repeat(x: Any, times: Sequence[int]) -> Any:
    return jnp.tile(x, tuple(times))


@operation("flip")
def _flip(x: Any, dims: Sequence[int]) -> Any:
    return jnp.flip(x, tuple(dims))


@operation("roll")
def _roll(x: Any, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    return jnp.roll(x, tuple(shifts), tuple(dims)) if dims else jnp.roll(x, shifts[0])


@operation("tril")
def _tril(x: Any, diagonal: int = 0) -> Any:
    return jnp.tril(x, diagonal)


@operation("triu")
def _triu(x: Any, diagonal: int = 0) -> Any:
    return jnp.triu(x, diagonal)


@operation("constant_pad_nd")
def _pad(x: Any, pad: Sequence[int], value: Any = 0) -> Any:
    widths = [(0, 0)] * x.ndim
    for number in range(len(pad) // 2):
        widths[-1 - number] = pad[2 * number], pad[2 * number + 1]
    config = [(low, high, 0) for low, high in widths]
    return jax.lax.pad(x, jnp.asarray(value, x.dtype), config)


@operation("index_select")
def _index_select(x: Any, dim: int, index: Any) -> Any:
    return jnp.take(x, index, axis=dim)


@operation("gather")
def _gather(x: Any, dim: int, index: Any, sparse_grad: bool = False) -> Any:
    return jnp.take_along_axis(x, index, axis=dim)


@operation("index")
def _index(x: Any, indices: Sequence[Any]) -> Any:
    return x[tuple(slice(None) if i is None else i for i in indices)]


@operation("index_put")
def _index_put(
    x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False
) -> Any:
    at = x.at[tuple(slice(None) if i is None else i for i in indices)]
    return at.add(values) if accumulate else at.set(values)


@operation("index_fill")
def _index_fill(x: Any, dim: int, index: Any, value: Any) -> Any:
    return x.at[(slice(None),) * (dim % x.ndim) + (index,)].set(value)


@operation("index_copy")
def _index_copy(x: Any, dim: int, index: Any, source: Any) -> Any:
    return x.at[(slice(None),) * (dim % x.ndim) + (index,)].set(source)


@operation("sum")
def _sum(x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return jnp.sum(x, _number_of(dim), keepdims=keepdim)


@operation("mean")
def _mean(x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return jnp.mean(x, _number_of(dim), keepdims=keepdim)


@operation("prod")
def _prod(x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return jnp.prod(x, dim, keepdims=keepdim)


@operation("amax")
def _amax(x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    return jnp.max(x, _number_of(dim), keepdims=keepdim)


@operation("amin")
def _amin(x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    return jnp.min(x, _number_of(dim), keepdims=keepdim)


def _spread(x: Any, dim: Any, correction: Any, keepdim: bool) -> Any:
    ddof = 1 if correction is None else float(correction)
    return jnp.var(x, _number_of(dim), ddof=ddof, keepdims=keepdim)


@operation("var")
def _var(x: Any, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> Any:
    return _spread(x, dim, correction, keepdim)


@operation("std")
def _std(x: Any, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> Any:
    return jnp.sqrt(_spread(x, dim, correction, keepdim))


@operation("var_mean")
def _var_mean(x: Any, dim: Any = None, correction: Any = 1, keepdim: Any = False) -> Any:
    return _spread(x, dim, correction, keepdim), _mean(x, dim, keepdim)


@operation("cumsum")
def _cumsum(x: Any, dim: int, dtype: Any = None) -> Any:
    return jnp.cumsum(x, dim)


@operation("cumprod")
def _cumprod(x: Any, dim: int, dtype: Any = None) -> Any:
    return jnp.cumprod(x, dim)


@operation("_softmax")
def _softmax(x: Any, dim: int, half_to_float: bool = False) -> Any:
    return jax.nn.softmax(x, dim)


@operation("_log_softmax")
def _log_softmax(x: Any, dim: int, half_to_float: bool = False) -> Any:
    return jax.nn.log_softmax(x, dim)


@operation("sort")
def _sort(x: Any, dim: int = -1, descending: bool = False, **kwargs: Any) -> Any:
    order = jnp.argsort(x, dim, descending=descending)
    return jnp.take_along_axis(x, order, dim), order


@operation("argsort")
def _argsort(x: Any, dim: int = -1, descending: bool = False, **kwargs: Any) -> Any:
    return jnp.argsort(x, dim, descending=descending)


@operation("linalg_vector_norm", "norm")
def _norm(
    x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Any:
    axes = _number_of(dim)
    size, order = jnp.abs(x), 2.0 if ord is None else float(ord)
    if math.isinf(order):
        return (jnp.max if order > 0 else jnp.min)(size, axes, keepdims=keepdim)
    if order == 2:
        return jnp.sqrt(jnp.sum(jnp.square(size), axes, keepdims=keepdim))
    return jnp.sum(size**order, axes, keepdims=keepdim) ** (1 / order)


@operation("_weight_norm_interface")
def _weight_norm(v: Any, g: Any, dim: int = 0) -> Any:
    axes = tuple(axis for axis in range(v.ndim) if axis != dim)
    norm = jnp.sqrt(jnp.sum(jnp.square(v), axes, keepdims=True))
    return v * (g / norm), norm


@operation("linalg_qr")
def _qr(x: Any, mode: str = "reduced") -> Any:
    return jnp.linalg.qr(x, mode=mode)


@operation("linalg_svd", "_linalg_svd")
def _svd(x: Any, full_matrices: bool = False, *args: Any, **kwargs: Any) -> Any:
    return jnp.linalg.svd(x, full_matrices=full_matrices)


@operation("linalg_inv_ex")
def _inv(x: Any, check_errors: bool = False) -> Any:
    return jnp.linalg.inv(x), jnp.zeros(x.shape[:-2], jnp.int32)


@operation("diagonal_copy")
def _diagonal(x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    return jnp.diagonal(x, offset, dim1, dim2)


@operation("mm", "bmm", "mv", "dot")
def _matmul(x: Any, y: Any) -> Any:
    return jnp.matmul(x, y)


@operation("addmm")
def _addmm(x: Any, one: Any, two: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    return beta * x + alpha * jnp.matmul(one, two)


@operation("eye")
def _eye(rows: int, columns: int | None = None, **kwargs: Any) -> Any:
    return jnp.eye(rows, columns)


@operation("arange")
def _arange(*bounds: Any, **kwargs: Any) -> Any:
    return jnp.arange(*bounds)
