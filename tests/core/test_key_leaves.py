"""Leaves of keys that are computed, from drawn or counted words, as plain jit's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardinit

random = jax.random


def fn(key):
    return {
        "drawn": random.wrap_key_data(random.bits(key, (8, 2))),
        "counted": jax.vmap(random.key)(jnp.arange(8)),
        "picked": random.split(key, 8)[random.randint(key, (4,), 0, 8)],
        "folded": random.fold_in(key, random.randint(key, (), 0, 99)),
    }


@pytest.fixture(scope="module")
def plain():
    return jax.tree.map(random.key_data, jax.jit(fn)(random.key(0)))


def check(made, plain):
    for name, words in plain.items():
        assert jnp.issubdtype(made[name].dtype, jax.dtypes.prng_key)
        np.testing.assert_array_equal(random.key_data(made[name]), words)


def test_they_are_those_of_jit(mesh, plain):
    check(shardinit.init(fn, 0, mesh=mesh, rules=shardinit.fsdp(min_bytes=0)), plain)


def test_a_file_and_windows_have_them(plain):
    program = shardinit.export_plan(fn)
    check(shardinit.init(type(program).from_bytes(program.to_bytes()), 0), plain)
    lazy = shardinit.open(fn, 0)
    for name, words in plain.items():
        np.testing.assert_array_equal(lazy[name][...], words)
