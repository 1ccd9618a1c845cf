"""From a root key to the words that each leaf program takes.

The user's key, in any of its forms, becomes a few 32-bit words; the key prelude turns
those into the words of every leaf's operands, on the host and for all leaves at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from shardinit.core.cut.cut import Cut
from shardinit.core.ir.jaxpr import is_key, is_tracer, key_impl
from shardinit.core.prng import derivation as keys
from shardinit.core.prng.root_key import RootKey, keys_of, streams_of
from shardinit.core.types import Array
from shardinit.errors import InvalidKeyError


def key_words(key: RootKey, cut: Cut) -> np.ndarray:
    """The uint32 words of a root key, which must be of the kind that was planned for.

    Those of several streams come one after the other.

    Args:
      key: from ``as_key``.
      cut: the function that was planned.

    Raises:
      InvalidKeyError: (a ``TypeError``) the key has other streams or another
        implementation than the plan's, or no value.
    """
    if streams_of(key) != cut.streams:
        raise InvalidKeyError(
            "key",
            f"got {_said(streams_of(key))}; the plan was made for {_said(cut.streams)}",
            remedy="Pass key= of the same kind to shardinit.plan",
        )
    return np.concatenate([_words(one, cut) for one in keys_of(key)])


def _said(streams: tuple[str, ...]) -> str:
    return f"keys by the names {', '.join(streams)}" if streams else "one key"


def _words(key: Array, cut: Cut) -> np.ndarray:
    if is_tracer(key):
        raise InvalidKeyError(
            "key",
            "got a value that is being traced",
            "a concrete key",
            "Call shardinit outside jax.jit and other transformations",
        )
    if is_key(key.dtype):
        impl = key_impl(key.dtype)
        words = jax.random.key_data(key)
    else:
        impl, words = cut.impl, key
    if impl != cut.impl or words.size != keys.words_per_key(cut.impl):
        raise InvalidKeyError(
            "key",
            f"got a {impl} key with {words.size} words; the plan was made for "
            f"{cut.impl} keys",
            remedy="Pass key= of the same type to shardinit.plan",
        )
    return np.asarray(words)


def operand_words(
    derived: Sequence[tuple[keys.Derivation, ...]], words: np.ndarray
) -> list[np.ndarray]:
    """For each leaf the words of all its operands in one uint32 vector.

    Args:
      derived: the operands of each leaf.
      words: the root key's words.
    """
    flat = keys.derive([d for group in derived for d in group], words)
    vectors, start = [], 0
    for group in derived:
        parts = flat[start : start + len(group)]
        start += len(group)
        if len(parts) == 1:
            vectors.append(parts[0])
        else:
            vectors.append(np.concatenate(parts) if parts else np.zeros(0, np.uint32))
    return vectors
