"""Random access: any window of any leaf, computed alone.

A leaf program takes where a window starts as data and its shape as a type, so windows
of one shape share one executable, whichever part of whichever equal leaf they are.
``open`` makes of a function and a key something that looks like a checkpoint: a
mapping of paths to arrays that can be sliced, and are computed when they are.

A leaf that cannot be windowed is evaluated whole, kept while its windows are read, and
refused beforehand if that would take more memory than the caller allows.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import jax
import numpy as np

from shardinit.core.cut.cut import LeafCut
from shardinit.core.cut.leaf_program import Program
from shardinit.core.cut.sources import Hosted, Replicated
from shardinit.core.ir.jaxpr import is_key, key_impl
from shardinit.core.paths import nearest
from shardinit.core.plan.leaves import gather_results
from shardinit.core.plan.mesh import alone_on, as_device, one_device
from shardinit.core.plan.options import PlanOptions
from shardinit.core.plan.plan import Plan
from shardinit.core.plan.planning import make_plan
from shardinit.core.prng import derivation as keys
from shardinit.core.prng.root_key import KeyLike, RootKey, as_key
from shardinit.core.region import Index, Region, covering
from shardinit.core.run import arguments as operands
from shardinit.core.types import Device, DType, Tree, Values, Words
from shardinit.errors import ArgumentError, SelectError, WholeLeafError
from shardinit.short import plural

EXECUTABLES = 256


class LazyArray:
    """One leaf that is computed when it is sliced.

    Slicing with ints, slices and ``...`` gives numpy arrays. A leaf of typed keys reads
    as its key data: uint32, with the words of a key as the last axis.

    Attributes:
      path: the leaf's key path.
      shape, dtype: of the whole leaf; a numpy dtype.
      whole: why any window of it costs the full leaf; empty if it does not.
      uniform: whether all its elements are known to be one number, as those of zeros.
    """

    def __init__(self, tree: LazyTree, number: int):
        leaf = tree.cut.leaves[number]
        self._tree = tree
        self._number = number
        self.path = leaf.path
        self.whole = tree.cut.replicated_text(leaf)
        self.uniform = tree.cut.is_uniform(leaf)
        if is_key(leaf.dtype):
            width = keys.words_per_key(key_impl(leaf.dtype))
            self.shape: tuple[int, ...] = (*leaf.shape, width)
            self.dtype = np.dtype(np.uint32)
        else:
            self.shape = leaf.shape
            self.dtype = np.dtype(leaf.dtype)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole leaf."""
        return self.size * self.dtype.itemsize

    def read(self, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """The window that begins at ``start`` and has ``shape``.

        Args:
          start: its first index along each axis.
          shape: its size along each axis; 0 is allowed.

        Raises:
          IndexError: the window does not lie inside the leaf.
          WholeLeafError: the leaf must be evaluated whole, beyond the memory limit.
        """
        region = Region(tuple(start), tuple(shape))
        if not region.inside(self.shape):
            raise IndexError(
                f"leaf {self.path!r}: got a window from {region.start} of shape "
                f"{region.shape}; expected one inside its shape {self.shape}"
            )
        if not region.size:
            return np.zeros(region.shape, self.dtype)
        with alone_on(one_device(self._tree._device)):
            return self._tree._read(self._number, region)

    def __getitem__(self, index: Index) -> np.ndarray | np.generic:
        region, rest = covering(index, self.shape, f"leaf {self.path!r}")
        return self.read(region.start, region.shape)[rest]

    def __array__(self, dtype: DType = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"leaf {self.path!r}: it is computed, never a view")
        array = self.read((0,) * self.ndim, self.shape)
        return array if dtype is None else array.astype(dtype, copy=False)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"leaf {self.path!r}: a scalar has no len()")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyArray({self.path!r}, shape={self.shape}, dtype={self.dtype})"


