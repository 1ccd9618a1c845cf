"""Parameters as data: what a model's weights are, before there is a model.

A declaration is a tree of dicts and lists whose leaves are `Param`: the logical name
and size of each dimension, which belong together, so that no dimension goes without a
name, and how the values begin. `Parameters` makes Flax NNX variables of it. The order
in which a declaration lists its parameters is the order in which they draw from the
key, and so part of the model's values; the order of the leaves is by name.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Dims = tuple[tuple[str, int], ...]
"""Logical name and size of each dimension."""


@dataclass(frozen=True)
class Param:
    """One parameter.

    Attributes:
      dims: logical name and size of each dimension.
      dtype: name of its dtype.
      fill: the value of every element; None if they are drawn from a normal
        distribution.
      std: standard deviation of that distribution.
      draw: name of the dtype in which they are drawn, then cast.
      variable: class of its NNX variable.
    """

    dims: Dims
    dtype: str
    fill: float | None = None
    std: float = 0.0
    draw: str = "float32"
    variable: type[nnx.Variable] = nnx.Param


@dataclass(frozen=True)
class Stacked:
    """As many equal subtrees as there are layers, along a leading axis ``layers``."""

    count: int
    tree: Tree


Tree = dict[str, "Param | Stacked | list[Tree] | Tree"]


# One jitted function draws every parameter: a trace then holds one equation a
# parameter, found in a cache from the second layer on, which is what keeps tracing
# hundreds of layers cheap.
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _normal(
    key: jax.Array, shape: tuple[int, ...], std: float, draw: str, dtype: str
) -> jax.Array:
    drawn = jax.random.normal(key, shape, draw) * jnp.asarray(std, draw)
    return drawn.astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _full(value: float, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jnp.full(shape, value, dtype)


def _variable(param: Param, rngs: nnx.Rngs) -> nnx.Variable:
    names, shape = zip(*param.dims, strict=True)
    if param.fill is None:
        value = _normal(rngs.params(), shape, param.std, param.draw, param.dtype)
    else:
        value = _full(param.fill, shape, param.dtype)
    # eager sharding would ask for a mesh; whoever runs the init places the arrays
    return param.variable(value, out_sharding=names, eager_sharding=False)


class Parameters(nnx.Module):
    """A subtree of parameters; each is an attribute by its name.

    Args:
      tree: the declaration.
      rngs: random streams; ``params`` gives the keys.
    """

    def __init__(self, tree: Tree, rngs: nnx.Rngs):
        for name, entry in tree.items():
            setattr(self, name, _made(entry, rngs))


def _made(entry: Any, rngs: nnx.Rngs) -> Any:
    if isinstance(entry, Param):
        return _variable(entry, rngs)
    if isinstance(entry, Stacked):
        return _stack(entry, rngs)
    if isinstance(entry, dict):
        return Parameters(entry, rngs)
    return nnx.List([Parameters(item, rngs) for item in entry])


def _stack(stacked: Stacked, rngs: nnx.Rngs) -> Parameters:
    @nnx.split_rngs(splits=stacked.count)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def layers(rngs: nnx.Rngs) -> Parameters:
        return Parameters(stacked.tree, rngs)

    return layers(rngs)
