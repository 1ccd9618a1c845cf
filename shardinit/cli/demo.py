"""The demo: the whole road once, on this machine, with nothing left behind.

Three processes, as in real life. This one plans the model on a mesh of 8 simulated CPU
devices and prints the plan. A second one serves init programs. A third one is the
training job (``shardinit.cli.job``): it knows the service's address and the model's
spec, and ends up with sharded weights.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from shardinit.cli import arguments, devices
from shardinit.errors import ServiceError, ShardinitError
from shardinit.models import ModelSpec, build

MESH = {"data": 2, "model": 4}
RULES = "vocab=model,embed=data,mlp=model,heads=model,kv_heads=model"
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0


def run(config: str) -> None:
    """Runs the demo for a config file or an example.

    Raises:
      SpecError: the config has faults.
      ServiceError: the server did not start.
      ShardinitError: the job failed; it has said why.
    """
    begin = time.monotonic()
    # Before `simulate` changes the environment: a server needs no devices.
    served = dict(os.environ, JAX_PLATFORMS="cpu")
    devices.simulate(8)
    job = dict(os.environ)
    print(f"1. Plan {config} on 8 simulated CPU devices, data=2 x model=4", flush=True)
    spec = arguments.read_spec(config)
    _show_plan(spec)
    print("2. Serve its init program to another process", flush=True)
    with (
        _terminable(),
        tempfile.TemporaryDirectory(prefix="shardinit-") as cache,
        _server(served) as address,
    ):
        print(f"   the server listens on {address}", flush=True)
        print("3. Ask for the model by its spec, and materialise it", flush=True)
        command = [sys.executable, "-m", "shardinit.cli.job", address]
        command += [json.dumps(dict(spec.config)), cache]
        try:
            with _child(command, job) as process:
                code = process.wait()
        finally:
            if sys.stderr.isatty():  # a bar hides the cursor
                print("\x1b[?25h", end="", file=sys.stderr, flush=True)
        if code:
            raise ShardinitError("demo", f"the job ended with exit code {code}")
    print(f"Done in {time.monotonic() - begin:.1f} s; nothing is left running.")


def demo_mesh() -> Any:
    """The mesh of the simulated devices."""
    import jax

    return jax.make_mesh(tuple(MESH.values()), tuple(MESH))


def _show_plan(spec: ModelSpec) -> None:
    from shardinit.cli import tables
    from shardinit.core.plan.planning import plan as make_plan

    rules = arguments.parse_rules(RULES)
    tables.print_plan(make_plan(build(spec), mesh=demo_mesh(), rules=rules))


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does: in order, its children first."""

    def on_signal(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _child(
    command: list[str], environment: Mapping[str, str], stdout: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that is gone when the block ends, however it ends.

    It has a session of its own, so that Ctrl-C reaches the demo alone, which then
    ends its children in order; else each would complain that the other is gone.
    """
    process = None
    try:
        with _uninterrupted():
            process = subprocess.Popen(
                command, env=dict(environment), stdout=stdout, start_new_session=True
            )
        yield process
    finally:
        if process is not None:
            _end(process)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals wait until the block is over: no child may start without a parent."""
    waiting: list[int] = []

    def later(number: int, frame: Any) -> None:
        waiting.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, later) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    except BaseException:  # the user is impatient
        process.kill()
        raise
    finally:
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def _server(environment: Mapping[str, str]) -> Iterator[str]:
    """A server in a process of its own; its address."""
    command = [sys.executable, "-m", "shardinit", "serve", "--listen", "127.0.0.1:0"]
    command += ["--log-level", "warning", "--grace", "1"]
    with _child(command, environment, stdout=subprocess.PIPE) as process:
        yield _address(process)


def _address(process: subprocess.Popen[bytes]) -> str:
    """Waits for the line in which the server says where it is."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        ready = selector.select(_START_SECONDS)
    line = process.stdout.readline().decode() if ready else ""
    if "serves on " not in line:
        raise ServiceError(
            "demo",
            "the server ended before it served" if ready else "no word from the server",
            f"its address within {_START_SECONDS:.0f} s",
            code="UNAVAILABLE",
        )
    return line.split("serves on ", 1)[1].strip()
