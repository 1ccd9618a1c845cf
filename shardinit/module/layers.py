"""Layers that infer the size of their input in ``init``.

Each layer takes one ``next_key()`` when it is initialised, and its initial values are
those of the Flax layer that Treex wraps. Flax derives the n-th parameter of a module by
folding the SHA-1 of n into the key of the module. These layers do the same, so a model
ported from Treex starts from the same weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import initializers

from shardinit.module.base import Module
from shardinit.module.context import fold_in, next_key
from shardinit.module.fields import Parameter

Init = Callable[[jax.Array, Sequence[int], Any], jax.Array]
Axes = tuple[str | None, ...] | None

default_kernel_init = initializers.lecun_normal()
default_embedding_init = initializers.variance_scaling(
    1.0, "fan_in", "normal", out_axis=0
)


def parameter_key(key: jax.Array, number: int) -> jax.Array:
    """Derives the key of the n-th parameter of a layer, from 1, as Flax does."""
    digest = hashlib.sha1(bytes([number])).digest()
    return fold_in(key, np.uint32(int.from_bytes(digest[:4], "big")))


class Linear(Module):
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
        name: str | None = None,
    ):
        """Sets the options of the layer; computes no values.

        Args:
          features_out: size of the last axis of the output.
          use_bias: whether to add a bias.
          dtype: dtype of the computation.
          param_dtype: dtype of the parameters.
          precision: precision of the product, see ``jax.lax.Precision``.
          kernel_init: takes a key, the shape (features in, features out) and a dtype.
          bias_init: takes a key, the shape (features out,) and a dtype.
          kernel_axes: logical axis names of the kernel; the bias has the last one.
          name: name of the field that a compact method makes for the layer.
        """
        super().__init__(name)
        self.features_out = features_out
        self.use_bias = use_bias
        self.dtype, self.param_dtype = dtype, param_dtype
        self.precision = precision
        self.kernel_init, self.bias_init = kernel_init, bias_init
        self.kernel_axes = kernel_axes
        self.kernel = None
        self.bias = None

    def field_axes(self) -> dict[str, Axes]:
        """Returns ``kernel_axes``, and the last of them for the bias."""
        axes = self.kernel_axes
        return {"kernel": axes, "bias": axes[-1:] if axes else None}

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (…, features in) to (…, features out)."""
        if self.initializing():
            key, shape = next_key(), (x.shape[-1], self.features_out)
            self.kernel = self.kernel_init(
                parameter_key(key, 1), shape, self.param_dtype
            )
            if self.use_bias:
                key = parameter_key(key, 2)
                self.bias = self.bias_init(key, shape[1:], self.param_dtype)
        assert self.kernel is not None
        kernel = self.kernel.astype(self.dtype)
        y = jnp.matmul(x.astype(self.dtype), kernel, precision=self.precision)
        return y if self.bias is None else y + self.bias.astype(self.dtype)


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
        """Returns ``embedding_axes``."""
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


class Conv(Module):
    """A convolution over the spatial axes of (batch, spatial…, features).

    Example:
      >>> import jax.numpy as jnp
      >>> from shardinit.module import Conv
      >>> conv = Conv(8, (3, 3)).init(42, jnp.ones((1, 16, 16, 3)))
      >>> conv.kernel.shape
      (3, 3, 3, 8)
      >>> conv(jnp.ones((2, 16, 16, 3))).shape
      (2, 16, 16, 8)
    """

    kernel: jax.Array | None = Parameter.node()
    bias: jax.Array | None = Parameter.node()

    def __init__(
        self,
        features_out: int,
        kernel_size: int | Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: str | Sequence[tuple[int, int]] = "SAME",
        input_dilation: int | Sequence[int] = 1,
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Init = default_kernel_init,
        bias_init: Init = initializers.zeros,
        kernel_axes: Axes = None,
        name: str | None = None,
    ):
        """Sets the options of the layer; computes no values.

        Args:
          features_out: number of filters.
          kernel_size: size along each spatial axis; an int means one spatial axis.
          strides: strides of the windows along each spatial axis.
          padding: ``"SAME"``, ``"VALID"``, or a pair (before, after) for each axis.
          input_dilation: ``lhs_dilation`` of ``jax.lax.conv_general_dilated``.
          kernel_dilation: ``rhs_dilation`` of ``jax.lax.conv_general_dilated``.
          feature_group_count: as for ``jax.lax.conv_general_dilated``.
          use_bias: whether to add a bias.
          dtype: dtype of the computation.
          param_dtype: dtype of the parameters.
          precision: see ``jax.lax.Precision``.
          kernel_init: takes a key, the shape (*kernel_size, features in / groups,
            features out) and a dtype.
          bias_init: takes a key, the shape (features out,) and a dtype.
          kernel_axes: logical axis names of the kernel; the bias has the last one.
          name: name of the field that a compact method makes for the layer.
        """
        super().__init__(name)
        single = isinstance(kernel_size, int)
        self.kernel_size = (kernel_size,) if single else tuple(kernel_size)
        self.features_out = features_out
        self.strides = self._along(strides)
        self.padding = padding
        self.input_dilation = self._along(input_dilation)
        self.kernel_dilation = self._along(kernel_dilation)
        self.feature_group_count = feature_group_count
        self.use_bias = use_bias
        self.dtype, self.param_dtype = dtype, param_dtype
        self.precision = precision
        self.kernel_init, self.bias_init = kernel_init, bias_init
        self.kernel_axes = kernel_axes
        self.kernel = None
        self.bias = None

    def _along(self, sizes: int | Sequence[int]) -> tuple[int, ...]:
        if isinstance(sizes, int):
            return (sizes,) * len(self.kernel_size)
        return tuple(sizes)

    def field_axes(self) -> dict[str, Axes]:
        """Returns ``kernel_axes``, and the last of them for the bias."""
        axes = self.kernel_axes
        return {"kernel": axes, "bias": axes[-1:] if axes else None}

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (batch, spatial…, features in) to (batch, spatial…, features out)."""
        if self.initializing():
            key = next_key()
            features_in = x.shape[-1] // self.feature_group_count
            shape = (*self.kernel_size, features_in, self.features_out)
            self.kernel = self.kernel_init(
                parameter_key(key, 1), shape, self.param_dtype
            )
            if self.use_bias:
                key = parameter_key(key, 2)
                self.bias = self.bias_init(key, shape[-1:], self.param_dtype)
        assert self.kernel is not None
        rank = x.ndim
        image = (0, rank - 1, *range(1, rank - 1))
        filters = (rank - 1, rank - 2, *range(rank - 2))
        y = lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel.astype(self.dtype),
            self.strides,
            self.padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=lax.ConvDimensionNumbers(image, filters, image),
            feature_group_count=self.feature_group_count,
            precision=self.precision,
        )
        return y if self.bias is None else y + self.bias.astype(self.dtype)
