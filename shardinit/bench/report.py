"""Report: the rows as a table for people, and as JSON with all that made them.

A figure can be judged only with what it was taken on, so the JSON holds the command,
the processor, the versions and every single run, and not only the medians.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from shardinit.bench.case import Row, Sample
from shardinit.bench.runner import proc
from shardinit.version import __version__

HEADER = ("measured", "shardinit", "against", "ratio", "must", "goal", "met")
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def environment(command: str) -> dict[str, Any]:
    """What the run is made on: machine, versions, commit, date, command."""
    versions = {"python": platform.python_version(), "shardinit": __version__}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions,
        "machine": {
            "cpu": proc("cpuinfo", "model name") or platform.processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_average_before": os.getloadavg()[0],
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def _commit() -> str | None:
    """The checkout's commit, marked if the package differs; None outside of one."""
    folder = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        if git("ls-files", "__init__.py"):  # not merely installed below some checkout
            changed = git("status", "--porcelain", "--", str(folder))
            return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    return None


def _side(sample: Sample | None, unit: str) -> str:
    if sample is None:
        return ""
    text = f"{sample.median:.3g} {unit}"
    return text + (f" ±{sample.spread / 2:.0%}" if len(sample.values) > 1 else "")


def _cells(row: Row) -> tuple[str, ...]:
    unit = "" if row.unit == "x" else " "
    target, sign = row.target, ""
    if target is not None:
        sign = "≥ " if target.higher else "≤ "

    def figure(value: float) -> str:
        return f"{value:.3g}{unit}{row.unit}"

    against = _side(row.baseline, row.side_unit)
    return (
        row.name,
        _side(row.ours, row.side_unit),
        f"{row.against} {against}".strip(),
        figure(row.value),
        sign + figure(target.must) if target else "",
        sign + figure(target.goal) if target else "",
        {None: "", True: "yes", False: "no"}[row.met],
    )


def line(row: Row) -> str:
    """A row as it comes, before there is a table."""
    name, ours, against, ratio, must, _, met = _cells(row)
    sides = f" ({ours}{', ' if against else ''}{against})" if row.baseline else ""
    wanted = f"; must {must}: {met}" if must else ""
    return f"{name}: {ratio}{sides}{wanted}"


def table(rows: Sequence[Row]) -> Table:
    """The rows for the terminal."""
    made = Table(*HEADER)
    for row in rows:
        style = {None: "", True: "green", False: "red"}[row.met]
        made.add_row(*map(escape, _cells(row)), style=style)
    return made


def notes(rows: Sequence[Row]) -> list[str]:
    """What the reader must know, one line a row that has a note or misses its must."""
    lines = []
    for row in rows:
        text = row.note
        if row.target is not None and not row.met:
            missed = f"missed by {row.target.missed_by(row.value):.2f}x"
            text = f"{missed}; {text}" if text else missed
        if text:
            lines.append(f"{row.name}: {text}")
    return lines


def markdown(about: dict[str, Any], rows: Sequence[Row]) -> str:
    """The rows, their notes and the environment as a Markdown page."""
    lines = [f"| {' | '.join(HEADER)} |", "| " + "--- | " * len(HEADER)]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    machine = about["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    head = [
        f"    {about['command']}",
        "",
        f"{about['date']}, commit {about['commit'] or 'unknown'}; {versions}; "
        f"{machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB, load before the run "
        f"{machine['load_average_before']:.1f}.",
        "",
    ]
    listed = [f"- {line}" for line in notes(rows)]
    return "\n".join([*head, *lines, "", *listed, ""])


def write_json(
    path: Path, about: dict[str, Any], rows: Sequence[Row], log: list[dict[str, Any]]
) -> None:
    """Writes environment, rows and every run to ``path``."""
    content = {**_result(about, rows), "runs": log}
    path.write_text(json.dumps(content, indent=1) + "\n")


def append_history(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Adds environment and rows to ``path``, as one line of JSON."""
    with path.open("a") as file:
        file.write(json.dumps(_result(about, rows)) + "\n")


def _result(about: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    return {**about, "rows": [_as_data(row) for row in rows]}


def _as_data(row: Row) -> dict[str, Any]:
    def side(sample: Sample | None) -> dict[str, Any] | None:
        if sample is None:
            return None
        values = list(sample.values)
        return {"median": sample.median, "spread": sample.spread, "values": values}

    target = row.target
    return {
        "case": row.case,
        "name": row.name,
        "value": row.value,
        "unit": row.unit,
        "shardinit": side(row.ours),
        "baseline": side(row.baseline),
        "against": row.against,
        "side_unit": row.side_unit,
        "must": target.must if target else None,
        "goal": target.goal if target else None,
        "higher_is_better": target.higher if target else None,
        "met": row.met,
        "note": row.note,
    }
