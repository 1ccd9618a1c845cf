"""Small models as a user would write them, for the tests of this folder."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from shardinit import deferred

STATIC = {"pytree_node": False}


@deferred.pytree_dataclass
class Dense(deferred.Struct):
    kernel: deferred.ParameterLike[jax.Array]
    bias: deferred.ParameterLike[jax.Array]
    activation: Callable = dataclasses.field(metadata=STATIC)

    @classmethod
    def build(cls, inputs, outputs, axes=("embed", "mlp")):
        def draw(key):
            return jax.random.normal(key, (inputs, outputs)) * 0.02

        def zeros(key):
            return jnp.zeros((outputs,))

        return cls(
            deferred.UninitializedParameter(deferred.with_axes(draw, axes), "kernel"),
            deferred.UninitializedParameter(zeros, "bias"),
            jax.nn.relu,
        )

    def __call__(self, x):
        return self.activation(x @ self.kernel.value + self.bias.value)


def stack(layers=3, inputs=64, outputs=64):
    """A list of Dense, with prefixes."""
    return [
        deferred.add_parameter_prefix(f"layer_{n}", Dense.build(inputs, outputs))
        for n in range(layers)
    ]


def weight(name="w", shape=(4, 32)):
    return deferred.UninitializedParameter(
        lambda key: jax.random.normal(key, shape), name
    )


def keys_of(model):
    """The model with, for each parameter, an initializer that returns its key data."""

    def show(parameter):
        return deferred.UninitializedParameter(jax.random.key_data, parameter.name)

    found = deferred.select(model).at_instances_of(deferred.UninitializedParameter)
    return found.apply(show)


def jitted(model, key):
    """The oracle for the sharded form: the plain form under ``jax.jit``."""
    return jax.jit(lambda key: deferred.initialize_parameters(model, key))(key)
