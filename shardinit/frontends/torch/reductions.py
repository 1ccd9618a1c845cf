"""Operations over whole axes: sums, norms, products and factorisations of matrices."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from shardinit.frontends.torch.operations import operation


def _number_of(dims: Any) -> Any:
    return tuple(dims) if isinstance(dims, list | tuple) and dims else dims or None


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
def _var_mean(
    x: Any, dim: Any = None, correction: Any = 1, keepdim: Any = False
) -> Any:
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
