"""The root key: what a caller may pass as ``key``, made one key or one key a stream.

Some models draw from several streams, each with a key of its own: parameters, dropout,
noise. Their init functions take a dict of keys by name, and such a dict is a root key
like any other: its words are those of all its keys, in the order of their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np

from shardinit.core.types import Array, DType
from shardinit.errors import InvalidKeyError

Seed = int | np.integer
OneKey: TypeAlias = Seed | jax.Array | np.ndarray
KeyLike: TypeAlias = OneKey | Mapping[str, OneKey]
"""What a caller may pass as a key."""

RootKey: TypeAlias = Array | dict[str, Array]
"""What ``as_key`` makes of it: a key, or keys by the names of their streams."""

AbstractKey: TypeAlias = jax.ShapeDtypeStruct | dict[str, jax.ShapeDtypeStruct]
"""A root key as shapes and dtypes."""

T = TypeVar("T")

_RAW = ((2,), (4,))  # of threefry and of rbg


def as_key(key: object) -> RootKey:
    """An int seed, a typed key or raw key data as a key; a mapping of them as a dict.

    Raises:
      InvalidKeyError: (a ``TypeError`` and a ``ValueError``) anything else, a seed of
        more than 64 bits, or streams of several kinds of keys.
    """
    if not isinstance(key, Mapping):
        return as_single_key(key)
    named = sorted(key) if all(isinstance(name, str) for name in key) else []
    if not named:
        raise InvalidKeyError("key", f"got {key!r}", "keys by the names of streams")
    streams = {name: as_single_key(key[name], f"key[{name!r}]") for name in named}
    kinds = {(str(x.dtype), tuple(x.shape)) for x in streams.values()}
    if len(kinds) > 1:
        raise InvalidKeyError(
            "key",
            f"got streams of {sorted(dtype for dtype, _ in kinds)}",
            "keys of one kind",
            "Pass jax.random.key(seed) for each, or seeds",
        )
    return streams


def streams_of(key: RootKey | AbstractKey) -> tuple[str, ...]:
    """The names of a root key's streams, in order; none of a single key.

    It may be abstract here and in ``keys_of``.
    """
    return tuple(key) if isinstance(key, dict) else ()


def keys_of(key: T | dict[str, T]) -> list[T]:
    """The key of each stream, in order; a single key alone."""
    return list(key.values()) if isinstance(key, dict) else [key]


def abstract(key: RootKey) -> AbstractKey:
    """A root key as shapes and dtypes: what a function is traced with."""
    return jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), key)


def as_single_key(key: object, where: str = "key") -> Array:
    """An int seed, a typed key or raw key data as one key.

    Raises:
      InvalidKeyError: (a ``TypeError`` and a ``ValueError``) anything else, streams by
        name included, or a seed of more than 64 bits.
    """
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        # JAX says of a larger one "Python int too large to convert to C long", and no
        # word of a seed (0.10.2 and 0.12.0.1).
        if not -(1 << 63) <= key < 1 << 63:
            raise InvalidKeyError(
                where, f"got the seed {key}", "one from -2**63 to 2**63 - 1"
            )
        with jax.transfer_guard("allow"):  # of a seed, which no user sees
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
        where,
        f"got {what}",
        "one key, raw uint32 key data or an int seed",
        "Pass jax.random.key(0), or 0",
    )


def _is_key(dtype: DType) -> bool:
    try:
        return jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)
    # "data type 'foo' not understood", where ``dtype`` is text.
    except TypeError:  # some other object that has a dtype of its own
        return False


def as_threefry(key: RootKey) -> RootKey:
    """A threefry key from a key of any implementation; of streams each.

    The data of an rbg key is that of the threefry key of the same seed, twice; so a
    seed gives the key that it gives where threefry is the default, and ``fold_in`` and
    ``split`` of rbg keys commute with this.

    Args:
      key: from ``as_key``; typed, or raw words.
    """
    if isinstance(key, dict):
        return {name: _one_threefry(one) for name, one in key.items()}
    return _one_threefry(key)


def _one_threefry(key: Array) -> Array:
    typed = _is_key(key.dtype)
    words = jax.random.key_data(key) if typed else key
    if words.shape[-1] < 2:
        raise TypeError(f"key: got {words.shape[-1]} words; expected 2 or more")
    raw = words[..., :2]
    return jax.random.wrap_key_data(raw, impl="threefry2x32") if typed else raw
