"""Containers, wrappers of functions, and dropout."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from shardinit.module.base import Module
from shardinit.module.fields import Rng
from shardinit.module.layers import (
    Init,
    Linear,
    default_kernel_init,
    held_key,
    parameter_key,
)
from shardinit.module.submodules import compact


class Lambda(Module):
    """Wraps a pure function as a module.

    Example:
      >>> from shardinit.module import Lambda
      >>> Lambda(abs)(-3)
      3
    """

    def __init__(self, f: Callable[..., Any]):
        """Wraps ``f``."""
        self.f = f

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns ``f(*args, **kwargs)``."""
        return self.f(*args, **kwargs)


class Sequential(Module):
    """Applies modules and functions in order, each to the result of the previous.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from shardinit.module import Linear, Sequential
      >>> model = Sequential(Linear(4), jax.nn.relu, Linear(2))
      >>> model = model.init(42, jnp.ones((1, 3)))
      >>> [type(layer).__name__ for layer in model.layers]
      ['Linear', 'Lambda', 'Linear']
      >>> model(jnp.ones((5, 3))).shape
      (5, 2)
    """

    layers: list[Module]

    def __init__(self, *layers: Callable[..., Any]):
        """Keeps the layers in a list; a function becomes a `Lambda`."""
        self.layers = [x if isinstance(x, Module) else Lambda(x) for x in layers]

    def __call__(self, x: Any) -> Any:
        """Applies the layers to ``x`` in order."""
        for layer in self.layers:
            x = layer(x)  # type: ignore[operator]
        return x


class MLP(Module):
    """Linear layers with an activation between them; the last one is linear.

    Example:
      >>> import jax.numpy as jnp
      >>> from shardinit.module import MLP
      >>> mlp = MLP([8, 2]).init(42, jnp.ones((1, 3)))
      >>> mlp.linear.kernel.shape, mlp.linear2.kernel.shape
      ((3, 8), (8, 2))
    """

    def __init__(
        self,
        features: Sequence[int],
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        *,
        use_bias: bool = True,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Init = default_kernel_init,
        bias_init: Init = initializers.zeros,
        name: str | None = None,
    ):
        """Sets the options of the layers; computes no values.

        Args:
          features: size of the output of each layer.
          activation: applied between layers.
          use_bias: see `Linear`.
          dtype: see `Linear`.
          param_dtype: see `Linear`.
          precision: see `Linear`.
          kernel_init: see `Linear`.
          bias_init: see `Linear`.
          name: see `Linear`.

        Raises:
          ValueError: ``features`` is empty.
        """
        super().__init__(name)
        if not features:
            raise ValueError("MLP: features is empty; expected a size for each layer")
        self.features = tuple(features)
        self.activation = activation
        self.options = {
            "use_bias": use_bias,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "kernel_init": kernel_init,
            "bias_init": bias_init,
        }

    @compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (…, features in) to (…, features[-1])."""
        for number, features in enumerate(self.features):
            if number:
                x = self.activation(x)
            x = Linear(features, **self.options)(x)
        return x


class Dropout(Module):
    """Sets random elements to zero in training, and scales the others up.

    The layer holds its own key; each call in training splits it.

    Example:
      >>> import jax.numpy as jnp
      >>> from shardinit.module import Dropout
      >>> dropout = Dropout(0.5).init(42)
      >>> bool((dropout.eval()(jnp.ones(8)) == 1).all())
      True
      >>> sorted(set(Dropout(0.5).init(42)(jnp.ones(1000)).tolist()))
      [0.0, 2.0]
    """

    rng: Any = Rng.node()

    def __init__(self, rate: float, broadcast_dims: Sequence[int] = ()):
        """Sets the options of the layer; computes no values.

        Args:
          rate: probability that an element is set to zero.
          broadcast_dims: axes along which the random mask is broadcast.
        """
        self.rate = rate
        self.broadcast_dims = tuple(broadcast_dims)
        self.rng = held_key()

    def __call__(
        self,
        x: jax.Array,
        deterministic: bool | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Applies dropout to ``x``.

        Args:
          x: an array.
          deterministic: whether to return ``x`` unchanged; by default true if the
            module is not training or is frozen.
          rng: a key to use instead of the one that the layer holds.
        """
        if deterministic is None:
            deterministic = not self.training or self.frozen
        if deterministic:
            return x
        if rng is None:
            self.initializing()  # raises while there is no key to split
            rng, self.rng = jax.random.split(self.rng)
        assert rng is not None
        if self.rate <= 0.0:
            return x
        if self.rate >= 1.0:
            return jnp.zeros_like(x)
        shape = list(x.shape)
        for dim in self.broadcast_dims:
            shape[dim] = 1
        kept = jax.random.bernoulli(parameter_key(rng, 1), 1.0 - self.rate, shape)
        kept = jnp.broadcast_to(kept, x.shape)
        return jnp.where(kept, x / (1.0 - self.rate), jnp.zeros_like(x))


def compact_module(fn: Callable[..., Any]) -> Any:
    """Makes a module class whose ``__call__`` is a function as a compact method.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from shardinit.module import Inputs, Linear, compact_module
      >>> @compact_module
      ... def Block(x, features):
      ...     return jax.nn.relu(Linear(features)(x))
      >>> block = Block().init(42, Inputs(jnp.ones((2, 3)), features=8))
      >>> block.linear.kernel.shape
      (3, 8)
    """

    # Not named as the function: what a compact method made is noted by its name.
    @compact
    @functools.wraps(fn, assigned=("__doc__",))
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    name = getattr(fn, "__name__", "compact_module")
    body = {
        "__call__": __call__,
        "__doc__": fn.__doc__,
        "__module__": fn.__module__,
        "__qualname__": getattr(fn, "__qualname__", name),
    }
    return types.new_class(name, (Module,), exec_body=lambda ns: ns.update(body))
