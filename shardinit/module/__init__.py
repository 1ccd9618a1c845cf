"""Modules that infer the shapes of their parameters from an example input.

A module is a Python class that is a pytree. Constructing one computes no values.
``init`` takes a key and an example input, infers the shapes of all parameters and
returns an initialised copy::

    class Net(Module):
        scale: jax.Array | Initializer = Parameter.node()

        def __init__(self):
            self.scale = Initializer(jax.random.uniform)
            self.linear = Linear(8)

        def __call__(self, x):
            return self.scale * self.linear(x)

    m = Net().init(42, x, mesh=mesh, rules=rules)

The names and their meaning are those of Treex (see ``docs/modules.md``). In addition,
``init`` compiles the initialisation under ``jax.jit`` with ``out_shardings``, so that
each accelerator computes only its own shard. `init_fn` returns the initialisation as a
function of the key, for plans, programs, windows and the service.

Example:
  >>> import jax.numpy as jnp
  >>> from shardinit.module import Linear
  >>> Linear(8).init(42, jnp.ones((1, 3))).kernel.shape
  (3, 8)
"""

from shardinit.module.base import Module, ModuleMeta
from shardinit.module.containers import MLP, Dropout, Lambda, Sequential, compact_module
from shardinit.module.context import next_key, rng_key
from shardinit.module.convolutions import Conv, ConvTranspose
from shardinit.module.fields import (
    MISSING,
    NOTHING,
    BatchStat,
    Cache,
    FieldInfo,
    Initializer,
    Inputs,
    Kind,
    Log,
    ModelState,
    Nothing,
    OptState,
    Parameter,
    Rng,
    State,
    node,
    static,
)
from shardinit.module.filters import filter
from shardinit.module.initialise import init_fn
from shardinit.module.layers import Embed, Linear
from shardinit.module.norms import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from shardinit.module.recurrent import GRU
from shardinit.module.submodules import compact

__all__ = [
    "GRU",
    "MISSING",
    "MLP",
    "NOTHING",
    "BatchNorm",
    "BatchStat",
    "Cache",
    "Conv",
    "ConvTranspose",
    "Dropout",
    "Embed",
    "FieldInfo",
    "GroupNorm",
    "Initializer",
    "Inputs",
    "Kind",
    "Lambda",
    "LayerNorm",
    "Linear",
    "Log",
    "ModelState",
    "Module",
    "ModuleMeta",
    "Nothing",
    "OptState",
    "Parameter",
    "RMSNorm",
    "Rng",
    "Sequential",
    "State",
    "compact",
    "compact_module",
    "filter",
    "init_fn",
    "next_key",
    "node",
    "rng_key",
    "static",
]
