"""A server as a process of its own, for the cases that ask one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

from shardinit.bench.runner import proc


@contextlib.contextmanager
def server(*options: str) -> Iterator[tuple[str, int]]:
    """A server process: its address and its id."""
    command = [sys.executable, "-m", "shardinit", "serve", "--listen", "127.0.0.1:0"]
    command += ["--log-level", "warning", "--grace", "0", *options]
    command += ["--models", "shardinit.bench.serving_models"]
    # Those simulate the devices of the job; a server needs none of them.
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=kept)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1], process.pid
    finally:
        process.terminate()
        process.communicate()


def processor_seconds(pid: int) -> float:
    """What a process has taken of all processors so far, in seconds."""
    with open(f"/proc/{pid}/stat") as file:
        # The second field is the program's name in brackets, which may hold spaces
        # itself.
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def memory(pid: int, field: str) -> int:
    """Bytes of a field of ``/proc/PID/status``."""
    found = proc(f"{pid}/status", field)
    assert found is not None
    return int(found.split()[0]) * 1024
