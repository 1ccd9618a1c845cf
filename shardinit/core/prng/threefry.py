"""Partitionable threefry2x32 with its rounds unrolled.

Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) as JAX uses it when ``jax_threefry_partitionable`` is on:
the bits at flat place ``i`` of an array are the hash of the 64-bit counter ``i``. So
any element can be computed alone, which is what a window needs.

JAX's own primitive is lowered to a loop over the rounds on CPU, to compile sooner
(https://github.com/jax-ml/jax/pull/1175; so on 0.10.2 and 0.12.0.1, and unrolled later
by https://github.com/jax-ml/jax/pull/37872). Nothing fuses with that loop, and it holds
three times the output in temporaries. On CUDA it is a custom call, made in full however
its result is sharded (https://github.com/jax-ml/jax/issues/19893). Written out as plain
adds, rotations and xors the rounds fuse into the initializer. The same text serves the
host, where the key prelude runs on numpy arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from jax import lax
from jaxtyping import UInt, UInt32

from shardinit.core.types import Array, Words

HostWords: TypeAlias = UInt32[np.ndarray | np.generic, "..."]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def _hash(
    key0: Words,
    key1: Words,
    x0: Words,
    x1: Words,
    rotate: Callable[[Words, int], Words],
) -> tuple[Words, Words]:
    schedule = (key0, key1, key0 ^ key1 ^ _PARITY)
    x0, x1 = x0 + key0, x1 + key1
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = rotate(x1, distance) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + (schedule[(group + 2) % 3] + np.uint32(group + 1))
    return x0, x1


def hash_on_host(
    key0: HostWords, key1: HostWords, high: HostWords, low: HostWords
) -> tuple[HostWords, HostWords]:
    """Threefry-2x32 on numpy.

    Args:
      key0: uint32 ``(n,)``, first words of the keys.
      key1: uint32 ``(n,)``, second words.
      high: uint32 ``(n,)``, high words of the counters.
      low: uint32 ``(n,)``, low words.

    Returns:
      Two uint32 ``(n,)`` vectors, the words of the hash.
    """
    return _hash(
        key0,
        key1,
        high,
        low,
        lambda x, d: (x << np.uint32(d)) | (x >> np.uint32(32 - d)),
    )


def hash_on_device(
    key0: Words, key1: Words, high: Words, low: Words
) -> tuple[Words, Words]:
    """Threefry-2x32 on traced uint32 arrays of one shape, rounds unrolled."""

    def rotate(x: Words, distance: int) -> Words:
        left = lax.shift_left(x, lax.full_like(x, distance))
        right = lax.shift_right_logical(x, lax.full_like(x, 32 - distance))
        return lax.bitwise_or(left, right)

    return _hash(key0, key1, high, low, rotate)


def random_bits(
    key0: Words, key1: Words, high: Words, low: Words, bit_width: int
) -> UInt[Array, ...]:
    """What ``jax.random.bits`` holds at the flat places ``high << 32 | low``.

    Args:
      key0: uint32, first words of the keys, shaped like the counters.
      key1: uint32, second words of the keys.
      high: uint32, high words of the places.
      low: uint32, low words of the places.
      bit_width: 8, 16, 32 or 64 (64 needs x64 mode).

    Returns:
      Unsigned integers of that width, shaped like the counters.
    """
    bits0, bits1 = hash_on_device(key0, key1, high, low)
    if bit_width == 64:
        wide = lax.shift_left(
            bits0.astype(np.uint64), lax.full_like(bits0, 32, np.uint64)
        )
        return lax.bitwise_or(wide, bits1.astype(np.uint64))
    # Of fewer bits JAX takes the low ones of both words mixed, not parts of a word.
    mixed = lax.bitwise_xor(bits0, bits1)
    return mixed if bit_width == 32 else mixed.astype(f"uint{bit_width}")
