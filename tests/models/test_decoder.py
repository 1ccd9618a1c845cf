"""The decoder: published sizes, named dimensions, layouts, values and faults."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shardinit.core.init_fn import AxisNames
from shardinit.errors import SpecError
from shardinit.models import ModelSpec, build, example_config, example_names
from shardinit.models.config import DecoderConfig
from shardinit.models.decoder import Decoder, RouterBias

pytestmark = pytest.mark.once

PUBLISHED = {
    "gpt2": 124_439_808,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-0.6b": 596_049_920,
    "deepseek-v3": 671_026_404_352,
}

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY = {
    "llama": BASE | {"attention_bias": True, "mlp_bias": True},
    "mistral": BASE | {"sliding_window": 3, "head_dim": 16},
    "qwen2": BASE,
    "qwen3": BASE | {"head_dim": 16, "tie_word_embeddings": True},
    "mixtral": BASE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 16,
    },
    "deepseek_v3": BASE
    | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 12,
    },
}
LAYOUTS = ("unrolled", "stacked")

# compiles in a fraction of the time that threefry takes
KEY = jax.random.key(7, impl="unsafe_rbg")


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def tiny(family, **more):
    return TINY[family] | {"model_type": family} | more


def spec(family, **more):
    return ModelSpec("decoder", tiny(family, **more))


def shapes(init):
    return jax.eval_shape(init.fn, jax.random.key(0))


def size(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    init = build(ModelSpec("decoder", example_config(name)))
    state = nnx.state(init.rebuild(shapes(init)))
    params, rest = nnx.split_state(state, nnx.Param, ...)
    assert size(params) == PUBLISHED[name]
    # the router's correction bias is state, not a parameter, and not in that count
    assert all(isinstance(x, RouterBias) for _, x in nnx.to_flat_state(rest))
    assert size(rest) == (58 * 256 if name == "deepseek-v3" else 0)


def test_every_example_is_published():
    assert set(example_names()) == set(PUBLISHED)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", TINY)
def test_every_dimension_of_every_leaf_has_a_name(family, layout):
    init = build(spec(family, layer_layout=layout))

    def check(names, leaf):
        assert isinstance(names, AxisNames)
        assert len(names) == len(leaf.shape)
        assert all(isinstance(name, str) for name in names)
        assert len(set(names)) == len(names)

    def is_names(x):
        return isinstance(x, AxisNames)

    jax.tree.map(check, init.axes, shapes(init), is_leaf=is_names)


@pytest.mark.parametrize("family", TINY)
def test_layouts_have_the_same_parameters(family):
    sizes = {size(shapes(build(spec(family, layer_layout=x)))) for x in LAYOUTS}
    if "num_experts_per_tok" in TINY[family]:
        sizes |= {size(shapes(build(spec(family, expert_layout=x)))) for x in LAYOUTS}
    assert len(sizes) == 1


def test_paths_and_axes_of_the_layouts():
    unrolled = build(spec("mixtral", expert_layout="unrolled")).axes
    assert unrolled["layers"][1]["moe"]["experts"][3]["up"] == ("embed", "mlp")
    assert unrolled["layers"][0]["attention"]["q"]["kernel"] == (
        "embed",
        "heads",
        "head_dim",
    )
    stacked = build(spec("deepseek_v3", layer_layout="stacked"))
    experts = shapes(stacked)["layers"]["moe"]["experts"]["up"]
    assert experts.shape == (1, 8, 32, 16)
    names = stacked.axes["layers"]["moe"]["experts"]["up"]
    assert names == ("layers", "expert", "embed", "mlp")
    assert shapes(stacked)["dense_layers"]["mlp"]["up"]["kernel"].shape == (1, 32, 48)


@pytest.mark.parametrize(
    ("family", "layout"), [("qwen2", "unrolled"), ("deepseek_v3", "stacked")]
)
def test_values_are_those_of_the_plain_model(family, layout):
    config = tiny(family, layer_layout=layout)
    init = build(ModelSpec("decoder", config))

    def plain(key):
        return nnx.state(Decoder(DecoderConfig.from_dict(config), rngs=nnx.Rngs(key)))

    # one compilation: what is the same computation is compiled only once
    got, want = jax.jit(lambda key: (init.fn(key), plain(key)))(KEY)
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w, strict=True)


def some(spec, pick):
    """Some of the initial values: ``pick`` of the whole tree."""
    init = build(spec)
    return jax.jit(lambda key: pick(init.fn(key)))(KEY)


def test_initial_values_follow_the_family():
    config = {"hidden_size": 128, "initializer_range": 0.05, "attention_bias": True}
    layer = some(spec("llama", **config), lambda tree: tree["layers"][0])
    for name in ("q", "o"):
        kernel = layer["attention"][name]["kernel"]
        np.testing.assert_allclose(kernel.std(), 0.05, rtol=0.03)
        assert not layer["attention"][name]["bias"].any()
    assert (layer["attention_norm"]["scale"] == 1).all()
    mlp = some(spec("gpt2", n_embd=256), lambda tree: tree["layers"][0]["mlp"])
    np.testing.assert_allclose(mlp["up"]["kernel"].std(), 0.02, rtol=0.03)
    down = mlp["down"]["kernel"].std()
    np.testing.assert_allclose(down, 0.02 / math.sqrt(2 * 2), rtol=0.03)


def test_dtypes_of_parameters_and_draws():
    def kernel(**config):
        return some(spec("llama", **config), lambda tree: tree["lm_head"]["kernel"])

    assert kernel().dtype == jnp.float32
    assert kernel(torch_dtype="bfloat16").dtype == jnp.bfloat16
    assert kernel(torch_dtype="bfloat16", param_dtype="float16").dtype == jnp.float16
    drawn = kernel(param_dtype="bfloat16")  # in float32, then cast
    assert drawn.dtype == jnp.bfloat16
    np.testing.assert_array_equal(drawn, kernel().astype(jnp.bfloat16))
    direct = kernel(param_dtype="bfloat16", init_dtype="bfloat16")
    assert not np.array_equal(drawn, direct)


FAULTS = {
    "unknown family": (
        {"model_type": "lama"},
        {"model_type": "did you mean 'llama'"},
    ),
    "no family": ({"model_type": None}, {"model_type": "missing"}),
    "missing": (
        {"hidden_size": None, "vocab_size": None},
        {"hidden_size": "missing", "vocab_size": "missing"},
    ),
    "misspelt": (
        {"num_hiden_layers": 3, "rms_norm_epss": 1e-5, "flux": 1},
        {
            "num_hiden_layers": "did you mean 'num_hidden_layers'",
            "rms_norm_epss": "did you mean 'rms_norm_eps'",
            "flux": "unknown key",
        },
    ),
    "types": (
        {"hidden_size": "32", "vocab_size": True, "mlp_bias": 1, "rope_theta": "x"},
        {
            "hidden_size": "expected integer",
            "vocab_size": "expected integer",
            "mlp_bias": "expected boolean",
            "rope_theta": "expected number",
        },
    ),
    "sizes": (
        {"num_attention_heads": 0, "intermediate_size": -4, "initializer_range": -1},
        {
            "num_attention_heads": "at least 1",
            "intermediate_size": "at least 1",
            "initializer_range": "at least 0",
        },
    ),
    "heads": (
        {"num_attention_heads": 5, "num_key_value_heads": 3},
        {
            "num_attention_heads": "does not divide the width 32",
            "num_key_value_heads": "does not divide 5",
        },
    ),
    "odd heads": ({"head_dim": 7}, {"head_dim": "odd"}),
    "another family's key": (
        {"num_local_experts": 4},
        {"num_local_experts": "of mixtral"},
    ),
    "choices": (
        {"hidden_act": "silo", "param_dtype": "int8", "layer_layout": "stack"},
        {
            "hidden_act": "did you mean 'silu'",
            "param_dtype": "one of float32",
            "layer_layout": "did you mean 'stacked'",
        },
    ),
    "top-k": (
        {
            "model_type": "mixtral",
            "num_local_experts": 2,
            "num_experts_per_tok": 3,
        },
        {"num_experts_per_tok": "more than num_local_experts, 2"},
    ),
    "rope": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 0, "beta": 2}},
        {
            "rope_scaling.factor": "above 0",
            "rope_scaling.low_freq_factor": "missing",
            "rope_scaling.high_freq_factor": "missing",
            "rope_scaling.original_max_position_embeddings": "missing",
            "rope_scaling.beta": "no number of llama3",
        },
    ),
    "rope type": (
        {"rope_scaling": {"rope_type": "longrope"}},
        {"rope_scaling.rope_type": "not supported"},
    ),
    "layer types": (
        {
            "model_type": "mistral",
            "layer_types": ["full_attention", "half", "full_attention"],
        },
        {"layer_types": "3 entries for 2", "layer_types[1]": "not one of"},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_reported_by_field(name):
    change, want = FAULTS[name]
    config = BASE | {"model_type": "llama"} | change
    with pytest.raises(SpecError) as caught:
        build(ModelSpec("decoder", config))
    got = dict(caught.value.faults)
    assert got.keys() == want.keys()
    for field, text in want.items():
        assert text in got[field]


DEEPSEEK_FAULTS = {
    "n_group": ({"n_group": 3}, "does not divide"),
    "topk_group": ({"topk_group": 5}, "more than n_group"),
    "first_k_dense_replace": ({"first_k_dense_replace": 4}, "more than the 2 layers"),
    "num_key_value_heads": ({"num_key_value_heads": 2}, "is not num_attention_heads"),
    "qk_rope_head_dim": ({"qk_rope_head_dim": 3}, "odd"),
    "moe_layer_freq": ({"moe_layer_freq": 2}, "only 1 is"),
    "kv_lora_rank": ({"kv_lora_rank": None}, "missing"),
}


@pytest.mark.parametrize("field", DEEPSEEK_FAULTS)
def test_faults_of_deepseek(field):
    change, text = DEEPSEEK_FAULTS[field]
    with pytest.raises(SpecError) as caught:
        build(spec("deepseek_v3", **change))
    ((name, got),) = caught.value.faults
    assert name == field
    assert text in got


def test_faults_of_different_kinds_come_together():
    config = BASE | {"model_type": "lama", "vocab_size": 0, "hiden_size": 3}
    with pytest.raises(SpecError) as caught:
        build(ModelSpec("decoder", config))
    fields = {field for field, _ in caught.value.faults}
    assert fields == {"model_type", "vocab_size", "hiden_size"}


def test_keys_of_no_consequence_are_accepted():
    extra = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "transformers_version": "4.43.0",
        "use_cache": True,
        "rope_scaling": None,
        "pretraining_tp": 1,
        "num_local_experts": None,
    }
    plain = build(spec("llama"))
    assert shapes(build(spec("llama", **extra))) == shapes(plain)


def test_numbers_of_a_struct_are_accepted():
    config = {k: float(v) for k, v in tiny("qwen2").items() if isinstance(v, int)}
    config |= {"model_type": "qwen2", "rope_theta": 10000.0, "rms_norm_eps": 1e-5}
    assert shapes(build(ModelSpec("decoder", config))) == shapes(build(spec("qwen2")))
