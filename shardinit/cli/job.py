"""The demo's training job: asks a service by spec, initialises, checks, reports.

``python -m shardinit.cli.job ADDRESS CONFIG CACHE`` is started by the demo in an
environment with simulated devices. It is what a real job does, plus a check that no
job needs: one random leaf of each distinct program, bit for bit against plain
``jax.jit`` of that leaf alone.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from shardinit.cli import arguments
from shardinit.cli.demo import RULES, demo_mesh
from shardinit.core.plan.planning import plan as make_plan
from shardinit.core.platform import peak_bytes
from shardinit.core.run.compile import compile_plan
from shardinit.errors import FingerprintMismatchError, ShardinitError
from shardinit.models import build
from shardinit.progress import Report, progress
from shardinit.service.client.client import connect
from shardinit.short import plural

SEED = 0


def run(address: str, config: str, cache: str) -> None:
    """Materialises the model and prints what it took.

    Raises:
      ShardinitError: the service or the check failed.
    """
    spec = arguments.read_spec(config)
    times: dict[str, float] = {}
    with (
        _stage("fetch the init program", times),
        connect(address, cache_dir=cache) as client,
    ):
        program = client.program(spec)
    mesh, rules = demo_mesh(), arguments.parse_rules(RULES)
    with _stage("compile the distinct programs", times):
        plan = make_plan(program, mesh=mesh, rules=rules)
        compiled = compile_plan(plan)
    lines = None if sys.stderr.isatty() else _quarters("initialise")
    with (
        _stage("initialise", times),
        progress("   initialise", lines, "leaves") as report,
    ):
        params = jax.block_until_ready(compiled(SEED, report))
    peak = peak_bytes()
    held, seconds = _bytes_by_device(params), sum(times.values())
    with _stage("check against plain jax.jit", times):
        checked = _check(plan, params, build(spec))
    size = len(program.to_bytes())
    most = max(held.values())
    print(f"   time               {seconds:.1f} s from the request to the last byte")
    print(f"   init program       {size:,} bytes for {plan.total_bytes:,} of weights")
    leaves = plural(len(plan.leaves), "leaf")
    print(f"   distinct programs  {len(plan.programs)} for {leaves}")
    print(f"   bytes a device     {most:,} at most, planned {plan.bytes_per_device:,}")
    ratio = peak / plan.total_bytes
    print(f"   peak memory        {peak:,} bytes, {ratio:.2f} x the weights")
    print(f"   checked            {checked} leaves equal plain jax.jit bit for bit")


@contextmanager
def _stage(name: str, times: dict[str, float]) -> Iterator[None]:
    begin = time.monotonic()
    yield
    times[name] = time.monotonic() - begin
    print(f"   {name}: {times[name]:.2f} s", flush=True)


def _quarters(name: str) -> Report:
    """Where there is no terminal for a bar, a line for each quarter."""
    shown = 0

    def report(done: int, total: int) -> None:
        nonlocal shown
        quarter = 4 * done // total if total else 4
        if quarter > shown:
            shown = quarter
            print(f"   {name}: {done} of {total} leaves", flush=True)

    return report


def _check(plan: Any, params: Any, init_fn: Any) -> int:
    """Compares one random leaf of each program; returns how many."""
    local = make_plan(init_fn)
    if local.fingerprint != plan.fingerprint:
        raise FingerprintMismatchError(
            "demo",
            f"the service's program has fingerprint {plan.fingerprint}",
            f"that of the model here, {local.fingerprint}",
        )
    order = {leaf.path: i for i, leaf in enumerate(local.leaves)}
    arrays = jax.tree.leaves(params)
    by_program: dict[int, list[int]] = {}
    for i, leaf in enumerate(plan.leaves):
        by_program.setdefault(leaf.program, []).append(i)
    key = jax.random.key(SEED)
    for number, members in by_program.items():
        picked = random.choice(members)
        path = plan.leaves[picked].path
        place = order[path]

        def alone(key: jax.Array, place: int = place) -> jax.Array:
            return jax.tree.leaves(init_fn.fn(key))[place]

        expected = np.asarray(jax.jit(alone)(key))
        # As bytes: ``==`` takes -0.0 for 0.0, and NaN for no NaN.
        if np.asarray(arrays[picked]).tobytes() != expected.tobytes():
            raise ShardinitError(
                f"leaf {path!r}",
                f"its bits, made by program {number}, differ from plain jax.jit",
            )
        if sys.stdout.isatty() or len(by_program) <= 64:
            print(f"   equal to jax.jit: {path}", flush=True)
    return len(by_program)


def _bytes_by_device(params: Any) -> dict[Any, int]:
    held: dict[Any, int] = {}
    for array in jax.tree.leaves(params):
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return held


def main() -> None:
    """Runs the job; one line on standard error and exit code 1 if it fails."""
    try:
        run(*sys.argv[1:4])
    except ShardinitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
