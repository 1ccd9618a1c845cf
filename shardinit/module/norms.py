"""Normalisation layers, whose parameters get their size from the first input.

Each layer takes one ``next_key()``, since its initialisers may be random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers

from shardinit.module.base import Module
from shardinit.module.context import next_key
from shardinit.module.fields import BatchStat, Parameter
from shardinit.module.layers import Axes, Init, parameter_key


class _Norm(Module):
    """Base class of the layers: a scale and a bias along one axis."""

    scale: jax.Array | None = Parameter.node(None)
    bias: jax.Array | None = Parameter.node(None)

    def __init__(
        self,
        *,
        epsilon: float = 1e-5,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Init = initializers.zeros,
        scale_init: Init = initializers.ones,
        axes: Axes = None,
        name: str | None = None,
    ):
        """Sets the options of the layer; computes no values.

        Args:
          epsilon: added to the variance.
          dtype: dtype of the result; statistics are computed in float32 at least.
          param_dtype: dtype of the parameters.
          use_bias: whether to add a bias.
          use_scale: whether to multiply by a scale.
          bias_init: takes a key, the shape (features,) and a dtype.
          scale_init: takes a key, the shape (features,) and a dtype.
          axes: logical name of the axis of the parameters, as a tuple of one.
          name: name of the field that a compact method makes for the layer.
        """
        super().__init__(name)
        self.epsilon = epsilon
        self.dtype, self.param_dtype = dtype, param_dtype
        self.use_bias, self.use_scale = use_bias, use_scale
        self.bias_init, self.scale_init = bias_init, scale_init
        self.axes = axes

    def field_axes(self) -> dict[str, Axes]:
        """Returns ``axes`` for every array."""
        return dict.fromkeys(("scale", "bias", "mean", "var"), self.axes)

    def _make(self, features: int) -> None:
        key, shape, dtype = next_key(), (features,), self.param_dtype
        if self.use_scale:
            self.scale = self.scale_init(parameter_key(key, 1), shape, dtype)
        if self.use_bias:
            number = 1 + self.use_scale
            self.bias = self.bias_init(parameter_key(key, number), shape, dtype)

    def _apply(
        self, x: jax.Array, mean: jax.Array | None, var: jax.Array, shape: Any = (-1,)
    ) -> jax.Array:
        y = x if mean is None else x - mean
        factor = lax.rsqrt(var + self.epsilon)
        if self.scale is not None:
            factor = factor * self.scale.reshape(shape)
        y = y * factor
        if self.bias is not None:
            y = y + self.bias.reshape(shape)
        return y.astype(self.dtype)


def _statistics_of(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class LayerNorm(_Norm):
    """Normalises to zero mean and unit variance along the last axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from shardinit.module import LayerNorm
      >>> x = jnp.array([[1.0, 3.0]])
      >>> LayerNorm().init(42, x)(x).round(3).tolist()
      [[-1.0, 1.0]]
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x (…, features)."""
        if self.initializing():
            self._make(x.shape[-1])
        wide = _statistics_of(x)
        mean = wide.mean(-1, keepdims=True)
        return self._apply(wide, mean, wide.var(-1, keepdims=True))


class RMSNorm(_Norm):
    """Normalises to unit root mean square along the last axis; by default no bias.

    Example:
      >>> import jax.numpy as jnp
      >>> from shardinit.module import RMSNorm
      >>> x = jnp.array([[3.0, -3.0]])
      >>> RMSNorm().init(42, x)(x).round(3).tolist()
      [[1.0, -1.0]]
    """

    def __init__(self, *, use_bias: bool = False, **options: Any):
        """Takes the options of `LayerNorm`; ``use_bias`` is False by default."""
        super().__init__(use_bias=use_bias, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x (…, features)."""
        if self.initializing():
            self._make(x.shape[-1])
        wide = _statistics_of(x)
        return self._apply(wide, None, jnp.square(wide).mean(-1, keepdims=True))