class LazyTree(Mapping[str, LazyArray]):
    """All leaves by path, in the order of the pytree: a checkpoint that is not there.

    Attributes:
      cut: the function taken apart.
      init_fn: the function, with what its front end knows of it.
      fingerprint: of the function, in hex.
    """

    def __init__(
        self,
        plan: Plan,
        key: RootKey,
        memory_limit: int | None,
        device: Device | str | None,
    ):
        self.cut = cut = plan.cut
        self.init_fn = plan.init_fn
        self._key_words = operands.key_words(key, cut)
        if memory_limit is not None:
            ArgumentError.check_bytes("memory_limit", memory_limit)
        self._limit = memory_limit
        self._device = as_device(device)
        self._numbers = {leaf.path: i for i, leaf in enumerate(cut.leaves)}
        self._groups = {i: tuple(g) for g in gather_results(cut) for i in g}
        self._held: OrderedDict[tuple[int, ...], list[np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """Hash of the function, in hex."""
        return self.cut.fingerprint

    @property
    def identity(self) -> str:
        """Names the values: the function, the key and what computes them."""
        words = self._key_words.tobytes().hex()
        where = f"{self._device.platform}, JAX {jax.__version__}"
        return f"{self.fingerprint} at {self.cut.impl} {words} on {where}"

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.nbytes for leaf in self.values())

    def as_tree(self) -> Tree:
        """The pytree with a ``LazyArray`` for each leaf."""
        return jax.tree.unflatten(self.cut.tree, list(self.values()))

    def __getitem__(self, path: str) -> LazyArray:
        if not isinstance(path, str):
            likely = "/".join(map(str, path)) if isinstance(path, tuple | list) else ""
            raise SelectError(
                f"path {path!r}",
                f"it is of type {type(path).__name__}",
                nearest(likely, self._numbers),
            )
        if path not in self._numbers:
            raise SelectError(
                f"path {path!r}",
                f"none of the {len(self._numbers):,} leaves",
                nearest(path, self._numbers),
            )
        return LazyArray(self, self._numbers[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __repr__(self) -> str:
        return f"LazyTree({plural(len(self), 'leaf')}, {self.nbytes:,} bytes)"

    def _read(self, number: int, region: Region) -> np.ndarray:
        leaf = self.cut.leaves[number]
        (words,) = operands.operand_words([leaf.operands], self._key_words)
        if isinstance(leaf.source, Hosted):
            array = leaf.source.on_host(leaf.shape, words, self._device)
            return np.array(array[region.slices])
        program = self.cut.programs[leaf.source.program]
        if isinstance(leaf.source, Replicated):
            group = self._groups[number]
            full = self._in_full(group, program, words, number)
            return np.array(full[region.slices])
        run = executable(program, (region.shape,), self._device)
        (out,) = run(words, np.asarray(region.start, np.uint32))
        return _to_numpy(out)

    def _in_full(
        self,
        group: tuple[int, ...],
        program: Program,
        words: np.ndarray,
        number: int,
    ) -> np.ndarray:
        """One result of a replicated program; all of them are kept, up to the limit."""
        with self._lock:  # one at a time: that is what is bounded
            if group not in self._held:
                leaves = [self.cut.leaves[i] for i in group]
                self._check_limit(leaves[0], sum(leaf.nbytes for leaf in leaves))
                shapes = tuple(leaf.shape for leaf in leaves)
                run = executable(program, shapes, self._device)
                self._check_limit(leaves[0], _memory(run))
                zeros = np.zeros(sum(map(len, shapes)), np.uint32)
                # The programs before this one are let go: at most one is held.
                self._held.clear()
                self._held[group] = [_to_numpy(out) for out in run(words, zeros)]
            return self._held[group][group.index(number)]

    def _check_limit(self, leaf: LeafCut, needed: int) -> None:
        if self._limit is not None and needed > self._limit:
            why = self.cut.replicated_text(leaf)
            raise WholeLeafError(
                f"leaf {leaf.path!r}",
                f"any window of it needs the whole leaf ({why}): {needed:,} bytes",
                f"at most memory_limit={self._limit:,} bytes",
                "Raise memory_limit, or use an initialiser that can be windowed",
            )


def _memory(run: jax.stages.Compiled) -> int:
    """Bytes of results and temporaries of an executable."""
    analysis = run.memory_analysis()
    if analysis is None:  # a backend that does not say
        return 0
    return analysis.output_size_in_bytes + analysis.temp_size_in_bytes


def _to_numpy(array: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(array) if is_key(array.dtype) else array)


@lru_cache(maxsize=EXECUTABLES)
def executable(
    program: Program, shapes: tuple[tuple[int, ...], ...], device: Device
) -> jax.stages.Compiled:
    """Compiled ``(words, starts) -> windows`` of the given shapes, on one device."""
    lanes = device.platform == "cpu"

    def windows(words: Words, starts: Words) -> tuple[Values, ...]:
        places, first = [], 0
        for shape in shapes:
            places.append([starts[first + i] for i in range(len(shape))])
            first += len(shape)
        return tuple(program.window(words, places, shapes, lanes=lanes))

    place = jax.sharding.SingleDeviceSharding(device)
    arguments = [
        jax.ShapeDtypeStruct((count,), np.uint32, sharding=place)
        for count in (program.words, sum(map(len, shapes)))
    ]
    with alone_on(one_device(device)):
        lowered = jax.jit(windows, out_shardings=place).lower(*arguments)
    return lowered.compile()


def open(
    fn: object,
    key: KeyLike,
    *,
    memory_limit: int | None = None,
    device: Device | str | None = None,
) -> LazyTree:
    """A function or program at a key as a mapping of lazy arrays; computes nothing.

    Args:
      fn: ``key -> pytree of arrays``, an ``InitFn``, an ``InitProgram`` or a ``Plan``.
      key: a key or an int seed.
      memory_limit: bytes that evaluating one leaf whole may take (its results and
        temporaries); None for no limit. Windowed leaves take their window only.
      device: where windows are computed, or the platform of the first device to take;
        default the first local device.

    Returns:
      Leaves by path, in the order of the pytree; all may be read from many threads.

    Raises:
      InitFnError: the function cannot be cut.
      TypeError: the key is none, or of another type than the plan's.

    Example:
      >>> import jax, shardinit
      >>> init = lambda key: {"w": jax.random.normal(key, (1 << 20, 64))}
      >>> weights = shardinit.open(init, 0)
      >>> weights["w"].nbytes, weights["w"][-2:, :32].shape  # 256 MiB, none of it made
      (268435456, (2, 32))
    """
    with jax.transfer_guard("allow"):
        root = as_key(key)
        made = make_plan(fn, root, PlanOptions())
        return LazyTree(made, made.root_key(root), memory_limit, device)


def read(
    fn: object,
    key: KeyLike,
    path: str,
    window: Index = ...,
    *,
    memory_limit: int | None = None,
    device: Device | str | None = None,
) -> np.ndarray:
    """One window of one leaf; equal to the same slice of the whole, bit for bit.

    A function is traced anew by every call: ``open`` it once to read many windows.

    Args:
      fn: ``key -> pytree of arrays``, an ``InitFn``, an ``InitProgram`` or a ``Plan``.
      key: a key or an int seed.
      path: the leaf's key path.
      window: a numpy index of ints, slices and ``...``; default the whole leaf.
      memory_limit: as for ``open``.
      device: as for ``open``.

    Raises:
      SelectError: no leaf has that path.
      IndexError: the window does not lie inside the leaf.
      WholeLeafError: the leaf must be evaluated whole, beyond the memory limit.

    Example:
      >>> import jax, numpy as np, shardinit
      >>> init = lambda key: {"w": jax.random.normal(key, (1 << 20, 64))}
      >>> shardinit.read(init, 0, "w", np.s_[1000:1002]).shape
      (2, 64)
    """
    lazy = open(fn, key, memory_limit=memory_limit, device=device)[path]
    return np.asarray(lazy[window])
