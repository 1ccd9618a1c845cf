"""What the process that listens holds before a load, at its end, and after a rest.

python -m tests.reliability.rest --way uploads --clients 8 --seconds 10
"""

import argparse
import random
import shutil
import threading
import time
from contextlib import suppress

import grpc

from shardinit.bench.server import memory, server
from tests.reliability import clients

REST = 15.0  # seconds: more than lie between two trims


def measure(way, count, seconds, rest=REST):
    """Bytes that it holds before, at the end of the load, and after the rest."""
    clients.ROOT.mkdir(exist_ok=True)
    options = ("--allow-upload", "--checkpoint-root", str(clients.ROOT))
    try:
        with server(*options, "--log-level", "error") as (address, pid):
            time.sleep(2)
            held = [memory(pid, "VmRSS")]
            end = time.monotonic() + seconds

            def run(seed):
                chance = random.Random(seed)
                while time.monotonic() < end:
                    with suppress(grpc.RpcError):
                        way(address, chance)

            threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            held.append(memory(pid, "VmRSS"))
            time.sleep(rest)
            return [*held, memory(pid, "VmRSS")]
    finally:
        shutil.rmtree(clients.ROOT, ignore_errors=True)


def main():
    ways = {way.__name__: way for way in clients.WAYS}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=ways, default="uploads")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args()
    held = measure(ways[given.way], given.clients, given.seconds)
    print("MB before, at the end, after a rest:", *(round(b / 1e6) for b in held))


if __name__ == "__main__":
    main()