class BatchNorm(_Norm):
    """Normalises over all axes but one, with running statistics.

    In training, if the layer is not frozen, a call normalises by the statistics of its
    batch and updates the running statistics. Otherwise it normalises by the running
    statistics. ``init`` creates the running statistics and does not update them.

    Example:
      >>> import jax.numpy as jnp
      >>> from shardinit.module import BatchNorm
      >>> x = jnp.array([[1.0], [3.0]])
      >>> norm = BatchNorm(momentum=0.5).init(42, x)
      >>> norm(x).round(3).tolist()
      [[-1.0], [1.0]]
      >>> norm.mean.tolist()
      [1.0]
    """

    mean: jax.Array | None = BatchStat.node(None)
    var: jax.Array | None = BatchStat.node(None)

    def __init__(
        self,
        *,
        axis: int = -1,
        momentum: float = 0.99,
        axis_name: str | None = None,
        **options: Any,
    ):
        """Sets the options of the layer; computes no values.

        Args:
          axis: the axis that holds the features.
          momentum: weight of the old running statistics in an update.
          axis_name: mapped axis (``jax.vmap`` or ``shard_map``) to average over.
          **options: options of `LayerNorm`.
        """
        super().__init__(**options)
        self.axis = axis
        self.momentum = momentum
        self.axis_name = axis_name

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None
    ) -> jax.Array:
        """Normalises ``x``.

        Args:
          x: an array with features along ``axis``.
          use_running_average: whether to normalise by the running statistics and not
            update them; by default true if not training, if frozen, and in ``init``.
        """
        axis = self.axis % x.ndim
        if self.initializing():
            self._make(x.shape[axis])
            self.mean = jnp.zeros((x.shape[axis],), jnp.float32)
            self.var = jnp.ones((x.shape[axis],), jnp.float32)
        assert self.mean is not None
        assert self.var is not None
        if use_running_average is None:
            learns = self.training and not self.frozen and self.initialized
            use_running_average = not learns
        wide = _statistics_of(x)
        mean, var = self.mean, self.var
        if not use_running_average:
            others = tuple(i for i in range(x.ndim) if i != axis)
            mean, square = wide.mean(others), jnp.square(wide).mean(others)
            if self.axis_name is not None:
                mean, square = lax.pmean((mean, square), self.axis_name)
            # Not the mean of squares around the mean, which one `pmean` could not
            # average. In float32 the difference may come out below 0 (1000 ± 0.001
            # gives -0.125), of which ``rsqrt`` is NaN.
            var = jnp.maximum(square - jnp.square(mean), 0.0)
            keep = self.momentum
            self.mean = keep * self.mean + (1.0 - keep) * mean
            self.var = keep * self.var + (1.0 - keep) * var
        shape = [1] * x.ndim
        shape[axis] = -1
        return self._apply(wide, mean.reshape(shape), var.reshape(shape), shape)


class GroupNorm(_Norm):
    """Normalises groups of features, over the spatial axes too, for each example.

    Example:
      >>> import jax.numpy as jnp
      >>> from shardinit.module import GroupNorm
      >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
      >>> GroupNorm(2).init(42, x)(x).round(3).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """

    def __init__(
        self,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        reduction_axes: Sequence[int] | None = None,
        axis_name: str | None = None,
        **options: Any,
    ):
        """Sets the options of the layer; computes no values.

        Args:
          num_groups: number of groups of features; None if ``group_size`` is given.
          group_size: number of features in a group.
          epsilon: added to the variance.
          reduction_axes: axes of the statistics, the last one among them; by default
            all but the first.
          axis_name: mapped axis (``jax.vmap`` or ``shard_map``) to average over.
          **options: options of `LayerNorm`.

        Raises:
          ValueError: both or neither of ``num_groups`` and ``group_size`` are given.
        """
        super().__init__(epsilon=epsilon, **options)
        if (num_groups is None) == (group_size is None):
            raise ValueError(
                f"GroupNorm: got num_groups={num_groups} and group_size={group_size}; "
                "expected one of them, and None for the other"
            )
        self.num_groups, self.group_size = num_groups, group_size
        self.reduction_axes = None if reduction_axes is None else tuple(reduction_axes)
        self.axis_name = axis_name

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x (batch, spatial…, features).

        Raises:
          ValueError: the features do not divide into the groups, or
            ``reduction_axes`` lack the last axis.
        """
        features, last = x.shape[-1], x.ndim - 1
        groups = self._groups(features)
        axes = {axis % x.ndim for axis in self.reduction_axes or (*range(1, last), -1)}
        if last not in axes:
            raise ValueError("GroupNorm: reduction_axes must have the last axis")
        if self.initializing():
            self._make(features)
        wide = _statistics_of(x)
        grouped = wide.reshape(*x.shape[:-1], groups, features // groups)
        over = (*(axes - {last}), last + 1)
        mean = grouped.mean(over, keepdims=True)
        square = jnp.square(grouped).mean(over, keepdims=True)
        if self.axis_name is not None:
            mean, square = lax.pmean((mean, square), self.axis_name)
        var = jnp.maximum(square - jnp.square(mean), 0.0)
        repeats = features // groups
        mean, var = (jnp.repeat(v[..., 0], repeats, axis=-1) for v in (mean, var))
        return self._apply(wide, mean, var)

    def _groups(self, features: int) -> int:
        size = self.group_size
        groups = self.num_groups if size is None else features // size
        if not groups or features % groups or size not in (None, features // groups):
            raise ValueError(
                f"GroupNorm: got {features} features; expected a multiple of "
                f"num_groups={self.num_groups} or group_size={size}"
            )
        return groups
