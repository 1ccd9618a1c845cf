"""Cancelled calls: how soon the worker that had one does nothing any more.

    python -m tests.reliability.cancels --times 10

A model of 2,000 layers is being built, or windows of a large leaf are being computed,
when the caller cancels. The worker has ended with it, or is idle.
"""

import argparse
import threading
import time
from contextlib import suppress

import grpc
import psutil

from shardinit.bench.server import server
from shardinit.service.wire.service_pb2_grpc import InitServiceStub
from shardinit.v1 import service_pb2
from tests.reliability.clients import decoder, named

IDLE = 0.04  # of a core: one tick of the clock; beside other load a busy one has little
SPAN = 0.25  # seconds over which a worker is watched


def build(stub):
    """A call that takes a worker a minute to trace."""
    return stub.DescribeModel.future(
        service_pb2.DescribeModelRequest(spec=decoder(2000)), timeout=600
    )


def stream(stub):
    """A call that takes a worker a minute to compute."""
    rows = 1 << 19  # of 16 KiB
    request = service_pb2.StreamShardsRequest(
        spec=named("bench-random", rows=rows), key=service_pb2.RootKey(seed=3)
    )
    request.windows.add(path="w", start=[0, 0], shape=[rows, 4096])
    answers = stub.StreamShards(request, timeout=600)

    def read():
        with suppress(grpc.RpcError):
            for _ in answers:
                pass

    threading.Thread(target=read, daemon=True).start()  # who does not read holds none
    return answers


def _seconds(workers):
    """Processor seconds of those workers that are still there."""
    total = 0.0
    for worker in workers:
        try:
            spent = worker.cpu_times()
            total += spent.user + spent.system
        except psutil.Error:
            continue
    return total


def _busy(workers):
    """How many cores the workers take."""
    before, begin = _seconds(workers), time.monotonic()
    time.sleep(SPAN)
    return (_seconds(workers) - before) / (time.monotonic() - begin)


def free_after(begin, stub, pid, patience=30.0):
    """Seconds from a cancel until the workers of that moment take no more time.

    Args:
      begin: makes a call.
      stub: of the service.
      pid: of the process that listens.
      patience: seconds to wait for a worker to be busy, and to be free.

    Raises:
      TimeoutError: no worker became busy, or none free.
    """
    call = begin(stub)
    until = time.monotonic() + patience
    workers = psutil.Process(pid).children()
    while not workers or _busy(workers) <= 2 * IDLE:
        if time.monotonic() > until:
            raise TimeoutError("no worker is busy")
        workers = psutil.Process(pid).children()
    call.cancel()
    cancelled = time.monotonic()
    while _busy(workers) > IDLE:
        if time.monotonic() > cancelled + patience:
            raise TimeoutError("the workers go on")
    return max(0.0, time.monotonic() - cancelled - SPAN)


def measure(times, kinds=(build, stream)):
    """For each kind of call the seconds of each cancel."""
    with server() as (address, pid), grpc.insecure_channel(address) as channel:
        stub = InitServiceStub(channel)
        stub.ListModels(service_pb2.ListModelsRequest(), timeout=120)  # one is up
        return {
            kind.__name__: [free_after(kind, stub, pid) for _ in range(times)]
            for kind in kinds
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    for kind, seconds in measure(parser.parse_args().times).items():
        middle = sorted(seconds)[len(seconds) // 2]
        print(f"{kind}: free after {middle:.2f} s, at most {max(seconds):.2f} s")


if __name__ == "__main__":
    main()
