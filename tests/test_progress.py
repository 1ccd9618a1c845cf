"""A bar on a terminal, the caller's own report instead of it, silence anywhere else."""

import io
import sys

import pytest

from shardinit.progress import progress

pytestmark = pytest.mark.once


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("unit", "text"), [("bytes", "3.0/6.0 kB"), ("leaves", "3000/6000")]
)
def test_a_terminal_shows_a_bar_on_standard_error(monkeypatch, capsys, unit, text):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress("receive", unit=unit) as report:
        report(3000, 6000)
    assert "receive" in terminal.getvalue()
    assert text in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_elsewhere_there_is_silence(monkeypatch, capsys):
    with progress("receive") as report:
        report(3, 6)
    assert capsys.readouterr() == ("", "")


def test_the_callers_own_report_replaces_the_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    seen = []
    with progress("receive", lambda *done: seen.append(done)) as report:
        report(3, 6)
    assert (seen, terminal.getvalue()) == ([(3, 6)], "")
