"""Two runs of the bench against each other: what is noise, what is a change.

A row's value is known no better than its runs agree: the spread of either side about
its median makes a range of values that would have surprised nobody. Where the ranges of
two results overlap, the difference is noise. Fewer than three runs of a side give no
range worth the name, and the row says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from shardinit.bench.case import ENOUGH_RUNS

HEADER = ("measured", "before", "after", "change", "verdict")
WORSE, BETTER, OTHER = "worse", "better", "changed"


@dataclass(frozen=True)
class Change:
    """One row of two results.

    Attributes:
      name: what was measured.
      before, after: its value in either, None where it was not measured.
      unit: of both.
      verdict: ``"noise"``, ``"worse"``, ``"better"``, ``"changed"`` (it has no target
        that says which way is better), ``"too few runs"``, ``"new"`` or ``"gone"``.
    """

    name: str
    before: float | None
    after: float | None
    unit: str
    verdict: str

    def cells(self) -> tuple[str, ...]:
        """The row of a table."""
        part = ""
        if self.before is not None and self.after is not None:
            part = f"{self.after / self.before - 1:+.1%}"
        values = (self._text(self.before), self._text(self.after))
        return (self.name, *values, part, self.verdict)

    def _text(self, value: float | None) -> str:
        space = "" if self.unit == "x" else " "
        return "" if value is None else f"{value:.3g}{space}{self.unit}"


def read(path: Path) -> list[dict[str, Any]]:
    """The results in a file that ``--json`` or ``--history`` wrote, oldest first.

    Raises:
      ValueError: it holds something else.
    """
    text = path.read_text()
    try:
        try:
            found = [json.loads(text)]
        except json.JSONDecodeError:  # a history: one result a line
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        if not found or not all(isinstance(one["rows"], list) for one in found):
            raise ValueError("no rows")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: {error}; expected what --json or --history of the bench writes"
        ) from error
    return found


def pair(paths: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two results to compare: of two files, or the last two like ones of a history.

    Like ones have the same command and were taken on the same processor.

    Raises:
      ValueError: a file holds no result, or a history no two like ones.
    """
    if len(paths) == 2:
        return read(paths[0])[-1], read(paths[1])[-1]
    *earlier, last = read(paths[0])
    like = [one for one in earlier if _kind(one) == _kind(last)]
    if not like:
        raise ValueError(
            f"{paths[0]}: no earlier result of {last['command']!r} on this processor; "
            "expected two, run the same command again with --history"
        )
    return like[-1], last


def _kind(result: Mapping[str, Any]) -> tuple[str, str, int]:
    machine = result["machine"]
    return result["command"], machine["cpu"], machine["cores"]


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Every row of two results, in the order of the later one."""
    old = {_name(row): row for row in before["rows"]}
    new = {_name(row): row for row in after["rows"]}
    found = [_change(old.get(key), row) for key, row in new.items()]
    gone = [row for key, row in old.items() if key not in new]
    return found + [
        Change(_said(row), row["value"], None, row["unit"], "gone") for row in gone
    ]


def _name(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """What tells a row from others: one thing may be held against several."""
    return row["case"], row["name"], row["against"]


def _change(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> Change:
    name, value, unit = _said(new), new["value"], new["unit"]
    if old is None or old["unit"] != unit:
        return Change(name, None, value, unit, "new")
    return Change(name, old["value"], value, unit, _verdict(old, new))


def _said(row: Mapping[str, Any]) -> str:
    return f"{row['name']}, against {row['against']}" if row["against"] else row["name"]


def _verdict(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    before, after = _range(old), _range(new)
    if before is None or after is None:
        return "too few runs"
    if before[0] <= after[1] and after[0] <= before[1]:
        return "noise"
    if new["higher_is_better"] is None:
        return OTHER
    return BETTER if (after[0] > before[1]) == new["higher_is_better"] else WORSE


def _range(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """The least and the largest value that the runs of a row allow; None if too few."""
    factor = 1.0
    for side in (row["shardinit"], row["baseline"]):
        if side is None:
            continue
        values, middle = side["values"], side["median"]
        if len(values) < ENOUGH_RUNS:
            return None
        factor *= max(max(values) / middle, middle / min(values))
    return row["value"] / factor, row["value"] * factor


def table(found: Sequence[Change]) -> Table:
    """The changes for the terminal."""
    made = Table(*HEADER)
    styles = {WORSE: "red", BETTER: "green", OTHER: "yellow", "noise": "dim"}
    for change in found:
        made.add_row(*map(escape, change.cells()), style=styles.get(change.verdict, ""))
    return made
