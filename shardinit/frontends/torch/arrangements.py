"""Operations that move elements: joined, repeated, indexed, padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shardinit.frontends.torch.operations import operation


@operation("clone", "_to_copy", "contiguous", "alias", "lift_fresh")
def _clone(x: Any, **kwargs: Any) -> Any:
    return x


@operation("copy")
def _copy(x: Any, source: Any, non_blocking: bool = False) -> Any:
    return source


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


@operation("eye")
def _eye(rows: int, columns: int | None = None, **kwargs: Any) -> Any:
    return jnp.eye(rows, columns)


@operation("arange")
def _arange(*bounds: Any, **kwargs: Any) -> Any:
    return jnp.arange(*bounds)
