"""Digests on numpy: what is hashed, and how the parts of a leaf add up.

The digest of a leaf must not depend on how the leaf is cut into shards or windows, nor
on the order in which those are seen. So each element is hashed alone, together with its
place, and the hashes are *added*: integer sums modulo 2^32 come out the same in any
order. Four sums, which differ in how the place is keyed, are the 128 bits of a leaf.

The place is the element's coordinates. Each coordinate is hashed along its own axis,
and an element's place is the sum of those; so a matrix takes a row of hashes and a
column of hashes, and no flat 64-bit index is ever computed::

    place[lane] = K[lane, 0] + sum over axes k of P(c_k; K[lane, k + 1])
    P(c; K)     = mix((low ^ K) + high) + mix((low + K) ^ (high * GOLDEN))
    sum[lane]   = sum over elements of mix(word ^ place[lane])        (all mod 2^32)

``mix`` is MurmurHash3's 32-bit finalizer (Austin Appleby, public domain), a bijection,
and ``low`` and ``high`` are the halves of a 64-bit coordinate. A word is an element's
bits; elements of 64 or 128 bits are 2 or 4 little-endian words along one more axis.

What that means: a change of one element, by one bit or by all, *always* changes every
sum. Changes of several elements, swaps among them, cancel in one sum with a chance
that was measured at 2^-27 for the worst pattern (two equal bit flips), and in all four
with that to the fourth power. This finds damage and mistakes. It is no cryptographic
hash: sums can be made to collide by someone who wants them to.

A leaf's path, shape and dtype enter with its sums; the root is of all leaves by path.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from shardinit.core.region import Region
from shardinit.errors import DigestError
from shardinit.short import plural

if TYPE_CHECKING:
    import jax

Words = TypeVar("Words", np.ndarray, "jax.Array")

ALGORITHM = "shardinit-mix128-1"
LANES = 4
GOLDEN = np.uint32(0x9E3779B9)
# Elements of a block that the caches hold while it is hashed.
BLOCK = 1 << 14
_ROWS = 1 << 16
_SUB_BYTE = {
    "int2": 2,
    "uint2": 2,
    "int4": 4,
    "uint4": 4,
    "float4_e2m1fn": 4,
    "float6_e2m3fn": 6,
    "float6_e3m2fn": 6,
}


def mix(x: Words) -> Words:
    """MurmurHash3's 32-bit finalizer, on uint32 arrays of numpy or JAX.

    Example:
      >>> mix(np.array([1, 2], np.uint32))
      array([1364076727,  821347078], dtype=uint32)
    """
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def axis_keys(axis: int) -> np.ndarray:
    """The keys of an axis (0 is no axis, but the origin): uint32 ``(LANES,)``.

    Example:
      >>> axis_keys(0).shape
      (4,)
    """
    numbers = np.arange(1, LANES + 1, dtype=np.uint32) + np.uint32(LANES * axis)
    return mix(numbers * GOLDEN)


def place_hash(low: Words, high: Words, keys: Words | np.ndarray) -> Words:
    """The hash of coordinates along one axis.

    Args:
      low: uint32, the coordinates' low words.
      high: uint32, their high words.
      keys: uint32, of that axis; broadcast against the coordinates.

    Example:
      >>> row = np.arange(3, dtype=np.uint32)
      >>> place_hash(row, np.zeros_like(row), axis_keys(1)[:, None]).shape
      (4, 3)
    """
    return mix((low ^ keys) + high) + mix((low + keys) ^ (high * GOLDEN))


def split_axes(shape: Sequence[int]) -> int:
    """How many leading axes are the rows; the others together are the columns.

    Columns should fill vectors and their hashes should stay small.

    Example:
      >>> split_axes((3, 1024, 256)), split_axes((1024, 2))
      (2, 0)
    """
    first = max(len(shape) - 1, 0)
    while first and math.prod(shape[first:]) < 128:
        if math.prod(shape[first - 1 :]) > 1 << 16:
            break
        first -= 1
    return first


# ---- sums of a window ----------------------------------------------------------------


def bits_of(window: np.ndarray) -> np.ndarray:
    """The elements' bits as uint8, uint16 or uint32.

    Returns:
      Shaped like ``window``, with one more axis if an element has several words.

    Raises:
      DigestError: elements without bits of their own, such as objects and strings.

    Example:
      >>> bits_of(np.array([1.0, -0.0], np.float32))
      array([1065353216, 2147483648], dtype=uint32)
    """
    dtype = window.dtype
    if dtype.kind in "OSUMmT" or dtype.fields is not None:
        raise DigestError("digest", f"elements of dtype {dtype}", "numbers")
    if dtype.byteorder == ">":
        window = window.astype(dtype.newbyteorder("<"))
    window = np.asarray(window, order="C")
    size = dtype.itemsize
    if size <= 4:
        bits = window.view(f"<u{size}")
        used = _SUB_BYTE.get(dtype.name)
        return bits if used is None else bits & np.uint8((1 << used) - 1)
    return window.reshape(-1).view("<u4").reshape(*window.shape, size // 4)


def window_sums(window: np.ndarray, start: Sequence[int]) -> np.ndarray:
    """The four sums of a window: uint32 ``(LANES,)``.

    Args:
      window: the elements.
      start: where the window begins along each axis of the leaf.

    Example:
      >>> leaf = np.arange(6.0).reshape(2, 3)
      >>> parts = window_sums(leaf[:1], (0, 0)) + window_sums(leaf[1:], (1, 0))
      >>> bool((parts == window_sums(leaf, (0, 0))).all())
      True
    """
    bits = bits_of(window)
    if not bits.size:
        return np.zeros(LANES, np.uint32)
    start = [*start, *[0] * (bits.ndim - len(start))]
    first = split_axes(bits.shape)
    axes = list(range(bits.ndim))
    flat = bits.reshape(math.prod(bits.shape[:first]), -1)
    total = np.zeros(LANES, np.uint64)
    wide = min(flat.shape[1], BLOCK)
    high = max(1, BLOCK // wide)
    for top in range(0, flat.shape[0], _ROWS):
        some = flat[top : top + _ROWS]
        rows = _places(bits.shape, start, axes[:first], top, len(some))
        rows = (rows + axis_keys(0)[:, None])[:, :, None]
        for left in range(0, flat.shape[1], wide):
            part = some[:, left : left + wide]
            columns = _places(bits.shape, start, axes[first:], left, part.shape[1])
            for at in range(0, len(part), high):
                words = part[at : at + high].astype(np.uint32)
                for lane in range(LANES):
                    hashed = rows[lane, at : at + high] + columns[lane]
                    hashed ^= words
                    _mix_in_place(hashed)
                    total[lane] += hashed.sum(dtype=np.uint64)
    return total.astype(np.uint32)


def _mix_in_place(x: np.ndarray) -> None:
    """``mix``, without an allocation for every step."""
    shifted = x >> np.uint32(16)
    x ^= shifted
    x *= np.uint32(0x85EBCA6B)
    np.right_shift(x, np.uint32(13), out=shifted)
    x ^= shifted
    x *= np.uint32(0xC2B2AE35)
    np.right_shift(x, np.uint32(16), out=shifted)
    x ^= shifted


def _places(
    shape: Sequence[int],
    start: Sequence[int],
    axes: Sequence[int],
    first: int,
    count: int,
) -> np.ndarray:
    """Hashes of ``count`` row-major places of a box of neighbouring axes.

    Returns:
      uint32 ``(LANES, count)``.
    """
    flat = np.arange(first, first + count, dtype=np.uint64)
    places = np.zeros((LANES, count), np.uint32)
    for axis in reversed(axes):
        size = np.uint64(shape[axis])
        inner, flat = (flat, flat) if axis == axes[0] else (flat % size, flat // size)
        wide = inner + np.uint64(start[axis])
        low, high = wide.astype(np.uint32), (wide >> np.uint64(32)).astype(np.uint32)
        places += place_hash(low, high, axis_keys(axis + 1)[:, None])
    return places


# ---- digests -------------------------------------------------------------------------


@dataclass(frozen=True)
class Digest:
    """The digest of a tree.

    Attributes:
      leaves: by path, 128 bits in hex, in the order of the tree.
      kinds: by path, the shape and the name of the dtype.

    Example:
      >>> finish([("a", (3,), "float64", window_sums(np.ones(3), (0,)))]).kinds
      {'a': ((3,), 'float64')}
    """

    leaves: dict[str, str]
    kinds: dict[str, tuple[tuple[int, ...], str]]

    @property
    def root(self) -> str:
        """256 bits in hex, of all leaves by path; the order of the tree is no part.

        Example:
          >>> sums = window_sums(np.ones(3), (0,))
          >>> len(finish([("a", (3,), "float64", sums)]).root) * 4  # bits
          256
        """
        return root_digest(self.leaves)

    def __repr__(self) -> str:
        return f"<Digest of {plural(len(self.leaves), 'leaf')}, root {self.root}>"

    def __str__(self) -> str:
        return self.root


def root_digest(leaves: Mapping[str, str]) -> str:
    """256 bits in hex, of the digests of all leaves by path.

    Example:
      >>> root_digest({"a": "00", "b": "01"}) == root_digest({"b": "01", "a": "00"})
      True
    """
    text = json.dumps([ALGORITHM, *sorted(leaves.items())])
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def finish(
    leaves: Iterable[tuple[str, Sequence[int], DTypeLike, np.ndarray]],
) -> Digest:
    """The digest of leaves, each as path, shape, dtype and sums.

    Example:
      >>> sums = window_sums(np.ones(3), (0,))
      >>> len(finish([("a", (3,), "float64", sums)]).leaves["a"]) * 4  # bits
      128
    """
    digests, kinds = {}, {}
    for path, shape, dtype, sums in leaves:
        kinds[path] = tuple(int(n) for n in shape), np.dtype(dtype).name
        words = [int(word) for word in sums]
        text = json.dumps([ALGORITHM, path, kinds[path][1], kinds[path][0], words])
        digests[path] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Digest(digests, kinds)


class Digester:
    """Adds up windows, in any order, until every element was seen once.

    Args:
      leaves: by path, the shape and the dtype of each leaf.

    Example:
      >>> digester = Digester({"a": ((4,), "float32")})
      >>> digester.add("a", (2,), np.ones(2, np.float32))
      >>> digester.add("a", (0,), np.ones(2, np.float32))
      >>> sums = window_sums(np.ones(4, np.float32), (0,))
      >>> digester.digest() == finish([("a", (4,), "float32", sums)])
      True
    """

    def __init__(self, leaves: Mapping[str, tuple[Sequence[int], DTypeLike]]):
        self._shapes = {
            path: tuple(int(n) for n in shape) for path, (shape, _) in leaves.items()
        }
        self._dtypes = {path: np.dtype(dtype) for path, (_, dtype) in leaves.items()}
        self._sums = {path: np.zeros(LANES, np.uint32) for path in leaves}
        self._seen = dict.fromkeys(leaves, 0)

    def add(self, path: str, start: Sequence[int], window: np.ndarray) -> None:
        """Adds a window of a leaf.

        Args:
          path: the leaf.
          start: where the window begins along each axis.
          window: its elements, of the leaf's dtype. Windows must not overlap.

        Raises:
          DigestError: an unknown leaf, or a window that does not lie in it.

        Example:
          >>> digester = Digester({"a": ((4,), "float32")})
          >>> digester.add("a", (2,), np.ones(2, np.float32))
        """
        if path not in self._shapes:
            raise DigestError(f"leaf {path!r}", "it is not known", "a leaf of the tree")
        shape = self._shapes[path]
        if window.dtype != self._dtypes[path]:
            raise DigestError(
                f"leaf {path!r}",
                f"a window of dtype {window.dtype}",
                f"{self._dtypes[path]}",
            )
        if not Region(tuple(start), window.shape).inside(shape):
            raise DigestError(
                f"leaf {path!r}",
                f"a window of shape {window.shape} at {tuple(start)}",
                f"one inside {shape}",
            )
        self._sums[path] += self._window_sums(window, start)
        self._seen[path] += window.size

    def digest(self) -> Digest:
        """The digest of all leaves.

        Raises:
          DigestError: a leaf of which not every element was added.

        Example:
          >>> digester = Digester({"a": ((2,), "float32")})
          >>> digester.add("a", (0,), np.ones(2, np.float32))
          >>> list(digester.digest().leaves)
          ['a']
        """
        for path, shape in self._shapes.items():
            if self._seen[path] != math.prod(shape):
                raise DigestError(
                    f"leaf {path!r}",
                    f"{self._seen[path]:,} elements were added",
                    f"all {math.prod(shape):,}, each once",
                )
        return finish(
            (path, shape, self._dtypes[path], self._sums[path])
            for path, shape in self._shapes.items()
        )

    def _window_sums(self, window: np.ndarray, start: Sequence[int]) -> np.ndarray:
        return window_sums(window, start)
