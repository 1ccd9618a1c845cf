"""Progress: how far a long task has come, told in one way to whoever wants to know.

Whoever works calls a report with what is done and what there is in all, in bytes or in
leaves. The library hands it the caller's own function, the command line a bar: on a
terminal, on standard error, so that what a command prints can still be piped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

Report = Callable[[int, int], None]
"""Called with (done, in all) whenever the first has grown."""


@contextmanager
def progress(
    text: str, report: Report | None = None, unit: str = "bytes"
) -> Iterator[Report]:
    """What a task reports to while the block runs.

    Args:
      text: what is being done.
      report: the caller's own; None for a bar on a terminal and silence elsewhere.
      unit: what is counted: ``"bytes"``, shown with their rate, ``"leaves"``, or
        nothing, where it cannot be known how far a task has come.

    Example:
      >>> with progress("copy", lambda done, total: print(f"{done}/{total}")) as report:
      ...     report(1, 2)
      1/2
    """
    bar_wanted = report is None and sys.stderr.isatty()
    if not bar_wanted or find_spec("rich") is None:
        yield report or (lambda done, total: None)
        return
    # 0.1 s to import, and of no use to a job without a terminal.
    from rich import progress as rich
    from rich.console import Console

    counted_as = {
        "": (),
        "bytes": (rich.DownloadColumn(), rich.TransferSpeedColumn()),
    }
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        *counted_as.get(unit, (rich.MofNCompleteColumn(),)),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with rich.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def counted(report: Report, total: int) -> Callable[[int], None]:
    """A report of what is newly done, for a task that knows only that.

    Args:
      report: told (done, in all).
      total: what there is in all.

    Example:
      >>> advance = counted(lambda done, total: print(f"{done}/{total}"), 8)
      >>> advance(3)
      3/8
      >>> advance(5)
      8/8
    """
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    return advance
