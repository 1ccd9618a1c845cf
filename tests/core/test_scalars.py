"""Scale is data: layers that differ in a scale, a bound or a constant are one program,
with the bits of plain jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardinit

from .bits import differing

LAYERS = 7
SHAPE = (48, 64)
draw, init = jax.random, jax.nn.initializers


def variance(mode, distribution):
    def make(key, i, dtype):
        scaled = init.variance_scaling(1 / (i + 1), mode, distribution, dtype=dtype)
        return scaled(key, SHAPE)

    return make


def number(value, dtype):
    return jnp.asarray(value, dtype)


MAKERS = {
    "normal by depth": lambda k, i, d: (
        draw.normal(k, SHAPE, d) * number(0.02 / np.sqrt(2 * i + 2), d)
    ),
    "normal initialiser": lambda k, i, d: init.normal(0.02 / (i + 1))(k, SHAPE, d),
    "truncated": lambda k, i, d: init.truncated_normal(0.1 / (i + 1))(k, SHAPE, d),
    **{
        f"variance {mode} {name}": variance(mode, name)
        for mode in ("fan_in", "fan_avg")
        for name in ("normal", "uniform", "truncated_normal")
    },
    "uniform between": lambda k, i, d: draw.uniform(
        k, SHAPE, d, minval=-1 / (i + 1), maxval=1 / (i + 2)
    ),
    "uniform initialiser": lambda k, i, d: init.uniform(0.3 / (i + 1))(k, SHAPE, d),
    "shifted": lambda k, i, d: draw.normal(k, SHAPE, d) + number(0.3 * i + 0.1, d),
    "lowered": lambda k, i, d: draw.laplace(k, SHAPE, d) - number(0.3 * i + 0.1, d),
    "scaled and shifted": lambda k, i, d: (
        draw.normal(k, SHAPE, d) * number(0.3 / (i + 1), d) + number(0.1 * i + 0.1, d)
    ),
    "clipped": lambda k, i, d: jnp.clip(
        draw.normal(k, SHAPE, d), number(-1 / (i + 1), d), number(1 / (i + 1), d)
    ),
    "all three": lambda k, i, d: jnp.maximum(
        draw.gumbel(k, SHAPE, d) * number(0.3 / (i + 1), d) + number(i + 0.1, d),
        number(-0.1 * i, d),
    ),
    "divided": lambda k, i, d: draw.normal(k, SHAPE, d) / number(3 * i + 2, d),
    "divided and shifted": lambda k, i, d: (
        draw.uniform(k, SHAPE, d) / jnp.sqrt(number(3 * i + 2, d)) + number(i + 0.1, d)
    ),
    "negated": lambda k, i, d: -(draw.normal(k, SHAPE, d) * number(0.3 / (i + 2), d)),
    "constant": lambda k, i, d: jnp.full(SHAPE, 0.3 * i, d),
    "orthogonal": lambda k, i, d: init.orthogonal(0.3 / (i + 1))(k, (32, 32), d),
    "transposed": lambda k, i, d: (
        (draw.normal(k, SHAPE, d) * number(0.2 / (i + 1), d)).T
    ),
    "cast": lambda k, i, d: (draw.normal(k, SHAPE) * jnp.float32(0.2 / (i + 1))).astype(
        d
    ),
    "stacked": lambda k, i, d: jax.vmap(
        lambda key: draw.normal(key, (64,), d) * number(0.2 / (i + 1), d)
    )(draw.split(k, 4)),
}


def test_a_shift_of_nothing_in_half_precision_keeps_the_bits_of_jit(mesh):
    """XLA removes it, and with it a rounding."""

    def fn(key):
        drawn = draw.gumbel(key, SHAPE, jnp.bfloat16) * jnp.bfloat16(0.3)
        return drawn + jnp.bfloat16(0)

    key = draw.key(3)
    rules = shardinit.fsdp("data", min_bytes=0)
    made = shardinit.init(fn, key, mesh=mesh, rules=rules)
    assert differing(made, jax.jit(fn)(key)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.few(4)
def test_layers_of_other_scales_are_one_program(name, dtype, mesh):
    if name == "orthogonal" and dtype != "float32":
        pytest.skip("LAPACK has no QR in bfloat16")

    def model(layers):
        def fn(key):
            folded = (draw.fold_in(key, i) for i in range(layers))
            return [MAKERS[name](k, i, jnp.dtype(dtype)) for i, k in enumerate(folded)]

        return fn

    rules = shardinit.fsdp("data", min_bytes=0)
    plan = shardinit.plan(model(LAYERS), mesh=mesh, rules=rules)
    assert len(plan.programs) == 1
    two = shardinit.plan(model(2), mesh=mesh, rules=rules)
    assert two.cut.programs[0].digest == plan.cut.programs[0].digest
    key = draw.key(3)
    made = shardinit.compile_plan(plan)(key)
    for got, want in zip(made, jax.jit(model(LAYERS))(key), strict=True):
        assert differing(got, want) == []
    again = shardinit.init(shardinit.export_plan(plan), key)
    assert all(differing(a, b) == [] for a, b in zip(again, made, strict=True))
