"""A ``jax.distributed`` job of two processes: shards of one array, or a refusal."""

import os
import re
import socket
import subprocess
import sys

import pytest

from shardinit.core.run.processes import differences

pytestmark = pytest.mark.once

START = """
import shardinit.errors
import sys
import jax, numpy as np
port, rank, other = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
import shardinit

mesh = jax.make_mesh((2, 4), ("a", "b"))
"""
JOB = (
    START
    + """
def fn(key):
    a, b = jax.random.split(key)
    scale = 2.5 if other == rank else 1.5
    return {
        "w": jax.random.normal(a, (64, 96)) + scale,
        "one": jax.numpy.ones((8,)),
        "weak": jax.numpy.full((8,), 0.5),
        "key": b,
        "table": np.arange(16.0),
        "sorted": jax.numpy.sort(jax.random.normal(b, (16, 32)), axis=0),
        "whole": jax.numpy.sort(jax.random.normal(b, (3, 5)), axis=1),
    }

try:
    got = shardinit.init(fn, 3, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
except shardinit.errors.FingerprintMismatchError as error:
    print("REFUSED", error)
    sys.exit()
want = jax.jit(fn)(jax.random.key(3))
assert got["weak"].weak_type
for name in ("w", "one", "weak", "table", "sorted", "whole"):
    shards = got[name].addressable_shards
    assert len(shards) == 4
    for shard in shards:
        assert np.array_equal(shard.data, np.asarray(want[name])[shard.index])
print("EQUAL")
"""
)

NORMAL = (
    START
    + """
def fn(key):
    return {"w": jax.random.normal(key, (64, 96))}

rules = shardinit.fsdp(min_bytes=0)
plan = shardinit.plan(fn, mesh=mesh, rules=rules)  # waits for nobody
own = jax.sharding.Mesh(jax.local_devices(), "x")
"""
)
OTHER_KEY = (
    NORMAL
    + """
try:
    shardinit.init(fn, 7 + (other == rank), mesh=mesh, rules=rules)
except shardinit.errors.FingerprintMismatchError as error:
    print("REFUSED", error)
"""
)
OTHER_RULES = (
    NORMAL
    + """
try:
    shardinit.init(fn, 7, mesh=mesh, rules=rules if other == rank else None)
except shardinit.errors.FingerprintMismatchError as error:
    print("REFUSED", error)
"""
)
# The one that is told to stay away makes arrays on its own devices alone.
ABSENT = (
    NORMAL
    + """
import time, warnings
compiled = shardinit.compile_plan(plan)
jax.block_until_ready(shardinit.init(fn, int(rank), mesh=own, rules=rules))
if other == rank:
    time.sleep(8)
    sys.exit()
with warnings.catch_warnings(record=True) as told:
    try:
        compiled(7)
    except shardinit.errors.MissingProcessesError as error:
        print("REFUSED", error, "|", *[each.message for each in told])
"""
)
LATE = (
    NORMAL
    + """
import time
if other == rank:
    time.sleep(1)
made = shardinit.init(fn, 7, mesh=mesh, rules=rules)
print("EQUAL" if len(made["w"].addressable_shards) == 4 else "")
"""
)


def run(other, job=JOB, wait="5"):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        "JAX_PLATFORMS": "cpu",
        "PATH": "/usr/bin:/bin",
        "SHARDINIT_PROCESS_WAIT": wait,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    jobs = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                job,
                port,
                rank,
                other,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in ("0", "1")
    ]
    try:
        done = [job.communicate(timeout=120) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], [err[-2000:] for _, err in done]
    # the transport talks on standard output too
    return [
        "\n".join(x for x in out.splitlines() if not x.startswith("[Gloo]"))
        for out, _ in done
    ]


@pytest.mark.timeout(200)
def test_every_process_holds_its_shards():
    assert run("none") == ["EQUAL", "EQUAL"]


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_a_process_with_another_model_is_stopped_before_dispatch():
    for out in run("1"):
        assert out.startswith("REFUSED")
        first, second = re.findall(r"\b[0-9a-f]{64}\b", out)
        assert first != second


@pytest.mark.timeout(200)
def test_processes_with_different_keys_are_refused_and_each_says_whose():
    for out in run("1", OTHER_KEY):
        assert out.startswith("REFUSED process ")
        assert "key: process 0 has threefry2x32 [0, 7], process 1 has" in out
        assert "fingerprint" not in out


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_processes_with_different_rules_are_refused():
    first, second = run("1", OTHER_RULES)
    assert re.search(r"shardings: process 0 has 1 of P\w*\(\) ", first)
    assert first.partition(":")[2] == second.partition(":")[2]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("absent", ["0", "1"])
@pytest.mark.few(1)
def test_a_process_that_does_not_come_is_named(absent):
    outs = run(absent, ABSENT, wait="0.05")
    assert outs[int(absent)] == ""
    told, _, warned = outs[1 - int(absent)].partition(" | ")
    assert f"process {absent} of this job did not come to initialise" in told
    assert f"waits for process {absent}" in warned


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_a_process_that_is_late_is_waited_for():
    assert run("1", LATE, wait="0.2") == ["EQUAL", "EQUAL"]


def test_differences_name_ranges_of_processes():
    facts = {n: {"key": "1", "versions": "a"} for n in range(6)}
    facts[2] = facts[5] = {"key": "2", "versions": "a"}
    assert differences(facts) == [
        "key: processes 0-1, 3-4 have 1, processes 2, 5 have 2"
    ]
