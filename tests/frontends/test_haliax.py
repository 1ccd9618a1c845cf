"""Haliax: names of axes are logical axes, also inside of Equinox modules.

The decoder is Levanter's GPT-2 (github.com/marin-community/levanter, models/gpt2.py) as
far as it draws; ``gpt2`` has the axis names of its config. The oracle of placement is
Haliax's own ``infer_resource_partitions``.
"""

import functools
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jrandom
import pytest

import shardinit
from shardinit.frontends import equinox as frontend
from tests.core.bits import unlike_jit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports shard_map by its old name
    try:
        import haliax as hax
        import haliax.nn as hnn
        from haliax import Axis, NamedArray
        from haliax.nn.scan import Stacked
        from haliax.partitioning import infer_resource_partitions
    except Exception as error:  # haliax 1.3 fails in various ways beside newer JAX
        pytest.skip(f"haliax: {error}", allow_module_level=True)

# names that JAX means to remove
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

KEY = jrandom.key(5)
Embed, Mlp = Axis("embed", 64), Axis("mlp", 256)
Heads, HeadSize = Axis("heads", 4), Axis("head_size", 32)
Vocab, Pos = Axis("vocab", 128), Axis("position", 64)
RULES = {"embed": "data", "mlp": "model", "heads": "model", "vocab": "model"}


class Gpt2Mlp(eqx.Module):
    c_fc: hnn.Linear
    c_proj: hnn.Linear

    @staticmethod
    def init(Embed, Mlp, *, key):
        k_fc, k_proj = jrandom.split(key, 2)
        c_fc = hnn.Linear.init(Out=Mlp, In=Embed, key=k_fc, out_first=True)
        c_proj = hnn.Linear.init(Out=Embed, In=Mlp, key=k_proj, out_first=True)
        return Gpt2Mlp(c_fc, c_proj)


class Gpt2Attention(eqx.Module):
    c_attn: hnn.Linear
    c_proj: hnn.Linear

    @staticmethod
    def init(*, key):
        Qkv = Axis("qkv", size=3)
        k_c, k_proj = jrandom.split(key, 2)
        c_attn = hnn.Linear.init(
            In=Embed, Out=(Qkv, Heads, HeadSize), key=k_c, out_first=True
        )
        c_proj = hnn.Linear.init(
            In=(Heads, HeadSize), Out=Embed, key=k_proj, out_first=True
        )
        return Gpt2Attention(c_attn, c_proj)


class Gpt2Block(eqx.Module):
    ln_1: hnn.LayerNorm
    attn: Gpt2Attention
    ln_2: hnn.LayerNorm
    mlp: Gpt2Mlp
    resid_dropout: hnn.Dropout

    @staticmethod
    def init(*, key):
        k_attn, _, k_mlp, _ = jrandom.split(key, 4)
        return Gpt2Block(
            hnn.LayerNorm.init(Embed, eps=1e-5),
            Gpt2Attention.init(key=k_attn),
            hnn.LayerNorm.init(Embed, eps=1e-5),
            Gpt2Mlp.init(Embed, Mlp, key=k_mlp),
            hnn.Dropout(pdrop=0.1),
        )


class Gpt2Embeddings(eqx.Module):
    token_embeddings: hnn.Embedding
    position_embeddings: hnn.Embedding

    @staticmethod
    def init(*, key):
        k_wte, k_wpe, _ = jrandom.split(key, 3)
        return Gpt2Embeddings(
            hnn.Embedding.init(Vocab, Embed, key=k_wte, init_scale=0.02),
            hnn.Embedding.init(Pos, Embed, key=k_wpe, init_scale=0.01),
        )


class Gpt2LMHeadModel(eqx.Module):
    blocks: Stacked
    ln_f: hnn.LayerNorm
    embeddings: Gpt2Embeddings

    @staticmethod
    def init(num_layers, *, key):
        k_t, k_embeddings = jrandom.split(key, 2)
        Layers = Axis("layers", num_layers)
        blocks = Stacked.init(Layers, Gpt2Block, gradient_checkpointing=True)(
            key=jrandom.split(k_t, num_layers)
        )
        return Gpt2LMHeadModel(
            blocks,
            hnn.LayerNorm.init(Embed, eps=1e-5),
            Gpt2Embeddings.init(key=k_embeddings),
        )


class Mixed(eqx.Module):
    """Named arrays, plain ones, and a plain one whose field names its axes."""

    named: NamedArray
    plain: jax.Array
    table: jax.Array = eqx.field(metadata={"axis_names": ("vocab", "embed")})

    @staticmethod
    def init(*, key):
        return Mixed(
            hax.random.normal(key, (Embed, Mlp)),
            jrandom.normal(key, (8, 32)),
            jrandom.normal(key, (Vocab.size, Embed.size)),
        )


MODELS = {
    "linear": functools.partial(hnn.Linear.init, Embed, Mlp),
    "mlp": functools.partial(hnn.MLP.init, Embed, Vocab, 256, 2),
    "gpt2": functools.partial(Gpt2LMHeadModel.init, 3),
    "mixed": Mixed.init,
}


@pytest.fixture(scope="module")
def auto(mesh):
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.few(1)
def test_a_model_lies_where_haliax_puts_it_with_its_own_values(name, auto):
    init = frontend.init_fn(MODELS[name])
    rules = shardinit.AxisRules(list(RULES.items()))
    got = shardinit.init(init, KEY, mesh=auto, rules=rules)
    want = eqx.filter_jit(MODELS[name])(key=KEY)
    assert jax.tree.structure(eqx.filter(got, eqx.is_array)) == jax.tree.structure(
        eqx.filter(want, eqx.is_array)
    )
    arrays = eqx.filter(got, eqx.is_array)
    assert unlike_jit(arrays, eqx.filter(want, eqx.is_array)) == []
    abstract = eqx.filter_eval_shape(MODELS[name], key=KEY)
    places = infer_resource_partitions(
        abstract, RULES, preserve_existing_shardings=False, mesh=auto
    )
    of = {jax.tree_util.keystr(path): x for path, x in with_paths(places)}
    for path, array in with_paths(arrays):
        place = of[jax.tree_util.keystr(path).removesuffix("[<flat index 0>]")]
        assert array.sharding.is_equivalent_to(place, array.ndim), path


def with_paths(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_names_of_stacked_layers_begin_with_the_layers():
    init = frontend.init_fn(MODELS["gpt2"])
    weight = init.axes.blocks.stacked.mlp.c_fc.weight
    assert weight.array == ("layers", "mlp", "embed")


def test_the_sharded_model_runs(auto):
    if not hasattr(jax.core, "is_constant_dim"):
        pytest.skip("Haliax multiplies by a name that this JAX has no more")
    init = frontend.init_fn(MODELS["mlp"])
    rules = shardinit.AxisRules(list(RULES.items()))
    model = shardinit.init(init, KEY, mesh=auto, rules=rules)
    out = eqx.filter_jit(model)(hax.ones(Embed))
    assert out.axes == (Vocab,)
    assert bool(jnp.isfinite(out.array).all())


def test_named_arrays_of_a_plain_function_lie_by_their_names(auto):
    def draw(key):
        axes = (hax.Axis("embed", 64), hax.Axis("mlp", 256))
        return {"w": hax.random.normal(key, axes)}

    rules = shardinit.AxisRules(list(RULES.items()))
    made = shardinit.init(draw, 0, mesh=auto, rules=rules)["w"]
    assert made.array.sharding.spec == jax.P("data", "model")
    assert [axis.name for axis in made.axes] == ["embed", "mlp"]
