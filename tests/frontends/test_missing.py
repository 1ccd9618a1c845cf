"""init_missing takes what init returned, the user's own object, of every front end."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import shardinit
from shardinit import deferred
from shardinit import module as tx
from shardinit.frontends import linen as from_linen
from shardinit.frontends import nnx as from_nnx
from tests.core.bits import differing
from tests.deferred.models import stack

pytestmark = pytest.mark.once

X = jnp.ones((2, 8))


def boxed_dense():
    kernel = nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    return from_linen.init_fn(nn.Dense(16, kernel_init=kernel), X)


def nnx_layers(rngs):
    return nnx.Sequential(
        nnx.Linear(8, 16, rngs=rngs),
        nnx.Dropout(0.5, rngs=rngs),
        nnx.BatchNorm(16, rngs=rngs),
    )


FRONT_ENDS = {
    "boxed Linen variables": boxed_dense,
    "an NNX model": lambda: from_nnx.init_fn(nnx_layers),
    "a deferred model": lambda: deferred.init_fn(stack(2)),
    "a module": lambda: tx.init_fn(
        tx.Sequential(tx.Linear(16), tx.BatchNorm(), tx.Linear(3)), X
    ),
}


@pytest.mark.parametrize("name", FRONT_ENDS)
@pytest.mark.few(1)
def test_what_init_made_is_complete(name):
    fn = FRONT_ENDS[name]()
    made = shardinit.init(fn, 0)
    again = shardinit.init_missing(made, fn, 1)
    assert jax.tree.structure(again) == jax.tree.structure(made)
    assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (again, made))))


def test_the_parameters_of_an_nnx_model_alone_are_completed():
    fn = from_nnx.init_fn(nnx_layers)
    full = shardinit.init(fn, 0)
    done = shardinit.init_missing(nnx.state(full, nnx.Param), fn, 0)
    assert differing(nnx.state(done), nnx.state(full)) == []
    assert done.layers[0].kernel.get_value() is full.layers[0].kernel.get_value()


def test_a_deferred_model_that_is_filled_in_part_is_completed():
    fn = deferred.init_fn(stack(2))
    full = shardinit.init(fn, 0)
    part = shardinit.init(fn, 0, select=lambda path: path.startswith("0"))
    waiting = jax.tree.leaves(
        part, is_leaf=lambda x: isinstance(x, deferred.UninitializedParameter)
    )
    assert any(isinstance(x, deferred.UninitializedParameter) for x in waiting)
    assert differing(shardinit.init_missing(part, fn, 0), full) == []


def test_a_box_whose_value_is_missing_is_filled():
    fn = boxed_dense()
    full = shardinit.init(fn, 0)
    box = full["params"]["kernel"]
    part = {"params": {**full["params"], "kernel": box.replace_boxed(None)}}
    done = shardinit.init_missing(part, fn, 0)
    assert done["params"]["kernel"].names == ("embed", "mlp")
    assert differing(done, full) == []
