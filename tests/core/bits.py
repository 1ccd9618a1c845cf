"""Comparing arrays by their bits: NaN and signed zero told apart."""

import jax
import numpy as np


def host(array):
    """A numpy array; the key data of typed keys."""
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array)


def raw(array):
    """The bytes of an array, of the key data for typed keys."""
    return np.ascontiguousarray(host(array)).tobytes()


def differing(left, right):
    """Paths of the leaves whose shape, dtype or bits differ."""
    pairs_left, tree_left = jax.tree_util.tree_flatten_with_path(left)
    pairs_right, tree_right = jax.tree_util.tree_flatten_with_path(right)
    assert tree_left == tree_right
    return [
        jax.tree_util.keystr(path)
        for (path, a), (_, b) in zip(pairs_left, pairs_right, strict=True)
        if a.shape != b.shape or a.dtype != b.dtype or raw(a) != raw(b)
    ]


def ulps(left, right):
    """Largest distance in units in the last place between two float arrays."""
    a, b = np.asarray(left), np.asarray(right)
    kind = f"int{a.dtype.itemsize * 8}"
    lowest = np.iinfo(kind).min

    def ordered(x):
        i = x.view(kind).astype(object)
        return np.where(i < 0, lowest - i, i)

    return int(np.max(np.abs(ordered(a) - ordered(b)), initial=0))


def unlike_jit(ours, plain):
    """Paths of the leaves that are not what the first promise says of plain jit.

    Equal bits where the last axis has 32 elements or more; for narrower leaves XLA's
    code for this processor decides the last places, and 4 units of them are allowed.
    """
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(ours),
        jax.tree_util.tree_leaves_with_path(plain),
        strict=True,
    )
    return [
        jax.tree_util.keystr(path)
        for (path, a), (_, b) in pairs
        if differing(a, b)
        and (a.shape != b.shape or a.shape[-1] >= 32 or ulps(a, b) > 4)
    ]
