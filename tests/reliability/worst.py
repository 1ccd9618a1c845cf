"""What GetVersion and health take while 32 clients do their worst.

python -m tests.reliability.worst --seconds 60
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shardinit.bench.server import server
from shardinit.service.wire.service_pb2_grpc import InitServiceStub
from shardinit.v1 import service_pb2
from tests.reliability import clients

SPAWN = multiprocessing.get_context("spawn")


def probe(address, seconds):
    """Seconds that calls took, by name; each on a connection that is there."""
    taken = {"GetVersion": [], "health": []}
    end = time.monotonic() + seconds
    version = service_pb2.GetVersionRequest(min=1, max=1)
    check = health_pb2.HealthCheckRequest()
    with grpc.insecure_channel(address) as channel:
        ask = {
            "GetVersion": (InitServiceStub(channel).GetVersion, version),
            "health": (health_pb2_grpc.HealthStub(channel).Check, check),
        }
        while time.monotonic() < end:
            for name, (call, request) in ask.items():
                begin = time.perf_counter()
                call(request)
                taken[name].append(time.perf_counter() - begin)
                time.sleep(0.01)
    return taken


def _misbehave(address, seconds, seed):
    os.nice(10)  # they stand for other machines: the server has this one
    clients.misbehave(address, seconds, seed)


def measure(seconds, processes):
    """What a probe saw alone, and beside 8 clients a process."""
    clients.ROOT.mkdir(exist_ok=True)
    options = ("--allow-upload", "--checkpoint-root", str(clients.ROOT))
    try:
        with server(*options, "--log-level", "error") as (address, pid):
            alone = probe(address, min(seconds, 5))
            bad = [
                SPAWN.Process(target=_misbehave, args=(address, seconds + 2, number))
                for number in range(processes)
            ]
            for process in bad:
                process.start()
            time.sleep(2)
            among = probe(address, seconds)
            for process in bad:
                process.join(60)
            after = probe(address, 1)
            assert os.path.exists(f"/proc/{pid}")
    finally:
        shutil.rmtree(clients.ROOT, ignore_errors=True)
    return {"alone": alone, "among them": among, "after": after}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--processes", type=int, default=4, help="of 8 clients each")
    given = parser.parse_args()
    for when, taken in measure(given.seconds, given.processes).items():
        for name, seconds in taken.items():
            cuts = statistics.quantiles(seconds, n=1000)
            print(
                f"{when:10} {name:10} {len(seconds):6} calls, median {cuts[499]:.4f}, "
                f"p99 {cuts[989]:.4f}, worst {max(seconds):.4f} s"
            )


if __name__ == "__main__":
    main()
