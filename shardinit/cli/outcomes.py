"""How a command ends: its exit code, and one message of what went wrong.

====  ==================================================================
0     done
1     refused or failed: the message says what, and what to do about it
2     wrong usage: an option or an argument that there is none, or that reads wrong
3     differs: all could be read, and values are not those of the receipt
4     cannot be read: a file or a checkpoint is missing, or damaged
130   interrupted by Ctrl-C: the message says what is kept
====  ==================================================================
"""

from __future__ import annotations

import _thread
import itertools
import os
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from shardinit.errors import ReceiptMismatchError, ShardinitError

REFUSED, USAGE, DIFFERS, UNREADABLE, INTERRUPTED = 1, 2, 3, 4, 130

NOTHING_KEPT = "Nothing was written; the same command again begins anew"


class UsageError(ShardinitError):
    """An option or an argument reads wrong, or means nothing beside the others."""


class UnreadableError(Exception):
    """What a command was given to read cannot be read; its text says why."""


@contextmanager
def reading() -> Iterator[None]:
    """Whatever is wrong inside is wrong with what is read: exit code 4."""
    try:
        yield
    except ReceiptMismatchError:
        raise
    except ShardinitError as error:
        raise UnreadableError(str(error)) from error
    except OSError as error:
        text = str(error)
        if error.filename is not None and error.strerror:
            text = f"cannot read {os.fspath(error.filename)!r}: {error.strerror}"
        raise UnreadableError(text) from error


class InterruptedByUserError(Exception):
    """Ctrl-C, on its way through typer, which would end the process without a word."""


@contextmanager
def interruptible(kept: str = NOTHING_KEPT) -> Iterator[None]:
    """Says on Ctrl-C what of the block's work is kept, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise InterruptedByUserError(kept) from error


def keep_interrupts() -> None:
    """Makes a Ctrl-C count that comes while a callback of the garbage collector runs.

    JAX has such a callback. Python prints what is raised in it, and goes on.
    """
    usual = sys.unraisablehook

    def look(raised: Any) -> None:
        if issubclass(raised.exc_type, KeyboardInterrupt):
            # A moment later: sent from here, its handler would run inside this hook,
            # and Python would print that one too and go on (3.11).
            threading.Timer(0.05, _interrupt_main).start()
        else:
            usual(raised)

    sys.unraisablehook = look


def _interrupt_main() -> None:
    if hasattr(signal, "pthread_kill"):  # which wakes it up as well
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


def end_with_code(command: Callable[[], None], *, debug: Callable[[], bool]) -> None:
    """Runs a command and ends the process as the table above says.

    Args:
      command: what to run.
      debug: whether a traceback is wanted, asked when something went wrong.
    """
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has enough, as `head` has
        # Python flushes standard output once more at its end, and would fail again
        # there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(REFUSED)
    except (UnreadableError, ShardinitError, OSError) as error:
        if debug():
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_code(error))
    except (InterruptedByUserError, KeyboardInterrupt) as error:
        print(f"interrupted. {str(error) or NOTHING_KEPT}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug() or (place := model_code(error)) is None:
            raise  # of our own code, where the traceback is what we need to hear
        said = " ".join(f"{type(error).__name__}: {error}".split())
        where = f"  at {place}; --debug shows the traceback"
        print(f"error: {said}", where, sep="\n", file=sys.stderr)
        sys.exit(REFUSED)


def model_code(error: Exception) -> str | None:
    """The line that raised an error, if a model's own code stands in its traceback.

    That is code behind ours in the traceback, and neither ours nor installed.
    """
    ours = os.path.dirname(os.path.dirname(__file__))
    installed = (ours, *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
    frames = traceback.extract_tb(error.__traceback__)
    names = itertools.dropwhile(
        lambda frame: not frame.filename.startswith(ours), frames
    )
    theirs = [
        frame
        for frame in names
        if not frame.filename.startswith(installed) and os.path.isfile(frame.filename)
    ]
    if not theirs:
        return None
    return f"{theirs[-1].filename}, line {theirs[-1].lineno}, in {theirs[-1].name}"


def _code(error: Exception) -> int:
    if isinstance(error, ReceiptMismatchError):
        return DIFFERS
    if isinstance(error, UsageError):
        return USAGE
    return UNREADABLE if isinstance(error, UnreadableError) else REFUSED
