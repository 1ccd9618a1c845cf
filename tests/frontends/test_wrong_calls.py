"""A front end that is given something else says what it takes."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import shardinit
from shardinit.errors import InitFnError
from shardinit.frontends import equinox, haiku, linen
from shardinit.frontends import nnx as from_nnx

pytestmark = pytest.mark.once

X = jax.ShapeDtypeStruct((2, 8), jnp.float32)
LINEAR = nnx.Linear(8, 64, rngs=nnx.Rngs(0))


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x, gate):
        return nn.Dense(8)(x) * gate

    def half(self, x):
        return nn.Dense(4, parent=self)(x)


class Table(nn.Module):
    """A module that is told a shape, and takes no array."""

    @nn.compact
    def __call__(self, shape):
        return self.param("table", nn.initializers.normal(), shape)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: linen.init_fn(nn.Dense(64)), r"Dense.*'inputs'.*\(inputs: "),
        (lambda: linen.init_fn(Gated(), X), r"'gate'.*\(x, gate\)"),
        (lambda: linen.init_fn(Gated(), X, X, X), r"too many.*\(x, gate\)"),
        (lambda: linen.init_fn(Gated(), method="half"), r"'x'.*\(x\)"),
        (lambda: linen.init_fn(Gated(), method=Gated.half), "'x'"),
        (lambda: linen.init_fn(nn.Dense, X), "class Dense.*a Linen module"),
        (lambda: linen.init_fn(LINEAR, X), r"nnx\.init_fn\(Linear"),
        (lambda: linen.init_fn(lambda key: key, X), r"Linen module.*init\(fn, key\)"),
        (lambda: from_nnx.init_fn(LINEAR), "an nnx.Module class"),
        (lambda: from_nnx.init_fn(nn.Dense, 64), r"linen\.init_fn\(Dense"),
        (lambda: from_nnx.init_fn(nn.Dense(64)), r"linen\.init_fn\(Dense"),
        (lambda: from_nnx.init_fn({"w": 1}), "got dict"),
        (lambda: from_nnx.init_fn(nnx.Linear, 8, 64, rngs=nnx.Rngs(0)), "rngs"),
        (lambda: from_nnx.init_fn(nnx.Linear, 8, 64, nnx.Rngs(0)), "rngs"),
        (lambda: from_nnx.init_fn(nnx.Linear, 8), "'out_features'"),
        (lambda: from_nnx.init_fn(nnx.Linear, 8, 64, bias=False), "'bias'"),
        (lambda: equinox.init_fn(eqx.nn.Linear, 8), "'out_features'"),
        (lambda: equinox.init_fn(eqx.nn.Linear, 8, 4, key=0), "a key was given"),
        (lambda: haiku.init_fn(lambda x: x, X), r"hk\.transform\(<lambda>\)"),
    ],
)
def test_what_is_no_model_of_the_framework(call, words):
    with pytest.raises(InitFnError, match=f"(?s){words}"):
        call()


@pytest.mark.parametrize("shape", [(2, 8), [2, 8], (8,)])
def test_a_shape_is_no_input(shape):
    network = hk.transform(lambda x: hk.Linear(4)(x))
    for call in (
        lambda: linen.init_fn(nn.Dense(64), shape),
        lambda: haiku.init_fn(network, shape),
    ):
        with pytest.raises(InitFnError, match=r"ShapeDtypeStruct\(\(.*8") as caught:
            call()
        assert caught.value.where == "inputs"


def test_a_shape_that_is_meant_is_given_by_keyword():
    plan = shardinit.plan(linen.init_fn(Table(), shape=(4, 8)))
    assert plan.leaves[0].shape == (4, 8)


def test_what_a_method_takes_beside_arrays_is_given_as_it_is():
    fn = linen.init_fn(Gated(), X, jnp.ones(8), mutable=["params"])
    assert shardinit.plan(fn).parameter_count == 8 * 8 + 8
