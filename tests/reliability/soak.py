"""Hours of everything at once: what the process that listens holds at the end.

    python -m tests.reliability.soak --minutes 30

32 clients do their worst, a worker is killed every 20 seconds, and honest clients
hold each window that they get against the same window computed here.
"""

import argparse
import math
import random
import shutil
import threading
import time
from collections import Counter
from contextlib import suppress

import numpy as np
import psutil

import shardinit
from shardinit.bench.server import memory, server
from shardinit.bench.serving_models import build_random
from shardinit.errors import ServiceError
from shardinit.models import ModelSpec
from tests.reliability import clients
from tests.reliability.worst import SPAWN, _misbehave

ROWS = 1 << 12
PATIENCE = 30.0  # seconds that an honest call may take


def read(address, end, seed, ends):
    """Honest reads until the end: right, wrong, refused, or stuck."""
    chance = random.Random(seed)
    spec = ModelSpec("bench-random", {"rows": ROWS})
    here = shardinit.open(build_random({"rows": ROWS}), 5)["w"]
    with shardinit.connect(address, timeout=PATIENCE) as client:
        while time.monotonic() < end:
            first = chance.randrange(ROWS - 8)
            window = np.s_[first : first + 8]
            begin = time.monotonic()
            try:
                same = client.read(spec, 5, "w", window).tobytes()
                right = same == np.asarray(here[window]).tobytes()
                ends["right" if right else "wrong"] += 1
            except ServiceError as error:
                ends[error.code] += 1
            # It describes and reads, each with its time, and retries within it.
            ends["stuck"] += time.monotonic() - begin > 2 * PATIENCE + 10


def measure(seconds, processes, kill_every=20.0, sample_every=2.0):
    """What honest reads ended with, and (seconds, bytes) of the front."""
    ends, held = Counter(), []
    clients.ROOT.mkdir(exist_ok=True)
    options = ("--allow-upload", "--checkpoint-root", str(clients.ROOT))
    try:
        with server(*options, "--log-level", "error") as (address, pid):
            begin = time.monotonic()
            end = begin + seconds
            readers = [
                threading.Thread(target=read, args=(address, end, seed, ends))
                for seed in range(2)
            ]
            bad = [
                SPAWN.Process(target=_misbehave, args=(address, seconds, number))
                for number in range(processes)
            ]
            for each in (*readers, *bad):
                each.start()
            killed = begin
            while time.monotonic() < end:
                time.sleep(sample_every)
                held.append((time.monotonic() - begin, memory(pid, "VmRSS")))
                if time.monotonic() - killed > kill_every:
                    killed = time.monotonic()
                    with suppress(psutil.Error, IndexError):
                        random.choice(psutil.Process(pid).children()).kill()
                        ends["killed"] += 1
            for each in (*readers, *bad):
                each.join()
    finally:
        shutil.rmtree(clients.ROOT, ignore_errors=True)
    return ends, held


def least(held):
    """Of each minute the sample that has least: uploads under way come and go."""
    minutes = {}
    for sample in held:
        first = minutes.setdefault(sample[0] // 60, sample)
        if sample[1] < first[1]:
            minutes[sample[0] // 60] = sample
    return list(minutes.values())


def slope(held):
    """Megabytes a minute of a line through (seconds, bytes)."""
    if len(held) < 2:
        return math.nan
    seconds, size = np.array(held).T
    return np.polyfit(seconds / 60, size / 1e6, 1)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    given = parser.parse_args()
    ends, held = measure(given.minutes * 60, 4)
    print(f"honest reads: {dict(ends)}")
    every = max(len(held) // 12, 1)
    print("MB by second:", {round(s): round(b / 1e6) for s, b in held[::every]})
    settled = held[len(held) // 3 :]
    print(
        f"the process that listens: {held[0][1] / 1e6:.0f} MB, at the end "
        f"{held[-1][1] / 1e6:.0f}; after the first third {slope(settled):+.2f} MB a "
        f"minute, the least of each minute {slope(least(settled)):+.2f}"
    )


if __name__ == "__main__":
    main()
