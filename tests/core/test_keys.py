"""Derivations on the host against ``jax.random``, and counters beyond 32 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardinit.core.prng import derivation as keys
from shardinit.core.prng import threefry
from shardinit.core.window import coordinates as coords


def data(key):
    return np.asarray(jax.random.key_data(key)).ravel()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("fold_in"), st.integers(0, 2**32 - 1)),
        st.tuples(st.just("split"), st.integers(1, 5)),
    ),
    max_size=6,
)


@settings(max_examples=12)
@given(STEPS, st.integers(0, 2**31 - 1), st.sampled_from(["threefry2x32", "rbg"]))
def test_chains_equal_jax(steps, seed, impl):
    key = jax.random.key(seed, impl=impl)
    derived, want = keys.root(impl), key
    width = keys.words_per_key(impl)
    for step, number in steps:
        if step == "fold_in":
            derived = keys.fold_in(derived, np.array([number]))
            want = jax.random.fold_in(want, np.uint32(number))
        else:
            parts = keys.split(derived, (number,))
            last = np.arange((number - 1) * width, number * width)
            derived = keys.take([parts], last)
            want = jax.random.split(want, number)[-1]
    (got,) = keys.derive([derived], data(key))
    np.testing.assert_array_equal(got, data(want))


def test_batches_of_keys():
    key = jax.random.key(3)
    many = keys.split(keys.root("threefry2x32"), (4, 3))
    folded = keys.fold_in(many, np.arange(12))
    nested = keys.split(folded, (2,))
    got = keys.derive([many, folded, nested], data(key))
    want = jax.random.split(key, (4, 3))
    np.testing.assert_array_equal(got[0], data(want))
    each = jax.vmap(jax.random.fold_in)(want.reshape(-1), jnp.arange(12))
    np.testing.assert_array_equal(got[1], data(each))
    np.testing.assert_array_equal(
        got[2], data(jax.vmap(lambda k: jax.random.split(k, 2))(each))
    )


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_unrolled_bits_equal_jax(width):
    with jax.enable_x64(width == 64):
        key = jax.random.key(17)
        want = jax.random.bits(key, (1000,), f"uint{width}")
        k0, k1 = (jnp.full(1000, w) for w in jax.random.key_data(key))
        low = jnp.arange(1000, dtype=np.uint32)
        got = jax.jit(threefry.random_bits, static_argnums=4)(
            k0, k1, jnp.zeros_like(low), low, width
        )
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


@settings(max_examples=20)
@given(st.data())
def test_flat_places_beyond_32_bits(data):
    """64-bit places from 32-bit parts, against Python's own integers."""
    shape = data.draw(
        st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=4).filter(
            lambda s: np.prod([int(n) for n in s], dtype=object) < 2**64
        )
    )
    at = [data.draw(st.integers(0, n - 1)) for n in shape]
    place = 0
    for n, i in zip(shape, at, strict=True):
        place = place * n + i
    high, low = coords.ravel_wide(tuple(np.uint32(i) for i in at), shape)
    assert (int(high) << 32 | int(low)) == place


def test_a_leaf_of_more_than_2_to_the_32_elements(mesh):
    """The last window of a 2**33-element leaf, against threefry on the host."""
    from shardinit.core.cut.cutter import cut

    shape = (1 << 20, 1 << 13)
    key = jax.random.key(5)
    made = cut(lambda k: jax.random.bits(k, shape), jax.ShapeDtypeStruct((), key.dtype))
    (program,) = made.programs
    assert program.replicated_reason is None
    start = (shape[0] - 2, shape[1] - 70)
    got = jax.jit(
        lambda words: program.window(
            words, [[np.uint32(s) for s in start]], [(2, 70)], lanes=True
        )[0]
    )(data(key))
    rows, columns = np.mgrid[start[0] : shape[0], start[1] : shape[1]]
    places = (rows * shape[1] + columns).astype(np.uint64)
    k0, k1 = (np.full(places.shape, w) for w in data(key))
    high = (places >> np.uint64(32)).astype(np.uint32)
    b0, b1 = threefry.hash_on_host(k0, k1, high, places.astype(np.uint32))
    np.testing.assert_array_equal(got, b0 ^ b1)
    assert high.max() == 1
