"""Case: what is measured, against what, and how much of it is enough.

A case has *sides*, functions that a child process runs and that return figures by
name, and *rows*, a generator that asks for runs of those sides and makes rows of the
table out of what came back. Only sides import JAX, and only when they are called.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ParamSpec, Protocol, TypeVar

from shardinit.bench import FAMILIES

P = ParamSpec("P")
T = TypeVar("T")

ENOUGH_RUNS = 3  # of a side, to say how far its runs lie apart

_SCALES = {"s": 1.0, "KB": 1e-3, "GB": 1e-9, "GB/s": 1e-9}

Figures = dict[str, float]
Side = Callable[..., Figures]


@dataclass(frozen=True)
class Target:
    """What a figure must reach, and what would be better still.

    Attributes:
      must: the figure to reach.
      goal: the figure to aim at.
      higher: whether more is better.
    """

    must: float
    goal: float
    higher: bool = True

    def missed_by(self, value: float) -> float:
        """Factor by which ``value`` falls short of the must; at most 1 if it is met."""
        return self.must / value if self.higher else value / self.must


@dataclass(frozen=True)
class Sample:
    """One figure of one side, from several runs.

    Attributes:
      values: in the order of the runs.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Largest less smallest value, as a part of the median."""
        return (max(self.values) - min(self.values)) / self.median

    def __truediv__(self, other: Sample) -> float:
        """How many times the other's median this one is."""
        return self.median / other.median


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      case: name of the case.
      name: what was measured.
      value: the figure that counts, in ``unit``: a ratio of the two sides ("x"), or
        seconds ("s")
        or kilobytes ("KB", 1e3 bytes).
      ours: shardinit's own figures, in ``side_unit``.
      baseline: those of the other side; None without one.
      against: what the other side is.
      side_unit: "s", "KB" (1e3 bytes), "GB" (1e9 bytes) or "GB/s".
      target: what ``value`` must reach; None where nothing was set.
      note: what the reader must know to read the row right.
    """

    case: str
    name: str
    value: float
    unit: str
    ours: Sample
    baseline: Sample | None = None
    against: str = ""
    side_unit: str = "s"
    target: Target | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the must is reached; None without one."""
        return None if self.target is None else self.target.missed_by(self.value) <= 1


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
      layers: depths of the models of a cold start.
      devices: simulated CPU devices, or all that the platform has.
      repeats: runs a side.
      quick: small sizes, for a look and for tests; targets do not apply to them.
      platform: ``"cpu"``, ``"tpu"`` or ``"cuda"``, as JAX calls it.
    """

    layers: tuple[int, ...]
    devices: int
    repeats: int
    quick: bool
    platform: str = "cpu"


@dataclass(frozen=True)
class Job:
    """Runs of one side that are wanted.

    Attributes:
      side: name of the side.
      parameters: its arguments; plain data.
      repeats: how many runs, each in its own process; default as many as the options
        say.
      needs_bytes: memory that a run is expected to take; 0 if it is no matter.
    """

    side: str
    parameters: Mapping[str, Any]
    repeats: int | None = None
    needs_bytes: int = 0


class Bench(Protocol):
    """What a case asks for runs of its sides; `shardinit.bench.runner` is one."""

    @property
    def options(self) -> Options:
        """What the command line asks for."""
        ...

    def measure(self, case: Case, *jobs: Job) -> list[list[Figures]]:
        """Runs jobs in turns; for each the figures of its runs."""
        ...

    def fits(self, size: int) -> bool:
        """Whether a run that takes ``size`` bytes may be started now."""
        ...


@dataclass(frozen=True)
class Case:
    """A thing to measure.

    Attributes:
      name: as the command line calls it.
      measures: one line for people.
      baseline: what shardinit is held against.
      sides: functions that a child runs, by name.
      rows: makes the rows.
      targets: by a key of the case's choice, such as a depth.
    """

    name: str
    measures: str
    baseline: str
    sides: Mapping[str, Side]
    rows: Callable[[Bench], Iterator[Row]]
    targets: Mapping[Any, Target] = field(default_factory=dict)

    def row(
        self,
        bench: Bench,
        name: str,
        value: float,
        ours: Sample,
        *,
        unit: str = "x",
        target: Any = None,
        **more: Any,
    ) -> Row:
        """A row of this case.

        Args:
          bench: whose options say whether targets apply.
          name: see `Row`.
          value: see `Row`.
          ours: see `Row`.
          unit: see `Row`.
          target: the key of the target, if the row has one.
          **more: further fields of `Row`.
        """
        wanted = None if bench.options.quick else self.targets.get(target)
        return Row(self.name, name, value, unit, ours, target=wanted, **more)

    def compare(
        self,
        bench: Bench,
        name: str,
        mine: list[Figures],
        theirs: list[Figures],
        against: str,
        figure: str = "seconds",
        *,
        over: bool = False,
        unit: str = "s",
        **more: Any,
    ) -> Row:
        """A row with the ratio of one figure on the two sides.

        Args:
          bench: as for `row`.
          name: as for `row`.
          mine: shardinit's runs.
          theirs: those of the other side.
          against: what the other side is.
          figure: what of the runs; bytes and seconds.
          over: whether the ratio is mine over theirs, and not theirs over mine.
          unit: of the sides.
          **more: as for `row`.
        """
        ours, other = (sample(runs, figure, _SCALES[unit]) for runs in (mine, theirs))
        value = ours / other if over else other / ours
        sides = {"baseline": other, "against": against, "side_unit": unit}
        return self.row(bench, name, value, ours, **sides, **more)


class OutOfMemory(RuntimeError):
    """A run was stopped, or not started, because memory would not have sufficed."""


_cases: dict[str, Case] = {}


def register(
    name: str,
    measures: str,
    baseline: str,
    sides: Mapping[str, Side],
    rows: Callable[[Bench], Iterator[Row]],
    targets: Mapping[Any, Target] | None = None,
) -> Case:
    """Makes a case of these fields known under its name."""
    _cases[name] = Case(name, measures, baseline, sides, rows, targets or {})
    return _cases[name]


def load() -> dict[str, Case]:
    """All cases of all families, by name, in the order of the families."""
    for family in FAMILIES:
        importlib.import_module(f"shardinit.bench.{family}")
    return dict(_cases)


def sample(runs: list[Figures], figure: str, scale: float = 1.0) -> Sample:
    """One figure of all runs of a side, multiplied by ``scale``."""
    return Sample(tuple(run[figure] * scale for run in runs))


def median(runs: list[Figures], figure: str, scale: float = 1.0) -> float:
    """The middle value of that figure."""
    return sample(runs, figure, scale).median


def timed(run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[float, T]:
    """Seconds until a call has returned and its arrays are there; what it returned."""
    import jax

    begin = time.perf_counter()
    # JAX returns once it has dispatched: without the wait that alone would be timed.
    made = jax.block_until_ready(run(*args, **kwargs))
    return time.perf_counter() - begin, made
