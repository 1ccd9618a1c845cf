"""Progress: a bar on a terminal, silence anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def shown(
    text: str, given: Callable[[int, int], None] | None, unit: str = "leaves"
) -> Iterator[Callable[[int, int], None]]:
    """What to call with (done, total).

    Args:
      text: what is being done.
      given: the caller's own, used instead of a bar.
      unit: what is counted: "leaves", or "bytes" to show sizes and speed.
    """
    if given is not None or not sys.stderr.isatty():
        yield given or (lambda done, total: None)
        return
    from rich import progress as rich
    from rich.console import Console

    counts = (rich.DownloadColumn(), rich.TransferSpeedColumn())
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        *(counts if unit == "bytes" else (rich.MofNCompleteColumn(),)),
        rich.TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with rich.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update
