"""A ``jax.distributed`` job of two processes: shards of one array, or a refusal."""

import socket
import subprocess
import sys

import pytest

JOB = """
import sys
import jax, numpy as np
port, rank, other = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
import shardinit

def fn(key):
    a, b = jax.random.split(key)
    scale = 2.5 if other == rank else 1.5
    return {
        "w": jax.random.normal(a, (64, 96)) + scale,
        "one": jax.numpy.ones((8,)),
        "key": b,
        "table": np.arange(16.0),
    }

mesh = jax.make_mesh((2, 4), ("a", "b"))
try:
    got = shardinit.init(fn, 3, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
except shardinit.errors.FingerprintMismatchError as error:
    print("REFUSED", error)
    sys.exit()
want = jax.jit(fn)(jax.random.key(3))
for name in ("w", "one", "table"):
    shards = got[name].addressable_shards
    assert len(shards) == 4
    for shard in shards:
        assert np.array_equal(shard.data, np.asarray(want[name])[shard.index])
print("EQUAL")
"""


def run(other):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    jobs = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import shardinit.errors\n" + JOB,
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
def test_a_process_with_another_model_is_stopped_before_dispatch():
    for out in run("1"):
        assert out.startswith("REFUSED")
        ours, theirs = (word for word in out.split() if len(word.strip(";")) == 64)
        assert ours != theirs.strip(";")
