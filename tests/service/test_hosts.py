"""Jobs of several processes, each with its own devices, against replicas and none."""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import shardinit
from shardinit.models import ModelSpec, build
from shardinit.service.server.config import Config
from shardinit.service.server.server import Server

pytestmark = pytest.mark.once

EXAMPLE = Path(__file__).parents[2] / "examples" / "multihost.py"
SPEC = ModelSpec("decoder", runpy.run_path(str(EXAMPLE))["TINY"])


def environment(devices):
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return kept | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


@pytest.fixture(scope="module")
def alone():
    """The digest of one process's arrays, and the bytes of all leaves."""
    plan = shardinit.plan(build(SPEC))
    return shardinit.digest(shardinit.init(build(SPEC), 0)).root, plan.total_bytes


@pytest.fixture(scope="module")
def replicas():
    """Two servers that know nothing of each other, behind one target."""
    with Server(Config()) as one, Server(Config()) as two:
        yield one, two, f"ipv4:{one.address},{two.address}"


def job(processes, tmp_path, *arguments):
    command = [sys.executable, str(EXAMPLE), "--processes", str(processes), *arguments]
    done = subprocess.run(
        [*command, "--devices", str(8 // processes)],
        capture_output=True,
        text=True,
        timeout=150,
        env=environment(8 // processes) | {"XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
    assert sorted(line["rank"] for line in lines) == list(range(processes))
    return lines


def served(server):
    calls = server.metrics.calls.collect()[0].samples
    return sum(x.value for x in calls if x.name.endswith("_total"))


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_two_processes_without_a_server_hold_the_shards_of_one_model(tmp_path, alone):
    lines = job(2, tmp_path)
    assert {line["root"] for line in lines} == {alone[0]}
    assert all(line["devices"] == 4 for line in lines)
    assert all(line["bytes"] < alone[1] for line in lines)


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_four_processes_are_served_by_two_replicas_and_write_one_checkpoint(
    tmp_path, alone, replicas
):
    import orbax.checkpoint as ocp

    one, two, target = replicas
    before = served(one) + served(two)
    folder = tmp_path / "checkpoint"
    lines = job(4, tmp_path, "--server", target, "--checkpoint", str(folder))
    assert {line["root"] for line in lines} == {alone[0]}
    assert served(one) + served(two) >= before + 8  # version and program, each
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    key = jax.random.key(0)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(build(SPEC).fn, key),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder, abstract)
    assert shardinit.digest(restored).root == alone[0]


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_two_processes_receive_the_bytes_of_their_shards_alone(
    tmp_path, alone, replicas
):
    one, two, target = replicas

    def sent():
        return one.metrics.sent._value.get() + two.metrics.sent._value.get()

    before = sent()
    lines = job(2, tmp_path, "--server", target, "--via", "stream")
    assert {line["root"] for line in lines} == {alone[0]}
    # of the replicated leaves each process asks for a copy, of the others for a part
    assert sent() - before < 1.4 * alone[1]


JOB = """
import json, os, sys
import jax
port, rank, server, mode, config = sys.argv[1:]
jax.distributed.initialize(
    f"127.0.0.1:{port}", 2, int(rank),
    heartbeat_timeout_seconds=6, shutdown_timeout_seconds=6,
)
import shardinit
from shardinit.models import ModelSpec
config = json.loads(config)
if mode in ("program", "stream") and rank == "1":
    config = {**config, "hidden_size": 128}
dispatched = []

def progress(done, total):
    dispatched.append(done)
    if mode == "killed" and rank == "1":
        os.kill(os.getpid(), 9)

mesh = jax.make_mesh((jax.device_count(),), ("data",))
with shardinit.connect(server) as client:
    try:
        params = client.init(
            ModelSpec("decoder", config), 0, mesh=mesh, progress=progress,
            via="stream" if mode == "stream" else "program",
        )
    except shardinit.errors.FingerprintMismatchError as error:
        print("REFUSED", len(dispatched), error, flush=True)
        sys.exit(0)  # which waits for the other: the coordinator must not go first
print("ready", flush=True)
print(shardinit.digest(params).root, flush=True)
"""


def pair(tmp_path, servers, mode):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code, config = "import shardinit.errors\n" + JOB, json.dumps(dict(SPEC.config))
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, port, rank, servers[int(rank)], mode, config],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(2) | {"XDG_CACHE_HOME": str(tmp_path)},
        )
        for rank in "01"
    ]


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_half_the_hosts_ask_one_replica_and_half_the_other(tmp_path, alone, replicas):
    one, two, _ = replicas
    before = served(one), served(two)
    jobs = pair(tmp_path, (one.address, two.address), "same")
    for job in jobs:
        out, err = job.communicate(timeout=120)
        assert alone[0] in out.splitlines(), err  # the transport talks there too
    assert served(one) > before[0]
    assert served(two) > before[1]


def test_one_client_uses_all_replicas_in_turns(tmp_path, replicas):
    one, two, target = replicas
    before = served(one), served(two)
    with shardinit.connect(target, cache_dir=tmp_path) as client:
        for _ in range(100):  # until both connections are there
            client.models()
            if served(one) > before[0] and served(two) > before[1]:
                break
            time.sleep(0.05)
    assert served(one) > before[0]
    assert served(two) > before[1]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("via", ["program", "stream"])
@pytest.mark.slow
def test_a_process_that_asks_for_another_model_stops_all_before_dispatch(
    tmp_path, replicas, via
):
    jobs = pair(tmp_path, replicas[2:] * 2, via)
    done = [job.communicate(timeout=120) for job in jobs]
    ours = shardinit.plan(build(SPEC)).fingerprint
    for out, err in done:
        (line,) = [x for x in out.splitlines() if x.startswith("REFUSED")] or [err]
        assert line.startswith("REFUSED 0 "), line
        found = set(re.findall("[0-9a-f]{64}", line))
        assert len(found) == 2
        assert ours in found


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_a_process_killed_during_init_takes_the_others_down_in_time(tmp_path, replicas):
    survivor, victim = pair(tmp_path, replicas[2:] * 2, "killed")
    victim.communicate(timeout=120)
    begin = time.monotonic()
    assert victim.returncode == -signal.SIGKILL
    out, _ = survivor.communicate(timeout=100)
    assert survivor.returncode != 0
    assert not re.search("^[0-9a-f]{64}$", out, re.MULTILINE)
    assert time.monotonic() - begin < 60  # six seconds, and a machine that is busy
