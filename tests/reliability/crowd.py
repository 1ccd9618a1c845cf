"""Thousands of clients, each on its own connection, ask for one model nobody has built.

python -m tests.reliability.crowd --clients 2000 --seconds 10
"""

import argparse
import asyncio
import os
import time
from collections import Counter

import jax
from grpc import aio

from shardinit.bench.server import server
from shardinit.core.init_fn import InitFn
from shardinit.models import register
from shardinit.service.wire.service_pb2_grpc import InitServiceStub
from shardinit.v1 import service_pb2
from tests.reliability.clients import named
from tests.reliability.worst import SPAWN


@register("reliability-slow")
def build_slow(config):
    """A small model that takes its time to be built."""
    time.sleep(config["seconds"])
    return InitFn(lambda key: {"w": jax.random.normal(key, (64, 64))})


async def _ask(address, request, seconds):
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with aio.insecure_channel(address, options) as channel:
        try:
            answers = InitServiceStub(channel).GetProgram(request, timeout=seconds)
            async for _ in answers:
                pass
        except aio.AioRpcError as error:
            return error.code().name
    return "OK"


def _crowd(address, clients, seconds, ends):
    request = service_pb2.GetProgramRequest(
        spec=named("reliability-slow", seconds=seconds)
    )

    async def all_of_them():
        asked = [_ask(address, request, 10 * seconds + 60) for _ in range(clients)]
        return Counter(await asyncio.gather(*asked))

    os.nice(10)
    ends.put(asyncio.run(all_of_them()))


def measure(clients, seconds, processes=4):
    """How the calls ended, and seconds until the last had."""
    ends = SPAWN.Queue()
    share = [clients // processes + (i < clients % processes) for i in range(processes)]
    options = ("--models", __spec__.name, "--log-level", "error")
    with server(*options) as (address, _):
        crowd = [
            SPAWN.Process(target=_crowd, args=(address, count, seconds, ends))
            for count in share
        ]
        begin = time.monotonic()
        for process in crowd:
            process.start()
        found = sum((ends.get() for _ in crowd), Counter())
        taken = time.monotonic() - begin
        for process in crowd:
            process.join()
    return found, taken


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of the build")
    given = parser.parse_args()
    found, taken = measure(given.clients, given.seconds)
    print(
        f"{given.clients:,} clients of a build of {given.seconds:g} s: {dict(found)}, "
        f"all after {taken:.1f} s, their start included"
    )


if __name__ == "__main__":
    main()
