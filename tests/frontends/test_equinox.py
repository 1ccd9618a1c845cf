"""Equinox's own examples: the constructor's values, sharded, and the model as it was.

The models are those of Equinox's documentation (github.com/patrick-kidger/equinox):
"Training CNN on MNIST", "Training an RNN", "Image generation with a score-based
diffusion model", "Stateful operations" and the ensemble of its tricks.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import shardinit
from shardinit.errors import InitFnError
from shardinit.frontends import equinox as frontend
from tests.core.bits import differing, unlike_jit

KEY = jr.key(5)

# Equinox warns of arrays in static fields
pytestmark = pytest.mark.filterwarnings("ignore:A JAX array is being set as static")


class CNN(eqx.Module):
    layers: list

    def __init__(self, key):
        key1, key2, key3, key4 = jax.random.split(key, 4)
        self.layers = [
            eqx.nn.Conv2d(1, 3, kernel_size=4, key=key1),
            eqx.nn.MaxPool2d(kernel_size=2),
            jax.nn.relu,
            jnp.ravel,
            eqx.nn.Linear(1728, 512, key=key2),
            jax.nn.sigmoid,
            eqx.nn.Linear(512, 64, key=key3),
            jax.nn.relu,
            eqx.nn.Linear(64, 10, key=key4),
            jax.nn.log_softmax,
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class RNN(eqx.Module):
    hidden_size: int
    cell: eqx.Module
    linear: eqx.nn.Linear
    bias: jax.Array

    def __init__(self, in_size, out_size, hidden_size, *, key):
        ckey, lkey = jr.split(key)
        self.hidden_size = hidden_size
        self.cell = eqx.nn.GRUCell(in_size, hidden_size, key=ckey)
        self.linear = eqx.nn.Linear(hidden_size, out_size, use_bias=False, key=lkey)
        self.bias = jnp.zeros(out_size)

    def __call__(self, input):
        hidden = jnp.zeros((self.hidden_size,))

        def f(carry, inp):
            return self.cell(inp, carry), None

        out, _ = jax.lax.scan(f, hidden, input)
        return jax.nn.sigmoid(self.linear(out) + self.bias)


class MixerBlock(eqx.Module):
    patch_mixer: eqx.nn.MLP
    hidden_mixer: eqx.nn.MLP
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm

    def __init__(
        self, num_patches, hidden_size, mix_patch_size, mix_hidden_size, *, key
    ):
        tkey, ckey = jr.split(key, 2)
        self.patch_mixer = eqx.nn.MLP(
            num_patches, num_patches, mix_patch_size, depth=1, key=tkey
        )
        self.hidden_mixer = eqx.nn.MLP(
            hidden_size, hidden_size, mix_hidden_size, depth=1, key=ckey
        )
        self.norm1 = eqx.nn.LayerNorm((hidden_size, num_patches))
        self.norm2 = eqx.nn.LayerNorm((num_patches, hidden_size))


class Mixer2d(eqx.Module):
    conv_in: eqx.nn.Conv2d
    conv_out: eqx.nn.ConvTranspose2d
    blocks: list
    norm: eqx.nn.LayerNorm
    t1: float

    def __init__(
        self,
        img_size,
        patch_size,
        hidden_size,
        mix_patch_size,
        mix_hidden_size,
        num_blocks,
        t1,
        *,
        key,
    ):
        input_size, height, width = img_size
        num_patches = (height // patch_size) * (width // patch_size)
        inkey, outkey, *bkeys = jr.split(key, 2 + num_blocks)
        self.conv_in = eqx.nn.Conv2d(
            input_size + 1, hidden_size, patch_size, stride=patch_size, key=inkey
        )
        self.conv_out = eqx.nn.ConvTranspose2d(
            hidden_size, input_size, patch_size, stride=patch_size, key=outkey
        )
        self.blocks = [
            MixerBlock(
                num_patches, hidden_size, mix_patch_size, mix_hidden_size, key=bkey
            )
            for bkey in bkeys
        ]
        self.norm = eqx.nn.LayerNorm((hidden_size, num_patches))
        self.t1 = t1


class Model(eqx.Module):
    norm1: eqx.nn.BatchNorm
    spectral_linear: eqx.nn.SpectralNorm[eqx.nn.Linear]
    norm2: eqx.nn.BatchNorm
    linear1: eqx.nn.Linear
    linear2: eqx.nn.Linear

    def __init__(self, key):
        key1, key2, key3, key4 = jr.split(key, 4)
        self.norm1 = eqx.nn.BatchNorm(input_size=3, axis_name="batch", mode="batch")
        self.spectral_linear = eqx.nn.SpectralNorm(
            layer=eqx.nn.Linear(in_features=3, out_features=32, key=key1),
            weight_name="weight",
            key=key2,
        )
        self.norm2 = eqx.nn.BatchNorm(input_size=32, axis_name="batch", mode="batch")
        self.linear1 = eqx.nn.Linear(in_features=32, out_features=32, key=key3)
        self.linear2 = eqx.nn.Linear(in_features=32, out_features=3, key=key4)

    def __call__(self, x, state):
        x, state = self.norm1(x, state)
        x, state = self.spectral_linear(x, state)
        x = jax.nn.relu(x)
        x, state = self.norm2(x, state)
        return self.linear2(jax.nn.relu(self.linear1(x))), state


def ensemble(key):
    @eqx.filter_vmap
    def make_ensemble(key):
        return eqx.nn.MLP(2, 8, 64, 2, activation=jax.nn.tanh, key=key)

    return make_ensemble(jr.split(key, 4))


MODELS = {
    "cnn": (CNN, ()),
    "rnn": (RNN, (2, 1, 64)),
    "mixer": (Mixer2d, ((1, 28, 28), 4, 64, 512, 512, 4, 10.0)),
    "stateful": (eqx.nn.make_with_state(Model), ()),
    "ensemble": (ensemble, ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_an_example_ends_sharded_as_its_constructor_makes_it(name, mesh):
    model, args = MODELS[name]
    init = frontend.init_fn(model, *args)
    rules = shardinit.fsdp("model", min_bytes=4096)
    plan = shardinit.plan(init, mesh=mesh, rules=rules)
    got = shardinit.compile_plan(plan)(KEY)
    want = eqx.filter_jit(model)(*args, key=KEY)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    got, want = eqx.filter(got, eqx.is_array), eqx.filter(want, eqx.is_array)
    assert unlike_jit(got, want) == []
    for leaf, array in zip(plan.leaves, jax.tree.leaves(got), strict=True):
        assert array.sharding.is_equivalent_to(leaf.sharding, array.ndim)
        assert array.sharding.is_fully_replicated == (array.nbytes < 4096)


@pytest.mark.slow
def test_layers_lie_by_rules_on_their_paths(mesh):
    rules = shardinit.PathRules(
        [
            ("hidden_mixer/layers/0/weight", PartitionSpec("model", None)),
            ("hidden_mixer/layers/1/weight", PartitionSpec(None, "model")),
            ("", PartitionSpec()),
        ]
    )
    model, args = MODELS["mixer"]
    got = shardinit.init(frontend.init_fn(model, *args), KEY, mesh=mesh, rules=rules)
    first, second = (layer.weight for layer in got.blocks[3].hidden_mixer.layers)
    assert first.addressable_shards[0].data.shape == (128, 64)
    assert second.addressable_shards[0].data.shape == (64, 128)
    assert got.t1 == 10.0


@pytest.mark.slow
def test_depth_adds_no_program():
    def programs(blocks):
        args = (*MODELS["mixer"][1][:5], blocks, 10.0)
        return len(shardinit.plan(frontend.init_fn(Mixer2d, *args)).programs)

    assert programs(2) == programs(6)


@pytest.mark.slow
def test_the_stateful_model_trains_one_step(mesh):
    model, state = shardinit.init(frontend.init_fn(MODELS["stateful"][0]), 0)
    x = jr.normal(jr.key(1), (16, 3))
    forward = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    out, state = forward(x, state)
    assert out.shape == (16, 3)
    assert bool(jnp.isfinite(out).all())


class Shared(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self, key):
        embedding = eqx.nn.Embedding(16, 32, key=key)
        linear = eqx.nn.Linear(32, 16, use_bias=False, key=key)

        def where(pair):
            return pair[1].weight

        self.shared = eqx.nn.Shared((embedding, linear), where, lambda p: p[0].weight)


def test_a_shared_weight_is_drawn_once():
    init = frontend.init_fn(Shared)
    assert [x.path for x in shardinit.plan(init).leaves] == ["shared/pytree/0/weight"]
    embedding, linear = shardinit.init(init, KEY).shared()
    assert embedding.weight is linear.weight


class Table(eqx.Module):
    weight: jax.Array
    places: np.ndarray = eqx.field(static=True)
    window: tuple = eqx.field(static=True)

    def __init__(self, make, *, key):
        self.weight = jr.normal(key, (8, 32))
        self.places, self.window = make(3), (make(2), "same")


def table(make):
    return frontend.init_fn(Table, make)


@pytest.mark.parametrize("make", [np.arange, lambda n: np.arange(1)])
def test_numpy_arrays_in_static_fields_are_kept(make, mesh):
    for _ in range(2):  # JAX compares the structure of the second with the first
        init = table(make)
        got = shardinit.init(init, KEY, mesh=mesh)
        assert np.array_equal(got.places, make(3))
        assert got.window[1] == "same"
        assert differing([got.weight], [jr.normal(KEY, (8, 32))]) == []
        again = shardinit.init_missing(got, init, KEY, mesh=mesh)
        assert again.weight is got.weight


def test_arrays_that_the_constructor_computes_for_static_fields_are_named():
    with pytest.raises(InitFnError, match=r"static field '(places|window)'"):
        table(jnp.arange)

    def fixed(n):
        with jax.ensure_compile_time_eval():
            return jnp.arange(n)

    assert np.array_equal(shardinit.init(table(fixed), KEY).places, [0, 1, 2])


def test_a_plain_function_keeps_or_names_static_arrays_as_well(mesh):
    def init(make):
        def fn(key):
            return {"layers": [Table(make, key=key)]}

        return fn

    for _ in range(2):
        got = shardinit.init(init(np.arange), KEY, mesh=mesh)
        assert np.array_equal(got["layers"][0].places, [0, 1, 2])
    with pytest.raises(InitFnError, match=r"static field 'layers/0/"):
        shardinit.init(init(jnp.arange), KEY, mesh=mesh)


def test_what_is_missing_of_a_model_is_made(mesh):
    init = frontend.init_fn(RNN, 2, 1, 64)
    whole = shardinit.init(init, KEY, mesh=mesh)
    part = eqx.tree_at(lambda m: m.cell.weight_hh, whole, replace=None)
    got = shardinit.init_missing(part, init, KEY, mesh=mesh)
    assert got.linear.weight is whole.linear.weight
    assert differing(got.cell.weight_hh, whole.cell.weight_hh) == []


def test_the_arrays_of_another_model_are_refused():
    init = frontend.init_fn(eqx.nn.Linear, 3, 4)
    other = frontend.init_fn(eqx.nn.Linear, 3, 4, use_bias=False)
    with pytest.raises(InitFnError, match="Linear: cannot be rebuilt"):
        init.rebuild(other.fn(KEY))


def test_a_saved_program_gives_the_values(tmp_path, mesh):
    init = frontend.init_fn(eqx.nn.MLP, 8, 8, 64, 2)
    shardinit.export_plan(shardinit.plan(init)).save(tmp_path / "mlp")
    program = shardinit.load_program(tmp_path / "mlp")
    got = shardinit.init(program, KEY, mesh=mesh)
    want = shardinit.init(init, KEY, mesh=mesh)
    assert differing(got["layers"][1]["weight"], want.layers[1].weight) == []
