"""Serving: what the service adds to an init, and what load costs.

The server is a process of its own, as in life. The load is 64 clients that each ask
once a second at random moments; the latency that counts is that of one more client,
against its own when the others are silent.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shardinit.bench import subjects
from shardinit.bench.case import (
    Bench,
    Figures,
    Job,
    Row,
    Target,
    median,
    register,
    sample,
    timed,
)
from shardinit.bench.server import server
from shardinit.models import build

if TYPE_CHECKING:
    from shardinit.service.client.client import Client

# ---- what the service adds to an init -----------------------------------------------


def in_process(layers: int, devices: int) -> Figures:
    """Build, plan, compile and run here."""
    from shardinit.core.run.init import init as init_sharded

    mesh, rules = subjects.mesh(devices), subjects.rules()
    spec = subjects.narrow_spec(layers)
    seconds, _ = timed(lambda: init_sharded(build(spec), 0, mesh=mesh, rules=rules))
    return {"seconds": seconds}


def by_client(layers: int, devices: int) -> Figures:
    """Ask a server that has the program, then compile and run here."""
    import jax

    from shardinit.service.client.client import connect

    mesh, rules = subjects.mesh(devices), subjects.rules()
    spec = subjects.narrow_spec(layers)
    with server() as (address, _), tempfile.TemporaryDirectory() as folder:
        with connect(address, cache_dir=f"{folder}/other") as other:
            first, _ = timed(other.program, spec)
        begin = time.perf_counter()
        # A folder of its own: from that of the first the program would come off the
        # disk.
        with connect(address, cache_dir=f"{folder}/mine") as client:
            params = client.init(spec, 0, mesh=mesh, rules=rules)
        jax.block_until_ready(params)
        return {"seconds": time.perf_counter() - begin, "first_program_seconds": first}


def init_rows(bench: Bench) -> Iterator[Row]:
    """The difference, in seconds."""
    layers = 1 if bench.options.quick else 16
    sizes = {"layers": layers, "devices": bench.options.devices}
    jobs = Job("shardinit", sizes), Job("in process", sizes)
    mine, theirs = bench.measure(INIT, *jobs)
    ours, other = sample(mine, "seconds"), sample(theirs, "seconds")
    yield INIT.row(
        bench,
        f"client.init less in-process init, {layers} layers",
        ours.median - other.median,
        ours,
        baseline=other,
        against="shardinit.init",
        unit="s",
        target="added",
        note="the server had been asked before; its first answer takes "
        f"{median(mine, 'first_program_seconds'):.2f} s",
    )


INIT = register(
    name="service-init",
    measures="client.init through a local server, less init in process",
    baseline="shardinit.init of the same model",
    sides={"shardinit": by_client, "in process": in_process},
    rows=init_rows,
    targets={"added": Target(0.2, 0.05, higher=False)},
)

# ---- load ---------------------------------------------------------------------------


def load(layers: int, clients: int, seconds: float) -> Figures:
    """Latency of DescribeModel for one client, alone and among others."""
    from shardinit.service.client.client import connect

    spec, mesh = subjects.narrow_spec(layers), {"data": 2, "model": 4}
    failures, done, counts = [], threading.Event(), [0] * clients

    def ask(client: Client, number: int) -> None:
        while not done.wait(random.random() * 2):
            try:
                client.describe(spec, mesh)
                counts[number] += 1
            except Exception as error:
                failures.append(error)

    def probe(client: Client) -> list[float]:
        times, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            times.append(timed(client.describe, spec, mesh)[0])
            time.sleep(0.01)
        return sorted(times)

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        address, _ = stack.enter_context(server())
        first, *others = (
            stack.enter_context(connect(address, cache_dir=folder))
            for _ in range(clients + 1)
        )
        for client in (first, *others):
            client.describe(spec, mesh)
        idle = probe(first)
        threads = [
            threading.Thread(target=ask, args=(client, number))
            for number, client in enumerate(others)
        ]
        for thread in threads:
            thread.start()
        busy = probe(first)
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
    sizes = {"layers": 16, "clients": 64, "seconds": 10.0}
    if bench.options.quick:
        sizes = {"layers": 1, "clients": 8, "seconds": 1.0}
    (runs,) = bench.measure(LOAD, Job("shardinit", sizes))
    busy, idle = sample(runs, "busy_p99_seconds"), sample(runs, "idle_p99_seconds")
    calls, failed = (sum(run[name] for run in runs) for name in ("calls", "failures"))
    yield LOAD.row(
        bench,
        f"p99 of DescribeModel among {sizes['clients']} clients",
        busy / idle,
        busy,
        baseline=idle,
        against="the same client alone",
        target="p99",
        note=f"{calls:.0f} calls of the others, {failed:.0f} failed",
    )


LOAD = register(
    name="service-load",
    measures="p99 of DescribeModel while 64 other clients ask once a second each",
    baseline="the same client alone",
    sides={"shardinit": load},
    rows=load_rows,
    targets={"p99": Target(5, 2, higher=False)},
)
