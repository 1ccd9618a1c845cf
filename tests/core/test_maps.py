"""A map whose steps no rule covers is windowed by the step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import shardinit

KEY = jax.random.key(3)
LAYERS = 6


def by_map(step):
    return lambda key: jax.lax.map(step, jax.random.split(key, LAYERS))


def by_scan(step):
    def fn(key):
        def one(key, _):
            key, mine = jax.random.split(key)
            return key, step(mine)

        return jax.lax.scan(one, key, None, length=LAYERS)[1]

    return fn


def by_number(step):
    return lambda key: jax.lax.map(
        lambda i: step(jax.random.fold_in(key, i)), jnp.arange(LAYERS)
    )


def qr(key):
    return jax.nn.initializers.orthogonal()(key, (40, 32))


def normalised(key):
    x = jax.random.normal(key, (40, 32))
    return x / jnp.linalg.norm(x, axis=0)


@pytest.mark.parametrize(
    ("stack", "step"), [(by_map, qr), (by_scan, normalised), (by_number, qr)]
)
@pytest.mark.few(1)
def test_layers_of_any_kind_shard_over_layers_and_axes(stack, step):
    fn = stack(step)
    plain = np.asarray(jax.jit(fn)(KEY))
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    for spec in [("data",), (None, "model", "data")]:
        plan = shardinit.plan(
            fn, out_shardings=NamedSharding(mesh, PartitionSpec(*spec))
        )
        assert not plan.whole_leaves
        made = shardinit.compile_plan(plan)(KEY)
        assert np.allclose(made, plain, atol=1e-6)
        if spec == ("data",):
            first = np.asarray(made)
        assert np.array_equal(made, first)


@pytest.mark.slow
def test_what_follows_the_map_only_moves_its_elements(mesh):
    def fn(key):
        x = by_map(qr)(key).reshape(LAYERS * 40, 32).T
        return jnp.pad(x[:, 5:211] * 2, ((0, 0), (1, 1)))

    plain = np.asarray(jax.jit(fn)(KEY))
    place = NamedSharding(mesh, PartitionSpec("model", "data"))
    plan = shardinit.plan(fn, out_shardings=place)
    assert not plan.whole_leaves
    assert np.allclose(shardinit.compile_plan(plan)(KEY), plain, atol=1e-6)
    program = shardinit.export_plan(plan)
    made = shardinit.init(program, KEY, out_shardings=place)
    assert np.array_equal(made, shardinit.compile_plan(plan)(KEY))
    window = shardinit.read(program, KEY, "", (slice(3, 9), slice(38, 90)))
    assert np.array_equal(window, np.asarray(made)[3:9, 38:90])


def test_a_map_over_values_that_are_not_keys_is_whole():
    def fn(key):
        return jax.lax.map(jnp.cumsum, jax.random.normal(key, (LAYERS, 64)))

    plan = shardinit.plan(fn)
    assert plan.whole_leaves
    made = shardinit.compile_plan(plan)(KEY)
    assert np.array_equal(made, jax.jit(fn)(KEY))


# Each has other last places in a loop than outside of one, on one of the two versions.
IN_LOOPS_ALONE = {
    "tan": (lambda k: jnp.tan(jax.random.uniform(k, (4, 96))), "float32"),
    "cbrt": (lambda k: jnp.cbrt(jax.random.uniform(k, (4, 96))), "float32"),
    "cauchy": (lambda k: jax.random.cauchy(k, (4, 96)) * 0.1, "float32"),
    "log1p": (
        lambda k: jnp.log1p(jax.random.uniform(k, (4, 96), "float16")),
        "float16",
    ),
    "exponential": (lambda k: jax.random.exponential(k, (4, 96), "float16"), "float16"),
}


@pytest.mark.parametrize("loop", [by_map, by_scan])
@pytest.mark.parametrize("name", IN_LOOPS_ALONE)
@pytest.mark.few(3)
def test_what_loops_compute_otherwise_is_computed_in_a_loop(mesh, name, loop):
    step, dtype = IN_LOOPS_ALONE[name]
    fn = loop(step)
    plan = shardinit.plan(
        fn, out_shardings=NamedSharding(mesh, PartitionSpec("data", None, "model"))
    )
    assert not plan.whole_leaves
    made = np.asarray(shardinit.compile_plan(plan)(KEY))
    assert made.dtype == dtype
    assert made.tobytes() == np.asarray(jax.jit(fn)(KEY)).tobytes()
