"""Runner: starts children, in turns, one at a time, and watches their memory.

The sides of a comparison take turns (A B A B), so that a machine that slows down slows
both. A run that would push the machine out of memory is stopped before it does: what
it was started for matters less than everything else that runs there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardinit.bench.case import Case, Figures, Job, Options, OutOfMemory
from shardinit.core.platform import with_cpu_devices

_RESERVE_BYTES = 1 << 30  # what must stay free while a child runs
_POLL_SECONDS = 0.05
_LIMIT_SECONDS = 1800.0


class Runner:
    """Runs jobs and remembers what came back, so that cases may share runs.

    Attributes:
      options: what the command line asks for.
      log: every run: case, side, parameters and figures.
    """

    def __init__(self, options: Options, tell: Callable[[str], None]):
        self.options = options
        self.log: list[dict[str, Any]] = []
        self._tell = tell
        self._known: dict[str, list[Figures]] = {}

    def measure(self, case: Case, *jobs: Job) -> list[list[Figures]]:
        """Runs jobs in turns; for each the figures of its runs.

        Raises:
          OutOfMemory: a job needs more memory than the machine has to give.
          RuntimeError: a child failed; with the end of what it said.
        """
        runs = [self._known.setdefault(_name(case, job), []) for job in jobs]
        wanted = [job.repeats or self.options.repeats for job in jobs]
        for turn in range(max(wanted)):
            for job, count, done in zip(jobs, wanted, runs, strict=True):
                if len(done) <= turn < count:
                    done.append(self._run(case, job))
        return [done[:count] for count, done in zip(wanted, runs, strict=True)]

    def fits(self, size: int) -> bool:
        """Whether a run that takes ``size`` bytes may be started now."""
        free = available_bytes()
        return free is None or size + _RESERVE_BYTES < free

    def _run(self, case: Case, job: Job) -> Figures:
        if job.needs_bytes and not self.fits(job.needs_bytes):
            raise OutOfMemory(f"{job.side}: needs {job.needs_bytes / 1e9:.1f} GB")
        figures = self._child(case, job)
        shown = ", ".join(f"{key} {value:.6g}" for key, value in figures.items())
        self._tell(f"{case.name} {job.side} {_arguments(job)}: {shown}")
        run = {"case": case.name, "side": job.side, "parameters": dict(job.parameters)}
        self.log.append({**run, "figures": figures})
        return figures

    def _child(self, case: Case, job: Job) -> Figures:
        with tempfile.TemporaryDirectory(prefix="shardinit-bench-") as folder:
            said, out = Path(folder) / "said", Path(folder) / "figures.json"
            command = [sys.executable, "-m", "shardinit.bench.child"]
            command += [case.name, job.side, json.dumps(dict(job.parameters)), str(out)]
            environment = child_environment(self.options.devices, self.options.platform)
            with open(said, "wb") as file:
                # Into a file: nobody reads a pipe meanwhile, and a child that says more
                # than it holds (64 KiB on Linux) would wait for ever.
                process = subprocess.Popen(
                    command, env=environment, stdout=file, stderr=file
                )
                try:
                    code = _watch(process)
                finally:
                    with suppress(ProcessLookupError):
                        process.kill()
                    process.wait()
            # SIGKILL, as Linux's out-of-memory killer sends it.
            if code == -9:
                raise OutOfMemory(f"{case.name} {job.side}: the system ended it")
            if code:
                tail = said.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{case.name} {job.side} failed ({code}):\n{tail}")
            return json.loads(out.read_text())


def _watch(process: subprocess.Popen[bytes]) -> int:
    """Waits for a child; its exit code.

    Raises:
      OutOfMemory: it was taking the machine's last memory.
      TimeoutError: it did not end.
    """
    begin = time.monotonic()
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL_SECONDS)
        free = available_bytes()
        if free is not None and free < _RESERVE_BYTES:
            raise OutOfMemory(f"only {free / 1e9:.1f} GB were left")
        if time.monotonic() - begin > _LIMIT_SECONDS:
            raise TimeoutError(f"a run took more than {_LIMIT_SECONDS:.0f} s")


def proc(file: str, field: str) -> str | None:
    """What a file below /proc says of a field; None where there is no such thing."""
    with suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return None


def available_bytes() -> int | None:
    """Memory that may be taken without swapping, in bytes; None if unknown."""
    found = proc("meminfo", "MemAvailable")
    return None if found is None else int(found.split()[0]) * 1024


def child_environment(devices: int, platform: str = "cpu") -> dict[str, str]:
    """This process's environment on a platform, with no cached code.

    On CPU the devices are simulated; elsewhere they are those that are there.
    """
    count = devices if platform == "cpu" else None
    return {
        **os.environ,
        "JAX_PLATFORMS": platform,
        "XLA_FLAGS": with_cpu_devices(os.environ.get("XLA_FLAGS", ""), count),
        # A run that finds what the one before it compiled is no cold start.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def count_devices(platform: str) -> int:
    """How many devices a platform has here, as a child of its own sees them.

    Raises:
      RuntimeError: JAX finds none; with what it said.
    """
    done = subprocess.run(
        [sys.executable, "-c", "import jax; print(len(jax.devices()))"],
        env=child_environment(0, platform),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"no {platform} device: {said[-1]}")
    return int(done.stdout)


def _name(case: Case, job: Job) -> str:
    return json.dumps([case.name, job.side, dict(job.parameters)], sort_keys=True)


def _arguments(job: Job) -> str:
    return " ".join(f"{key}={value}" for key, value in job.parameters.items())
