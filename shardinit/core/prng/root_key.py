"""The root key: what a caller may pass as ``key``, made one key."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from shardinit.core.types import Array, DType
from shardinit.errors import InvalidKeyError

Seed = int | np.integer
KeyLike = Seed | jax.Array | np.ndarray


_RAW = ((2,), (4,))  # of threefry and of rbg


def as_key(key: object) -> Array:
    """An int seed, a typed key or raw key data as a key.

    Raises:
      InvalidKeyError: (a ``TypeError`` and a ``ValueError``) anything else, or a seed
        of more than 64 bits.
    """
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        if not -(1 << 63) <= key < 1 << 63:
            raise InvalidKeyError(
                "key", f"got the seed {key}", "one from -2**63 to 2**63 - 1"
            )
        return jax.random.key(int(key))
    given: Any = key
    if (
        not isinstance(given, bool)
        and hasattr(given, "dtype")
        and (
            (_is_key(given.dtype) and given.shape == ())
            or (given.dtype == np.uint32 and tuple(given.shape) in _RAW)
        )
    ):
        return given
    what = type(given).__name__
    if isinstance(given, np.ndarray | jax.Array):
        what += f" of shape {given.shape} and dtype {given.dtype}"
    raise InvalidKeyError(
        "key",
        f"got {what}",
        "one key, raw uint32 key data or an int seed",
        "Pass jax.random.key(0), or 0",
    )


def _is_key(dtype: DType) -> bool:
    try:
        return jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)
    except TypeError:  # some other object that has a dtype of its own
        return False


def as_threefry(key: jax.Array) -> jax.Array:
    """A threefry key from a key of any implementation.

    The data of an rbg key is that of the threefry key of the same seed, twice; so a
    seed gives the key that it gives where threefry is the default, and ``fold_in`` and
    ``split`` of rbg keys commute with this.

    Args:
      key: from ``as_key``; typed, or raw words.
    """
    typed = _is_key(key.dtype)
    words = jax.random.key_data(key) if typed else key
    if words.shape[-1] < 2:
        raise TypeError(f"key: got {words.shape[-1]} words; expected 2 or more")
    raw = words[..., :2]
    return jax.random.wrap_key_data(raw, impl="threefry2x32") if typed else raw
