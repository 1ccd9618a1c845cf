"""Convolutions over the spatial axes of (batch, spatial…, features)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from shardinit.module.layers import Affine


def _sizes(kernel_size: int | Sequence[int]) -> tuple[int, ...]:
    return (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)


def _along(kernel_size: tuple[int, ...], sizes: int | Sequence[int]) -> tuple[int, ...]:
    """One size for each spatial axis."""
    if isinstance(sizes, int):
        return (sizes,) * len(kernel_size)
    return tuple(sizes)


class Conv(Affine):
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
        **options: Any,
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
          **options: options of `Linear`. The kernel has the shape (*kernel_size,
            features in / groups, features out).
        """
        super().__init__(features_out, **options)
        self.kernel_size = _sizes(kernel_size)
        self.strides = _along(self.kernel_size, strides)
        self.padding = padding
        self.input_dilation = _along(self.kernel_size, input_dilation)
        self.kernel_dilation = _along(self.kernel_size, kernel_dilation)
        self.feature_group_count = feature_group_count

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (batch, spatial…, features in) to (batch, spatial…, features out)."""
        if self.initializing():
            features_in = x.shape[-1] // self.feature_group_count
            self._make(*self.kernel_size, features_in, self.features_out)
        rank = x.ndim
        image = (0, rank - 1, *range(1, rank - 1))
        filters = (rank - 1, rank - 2, *range(rank - 2))
        y = lax.conv_general_dilated(
            *self._operands(x),
            self.strides,
            self.padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=lax.ConvDimensionNumbers(image, filters, image),
            feature_group_count=self.feature_group_count,
            precision=self.precision,
        )
        return self._biased(y)


class ConvTranspose(Affine):
    """A transposed convolution over (batch, spatial…, features).

    Example:
      >>> import jax.numpy as jnp
      >>> from shardinit.module import ConvTranspose
      >>> up = ConvTranspose(8, (3, 3), strides=2).init(42, jnp.ones((1, 4, 4, 3)))
      >>> up.kernel.shape
      (3, 3, 3, 8)
      >>> up(jnp.ones((2, 4, 4, 3))).shape
      (2, 8, 8, 8)
    """

    def __init__(
        self,
        features_out: int,
        kernel_size: int | Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: str | Sequence[tuple[int, int]] = "SAME",
        kernel_dilation: int | Sequence[int] = 1,
        **options: Any,
    ):
        """Sets the options of the layer; computes no values.

        Args:
          features_out: number of filters.
          kernel_size: size along each spatial axis; an int means one spatial axis.
          strides: factors by which the spatial axes grow.
          padding: ``"SAME"``, ``"VALID"``, or a pair (before, after) for each axis.
          kernel_dilation: ``rhs_dilation`` of ``jax.lax.conv_transpose``.
          **options: options of `Linear`. The kernel has the shape (*kernel_size,
            features in, features out).
        """
        super().__init__(features_out, **options)
        self.kernel_size = _sizes(kernel_size)
        self.strides = _along(self.kernel_size, strides)
        self.padding = padding
        self.kernel_dilation = _along(self.kernel_size, kernel_dilation)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (batch, spatial…, features in) to (batch, spatial…, features out)."""
        if self.initializing():
            self._make(*self.kernel_size, x.shape[-1], self.features_out)
        y = lax.conv_transpose(
            *self._operands(x),
            self.strides,
            self.padding,
            rhs_dilation=self.kernel_dilation,
            precision=self.precision,
        )
        return self._biased(y)
