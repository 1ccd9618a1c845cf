"""Layers that infer the size of their input in ``init``.

Each layer takes one ``next_key()`` when it is initialised, and its initial values are
those of the Flax layer that Treex wraps. Flax derives the n-th parameter of a module by
folding the SHA-1 of n into the key of the module. These layers do the same, so a model
ported from Treex starts from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from shardinit.core.prng.names import key_for_name
from shardinit.module.base import Module
from shardinit.module.context import next_key
from shardinit.module.fields import Initializer, Parameter

Init = Callable[[jax.Array, Sequence[int], Any], jax.Array]
Axes = tuple[str | None, ...] | None

default_kernel_init = initializers.lecun_normal()
default_embedding_init = initializers.variance_scaling(
    1.0, "fan_in", "normal", out_axis=0
)


def parameter_key(key: jax.Array, number: int, within: str = "") -> jax.Array:
    """Derives the key of the n-th parameter of a layer, from 1, as Flax does.

    Args:
      key: the key of the layer.
      number: the number of the parameter.
      within: the name of the part of the layer that has the parameter.
    """
    # Flax hashes a number as its bytes, which up to 127 are those of this character.
    return key_for_name(key, within + chr(number))


def _itself(key: jax.Array) -> jax.Array:
    return key


def held_key() -> Initializer:
    """A field that ``init`` fills with a key of its own."""
    return Initializer(_itself)


class Affine(Module):
    """Base class of layers with a kernel and a bias."""

    kernel: jax.Array | None = Parameter.node()
    bias: jax.Array | None = Parameter.node()

    def __init__(
        self,
        features_out: int,
        *,
        use_bias: bool = True,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Init = default_kernel_init,
        bias_init: Init = initializers.zeros,
        kernel_axes: Axes = None,
        axis_name: str | None = None,
        name: str | None = None,
    ):
        """Sets the options of the layer; computes no values.

        Args:
          features_out: size of the last axis of the output.
          use_bias: whether to add a bias.
          dtype: dtype of the computation.
          param_dtype: dtype of the parameters.
          precision: precision of the product, see ``jax.lax.Precision``.
          kernel_init: takes a key, the shape of the kernel and a dtype.
          bias_init: takes a key, the shape (features out,) and a dtype.
          kernel_axes: logical axis names of the kernel; the bias has the last one.
          axis_name: a mapped axis (``jax.vmap`` or ``shard_map``) along which each
            index draws parameters of its own.
          name: name of the field that a compact method makes for the layer.
        """
        super().__init__(name)
        self.features_out = features_out
        self.use_bias = use_bias
        self.dtype, self.param_dtype = dtype, param_dtype
        self.precision = precision
        self.kernel_init, self.bias_init = kernel_init, bias_init
        self.kernel_axes = kernel_axes
        self.axis_name = axis_name
        self.kernel = None
        self.bias = None

    def field_axes(self) -> dict[str, Axes]:
        """Returns ``kernel_axes``, and the last of them for the bias."""
        axes = self.kernel_axes
        return {"kernel": axes, "bias": axes[-1:] if axes else None}

    def _make(self, *shape: int) -> None:
        key = next_key(axis_name=self.axis_name)
        self.kernel = self.kernel_init(parameter_key(key, 1), shape, self.param_dtype)
        if self.use_bias:
            size = (self.features_out,)
            self.bias = self.bias_init(parameter_key(key, 2), size, self.param_dtype)

    def _operands(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert self.kernel is not None
        return x.astype(self.dtype), self.kernel.astype(self.dtype)

    def _biased(self, y: jax.Array) -> jax.Array:
        return y if self.bias is None else y + self.bias.astype(self.dtype)


class Linear(Affine):
    """``y = x @ kernel + bias`` over the last axis of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> from shardinit.module import Linear
      >>> linear = Linear(8).init(42, jnp.ones((1, 3)))
      >>> linear.kernel.shape, linear.bias.shape
      ((3, 8), (8,))
      >>> linear(jnp.ones((5, 3))).shape
      (5, 8)
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (…, features in) to (…, features out)."""
        if self.initializing():
            self._make(x.shape[-1], self.features_out)
        return self._biased(jnp.matmul(*self._operands(x), precision=self.precision))


class Embed(Module):
    """Maps integers below ``num_embeddings`` to vectors.

    Example:
      >>> import jax.numpy as jnp
      >>> from shardinit.module import Embed
      >>> embed = Embed(100, 16).init(42, jnp.zeros(1, int))
      >>> embed(jnp.arange(5)).shape
      (5, 16)
    """

    embedding: jax.Array | None = Parameter.node()

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        embedding_init: Init = default_embedding_init,
        embedding_axes: Axes = None,
        name: str | None = None,
    ):
        """Sets the options of the layer; computes no values.

        Args:
          num_embeddings: number of vectors.
          features: size of each vector.
          dtype: dtype of the result.
          param_dtype: dtype of the table.
          embedding_init: takes a key, a shape and a dtype.
          embedding_axes: logical axis names of the table.
          name: name of the field that a compact method makes for the layer.
        """
        super().__init__(name)
        self.num_embeddings, self.features = num_embeddings, features
        self.dtype, self.param_dtype = dtype, param_dtype
        self.embedding_init = embedding_init
        self.embedding_axes = embedding_axes
        self.embedding = None

    def field_axes(self) -> dict[str, Axes]:
        """Returns ``embedding_axes``.

        Example:
          >>> from shardinit.module import Embed
          >>> Embed(10, 4).field_axes()
          {'embedding': None}
        """
        return {"embedding": self.embedding_axes}

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Looks up integers (…) as vectors (…, features).

        Raises:
          TypeError: ``ids`` are not integers.
        """
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"Embed: got {ids.dtype}, expected integers to look up")
        if self.initializing():
            shape = (self.num_embeddings, self.features)
            key = parameter_key(next_key(), 1)
            self.embedding = self.embedding_init(key, shape, self.param_dtype)
        assert self.embedding is not None
        return jnp.take(self.embedding.astype(self.dtype), ids, axis=0)
