"""Inspect: what the weights will be like, from a few windows of each and no run.

Leaf by leaf: what it is drawn from, as its program says, and mean, deviation, range,
zeros and histogram of its numbers, as they will be at that key. Small leaves are summed
whole, of large ones sixty-four windows are, so that a model of 405 billion parameters
is looked at on a laptop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardinit.core.cut.cut import Cut, LeafCut
from shardinit.core.cut.sources import Constant, Keys, Replicated, Windowed
from shardinit.core.plan.findings import Finding, finding
from shardinit.core.plan.folded import template
from shardinit.core.plan.leaves import names_of
from shardinit.core.plan.mesh import as_device
from shardinit.core.plan.options import PlanOptions, Select
from shardinit.core.plan.plan import Plan, make_plan
from shardinit.core.prng.root_key import KeyLike, as_key
from shardinit.core.run.arguments import key_words, operand_words
from shardinit.core.run.lazy import LazyTree
from shardinit.core.run.lazy import open as open_lazily
from shardinit.core.types import Device
from shardinit.errors import WholeLeafError
from shardinit.progress import Report, counted, progress
from shardinit.verify.inspect.gain import depth_axis, depth_of, fan_in, unlike
from shardinit.verify.inspect.law import UNKNOWN, Law, read_law
from shardinit.verify.inspect.moments import Moments, moments
from shardinit.verify.inspect.report import Inspection, LeafStatistics
from shardinit.verify.inspect.windows import Layout, evaluate, layout

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
      report: told (leaves done, leaves in all).

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
        plan = make_plan(fn, as_key(key), PlanOptions(select=select))
        root = plan.root_key(as_key(key))
        reader = _Reader(plan, root, memory_limit, device)
        with progress("inspect", report, unit="leaves") as told:
            leaves = reader.read(told)
    words = tuple(int(word) for word in key_words(root, plan.cut))
    found = tuple(_findings(leaves, reader.names))
    return Inspection(plan.name, plan.fingerprint, words, tuple(leaves), found)


class _Reader:
    """Reads the leaves of a plan, those of one program together."""

    def __init__(
        self, plan: Plan, root: jax.Array, limit: int, device: Device | str | None
    ):
        self.cut: Cut = plan.cut
        self.numbers = [i for i, x in enumerate(plan.leaves) if x.selected]
        self.names = dict(
            zip(
                (leaf.path for leaf in plan.cut.leaves),
                names_of(plan.cut, plan.init_fn.axes),
                strict=True,
            )
        )
        self._device = as_device(device)
        self._lazy: LazyTree = open_lazily(
            plan, root, memory_limit=limit, device=self._device
        )
        derived = [plan.cut.leaves[i].operands for i in self.numbers]
        found = operand_words(derived, key_words(root, plan.cut))
        self._words = dict(zip(self.numbers, found, strict=True))
        self._laws: dict[Any, Law] = {}

    def read(self, report: Report) -> list[LeafStatistics]:
        """The statistics of the selected leaves, in their order."""
        advance = counted(report, len(self.numbers))
        made: dict[int, LeafStatistics] = {}
        for number, leaf in self._each():
            made[number] = leaf
            advance(1)
        return [made[number] for number in self.numbers]

    def _each(self) -> Iterator[tuple[int, LeafStatistics]]:
        together: dict[Any, list[int]] = {}
        for number in self.numbers:
            leaf = self.cut.leaves[number]
            if isinstance(leaf.source, Windowed):
                depth = self._depth(leaf)
                alike = (leaf.source.program, leaf.shape, depth)
                together.setdefault(alike, []).append(number)
            else:
                yield number, self._alone(leaf, number)
        for (program, shape, depth), numbers in together.items():
            yield from self._windowed(program, shape, depth, numbers)

    def _depth(self, leaf: LeafCut) -> int | None:
        return depth_axis(leaf.shape, self.names[leaf.path])

    def _alone(self, leaf: LeafCut, number: int) -> LeafStatistics:
        """A leaf that is there in full, or that is computed in full."""
        if isinstance(leaf.source, Keys):
            why = "keys are no numbers"
            return self._statistics(leaf, UNKNOWN, Moments(), 0, True, unread=why)
        law = self._law(number)
        try:
            values = np.asarray(self._lazy[leaf.path]).reshape(1, -1)
        except WholeLeafError as error:
            return self._statistics(leaf, law, Moments(), 0, False, unread=error.got)
        found = moments(values, exact=True)
        return self._statistics(leaf, law, found, 1, True)

    def _windowed(
        self, program: int, shape: tuple[int, ...], depth: int | None, numbers: list[int]
    ) -> Iterator[tuple[int, LeafStatistics]]:
        place = layout(shape, depth=depth)
        one = self.cut.is_uniform(self.cut.leaves[numbers[0]])
        if one:  # a single element says it all
            zeros = np.zeros((1, len(shape)), np.uint32)
            place = Layout((1,) * len(shape), zeros, True)
        words = np.stack([self._words[number] for number in numbers])
        function = self.cut.programs[program]
        made = evaluate(function, place.shape, words, place.starts, self._device)
        for number, windows in zip(numbers, made, strict=True):
            leaf = self.cut.leaves[number]
            found = moments(windows, exact=place.exact)
            if one:
                found = replace(found, count=math.prod(shape))
            count = len(place.starts)
            layers = () if depth is None or one else self._layers(windows, leaf, place)
            yield (
                number,
                self._statistics(
                    leaf, self._law(number), found, count, place.exact, layers=layers
                ),
            )

    def _layers(
        self, windows: np.ndarray, leaf: LeafCut, place: Layout
    ) -> tuple[float, ...]:
        """The standard deviation in each layer of a leaf that stacks them."""
        each = windows.reshape(leaf.shape[0], -1)
        return tuple(moments(x[None], exact=True).std for x in each)

    def _statistics(
        self,
        leaf: LeafCut,
        law: Law,
        found: Moments,
        windows: int,
        exact: bool,
        *,
        layers: tuple[float, ...] = (),
        unread: str = "",
    ) -> LeafStatistics:
        return LeafStatistics(
            path=leaf.path,
            shape=leaf.shape,
            dtype=str(leaf.dtype),
            law=law,
            moments=found,
            windows=windows,
            exact=exact and not unread,
            fan_in=fan_in(leaf.path, leaf.shape, self.names[leaf.path]),
            layers=layers,
            unread=unread,
        )

    def _law(self, number: int) -> Law:
        """The law of a leaf; equal programs with equal scalars have one."""
        source = self.cut.leaves[number].source
        scalars = tuple(int(d.data[0]) for d in source.operands if d.op == "words")
        if not isinstance(source, Windowed | Replicated):
            return law_of(self.cut, number, self._words[number])
        which = (source.program, source.result, scalars)
        if which not in self._laws:
            self._laws[which] = law_of(self.cut, number, self._words[number])
        return self._laws[which]


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
    if isinstance(source, Windowed | Replicated):
        return read_law(cut.programs[source.program], words, source.result)
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


# ---- what stands out -----------------------------------------------------------------

_BY_DESIGN = ("bias", "scale", "offset", "b", "beta", "gamma")


def _findings(
    leaves: Sequence[LeafStatistics], names: dict[str, Any]
) -> Iterable[Finding]:
    broken = [leaf.path for leaf in leaves if leaf.moments.nonfinite]
    if broken:
        yield finding(
            "not-finite",
            broken,
            "some of its numbers are infinite or NaN",
            "Look at the scale that the initialiser is given, and at its dtype",
            severity="warning",
        )
    yield from _of_one_value(leaves, names)
    groups: dict[Any, list[LeafStatistics]] = {}
    for leaf in leaves:
        if leaf.windows:
            alike = (template(leaf.path), leaf.shape, leaf.dtype)
            groups.setdefault(alike, []).append(leaf)
    for group in groups.values():
        yield from _unlike_their_sisters(group)
        for leaf in group:
            yield from _unlike_layers(leaf)


def _of_one_value(
    leaves: Sequence[LeafStatistics], names: dict[str, Any]
) -> Iterable[Finding]:
    """Kernels of one value, and random leaves that came out as one."""
    by_value: dict[float, list[str]] = {}
    for leaf in leaves:
        found = leaf.moments
        if not leaf.windows or found.count < 1 or not found.min == found.max:
            continue
        last = leaf.path.rpartition("/")[2]
        depth = depth_axis(leaf.shape, names[leaf.path])
        rank = len(leaf.shape) - (depth is not None)
        meant = leaf.law.family == "constant" or leaf.law.family == "unknown"
        if math.prod(leaf.shape) > 1 and (
            not meant or (rank > 1 and last not in _BY_DESIGN)
        ):
            by_value.setdefault(found.min, []).append(leaf.path)
    for value, paths in by_value.items():
        what = "dead: every element is 0" if value == 0 else f"every element is {value:.4g}"
        yield finding(
            "one-value",
            paths,
            what,
            "A kernel of one value learns one feature; draw it, unless it is meant so, "
            "as the last of a residual branch may be",
            severity="note",
        )


def _unlike_their_sisters(group: Sequence[LeafStatistics]) -> Iterable[Finding]:
    depths = [depth_of(leaf.path) for leaf in group]
    if len(set(depths)) < 2:
        depths = list(range(len(group)))
    for what in ("std", "mean"):
        values = [abs(getattr(leaf.moments, what)) for leaf in group]
        errors = [getattr(leaf.moments, f"{what}_error") for leaf in group]
        if what == "mean":  # of random leaves it is an accident of the draw
            noise = [
                x.moments.std / math.sqrt(max(x.moments.count, 1)) for x in group
            ]
            errors = [max(e, n) for e, n in zip(errors, noise, strict=True)]
            if not all(v > 6 * e for v, e in zip(values, errors, strict=True)):
                continue
        for number, expected in unlike(depths, values, errors):
            yield _stands_out(group[number].path, what, values[number], expected)
    yield from _of_another_family(group)


def _of_another_family(group: Sequence[LeafStatistics]) -> Iterable[Finding]:
    families = [leaf.law.family for leaf in group]
    most = max(set(families), key=families.count)
    others = [leaf for leaf in group if leaf.law.family != most]
    if others and len(group) >= 4 and len(others) <= len(group) / 4:
        for leaf in others:
            yield finding(
                "unlike-sisters",
                [leaf.path],
                f"it is {leaf.law}, and {len(group) - len(others):,} of its sisters "
                f"are {most}",
                "Give it the initialiser of the others, unless it is meant so",
                severity="warning",
            )


def _unlike_layers(leaf: LeafStatistics) -> Iterable[Finding]:
    """Layers of a stack that are unlike the others."""
    if not leaf.layers:
        return
    share = leaf.moments.count / len(leaf.layers)
    errors = [x / math.sqrt(2 * max(share, 1)) for x in leaf.layers]
    depths = range(len(leaf.layers))
    for number, expected in unlike(list(depths), leaf.layers, errors):
        where = f"{leaf.path}[{number}]"
        yield _stands_out(where, "std", leaf.layers[number], expected)


def _stands_out(path: str, what: str, value: float, expected: float) -> Finding:
    return finding(
        "unlike-sisters",
        [path],
        f"its {what} is {value:.4g}, that of its sisters at its depth {expected:.4g} "
        f"({value / expected:.3g} times)",
        "Look at the scale of this layer, unless it is meant so",
        severity="warning",
    )
