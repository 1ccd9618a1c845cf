"""Models built by Penzai itself: its own transformer and its own values, sharded."""

import warnings

import jax
import jax.numpy as jnp
import pytest

import shardinit
from shardinit.errors import DuplicateNamesError, StructureMismatchError
from tests.core.bits import differing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # treescope looks at deprecated names of NumPy
    from penzai.deprecated.v1 import pz
    from penzai.deprecated.v1.example_models import simple_mlp
    from penzai.deprecated.v1.example_models.gemma import model_core

    from shardinit.frontends import penzai

# treescope, as above; it looks when it first renders something
pytestmark = pytest.mark.filterwarnings("ignore:The chararray class")

RULES = shardinit.AxisRules(
    [("vocabulary", "model"), ("neurons", "model"), ("embedding", "data")]
)


@pytest.fixture(scope="module")
def transformer():
    """Penzai's own Gemma, four blocks deep, with a tied embedding table."""
    return model_core.GemmaTransformer.from_config(
        model_core.GemmaTransformerConfig(
            num_heads=2,
            embedding_dim=64,
            projection_dim=32,
            single_kv_head=True,
            mlp_hidden_dim=128,
            num_decoder_blocks=4,
            vocab_size=96,
            parameter_dtype=jnp.float32,
            activation_dtype=jnp.float32,
        )
    )


@pytest.fixture(scope="module")
def own(transformer):
    """Penzai's own initialisation from key 3, compiled as one function."""
    draw = jax.jit(
        lambda key: parameters(pz.nn.initialize_parameters(transformer, key))
    )
    return draw(jax.random.key(3))


def parameters(model):
    found = pz.select(model).at_instances_of(pz.nn.Parameter).get_sequence()
    return {parameter.name: parameter.value for parameter in found}


@pytest.mark.slow
def test_its_transformer_ends_sharded_with_its_own_values(transformer, own, mesh):
    key = jax.random.key(3)
    init = penzai.init_fn(transformer)
    plan = shardinit.plan(init, mesh=mesh, rules=RULES)
    assert len(plan.programs) < 12 < len(plan.leaves)
    model = shardinit.compile_plan(plan)(key)
    assert type(model) is type(transformer)
    assert not pz.select(model).at_instances_of(pz.nn.UninitializedParameter).count()
    assert differing(parameters(model), own) == []
    (table,) = [v for n, v in parameters(model).items() if "embed" in n]
    assert table.data_array.sharding.spec == jax.P("model", "data")
    assert dict(table.named_shape) == {"vocabulary": 96, "embedding": 64}


@pytest.mark.slow
def test_the_sharded_transformer_runs(transformer, mesh):
    model = shardinit.init(penzai.init_fn(transformer), 0, mesh=mesh)
    tokens = pz.nx.wrap(jnp.arange(5)).tag("seq")
    inputs = model_core.GemmaInputs.from_basic_segments(tokens)
    logits = jax.jit(lambda model, inputs: model(inputs))(model, inputs)
    assert dict(logits.named_shape) == {"seq": 5, "vocabulary": 96}
    assert bool(jnp.isfinite(logits.untag("seq", "vocabulary").data_array).all())


def test_one_parameter_alone_has_its_value(transformer, own, mesh):
    uninitialized = pz.nn.UninitializedParameter
    slots = pz.select(transformer).at_instances_of(uninitialized).get_sequence()
    alone = shardinit.init(penzai.init_fn(slots[3]), 3, mesh=mesh)
    assert type(alone) is pz.nn.Parameter
    expected = own[slots[3].name]
    assert differing(alone.value, expected) == []


def test_what_is_initialised_already_stays():
    mlp = simple_mlp.MLP.from_config([8, 32, 4])
    slots = pz.select(mlp).at_instances_of(pz.nn.UninitializedParameter)
    first = slots.pick_nth_selected(0)
    kept = first.get().initialize(jax.random.key(9))
    frozen = pz.nn.FrozenParameter(kept.value, kept.name)
    model = shardinit.init(penzai.init_fn(first.set(frozen)), 0)
    found = pz.select(model).at_instances_of(pz.nn.FrozenParameter).get()
    assert found.value.data_array is kept.value.data_array


def test_axis_names_are_found_in_views_too():
    def draw(key):
        return pz.nx.wrap(jax.random.normal(key, (4, 8, 32))).tag("a", "b", "c")

    plain = pz.nn.UninitializedParameter(lambda key: draw(key).untag("c"), "p")
    axes = penzai.init_fn(plain).axes
    assert jax.tree.leaves(axes.value, is_leaf=lambda x: isinstance(x, tuple)) == [
        ("a", "b", None)
    ]


def test_repeated_names_are_refused():
    layer = pz.nn.UninitializedParameter(jnp.asarray, "w", value_structure=None)
    frozen = pz.nn.FrozenParameter(jnp.ones(3), "w")
    with pytest.raises(DuplicateNamesError, match=r"Repeated names: \['w'\]"):
        penzai.init_fn([layer, frozen])


def test_an_initializer_that_breaks_its_word_is_named():
    layer = pz.nn.UninitializedParameter(
        lambda key: jnp.zeros(4), "w", pz.chk.ArraySpec((3,), jnp.float32)
    )
    with pytest.raises(StructureMismatchError, match="'w'"):
        penzai.init_fn(layer)(jax.random.key(0))
