"""Serving: what the service adds to an init, how fast it streams, what load costs.

The server is a process of its own, as in life. A stream of constant leaves is held
against raw TCP on the same loopback (what the wire could carry), one of random leaves
against the same windows computed in this process (what the arithmetic gives). The load
is 64 clients that each ask once a second at random moments; the latency that counts
is that of one more client, against its own when the others are silent.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from shardinit.bench.case import (
    Bench,
    Case,
    Figures,
    Job,
    Row,
    Target,
    register,
    sample,
)

_ROW_BYTES = 4096 * 4
_MIB = 1 << 20
_PIECE_MIB = 16


@contextlib.contextmanager
def _server(*options: str) -> Iterator[tuple[str, int]]:
    """A server process: its address and its id."""
    command = [sys.executable, "-m", "shardinit", "serve", "--listen", "127.0.0.1:0"]
    command += ["--log-level", "warning", "--grace", "0", *options]
    command += ["--models", "shardinit.bench.serving_models"]
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=kept)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1], process.pid
    finally:
        process.terminate()
        process.communicate()


def _memory(pid: int, field: str) -> int:
    """Bytes of a field of ``/proc/PID/status``."""
    with open(f"/proc/{pid}/status") as file:
        (line,) = [line for line in file if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


# ---- what the service adds to an init -----------------------------------------------


def in_process(layers: int, devices: int) -> Figures:
    """Build, plan, compile and run here."""
    import jax

    import shardinit
    from shardinit.bench import subjects
    from shardinit.models import build

    mesh = subjects.mesh(devices)
    spec = subjects.narrow_spec(layers)
    begin = time.perf_counter()
    params = shardinit.init(build(spec), 0, mesh=mesh, rules=subjects.RULES)
    jax.block_until_ready(params)
    return {"seconds": time.perf_counter() - begin}


def by_client(layers: int, devices: int) -> Figures:
    """Ask a server that has the program, then compile and run here."""
    import jax

    import shardinit
    from shardinit.bench import subjects

    mesh, spec = subjects.mesh(devices), subjects.narrow_spec(layers)
    with _server() as (address, _), tempfile.TemporaryDirectory() as folder:
        with shardinit.connect(address, cache_dir=f"{folder}/other") as other:
            begin = time.perf_counter()
            other.program(spec)
            first = time.perf_counter() - begin
        begin = time.perf_counter()
        with shardinit.connect(address, cache_dir=f"{folder}/mine") as client:
            params = client.init(spec, 0, mesh=mesh, rules=subjects.RULES)
        jax.block_until_ready(params)
        return {"seconds": time.perf_counter() - begin, "first_program_seconds": first}


def init_rows(bench: Bench) -> Iterator[Row]:
    """The difference, in seconds."""
    layers = 1 if bench.options.quick else 16
    parameters = {"layers": layers, "devices": bench.options.devices}
    repeats = bench.options.repeats
    mine, theirs = bench.measure(
        INIT,
        Job("shardinit", parameters, repeats),
        Job("in process", parameters, repeats),
    )
    value, baseline = sample(mine, "seconds"), sample(theirs, "seconds")
    first = sample(mine, "first_program_seconds").median
    yield Row(
        INIT.name,
        f"client.init less in-process init, {layers} layers",
        value.median - baseline.median,
        "s",
        value,
        baseline,
        "shardinit.init",
        target=None if bench.options.quick else INIT.targets["added"],
        note=f"the server had been asked before; its first answer takes {first:.2f} s",
    )


# ---- streams ------------------------------------------------------------------------


def tcp(mebibytes: int) -> Figures:
    """Raw bytes over loopback from one process to another."""
    code = (
        "import socket, sys\n"
        "with socket.create_connection(('127.0.0.1', int(sys.argv[1]))) as s:\n"
        "    data = bytes(1 << 20)\n"
        "    for _ in range(int(sys.argv[2])): s.sendall(data)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        command = [sys.executable, "-c", code, port, str(mebibytes)]
        with subprocess.Popen(command):
            connection, _ = listener.accept()
            buffer = bytearray(_MIB)
            begin, count = time.perf_counter(), 0
            while got := connection.recv_into(buffer):
                count += got
            seconds = time.perf_counter() - begin
            connection.close()
    return {"bytes_per_second": count / seconds}


def stream(mebibytes: int, model: str) -> Figures:
    """Windows of one leaf from a server into numpy arrays here, one stream.

    Each window is let go when it is complete, as the baselines let go of what they
    have: otherwise this measures how fast the machine hands out fresh memory.
    """
    import numpy as np

    import shardinit
    from shardinit.models import ModelSpec
    from shardinit.service.transfer import Piece

    rows, step = mebibytes * _MIB // _ROW_BYTES, _PIECE_MIB * _MIB // _ROW_BYTES
    spec = ModelSpec(model, {"rows": rows})
    with (
        tempfile.TemporaryDirectory() as folder,
        _server() as (address, pid),
        shardinit.connect(address, cache_dir=folder) as client,
    ):
        (leaf,) = client.describe(spec).leaves
        width = leaf.shape[1]
        pieces = [
            Piece(leaf.path, (first, 0), (step, width), np.dtype(leaf.dtype))
            for first in range(0, rows, step)
        ]
        for _ in client.receive(spec, 0, pieces[:1]):  # compiles the block
            pass
        before = _memory(pid, "VmRSS")
        begin = time.perf_counter()
        count = sum(array.nbytes for array in client.receive(spec, 0, pieces))
        seconds = time.perf_counter() - begin
        grown = _memory(pid, "VmHWM") - before
    return {"bytes_per_second": count / seconds, "grown_bytes": grown}


def windows(mebibytes: int) -> Figures:
    """The same blocks of normals, computed in this process."""
    import shardinit
    from shardinit.bench import serving_models
    from shardinit.service import streams

    fn = serving_models.build_random({"rows": mebibytes * _MIB // _ROW_BYTES})
    leaf = shardinit.open(fn, 0)["w"]
    window = streams.Wanted(leaf, (0, 0), leaf.shape)
    blocks = streams.blocks(window, 4 * _MIB)
    next(blocks)  # compiles it
    begin = time.perf_counter()
    count = sum(len(block) for block in blocks)
    return {"bytes_per_second": count / (time.perf_counter() - begin)}


def stream_rows(bench: Bench) -> Iterator[Row]:
    """Speeds as ratios, and the growth of the server."""
    size = 32 if bench.options.quick else 2048
    repeats, quick = bench.options.repeats, bench.options.quick
    parameters = {"mebibytes": size}
    constant, raw, drawn, computed = bench.measure(
        STREAM,
        Job("shardinit", {**parameters, "model": "bench-constant"}, repeats),
        Job("tcp", parameters, repeats),
        Job("shardinit", {**parameters, "model": "bench-random"}, repeats),
        Job("windows", parameters, repeats),
    )
    for name, mine, theirs, against in (
        ("constant", constant, raw, "raw TCP"),
        ("random", drawn, computed, "windows in process"),
    ):
        value = sample(mine, "bytes_per_second", 1e-9)
        baseline = sample(theirs, "bytes_per_second", 1e-9)
        yield Row(
            STREAM.name,
            f"StreamShards, {name} leaves, {size} MiB",
            value.median / baseline.median,
            "x",
            value,
            baseline,
            against,
            side_unit="GB",
            target=None if quick else STREAM.targets[name],
            note=f"GB a second, in windows of {_PIECE_MIB} MiB",
        )
    grown = sample([*constant, *drawn], "grown_bytes", 1e-9)
    yield Row(
        STREAM.name,
        f"server RSS growth while it streams {size} MiB",
        max(grown.values) / 0.256,
        "x",
        grown,
        None,
        "256 MB",
        side_unit="GB",
        target=None if quick else STREAM.targets["memory"],
        note="peak over what it had before the stream, the worst of all runs",
    )


# ---- load ---------------------------------------------------------------------------


def load(layers: int, clients: int, seconds: float) -> Figures:
    """Latency of DescribeModel for one client, alone and among others."""
    import shardinit
    from shardinit.bench import subjects

    spec, failures, done = subjects.narrow_spec(layers), [], threading.Event()
    counts = [0] * clients

    def ask(client: Any, number: int) -> None:
        while not done.wait(random.random() * 2):
            try:
                client.describe(spec, {"data": 2, "model": 4})
                counts[number] += 1
            except Exception as error:
                failures.append(error)

    def probe(client: Any) -> list[float]:
        times, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            begin = time.perf_counter()
            client.describe(spec, {"data": 2, "model": 4})
            times.append(time.perf_counter() - begin)
            time.sleep(0.01)
        return sorted(times)

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        address, _ = stack.enter_context(_server())
        made = [
            stack.enter_context(shardinit.connect(address, cache_dir=folder))
            for _ in range(clients + 1)
        ]
        for client in made:
            client.describe(spec, {"data": 2, "model": 4})
        idle = probe(made[0])
        threads = [
            threading.Thread(target=ask, args=(client, number))
            for number, client in enumerate(made[1:])
        ]
        for thread in threads:
            thread.start()
        busy = probe(made[0])
        done.set()
        for thread in threads:
            thread.join()
    return {
        "idle_p99_seconds": idle[int(len(idle) * 0.99)],
        "busy_p99_seconds": busy[int(len(busy) * 0.99)],
        "idle_p50_seconds": statistics.median(idle),
        "busy_p50_seconds": statistics.median(busy),
        "calls": float(sum(counts)),
        "failures": float(len(failures)),
    }


def load_rows(bench: Bench) -> Iterator[Row]:
    """The slowest hundredth of the calls, busy over idle."""
    quick = bench.options.quick
    parameters = {"layers": 1, "clients": 8, "seconds": 1.0}
    if not quick:
        parameters = {"layers": 16, "clients": 64, "seconds": 10.0}
    (runs,) = bench.measure(LOAD, Job("shardinit", parameters, bench.options.repeats))
    value = sample(runs, "busy_p99_seconds")
    baseline = sample(runs, "idle_p99_seconds")
    calls = sum(run["calls"] for run in runs)
    failed = sum(run["failures"] for run in runs)
    yield Row(
        LOAD.name,
        f"p99 of DescribeModel among {parameters['clients']} clients",
        value.median / baseline.median,
        "x",
        value,
        baseline,
        "the same client alone",
        target=None if quick else LOAD.targets["p99"],
        note=f"{calls:.0f} calls of the others, {failed:.0f} failed",
    )


INIT = register(
    Case(
        name="service-init",
        measures="client.init through a local server, less init in process",
        baseline="shardinit.init of the same model",
        sides={"shardinit": by_client, "in process": in_process},
        rows=init_rows,
        targets={"added": Target(0.2, 0.05, higher=False)},
    )
)

STREAM = register(
    Case(
        name="service-stream",
        measures="bytes of a leaf from a server into numpy, and the server's memory",
        baseline="raw TCP on loopback; windows computed in process; 256 MB",
        sides={"shardinit": stream, "tcp": tcp, "windows": windows},
        rows=stream_rows,
        targets={
            "constant": Target(0.5, 0.65),
            "random": Target(0.8, 0.95),
            "memory": Target(1.0, 0.5, higher=False),
        },
    )
)

LOAD = register(
    Case(
        name="service-load",
        measures="p99 of DescribeModel while 64 other clients ask once a second each",
        baseline="the same client alone",
        sides={"shardinit": load},
        rows=load_rows,
        targets={"p99": Target(5, 2, higher=False)},
    )
)
