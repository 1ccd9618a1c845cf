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

from shardinit.module.base import Module as Module
from shardinit.module.base import ModuleMeta as ModuleMeta
from shardinit.module.containers import MLP as MLP
from shardinit.module.containers import Dropout as Dropout
from shardinit.module.containers import Lambda as Lambda
from shardinit.module.containers import Sequential as Sequential
from shardinit.module.containers import compact_module as compact_module
from shardinit.module.context import next_key as next_key
from shardinit.module.context import rng_key as rng_key
from shardinit.module.convolutions import Conv as Conv
from shardinit.module.convolutions import ConvTranspose as ConvTranspose
from shardinit.module.fields import MISSING as MISSING
from shardinit.module.fields import NOTHING as NOTHING
from shardinit.module.fields import BatchStat as BatchStat
from shardinit.module.fields import Cache as Cache
from shardinit.module.fields import FieldInfo as FieldInfo
from shardinit.module.fields import Initializer as Initializer
from shardinit.module.fields import Inputs as Inputs
from shardinit.module.fields import Kind as Kind
from shardinit.module.fields import Log as Log
from shardinit.module.fields import ModelState as ModelState
from shardinit.module.fields import Nothing as Nothing
from shardinit.module.fields import OptState as OptState
from shardinit.module.fields import Parameter as Parameter
from shardinit.module.fields import Rng as Rng
from shardinit.module.fields import State as State
from shardinit.module.fields import node as node
from shardinit.module.fields import static as static
from shardinit.module.filters import filter as filter
from shardinit.module.initialise import init_fn as init_fn
from shardinit.module.layers import Embed as Embed
from shardinit.module.layers import Linear as Linear
from shardinit.module.norms import BatchNorm as BatchNorm
from shardinit.module.norms import GroupNorm as GroupNorm
from shardinit.module.norms import LayerNorm as LayerNorm
from shardinit.module.norms import RMSNorm as RMSNorm
from shardinit.module.recurrent import GRU as GRU
from shardinit.module.submodules import compact as compact
