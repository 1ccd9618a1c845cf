"""The decoder's smallest parts: a linear map, a norm, a table of embeddings.

Every parameter is made here, by one of three functions, of dimensions that carry
their logical names with their sizes, so that a parameter can have no dimension
without a name. A random parameter takes the stream's next key and is drawn by one
jitted function: a trace then holds one equation a parameter, found in a cache from
the second layer on, which is what keeps tracing hundreds of layers cheap.
"""

from __future__ import annotations

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from shardinit.models.config import DecoderConfig

Dims = tuple[tuple[str, int], ...]
"""Logical name and size of each dimension."""

V = TypeVar("V", bound=nnx.Variable)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _normal(
    key: jax.Array, shape: tuple[int, ...], std: float, draw: str, dtype: str
) -> jax.Array:
    drawn = jax.random.normal(key, shape, draw) * jnp.asarray(std, draw)
    return drawn.astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _full(value: float, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jnp.full(shape, value, dtype)


def named(value: jax.Array, dims: Dims, kind: type[V] = nnx.Param) -> V:
    """A Variable with the names of its dimensions and no placement."""
    # eager sharding would ask for a mesh; whoever runs the init places the arrays
    names = tuple(name for name, _ in dims)
    return kind(value, out_sharding=names, eager_sharding=False)


def normal(
    dims: Dims, config: DecoderConfig, rngs: nnx.Rngs, std: float | None = None
) -> nnx.Param:
    """A random parameter: normal with ``std``, by default that of the config."""
    shape = tuple(size for _, size in dims)
    std = config.std if std is None else std
    key = rngs.params()
    value = _normal(key, shape, std, config.init_dtype, config.param_dtype)
    return named(value, dims)


def zeros(dims: Dims, dtype: str) -> nnx.Param:
    """A parameter of zeros."""
    return named(_full(0, tuple(size for _, size in dims), dtype), dims)


def ones(dims: Dims, dtype: str) -> nnx.Param:
    """A parameter of ones."""
    return named(_full(1, tuple(size for _, size in dims), dtype), dims)


class Linear(nnx.Module):
    """A linear map from some last dimensions of its input to new ones.

    Attributes:
      kernel: the weights, shape (*inputs, *outputs).
      bias: shape (*outputs,), or None.
      contracted: how many dimensions are inputs.
    """

    # class attributes: every attribute that is set costs time in each layer's trace
    bias: nnx.Param | None = None
    contracted: int = 1

    def __init__(
        self,
        inputs: Dims,
        outputs: Dims,
        config: DecoderConfig,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        std: float | None = None,
    ):
        if len(inputs) != 1:
            self.contracted = len(inputs)
        self.kernel = normal(inputs + outputs, config, rngs, std)
        if bias:
            self.bias = zeros(outputs, config.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., *inputs) to (..., *outputs)."""
        kernel = self.kernel[...].astype(x.dtype)
        y = jnp.tensordot(x, kernel, self.contracted)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Norm(nnx.Module):
    """RMS norm, or layer norm if it has a bias, over the last dimension, in float32."""

    bias: nnx.Param | None = None

    def __init__(self, size: int, config: DecoderConfig, eps: float | None = None):
        self.eps = config.norm_eps if eps is None else eps
        dims = (("norm", size),)
        self.scale = ones(dims, config.param_dtype)
        if config.layer_norm:
            self.bias = zeros(dims, config.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises (..., size); keeps the dtype."""
        wide = x.astype(jnp.float32)
        if self.bias is not None:
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.eps)
        y = wide.astype(x.dtype) * self.scale[...]
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """A table with one vector for each of ``count`` things called ``name``."""

    def __init__(self, name: str, count: int, config: DecoderConfig, rngs: nnx.Rngs):
        dims = ((name, count), ("embed", config.hidden_size))
        self.embedding = normal(dims, config, rngs)

    def __call__(self, indices: jax.Array) -> jax.Array:
        """The vectors of integer ``indices``, shape (*indices.shape, embed)."""
        return self.embedding[...][indices]

    def attend(self, x: jax.Array) -> jax.Array:
        """Scores of (..., embed) against every vector, shape (..., count)."""
        return x @ self.embedding[...].T
