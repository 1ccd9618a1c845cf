"""What was freed goes back to the system while a server runs."""

import re
import subprocess
import sys
import time

import pytest

from shardinit.service.server import heap
from shardinit.service.server.server import Server

pytestmark = pytest.mark.once


def test_a_running_server_gives_back_what_is_free(monkeypatch):
    trimmed = []
    monkeypatch.setattr(heap, "_SECONDS", 0.01)
    monkeypatch.setattr(heap, "_glibc", lambda name: trimmed.append)
    with Server():
        until = time.monotonic() + 30
        while len(trimmed) < 3 and time.monotonic() < until:
            time.sleep(0.01)
    assert trimmed[:3] == [0, 0, 0]
    last = len(trimmed)
    time.sleep(0.2)
    assert len(trimmed) == last


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_free_memory_below_what_is_held_goes_back():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    # Each is below the size that glibc maps by itself.
    blocks = [b"x" * (100_000 + i) for i in range(400)]
    held = blocks[-1]  # the end of the heap: without a trim nothing below it goes back
    before = resident()
    del blocks
    trim = heap._glibc("malloc_trim")
    assert trim is not None
    trim(0)
    assert resident() < before - 20_000_000
    assert len(held) == 100_399


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("first", ["", "heap.use_few_arenas()"])
def test_threads_share_two_arenas(first):
    code = f"""
import ctypes, threading
from shardinit.service.server import heap
{first}
barrier = threading.Barrier(12)
def take():
    held = b"x" * 50_000
    barrier.wait()
threads = [threading.Thread(target=take) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
ctypes.CDLL(None).malloc_stats()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    arenas = len(re.findall(r"^Arena \d+:", done.stderr, re.MULTILINE))
    assert arenas == 2 if first else arenas > 2
