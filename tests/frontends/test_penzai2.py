"""Models of Penzai's second version: its own values, axis names and variables."""

import warnings

import jax
import jax.numpy as jnp
import pytest

import shardinit
from shardinit.errors import InitFnError
from tests.core.bits import differing, unlike_jit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # treescope looks at deprecated names of NumPy
    from penzai import pz
    from penzai.models import simple_mlp
    from penzai.models.transformer.variants import gpt_neox, llamalike_common

    from shardinit.frontends import penzai

pytestmark = pytest.mark.filterwarnings("ignore:The chararray class")

KEY = jax.random.key(3)
RULES = shardinit.AxisRules(
    [
        ("vocabulary", "model"),
        ("neurons", "model"),
        ("features_out", "model"),
        ("embedding", "data"),
    ]
)
LLAMA = {
    "num_kv_heads": 2,
    "query_head_multiplier": 2,
    "embedding_dim": 64,
    "projection_dim": 32,
    "mlp_hidden_dim": 128,
    "vocab_size": 96,
    "mlp_variant": "swiglu",
}


def llama(init_base_rng, layers=2, stacked=False, tied=True):
    config = llamalike_common.LlamalikeTransformerConfig(
        **LLAMA,
        num_decoder_blocks=layers,
        tie_embedder_and_logits=tied,
        use_layer_stack=stacked,
    )
    return llamalike_common.build_llamalike_transformer(config, init_base_rng)


def neox(init_base_rng):
    config = gpt_neox.GPTNeoXTransformerConfig(
        num_attention_heads=2,
        embedding_dim=64,
        projection_dim=32,
        mlp_hidden_dim=128,
        num_decoder_blocks=2,
        vocab_size=96,
        activation_fn="gelu_approx",
        rope_subset_size=8,
        rope_wavelength=10_000,
        layernorm_epsilon=1e-5,
        parameter_dtype=jnp.float32,
        activation_dtype=jnp.float32,
    )
    return gpt_neox.build_gpt_neox_transformer(config, init_base_rng)


MODELS = {
    "mlp": (simple_mlp.MLP.from_config, {"feature_sizes": [8, 64, 32]}),
    "dropout": (
        simple_mlp.DropoutMLP.from_config,
        {"feature_sizes": [8, 64, 32], "drop_rate": 0.1},
    ),
    "llama": (llama, {}),
    "stacked": (llama, {"stacked": True}),
    "untied": (llama, {"tied": False}),
    "neox": (neox, {}),
}


def frozen(model):
    """What the variables of a model hold, by label."""
    _, found = pz.unbind_variables(model, freeze=True)
    return {variable.label: variable.value for variable in found}


def own(name):
    """Penzai's own values, compiled as one function."""
    build, options = MODELS[name]
    return jax.jit(lambda key: frozen(build(init_base_rng=key, **options)))(KEY)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_ends_sharded_with_its_own_values_and_axis_names(name, mesh):
    build, options = MODELS[name]
    plan = shardinit.plan(penzai.init_fn(build, **options), mesh=mesh, rules=RULES)
    model = shardinit.compile_plan(plan)(KEY)
    whole = build(init_base_rng=KEY, **options)
    assert type(model) is type(whole)
    assert paths(model) == paths(whole)
    got, want = frozen(model), own(name)
    assert sorted(got) == sorted(want)
    for label, value in want.items():
        assert dict(got[label].named_shape) == dict(value.named_shape)
        assert unlike_jit(got[label], value) == []
        placed = got[label].data_array.sharding.spec
        assert placed == spec(value.named_shape), label


def paths(model):
    """Of all arrays outside of variables, and of the slots."""
    slots, _ = pz.unbind_variables(model)
    pairs = jax.tree_util.tree_leaves_with_path(
        slots, is_leaf=lambda node: isinstance(node, pz.ParameterSlot)
    )
    return [(jax.tree_util.keystr(path), type(node)) for path, node in pairs]


def spec(names):
    """Where the rules put an array with axes of these names."""
    of = dict(RULES.rules)
    return jax.P(*[of.get(name) for name in names])


@pytest.mark.parametrize("name", ["llama", "stacked"])
@pytest.mark.few(1)
def test_the_sharded_model_runs(name, mesh):
    build, options = MODELS[name]
    auto = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
    model = shardinit.init(penzai.init_fn(build, **options), KEY, mesh=auto)
    slots, params = pz.unbind_params(model, freeze=True)
    tokens = pz.nx.wrap(jnp.arange(5)).tag("seq")

    @jax.jit
    def logits(params):
        bound = pz.bind_variables(slots, params, unfreeze_as_copy=True)
        return bound(tokens, token_positions=pz.nx.arange("seq", 5))

    out = logits(params)
    assert dict(out.named_shape) == {"seq": 5, "vocabulary": 96}
    assert bool(jnp.isfinite(out.untag("seq", "vocabulary").data_array).all())


def test_a_shared_parameter_is_made_once_and_stays_shared():
    def build(init_base_rng):
        layer = pz.nn.Linear.from_config(
            "tied", init_base_rng, input_axes={"a": 32}, output_axes={"b": 32}
        )
        return [layer, layer]

    init = penzai.init_fn(build)
    assert [x.path for x in shardinit.plan(init).leaves] == ["tied.weights"]
    first, second = shardinit.init(init, KEY)
    assert first.weights is second.weights


def test_state_of_a_model_comes_along():
    def build(init_base_rng):
        counter = pz.StateVariable(value=pz.nx.wrap(jnp.zeros(4)).tag("n"))
        layer = simple_mlp.MLP.from_config(init_base_rng, [8, 32])
        return [layer, counter, pz.StateVariable(jnp.int32(7), label="calls")]

    init = penzai.init_fn(build)
    paths = [x.path for x in shardinit.plan(init).leaves]
    assert [path for path in paths if not path.startswith("mlp")] == [
        "calls",
        "state_2",
    ]
    _, counter, calls = shardinit.init(init, KEY)
    assert dict(counter.value.named_shape) == {"n": 4}
    assert (calls.label, int(calls.value)) == ("calls", 7)


@pytest.mark.slow
def test_depth_adds_no_program():
    def programs(layers):
        return len(shardinit.plan(penzai.init_fn(llama, layers=layers)).programs)

    assert programs(2) == programs(5)


def test_what_a_model_lacks_is_made(mesh):
    build, options = MODELS["mlp"]
    init = penzai.init_fn(build, **options)
    whole = shardinit.init(init, KEY, mesh=mesh)
    first = whole.sublayers[0]
    got = shardinit.init_missing(first, init, KEY, mesh=mesh)
    kept, had = frozen(got), frozen(first)
    for label, value in had.items():
        assert kept[label].data_array is value.data_array
    assert differing(kept, frozen(whole)) == []


def test_slots_without_initializers_are_refused_with_what_to_call():
    with pytest.raises(InitFnError, match=r"penzai\.init_fn\(build\)"):
        penzai.init_fn(llama(None))
    with pytest.raises(InitFnError, match=r"penzai\.init_fn\(build\)"):
        shardinit.plan(llama(None))


def test_arrays_of_another_model_are_refused():
    init = penzai.init_fn(llama)
    with pytest.raises(InitFnError, match="cannot be rebuilt"):
        init.rebuild({"mlp": jnp.ones(3)})
