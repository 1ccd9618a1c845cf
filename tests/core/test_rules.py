"""The push-down rules one by one: what windows, and that its values are plain JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import shardinit

from .bits import differing

weights = np.random.default_rng(0).dirichlet(np.ones(10)).astype(np.float32)
table = np.arange(320.0, dtype=np.float32).reshape(10, 32)
draw = jax.random


def normal(key):
    return draw.normal(key, (64, 32))


WINDOWED = {
    "categorical": lambda k: draw.categorical(k, jnp.log(weights), shape=(16, 64)),
    "categorical on an axis": lambda k: draw.categorical(
        k, jnp.tile(jnp.log(weights)[:, None], 64), axis=0
    ),
    "argmax of ties": lambda k: jnp.argmax(draw.randint(k, (16, 9, 32), 0, 3), 1),
    "argmin": lambda k: jnp.argmin(draw.normal(k, (16, 9, 32)), 1),
    "argmax with nan": lambda k: jnp.argmax(
        jnp.where((u := draw.uniform(k, (16, 9, 32))) < 0.2, jnp.nan, u), 1
    ),
    "choice": lambda k: draw.choice(k, 10, (16, 64)),
    "choice of numbers": lambda k: draw.choice(k, jnp.arange(5.0) * 3, (16, 64)),
    "choice of rows": lambda k: draw.choice(k, table, (64,)),
    "choice by weight": lambda k: draw.choice(k, 10, (16, 64), p=jnp.asarray(weights)),
    "bernoulli": lambda k: draw.bernoulli(k, 0.3, (16, 64)),
    "bernoulli of two draws": lambda k: draw.bernoulli(k, 0.3, (16, 64), mode="high"),
    "bernoulli of an array": lambda k: draw.bernoulli(k, table / 320),
    "embedding lookup": lambda k: jnp.asarray(table)[draw.randint(k, (64,), -12, 14)],
    "lookup that fills": lambda k: (
        jnp.asarray(table)
        .at[draw.randint(k, (64,), -12, 14)]
        .get(mode="fill", fill_value=-7)
    ),
    "lookup of pairs": lambda k: jnp.asarray(table)[
        draw.randint(k, (64,), 0, 10), draw.randint(draw.fold_in(k, 1), (64,), 0, 32)
    ],
    "known rows": lambda k: normal(k)[jnp.array([1, 5, 5, 2])],
    "known columns": lambda k: jnp.take(normal(k).T, jnp.array([1, -5]), axis=0),
    "known places": lambda k: normal(k)[jnp.arange(32), jnp.arange(32)[::-1]],
    "one row": lambda k: normal(k)[3],
    "every other": lambda k: jnp.pad(normal(k), ((0, 0), (0, 32)))[::2, 8:56],
    "row set": lambda k: normal(k).at[0].set(0.0),
    "columns set": lambda k: normal(k).at[:, 3:5].set(1.0),
    "rows set": lambda k: normal(k).at[jnp.array([0, 5, -1])].set(table[:3]),
    "rows set to drawn": lambda k: (
        normal(k).at[jnp.array([9, 2])].set(draw.uniform(k, (2, 32)))
    ),
    "beyond the end": lambda k: normal(k).at[jnp.array([2, 70])].set(5.0),
    "row added": lambda k: normal(k).at[3].add(1.0),
    "place multiplied": lambda k: normal(k).at[3, 4].mul(2.0),
    "row at most": lambda k: normal(k).at[7].min(0.0),
    "identity added": lambda k: normal(k) + jnp.eye(64, 32),
    "lower triangle": lambda k: jnp.tril(normal(k)),
    "rolled": lambda k: jnp.roll(normal(k), 3, axis=0),
}
WHOLE = {
    "qr": lambda k: jax.nn.initializers.orthogonal()(k, (32, 32)),
    "random_gamma": lambda k: draw.gamma(k, 2.0, (32,)),
    "sort": lambda k: draw.permutation(k, 64),
    "reduce_sum": lambda k: (x := normal(k)) / jnp.sum(x, -1, keepdims=True),
    "argmax": lambda k: jax.nn.one_hot(jnp.argmax(normal(k), -1)[::-1], 32),
    "reduce_max": lambda k: (x := normal(k)) / jnp.abs(x).max(),
    "reduce_min": lambda k: jnp.min(draw.normal(k, (64, 256)), 0),
    "scatter": lambda k: normal(k).at[jnp.array([0, 0])].set(table[:2]),
    "gather": lambda k: normal(k)[draw.randint(k, (64,), 0, 64)],
}


def reads_the_same(fn, plan, key, want):
    """Holds a window against plain jit's, of the function and through a file."""
    program = shardinit.export_plan(plan)
    part = tuple(slice(n // 3, n // 3 + n // 2) for n in want.shape)
    for source in (fn, shardinit.InitProgram.from_bytes(program.to_bytes())):
        assert differing(shardinit.read(source, key, "", part), want[part]) == []


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.few(6)
def test_windows_and_equals_plain_jit(name, mesh):
    fn = WINDOWED[name]
    key = jax.random.key(5)
    want = jax.jit(fn)(key)
    plan = shardinit.plan(fn)
    assert plan.leaves[0].whole == ""
    axes = [
        axis if want.shape and want.shape[0] % mesh.shape[axis] == 0 else None
        for axis in mesh.axis_names[:1]
    ]
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    got = shardinit.init(fn, key, out_shardings=sharding)
    assert differing(got, want) == []
    reads_the_same(fn, plan, key, want)


def scaled(x, axis):
    return x / jnp.max(jnp.abs(x), axis, keepdims=True)


def wide(key, dtype=jnp.float32):
    return draw.normal(key, (160, 256), dtype)


FOLDS = {
    "largest of each row": lambda k: jnp.max(jnp.abs(wide(k)), 1),
    "least of each column": lambda k: jnp.min(jnp.square(wide(k)), 0),
    "largest of two axes": lambda k: jnp.max(
        draw.randint(k, (6, 7, 256), -9, 999), (0, 1)
    ),
    "any of an axis": lambda k: jnp.any(wide(k) > 2.5, 0),
    "all of an axis": lambda k: jnp.all(wide(k) < 2.5, 1),
    "8-bit numbers by column": lambda k: jnp.round(127 * scaled(wide(k), 0)).astype(
        jnp.int8
    ),
    "scaled by row": lambda k: scaled(wide(k, jnp.bfloat16), 1),
    "scaled by row and column": lambda k: (
        (x := jnp.exp(wide(k))) / x.max(0, keepdims=True) / x.max(1, keepdims=True)
    ),
    "scaled twice": lambda k: scaled(scaled(wide(k), 0), 0),
    "turned": lambda k: scaled(wide(k), 0).T,
    "each layer scaled": lambda k: scaled(
        jax.vmap(lambda k: draw.normal(k, (16, 128)))(draw.split(k, 3)), 1
    ),
    "of a constant": lambda k: wide(k) / jnp.max(jnp.arange(512.0).reshape(2, 256), 0),
    "one hot": lambda k: jax.nn.one_hot(jnp.argmax(wide(k), -1), 32),
}


@pytest.mark.parametrize("name", FOLDS)
def test_the_largest_along_an_axis_is_found_by_windows(name, mesh):
    fn, key = FOLDS[name], jax.random.key(5)
    want = jax.jit(fn)(key)
    plan = shardinit.plan(fn)
    assert plan.leaves[0].whole == ""
    names = ["model", None, *[None] * want.ndim]
    for spec in (names[: want.ndim], names[1::-1][: want.ndim]):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        if all(n % 4 == 0 for n, axis in zip(want.shape, spec, strict=False) if axis):
            got = shardinit.init(fn, key, out_shardings=sharding)
            assert differing(got, want) == []
    reads_the_same(fn, plan, key, want)


def test_a_window_holds_its_part_of_what_was_found_and_no_more(mesh):
    def fn(key):
        return scaled(draw.normal(key, (512, 1024)), 0)

    sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
    plan = shardinit.plan(fn, out_shardings=sharding)
    (executable,) = shardinit.compile_plan(plan).executables
    assert executable.memory_analysis().temp_size_in_bytes < 64 * 1024


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_pushed_is_named(name):
    (leaf,) = shardinit.plan(WHOLE[name]).leaves
    assert leaf.whole.split()[0] == name


def test_a_large_axis_is_folded_without_being_held(mesh):
    def fn(key):
        return jax.random.categorical(key, jnp.zeros(4096), shape=(512,))

    sharding = NamedSharding(mesh, PartitionSpec("data"))
    plan = shardinit.plan(fn, out_shardings=sharding)
    (executable,) = shardinit.compile_plan(plan).executables
    assert executable.memory_analysis().temp_size_in_bytes < 64 * 1024
    assert (
        differing(
            shardinit.init(fn, 3, out_shardings=sharding),
            jax.jit(fn)(jax.random.key(3)),
        )
        == []
    )
