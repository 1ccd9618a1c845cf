"""Narrow random numbers that are drawn wide and rounded inside the shard."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import shardinit
from shardinit.errors import UnsupportedConfigError

from .bits import differing

RULES = shardinit.fsdp("data", min_bytes=0)
BF16 = jnp.bfloat16


DRAWS = {
    "normal": lambda key, shape, dtype: jax.random.normal(key, shape, dtype),
    "uniform": lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -2, 2),
    "truncated normal": lambda key, shape, dtype: jax.random.truncated_normal(
        key, -2, 2, shape, dtype
    ),
    "exponential": jax.random.exponential,
    "laplace": jax.random.laplace,
    "logistic": jax.random.logistic,
    "cauchy": jax.random.cauchy,
}


@pytest.mark.parametrize("dtype", [BF16, jnp.float16])
@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.few(4)
def test_a_draw_is_the_float32_one_rounded(mesh, name, dtype):
    draw = DRAWS[name]
    got = shardinit.init(
        lambda key: draw(key, (64, 128), dtype),
        3,
        mesh=mesh,
        rules=RULES,
        draw_dtype="float32",
    )
    want = jax.jit(lambda key: draw(key, (64, 128), jnp.float32).astype(dtype))
    assert differing(got, want(jax.random.key(3))) == []
    assert not got.sharding.is_fully_replicated


def test_what_follows_the_draw_stays_as_it_is(mesh):
    def model(draw):
        def step(carry, key):
            return carry, draw(key, (4, 64)) * BF16(0.3)

        def init(key):
            one, two, three = jax.random.split(key, 3)
            keys = jax.random.split(two, 5)
            return {
                "scaled": draw(one, (32, 64)) * BF16(0.02) + BF16(1),
                "scanned": jax.lax.scan(step, 0, keys)[1],
                "mapped": jax.vmap(lambda key: draw(key, (4, 64)))(keys),
                "wide": jax.random.normal(three, (8, 32)),
                "remat": jax.checkpoint(lambda key: draw(key, (8, 64)))(three),
                "zeros": jnp.zeros(3, BF16),
                "weak": 2.0,
            }

        return init

    narrow = model(lambda key, shape: jax.random.normal(key, shape, BF16))
    wide = model(lambda key, shape: jax.random.normal(key, shape).astype(BF16))
    options = {"mesh": mesh, "rules": RULES}
    got = shardinit.init(narrow, 3, draw_dtype=jnp.float32, **options)
    assert differing(got, shardinit.init(wide, 3, **options)) == []
    assert got["weak"].weak_type


def test_the_finding_about_narrow_draws_is_gone_and_equal_layers_stay_one(mesh):
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(6):
                x = nn.Dense(64, param_dtype=BF16)(x)
            return x

    def fn(key):
        return Deep().init(key, jnp.ones((1, 64)))

    before = shardinit.plan(fn, mesh=mesh, rules=RULES)
    after = shardinit.plan(fn, mesh=mesh, rules=RULES, draw_dtype="float32")
    assert [x.kind for x in before.findings if x.kind == "narrow-draw"]
    assert not [x.kind for x in after.findings if x.kind == "narrow-draw"]
    assert len(after.programs) == len(before.programs)
    assert after.fingerprint != before.fingerprint
    kernel = np.asarray(shardinit.compile_plan(after)(0)["params"]["Dense_0"]["kernel"])
    narrow = np.asarray(
        shardinit.compile_plan(before)(0)["params"]["Dense_0"]["kernel"]
    )
    assert len(np.unique(kernel)) > 4 * len(np.unique(narrow))


def test_a_function_without_narrow_draws_is_as_it_was(mesh):
    def fn(key):
        return {"w": jax.random.normal(key, (32, 64)), "b": jnp.zeros(4, BF16)}

    plain = shardinit.plan(fn)
    assert shardinit.plan(fn, draw_dtype="float32").fingerprint == plain.fingerprint


def test_a_program_keeps_it_and_takes_no_other(mesh):
    def fn(key):
        return {"w": jax.random.normal(key, (32, 64), BF16)}

    plan = shardinit.plan(fn, draw_dtype="float32")
    program = shardinit.export_plan(plan)
    got = shardinit.init(program, 3, mesh=mesh, rules=RULES)
    assert differing(got, shardinit.compile_plan(plan)(3)) == []
    with pytest.raises(UnsupportedConfigError, match="its draws are settled"):
        shardinit.plan(program, draw_dtype="float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "int32", "float64", "wide"])
def test_what_is_no_wide_float_is_refused(dtype):
    with pytest.raises(ValueError, match="draw_dtype: "):
        shardinit.plan(lambda key: jax.random.normal(key), draw_dtype=dtype)
