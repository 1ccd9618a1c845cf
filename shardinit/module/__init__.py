"""Modules that initialise on first sight of their input, and end sharded.

A module is a Python class that is a pytree. It waits without values until ``init`` is
given a key and an example input, whose shapes fix its own::

    class Net(Module):
        scale: jax.Array | Initializer = Parameter.node()

        def __init__(self):
            self.scale = Initializer(jax.random.uniform)
            self.linear = Linear(8)

        def __call__(self, x):
            return self.scale * self.linear(x)

    m = Net().init(42, x, mesh=mesh, rules=rules)

What Treex calls ``tx.Module`` is meant, name for name (see ``docs/modules.md``); what
it lacked is the end: values compiled under ``jax.jit`` with ``out_shardings``, leaf by
leaf, each accelerator making its own shard. `init_fn` gives the function of the key for
all else that takes one: plans, programs, windows, the service.
"""

from shardinit.module.base import Module, ModuleMeta
from shardinit.module.containers import MLP, Dropout, Lambda, Sequential, compact_module
from shardinit.module.context import next_key, rng_key
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
from shardinit.module.initialise import init_fn
from shardinit.module.layers import Conv, Embed, Linear
from shardinit.module.norms import BatchNorm, LayerNorm, RMSNorm
from shardinit.module.submodules import compact

__all__ = [
    "MISSING",
    "MLP",
    "NOTHING",
    "BatchNorm",
    "BatchStat",
    "Cache",
    "Conv",
    "Dropout",
    "Embed",
    "FieldInfo",
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
    "init_fn",
    "next_key",
    "node",
    "rng_key",
    "static",
]
