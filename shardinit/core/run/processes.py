"""A job of several processes: all of them initialise the same, or none begins.

Every process publishes what it is about to do under one name in the store of the job's
coordinator. The first of them compares and publishes a verdict, so that a job of
thousands costs each of the others one read. Missing processes are named.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
from jax.sharding import NamedSharding

from shardinit.core.ir.jaxpr import coordinator
from shardinit.errors import (
    FingerprintMismatchError,
    MissingProcessesError,
    UnsupportedConfigError,
)
from shardinit.version import __version__

WAIT_VARIABLE = "SHARDINIT_PROCESS_WAIT"
WAIT_SECONDS = 5.0  # until a warning names the missing
PATIENCE = 60  # times as long until they are given up
# What the store answers for a key that nobody has set: at once, and after a wait.
_NOT_THERE = ("NOT_FOUND", "DEADLINE_EXCEEDED")
_counts: collections.Counter[str] = collections.Counter()


def assert_same(facts: Mapping[str, str], shardings: Sequence[NamedSharding]) -> None:
    """Holds what this process is about to do against what the others are.

    Only the processes that hold devices of the shardings take part. Those that are
    missing after 5 seconds (``SHARDINIT_PROCESS_WAIT`` has others) are named in a
    warning; after 60 times as long the wait ends with an error.

    Args:
      facts: what must be the same, by name.
      shardings: of the leaves that are to be made, in order.

    Raises:
      FingerprintMismatchError: another process has others; all of them raise it.
      MissingProcessesError: a process did not come.
    """
    devices = {d for s in set(shardings) for d in s.device_set}
    processes = sorted({d.process_index for d in devices})
    if len(processes) < 2 or jax.process_index() not in processes:
        return
    mine = {**facts, "shardings": _summary(shardings), "versions": _versions()}
    store = _Store(processes)
    verdict = store.verdict(json.dumps(mine))
    if verdict.get("missing"):
        raise _missing_error(verdict["missing"])
    if verdict.get("differ"):
        raise FingerprintMismatchError(
            f"process {jax.process_index()}",
            "the processes of this job are about to initialise differently: "
            + "; ".join(verdict["differ"]),
            "one model, key, placement and set of versions in every process",
            "Make them the same in all processes, before shardinit is called",
        )


def _summary(shardings: Sequence[NamedSharding]) -> str:
    """The most frequent specs, and a digest of all of them with the mesh."""
    text = repr([str(sharding) for sharding in shardings]).encode()
    common = collections.Counter(str(s.spec) for s in shardings).most_common(3)
    told = ", ".join(f"{count} of {spec}" for spec, count in common)
    return f"{told} ({hashlib.sha256(text).hexdigest()[:16]})"


def _versions() -> str:
    jaxes = f"jax {jax.__version__}, jaxlib {version('jaxlib')}"
    return f"shardinit {__version__}, {jaxes}"


def differences(facts: Mapping[int, Mapping[str, str]]) -> list[str]:
    """What differs, in words: for each fact who has which value.

    Args:
      facts: by process.

    >>> differences({0: {"key": "1"}, 1: {"key": "2"}, 2: {"key": "2"}})
    ['key: process 0 has 1, processes 1-2 have 2']
    """
    told = []
    for name in dict.fromkeys(name for each in facts.values() for name in each):
        who: dict[str, list[int]] = {}
        for process, each in sorted(facts.items()):
            who.setdefault(each.get(name, "none"), []).append(process)
        if len(who) > 1:
            parts = [
                f"{_named(processes)} {'have' if processes[1:] else 'has'} {value}"
                for value, processes in who.items()
            ]
            told.append(f"{name}: " + ", ".join(parts))
    return told


def _named(processes: Sequence[int]) -> str:
    """``processes 0-3, 7``, of sorted numbers."""
    ranges = []
    for _, run in itertools.groupby(
        enumerate(processes), lambda pair: pair[1] - pair[0]
    ):
        numbers = [number for _, number in run]
        last = f"-{numbers[-1]}" if len(numbers) > 1 else ""
        ranges.append(f"{numbers[0]}{last}")
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(ranges)}"


def _missing_error(missing: Sequence[int]) -> MissingProcessesError:
    return MissingProcessesError(
        f"process {jax.process_index()}",
        f"{_named(missing)} of this job did not come to initialise",
        "the same call in every process that holds devices of the mesh",
        f"Look there for an error, or give them longer: {WAIT_VARIABLE}=60 (seconds)",
    )


def _wait_seconds() -> float:
    text = os.environ.get(WAIT_VARIABLE, str(WAIT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UnsupportedConfigError(
            WAIT_VARIABLE, f"got {text!r}", "seconds above 0, as in 60"
        )
    return seconds


class _Store:
    """The coordinator's store, as far as one comparison goes.

    The store is the only way that tells who is missing: a collective just hangs. It is
    what ``jax.distributed`` itself and Orbax use.
    """

    def __init__(self, processes: list[int]):
        self._client = coordinator()
        self._processes = processes
        self._me, self._first = jax.process_index(), processes[0]
        group = hashlib.sha256(repr(processes).encode()).hexdigest()[:16]
        # A room of its own for each comparison: what was written stays in the store as
        # long as the job runs.
        _counts[group] += 1
        self._room = f"shardinit/{group}/{_counts[group]}"
        self._wait = _wait_seconds()
        self._told = False

    def verdict(self, mine: str) -> dict[str, list[Any]]:
        """What the first process found: ``differ``, ``missing``, or neither."""
        self._set(str(self._me), mine)
        end = time.monotonic() + PATIENCE * self._wait
        if self._me != self._first:
            text = self._get("verdict", end, self._missing_by_note)
            return json.loads(text) if text else {"missing": self._missing_by_note()}
        found = {}
        for process in self._processes:
            text = self._get(str(process), end, self._missing_by_look)
            if text is not None:
                found[process] = json.loads(text)
        missing = [p for p in self._processes if p not in found]
        verdict = {"missing": missing, "differ": differences(found)}
        self._set("verdict", json.dumps(verdict))
        return verdict

    def _missing_by_look(self) -> list[int]:
        """The processes that have published nothing, published for the others too."""
        missing = [p for p in self._processes if self._peek(str(p)) is None]
        self._set("missing", json.dumps(missing))
        return missing

    def _missing_by_note(self) -> list[int]:
        """The missing that the first process has published, or that process itself."""
        if self._peek(str(self._first)) is None:
            return [self._first]
        return json.loads(self._peek("missing") or "[]")

    def _get(
        self, name: str, end: float, missing: Callable[[], list[int]]
    ) -> str | None:
        """A value, waited for until ``end``; None if it does not come."""
        while True:
            left = min(self._wait, end - time.monotonic())
            text = self._peek(name, max(left, 0.001))
            if text is not None or time.monotonic() >= end:
                return text
            absent = missing()
            if absent and not self._told:
                self._told = True
                warnings.warn(
                    f"shardinit: process {self._me} waits for {_named(absent)} to "
                    "initialise the same model",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _set(self, name: str, value: str) -> None:
        # The note of who is missing is written again and again; without the flag the
        # second time is ALREADY_EXISTS.
        self._client.key_value_set(f"{self._room}/{name}", value, allow_overwrite=True)

    def _peek(self, name: str, seconds: float = 0.0) -> str | None:
        """A value that is there, or comes within some seconds."""
        key = f"{self._room}/{name}"
        try:
            if not seconds:
                return self._client.key_value_try_get(key)
            return self._client.blocking_key_value_get(key, int(1000 * seconds) or 1)
        except jax.errors.JaxRuntimeError as error:
            if error.error_code_string not in _NOT_THERE:
                raise
            return None
