"""Two models that a service offers by name: a deferred tree and a `Module`.

A builder gets the config of a spec, which a stranger wrote: it checks every key, says
all that is wrong at once, and allocates nothing. What it returns is an `InitFn`; from
there on the service knows no difference between frameworks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shardinit import deferred
from shardinit import module as tx
from shardinit.core.init_fn import InitFn
from shardinit.deferred import ParameterLike, Struct, UninitializedParameter
from shardinit.errors import SpecError
from shardinit.models import register

_SIZE = {"type": "integer", "description": "width of the layers", "default": 64}
_LAYERS = {"type": "integer", "description": "number of layers", "default": 2}
SCHEMA = {"type": "object", "properties": {"size": _SIZE, "layers": _LAYERS}}


def sizes(model: str, config: Mapping[str, Any]) -> tuple[int, int]:
    """The config's size and number of layers.

    Raises:
      SpecError: unknown keys, or values out of range.
    """
    known = {"size": (64, 1 << 16), "layers": (2, 1000)}
    faults = [(name, "unknown key") for name in config if name not in known]
    values = []
    for name, (default, most) in known.items():
        value = config.get(name, default)
        if type(value) is not int or not 1 <= value <= most:
            faults.append((name, f"{value!r}; expected an integer from 1 to {most}"))
        values.append(value)
    if faults:
        raise SpecError(model, faults)
    return values[0], values[1]


@deferred.pytree_dataclass
class Layer(Struct):
    """A linear layer of deferred parameters."""

    kernel: ParameterLike[jax.Array]
    bias: ParameterLike[jax.Array]

    @classmethod
    def build(cls, name: str, size: int) -> Layer:
        """An uninitialised one; its parameters are named below ``name``."""

        def kernel(key: jax.Array) -> jax.Array:
            return jax.random.normal(key, (size, 4 * size)) * size**-0.5

        def bias(key: jax.Array) -> jax.Array:
            return jnp.zeros((4 * size,))

        axes = ("embed", "mlp")
        return cls(
            UninitializedParameter(deferred.with_axes(kernel, axes), f"{name}.kernel"),
            UninitializedParameter(deferred.with_axes(bias, axes[1:]), f"{name}.bias"),
        )


@register("zoo-mlp", schema=SCHEMA)
def build_mlp(config: Mapping[str, Any]) -> InitFn:
    """A stack of layers, every parameter's key derived from its name."""
    size, layers = sizes("zoo-mlp", config)
    return deferred.init_fn([Layer.build(f"layer{i}", size) for i in range(layers)])


class Net(tx.Module):
    """Linear layers that learn their input's size when they first see it."""

    def __init__(self, size: int, layers: int):
        self.layers = [tx.Linear(size) for _ in range(layers)]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, features) to (batch, size)."""
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return x


@register("zoo-net", schema=SCHEMA)
def build_net(config: Mapping[str, Any]) -> InitFn:
    """A module, initialised for inputs of half its size."""
    size, layers = sizes("zoo-net", config)
    inputs = jax.ShapeDtypeStruct((1, max(size // 2, 1)), jnp.float32)
    return tx.init_fn(Net(size, layers), inputs)
