"""Kills in the middle of a stream: every client ends with the right bytes.

    python -m tests.reliability.kills --kills 50

A stream of a model runs again and again; meanwhile the process that listens, or one of
its workers, is killed (SIGKILL), in turns. A supervisor starts the server anew on its
port, as Kubernetes would.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import xxhash

import shardinit
from shardinit.errors import ServiceError
from shardinit.models import ModelSpec, example_config
from shardinit.service.client import transfer

KEY = 7


class Supervised:
    """A server on one port that is started again whenever it ends."""

    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._stop = threading.Event()
        self._begin()
        self._thread = threading.Thread(target=self._supervise)
        self._thread.start()

    def _begin(self):
        command = [sys.executable, "-m", "shardinit", "serve", "--listen", self.address]
        command += ["--models", "shardinit.bench.serving_models"]
        self._process = subprocess.Popen(
            [*command, "--log-level", "error", "--grace", "0"],
            stdout=subprocess.DEVNULL,
        )

    def _supervise(self):
        while not self._stop.wait(0.05):
            if self._process.poll() is not None:
                self._begin()

    def kill(self, number, chance):
        """Kills the front, or a worker; says which."""
        while number % 2:  # one may have to begin first
            workers = psutil.Process(self._process.pid).children()
            if workers:
                chance.choice(workers).kill()
                return "worker"
            time.sleep(0.05)
        os.kill(self._process.pid, signal.SIGKILL)
        return "front"

    def close(self):
        self._stop.set()
        self._thread.join()
        self._process.terminate()
        self._process.wait()


def described(client, spec, seconds=60.0):
    """What a model is, from whoever serves within some time."""
    end = time.monotonic() + seconds
    while True:
        try:
            return client.describe(spec)
        except ServiceError as error:
            if error.code != "UNAVAILABLE" or time.monotonic() > end:
                raise
            time.sleep(0.2)


def digest(address, spec):
    """Of all bytes of a model, as they come in a stream."""
    made = xxhash.xxh3_128()
    with shardinit.connect(address, timeout=60) as client:
        pieces = [transfer.full_piece(leaf) for leaf in described(client, spec).leaves]
        for array in client.receive(spec, KEY, pieces):
            made.update(array.reshape(-1).view("uint8").data)
    return made.hexdigest()


def measure(spec, kills, most=4.0):
    """The right digest, those of all streams that ran, and what was killed."""
    served = Supervised()
    chance = random.Random(0)
    killed, digests, done = [], [], threading.Event()

    def kill():
        while len(killed) < kills:
            time.sleep(chance.uniform(0.5, most))
            killed.append(served.kill(len(killed), chance))
        done.set()

    try:
        expected = digest(served.address, spec)
        killer = threading.Thread(target=kill)
        killer.start()
        while not done.is_set():
            digests.append(digest(served.address, spec))
        killer.join()
    finally:
        served.close()
    return expected, digests, killed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model", default="tinyllama-1.1b")
    given = parser.parse_args()
    spec = ModelSpec("decoder", example_config(given.model))
    expected, digests, killed = measure(spec, given.kills, most=8.0)
    right = sum(one == expected for one in digests)
    print(
        f"{len(killed)} kills ({killed.count('front')} of the front), "
        f"{len(digests)} streams of {given.model}, {right} with the right digest"
    )


if __name__ == "__main__":
    main()
