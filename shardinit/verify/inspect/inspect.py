"""Inspect: what the weights will be like, from a few windows of each and no run.

Leaf by leaf: what it is drawn from, as its program says, and mean, deviation, range,
zeros and histogram of its numbers, as they will be at that key. Small leaves are summed
whole, of large ones sixty-four windows are, so that a model of 405 billion parameters
is looked at on a laptop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardinit.core.cut.cut import Cut, LeafCut
from shardinit.core.cut.sources import Constant, Run
from shardinit.core.plan.leaves import names_of
from shardinit.core.plan.options import PlanOptions, Select
from shardinit.core.plan.plan import Plan
from shardinit.core.plan.planning import make_plan
from shardinit.core.prng.root_key import KeyLike, as_key
from shardinit.core.types import Device
from shardinit.progress import Report, counted, progress
from shardinit.verify.inspect.gain import depth_axis, fan_in
from shardinit.verify.inspect.law import UNKNOWN, Law
from shardinit.verify.inspect.moments import Moments, moments
from shardinit.verify.inspect.program_law import read_law
from shardinit.verify.inspect.reading import Reader, Seen
from shardinit.verify.inspect.report import Inspection, LeafStatistics
from shardinit.verify.inspect.standing_out import findings

WHOLE_BYTES = 1 << 26


def inspect(
    fn: object,
    key: KeyLike = 0,
    *,
    select: Select | None = None,
    memory_limit: int = WHOLE_BYTES,
    device: Device | str | None = None,
    report: Report | None = None,
) -> Inspection:
    """Statistics of every leaf at a key, without making any large leaf.

    Leaves of at most 2^18 elements are summed whole. Of larger ones 64 windows of 2,048
    elements are, one at random in each of 64 strata (of a leaf that stacks layers at
    least one in each layer), and what is said of them has a standard error. Families
    and scales are read from the functions themselves; programs that were loaded from a
    file have none to read, and their families are unknown.

    Args:
      fn: ``key -> pytree of arrays``, an ``InitFn``, an ``InitProgram`` or a ``Plan``.
      key: a key or an int seed.
      select: globs over leaf paths, or a predicate: the leaves to look at.
      memory_limit: bytes that a leaf may take which has to be computed in full; those
        that take more are not looked at.
      device: where windows are computed; default the first local device.
      report: called with (leaves done, leaves in all).

    Raises:
      InitFnError: the function cannot be cut.
      SelectError: a glob that matches no leaf.
      TypeError: the key is none, or of another type than the plan's.

    Example:
      >>> import jax, shardinit
      >>> def init(key):
      ...     kernel = jax.nn.initializers.lecun_normal()(key, (1024, 1024))
      ...     return {"kernel": kernel, "bias": jax.numpy.zeros(1024)}
      >>> bias, kernel = shardinit.inspect(init, 0).leaves
      >>> kernel.law.family, kernel.exact, round(kernel.gain, 1)
      ('truncated normal', False, 1.0)
    """
    with jax.transfer_guard("allow"):
        root = as_key(key)
        plan = make_plan(fn, root, PlanOptions(select=select))
        numbers = [i for i, leaf in enumerate(plan.leaves) if leaf.selected]
        reader = Reader(
            plan,
            plan.root_key(root),
            numbers,
            memory_limit=memory_limit,
            device=device,
        )
        with progress("inspect", report, unit="leaves") as told:
            leaves = _statistics(plan, reader, counted(told, len(numbers)))
    words = tuple(int(word) for word in reader.key)
    made = tuple(leaves[number] for number in numbers)
    return Inspection(plan.name, plan.fingerprint, words, made, tuple(findings(made)))


def _statistics(
    plan: Plan, reader: Reader, advance: Callable[[int], None]
) -> dict[int, LeafStatistics]:
    """The statistics of each leaf by its number."""
    cut, laws, made = plan.cut, {}, {}
    paths = [leaf.path for leaf in cut.leaves]
    names = dict(zip(paths, names_of(cut, plan.init_fn.axes), strict=True))

    def depth(leaf: LeafCut) -> int | None:
        return depth_axis(leaf.shape, names[leaf.path])

    for seen in reader.read(depth):
        leaf = cut.leaves[seen.number]
        which = _alike(leaf)
        if which is None or which not in laws:
            laws[which] = law_of(cut, seen.number, reader.words[seen.number])
        made[seen.number] = _of_leaf(leaf, names[leaf.path], seen, laws[which])
        advance(1)
    return made


def _alike(leaf: LeafCut) -> Hashable:
    """Equal for leaves of one law, of equal programs and scalars; None if unknown."""
    source = leaf.source
    if not isinstance(source, Run):
        return None
    scalars = tuple(int(d.data[0]) for d in source.operands if d.op == "words")
    return source.computation, scalars


def _of_leaf(leaf: LeafCut, names: Any, seen: Seen, law: Law) -> LeafStatistics:
    size, found, layers = math.prod(leaf.shape), Moments(), ()
    axis = depth_axis(leaf.shape, names)
    if not seen.unread:
        found = moments(seen.windows, exact=seen.exact)
        one = seen.exact and found.count < size
        # A leaf of one number was read as a single element, which stands for all of
        # them.
        found = replace(found, count=size) if one else found
        if axis is not None and not one:
            each = seen.windows.reshape(leaf.shape[0], -1)
            layers = tuple(moments(x[None], exact=True).std for x in each)
    return LeafStatistics(
        path=leaf.path,
        shape=leaf.shape,
        dtype=str(leaf.dtype),
        law=law,
        moments=found,
        windows=len(seen.windows),
        exact=seen.exact,
        stacked=axis is not None,
        fan_in=fan_in(leaf.path, leaf.shape, names),
        layers=layers,
        unread=seen.unread,
    )


def law_of(cut: Cut, number: int, words: np.ndarray) -> Law:
    """The law of a leaf of a cut function, whatever it comes from.

    Args:
      cut: the function.
      number: of the leaf.
      words: of the leaf's operands.
    """
    source = cut.leaves[number].source
    if isinstance(source, Constant):
        return _of_array(source.array)
    if isinstance(source, Run):
        return read_law(source.program_of(cut.programs), words, source.result)
    return UNKNOWN


def _of_array(array: np.ndarray) -> Law:
    """The law of a captured array: a constant if it is one number throughout."""
    real = jnp.issubdtype(array.dtype, np.floating) or array.dtype.kind in "iu"
    if not array.size or not real:
        return UNKNOWN
    first = array.ravel()[0]
    value = float(first)
    same = bool((array == first).all())
    return Law("constant", value, 0.0, value, value) if same else UNKNOWN
