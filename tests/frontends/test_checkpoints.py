"""What init gives, in whatever classes, is written, attested and read back as it is."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType

import shardinit
from shardinit import deferred
from shardinit.errors import StructureMismatchError
from shardinit.frontends import equinox as from_equinox
from shardinit.frontends import haiku as from_haiku
from shardinit.frontends import linen as from_linen
from shardinit.frontends import nnx as from_nnx
from shardinit.frontends.optax import with_optimizer
from shardinit.storage import orbax, safetensors
from tests.core.bits import differing
from tests.deferred.models import stack

pytestmark = pytest.mark.once

X = jnp.ones((2, 32))
BOXED = nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp"))
ADAM = optax.adam(1e-3)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(64, 32, rngs=rngs)
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head, self.weight = self.embed, self.up.kernel


class Trained(nnx.Module):
    def __init__(self, rngs):
        self.model = Tied(rngs)
        self.optimizer = nnx.Optimizer(self.model, ADAM, wrt=nnx.Param)


def mlp(key):
    return eqx.nn.MLP(32, 8, 64, 2, activation=jax.nn.gelu, key=key)


class Regular(eqx.Module):
    layer: eqx.nn.Linear
    drop: eqx.nn.Dropout
    norm: eqx.nn.BatchNorm
    count: int

    def __init__(self, *, key):
        self.layer = eqx.nn.Linear(32, 64, key=key)
        self.drop, self.count = eqx.nn.Dropout(0.3), 7
        self.norm = eqx.nn.BatchNorm(64, axis_name="batch", mode="ema")


def regular():
    return with_optimizer(from_equinox.init_fn(eqx.nn.make_with_state(Regular)), ADAM)


def train_state(key):
    module = nn.Dense(64, kernel_init=BOXED)
    params = module.init(key, X)["params"]
    return TrainState.create(apply_fn=module.apply, params=params, tx=ADAM)


def haiku_net():
    def forward(x):
        return hk.BatchNorm(True, True, 0.9)(hk.nets.MLP([64])(x), True)

    return from_haiku.init_fn(hk.transform_with_state(forward), X)


STATES = {
    "boxed Linen": lambda: from_linen.init_fn(nn.Dense(64, kernel_init=BOXED), X),
    "boxes of a plain function": lambda: (
        lambda key: nn.Dense(64, kernel_init=BOXED).init(key, X)
    ),
    "a TrainState of boxes": lambda: train_state,
    "an NNX model with tied variables": lambda: from_nnx.init_fn(Tied),
    "an NNX model with its optimizer": lambda: from_nnx.init_fn(Trained),
    "an Equinox model with activations": lambda: from_equinox.init_fn(mlp),
    "Equinox with settings and state, optimised": regular,
    "deferred parameters": lambda: deferred.init_fn(stack(2)),
    "Haiku, optimised": lambda: with_optimizer(haiku_net(), ADAM),
    "Equinox, optimised": lambda: with_optimizer(from_equinox.init_fn(mlp), ADAM),
    "L-BFGS, which has a field called value": lambda: with_optimizer(
        lambda key: {"w": jax.random.normal(key, (8, 32))}, optax.lbfgs(memory_size=2)
    ),
    "NNX, optimised": lambda: with_optimizer(from_nnx.init_fn(Tied), ADAM),
}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("name", STATES)
def test_what_init_gives_is_written_attested_and_restored(name, mesh, tmp_path):
    rules = shardinit.fsdp("model", min_bytes=0)
    plan = shardinit.plan(STATES[name](), mesh=mesh, rules=rules)
    made = shardinit.compile_plan(plan)(0)
    orbax.save(tmp_path / "orbax", made)
    safetensors.write(tmp_path / "safetensors", made)
    receipt = shardinit.receipt(plan, 0, made)
    for storage in (orbax, safetensors):
        back = storage.restore(tmp_path / storage.__name__.split(".")[-1], plan)
        assert jax.tree.structure(back) == jax.tree.structure(made)
        arrays, again = eqx.filter((made, back), eqx.is_array)
        assert differing(again, arrays) == []
        pairs = zip(*map(jax.tree.leaves, (arrays, again)), strict=True)
        assert all(one.sharding == other.sharding for one, other in pairs)
        shardinit.verify_receipt(receipt, back)
    again = shardinit.init_missing(made, plan, 1)
    assert differing(*eqx.filter((again, made), eqx.is_array)) == []


@pytest.mark.parametrize(
    "name",
    ["Haiku, optimised", "Equinox, optimised", "boxed Linen", "a TrainState of boxes"],
)
def test_what_plain_orbax_wrote_and_reads(name, mesh, tmp_path):
    rules = shardinit.fsdp("model", min_bytes=0)
    plan = shardinit.plan(STATES[name](), mesh=mesh, rules=rules)
    made = eqx.filter(shardinit.compile_plan(plan)(0), eqx.is_array)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", made)
    assert (
        differing(
            eqx.filter(orbax.restore(tmp_path / "theirs", plan), eqx.is_array), made
        )
        == []
    )
    abstract = eqx.filter(
        plan.abstract(), lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )
    orbax.save(tmp_path / "ours", made)
    with ocp.StandardCheckpointer() as checkpointer:
        got = checkpointer.restore(tmp_path / "ours", nn.meta.unbox(abstract))
    assert differing(got, nn.meta.unbox(made)) == []
    where = [leaf.sharding for leaf in jax.tree.leaves(got)]
    assert where == [leaf.sharding for leaf in plan.leaves]


def test_lines_of_paths_need_not_say_the_boxes_of_a_model():
    plan = shardinit.plan(train_state)
    params = nn.meta.unbox(shardinit.compile_plan(plan)(7).params)
    made = shardinit.init_missing({"old": params}, plan, 0, paths="old/** -> params/**")
    assert differing(nn.meta.unbox(made.params), params) == []


@pytest.mark.parametrize(
    "there",
    [
        {"w": jnp.ones(8), "other": jnp.ones(8)},  # a leaf of no model
        {"v": jnp.ones(8)},  # of both networks of the state
        {"mu": {"w": jnp.ones(8)}},  # of the optimizer
    ],
)
def test_what_are_not_surely_the_parameters_alone_needs_lines_of_paths(there):
    def two(key):
        v = jax.random.normal(key, (8,))
        return {"actor": {"w": v, "v": v}, "critic": {"v": 2 * v}}

    with pytest.raises(StructureMismatchError, match="it is not among"):
        shardinit.init_missing(there, with_optimizer(two, optax.adam(1e-3)), 0)


def test_a_part_of_the_state_of_an_nnx_model_may_lie_in_a_dict():
    fn = from_nnx.init_fn(Trained)
    tied = shardinit.init(from_nnx.init_fn(Tied), 7)
    made = shardinit.init_missing({"model": nnx.state(tied)}, fn, 0)
    assert differing(nnx.state(made.model), nnx.state(tied)) == []
