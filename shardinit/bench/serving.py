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
from shardinit.bench.server import server

# ---- what the service adds to an init -----------------------------------------------


def in_process(layers: int, devices: int) -> Figures:
    """Build, plan, compile and run here."""
    import jax

    from shardinit.bench import subjects
    from shardinit.core.run.compile import init
    from shardinit.models import build

    mesh = subjects.mesh(devices)
    spec = subjects.narrow_spec(layers)
    begin = time.perf_counter()
    params = init(build(spec), 0, mesh=mesh, rules=subjects.RULES)
    jax.block_until_ready(params)
    return {"seconds": time.perf_counter() - begin}


def by_client(layers: int, devices: int) -> Figures:
    """Ask a server that has the program, then compile and run here."""
    import jax

    from shardinit.bench import subjects
    from shardinit.service.client.client import connect

    mesh, spec = subjects.mesh(devices), subjects.narrow_spec(layers)
    with server() as (address, _), tempfile.TemporaryDirectory() as folder:
        with connect(address, cache_dir=f"{folder}/other") as other:
            begin = time.perf_counter()
            other.program(spec)
            first = time.perf_counter() - begin
        begin = time.perf_counter()
        with connect(address, cache_dir=f"{folder}/mine") as client:
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


# ---- load ---------------------------------------------------------------------------


def load(layers: int, clients: int, seconds: float) -> Figures:
    """Latency of DescribeModel for one client, alone and among others."""
    from shardinit.bench import subjects
    from shardinit.service.client.client import connect

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
        address, _ = stack.enter_context(server())
        made = [
            stack.enter_context(connect(address, cache_dir=folder))
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
