"""The command line of the bench: chooses cases, runs them, shows and stores them."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

from rich.console import Console

from shardinit.bench import case as cases
from shardinit.bench import compare, report
from shardinit.bench.drawing import ratios_svg
from shardinit.bench.runner import Runner, count_devices

_COMPARE_USAGE = """\
compare two results, noise told from change; exit code 1 where one is for the worse:
  python -m shardinit.bench compare BEFORE.json AFTER.json
  python -m shardinit.bench compare HISTORY.jsonl    its last two of one command"""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a positive number is expected")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(_positive, text.split(",")))


def _parser(known: dict[str, cases.Case]) -> argparse.ArgumentParser:
    listing = "\n".join(f"  {c.name:8} {c.measures}" for c in known.values())
    parser = argparse.ArgumentParser(
        prog="python -m shardinit.bench",
        description="Measure shardinit side by side with plain JAX.",
        epilog=f"{_COMPARE_USAGE}\n\ncases:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    every = ",".join(known)
    parser.add_argument("--case", default=every, help=f"default: {every}")
    parser.add_argument("--layers", type=_numbers, help="depths of cold, as in 4,16")
    parser.add_argument("--platform", default="cpu", help="cpu (default), tpu or cuda")
    parser.add_argument(
        "--devices", type=_positive, default=8, help="simulated CPU devices; default 8"
    )
    parser.add_argument(
        "--repeats", type=_positive, help="runs a side; default 3, quick 1"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, one run")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--markdown", type=Path, help="also write the table to it")
    parser.add_argument(
        "--history", type=Path, help="also append the rows to it, a line a run"
    )
    parser.add_argument("--plot", type=Path, help="also draw the ratios, as SVG")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the chosen cases; the exit code is 0 even where a target is missed."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["compare"]:
        return _compare(words[1:])
    known = cases.load()
    parser = _parser(known)
    chosen = parser.parse_args(words)
    names = [name.strip() for name in chosen.case.split(",")]
    options = _options(parser, chosen, names, known)
    # An end that is asked for unwinds like any other, and takes the child along.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console = Console()
    command = shlex.join(["python", "-m", "shardinit.bench", *words])
    about = report.environment(command)
    runner = Runner(
        options, lambda text: console.print(text, style="dim", soft_wrap=True)
    )
    rows = []
    for row in (row for name in names for row in known[name].rows(runner)):
        console.print(report.line(row), soft_wrap=True, markup=False)
        rows.append(row)
    console.print(report.table(rows))
    for line in report.notes(rows):
        console.print(line, soft_wrap=True, markup=False)
    if chosen.json:
        report.write_json(chosen.json, about, rows, runner.log)
    if chosen.history:
        report.append_history(chosen.history, about, rows)
    if chosen.markdown:
        chosen.markdown.write_text(report.markdown(about, rows))
    if chosen.plot:
        chosen.plot.write_text(ratios_svg(rows))
    return 0


def _options(
    parser: argparse.ArgumentParser,
    chosen: argparse.Namespace,
    names: list[str],
    known: dict[str, cases.Case],
) -> cases.Options:
    """What the command line asks for; ends the process where it asks nonsense."""
    for name in names:
        if name not in known:
            parser.error(f"no case is named {name!r}; there are {', '.join(known)}")
    devices = chosen.devices
    if chosen.platform != "cpu":
        try:
            devices = count_devices(chosen.platform)
        except RuntimeError as error:
            parser.error(str(error))
    return cases.Options(
        layers=chosen.layers or ((4, 16) if chosen.quick else (4, 16, 64, 126)),
        devices=devices,
        repeats=chosen.repeats or (1 if chosen.quick else 3),
        quick=chosen.quick,
        platform=chosen.platform,
    )


def _compare(words: list[str]) -> int:
    """Shows two results side by side; 1 where a row is worse than noise explains."""
    parser = argparse.ArgumentParser(
        prog="python -m shardinit.bench compare",
        usage=f"\n{_COMPARE_USAGE}",
        description="Tell noise from change in two results of the bench.",
    )
    parser.add_argument("results", type=Path, nargs="+")
    paths = parser.parse_args(words).results
    if len(paths) > 2:
        parser.error(f"got {len(paths)} files; expected two results, or one history")
    try:
        before, after = compare.pair(paths)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    found = compare.changes(before, after)
    console = Console()
    for name, result in (("before", before), ("after", after)):
        told = f"{name}: {result['date']}, commit {result['commit'] or 'unknown'}"
        console.print(told, soft_wrap=True, markup=False, highlight=False)
    console.print(compare.table(found))
    return int(any(change.verdict == compare.WORSE for change in found))


if __name__ == "__main__":
    sys.exit(main())
