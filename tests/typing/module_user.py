"""Modules as a user writes them, for pyright: no test runs this file.

``assert_type`` says what pyright must infer; an ``ignore`` on a line that pyright would
accept is an error of its own (reportUnnecessaryTypeIgnoreComment, below).
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import assert_type

import jax
import jax.numpy as jnp

import shardinit
from shardinit import module
from shardinit.module import (
    BatchNorm,
    BatchStat,
    Dropout,
    Initializer,
    Inputs,
    Linear,
    Module,
    Parameter,
    Rng,
    Sequential,
    compact,
    compact_module,
    next_key,
    rng_key,
    static,
)


class Dense(Module):
    w: jax.Array | None = Parameter.node()
    b: jax.Array | Initializer = Parameter.node(axes=("mlp",))
    mean: jax.Array | None = BatchStat.node(None)
    key: jax.Array | Initializer = Rng.node(default_factory=lambda: Initializer(_same))
    scale: float = static(1.0)
    features: int

    def __init__(self, features: int):
        self.features = features
        self.w = None
        self.b = Initializer(lambda key: jax.random.uniform(key, (features,)))

    def rng_init(self) -> None:
        self.mean = jax.random.uniform(next_key(), (self.features,))

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.initializing():
            shape = (x.shape[-1], self.features)
            self.w = jax.random.uniform(next_key(), shape)
        assert self.w is not None
        assert not isinstance(self.b, Initializer)
        return x @ self.w + self.b


def _same(key: jax.Array) -> jax.Array:
    return key


class Net(Module):
    layers: list[Dense]

    def __init__(self, sizes: list[int], name: str | None = None):
        super().__init__(name)
        self.layers = [Dense(n) for n in sizes]

    @compact
    def __call__(self, x: jax.Array, *, wide: bool = False) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        x = BatchNorm()(x)
        return Linear(64 if wide else 8)(x)


@compact_module
def block(x: jax.Array, features: int) -> jax.Array:
    return Dropout(0.5)(Linear(features)(x))


x = jnp.ones((2, 4))
net = Net([3, 4], name="net")
assert_type(net, Net)
made = net.init(42, x)
assert_type(made, Net)
assert_type(made.layers[0], Dense)
assert_type(made.layers[0].w, jax.Array | None)
assert_type(made(x), jax.Array)
assert_type(made(x, wide=True), jax.Array)
assert_type(made.initialized, bool)
assert_type(made.filter(Parameter), Net)
assert_type(made.merge(made.filter(Parameter)), Net)
assert_type(made.trainable_parameters(), Net)
assert_type(made.train().eval().freeze().unfreeze(), Net)
assert_type(made.tabulate(x), str)
assert_type(net.init(jax.random.key(0), Inputs(x, wide=True), inplace=True), Net)
assert_type(module.init_fn(net, x), shardinit.InitFn)

mesh = jax.make_mesh((1,), ("data",))
sharded = net.init(42, x, mesh=mesh, rules=shardinit.fsdp("data"), key_policy="name")
assert_type(sharded, Net)

with rng_key(3):
    assert_type(next_key(), jax.Array)

Sequential(Linear(3), jnp.tanh, Net([2])).init(1, x)
block().init(1, Inputs(x, 8))

Dense("8")  # pyright: ignore[reportArgumentType]
Dense()  # pyright: ignore[reportCallIssue]
made("x")  # pyright: ignore[reportArgumentType]
made.layers[0].features = "8"  # pyright: ignore[reportAttributeAccessIssue]
