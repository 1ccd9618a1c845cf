"""Real Flax layers through the engine: all windowed, jit's bits on a mesh."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import shardinit
from shardinit.frontends import linen as from_linen
from shardinit.frontends import nnx as from_nnx
from tests.core.bits import differing


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        y = linen.LayerNorm()(x)
        y = linen.MultiHeadDotProductAttention(num_heads=4)(y, y)
        x = x + linen.Dropout(0.1, deterministic=True)(y)
        y = linen.DenseGeneral((4, 32), param_dtype=jnp.bfloat16)(x)
        y = linen.DenseGeneral(64, axis=(-2, -1))(y)
        return x + linen.Dense(64)(linen.gelu(y)), None


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(128, 64)(tokens)
        layers = linen.scan(
            LinenBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers()(x, None)
        x, _ = LinenBlock()(x)
        x = linen.Conv(32, (3,))(x)
        return linen.BatchNorm(use_running_average=True)(x)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.wide = nnx.LinearGeneral(64, (4, 32), rngs=rngs)
        self.narrow = nnx.LinearGeneral((4, 32), 64, axis=(-2, -1), rngs=rngs)
        self.lora = nnx.LoRA(64, 4, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(128, 64, rngs=rngs)
        self.first = Block(rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.layers = make(rngs)
        self.conv = nnx.Conv(64, 32, (3,), rngs=rngs)
        self.batch = nnx.BatchNorm(32, rngs=rngs)


def check(init_fn, mesh, programs):
    key = jax.random.key(21)
    plan = shardinit.plan(init_fn, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    assert plan.whole_leaves == ()
    assert len(plan.programs) <= programs
    flat = shardinit.InitFn(init_fn.fn)  # arrays, before the module is rebuilt
    got = shardinit.init(flat, key, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    assert differing(got, jax.jit(init_fn.fn)(key)) == []
    return plan


@pytest.mark.slow
def test_linen_attention_and_scanned_layers(mesh):
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    plan = check(from_linen.init_fn(LinenModel(), tokens), mesh, 24)
    shapes = {leaf.path: leaf.shape for leaf in plan.leaves}
    stacked = [s for p, s in shapes.items() if "ScanLinenBlock" in p]
    assert stacked
    assert all(shape[0] == 3 for shape in stacked)


@pytest.mark.slow
def test_nnx_attention_and_vmapped_layers(mesh):
    plan = check(from_nnx.init_fn(NnxModel), mesh, 24)
    shapes = {leaf.path: leaf.shape for leaf in plan.leaves}
    assert shapes["layers/attention/query/kernel"] == (3, 64, 4, 16)


@pytest.mark.slow
def test_nnx_comes_back_as_a_model_that_runs(mesh):
    model = shardinit.init(from_nnx.init_fn(NnxModel), 0, mesh=mesh)
    assert isinstance(model, NnxModel)
    assert model.embed(jnp.arange(4)).shape == (4, 64)


@pytest.mark.parametrize("layers", [2, 12])
@pytest.mark.few(1)
def test_depth_adds_no_program(layers, mesh):
    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Block(rngs) for _ in range(layers)])

    fn, rules = from_nnx.init_fn(Deep), shardinit.fsdp("data", min_bytes=0)
    # One for all constants of a shape: whether zeros or ones is a number it is given.
    assert len(shardinit.plan(fn, mesh=mesh, rules=rules).programs) == 9
