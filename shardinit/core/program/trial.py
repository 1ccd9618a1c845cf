"""A stranger's program, tried in a process of its own.

Digests show that a program is whole, not that it is honest: a module that somebody
altered and sealed anew reaches MLIR's parser and XLA's compiler, either of which may
end the process. So it ends another one first, which compiles every function for the
CPU and runs none.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

from shardinit.core.ir.jaxpr import setting
from shardinit.errors import ProgramFormatError

SECONDS = 300.0


def try_in_process(data: bytes, seconds: float = SECONDS) -> None:
    """Has another process load and compile a program.

    Args:
      data: the program's envelope.
      seconds: how long it may take.

    Raises:
      ProgramFormatError: the program is refused there, ends the process, or takes
        longer.
    """
    # The accelerator is the caller's: the other process must not take its memory.
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env["JAX_ENABLE_X64"] = str(bool(setting("jax_enable_x64"))).lower()
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    # -P: else the folder it is called in comes before all installed packages.
    command = [sys.executable, "-P", "-m", "shardinit.core.program.trial_worker"]
    try:
        done = subprocess.run(
            command,
            env=env,
            input=data,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refusal(f"compiling it took more than {seconds:g} s") from None
    if done.returncode == 0:
        return
    try:
        where, got, expected, remedy = json.loads(done.stdout)
    except ValueError:
        raise _refusal(_ending(done)) from None
    raise ProgramFormatError(where, got, expected, remedy)


def _refusal(what: str) -> ProgramFormatError:
    return ProgramFormatError(
        "init program",
        f"{what}, in the process that tried it",
        "a program that loads and compiles",
    )


def _ending(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode < 0:
        return f"it was ended by {signal.Signals(-done.returncode).name}"
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return f"it ended with status {done.returncode}: {''.join(said[-1:])}"[:300]
