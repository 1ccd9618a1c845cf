"""What was freed goes back to the system while a server runs."""

import sys
import time

import pytest

from shardinit.service.server import heap
from shardinit.service.server.server import Server

pytestmark = pytest.mark.once


def test_a_running_server_gives_back_what_is_free(monkeypatch):
    trimmed = []
    monkeypatch.setattr(heap, "_SECONDS", 0.01)
    monkeypatch.setattr(heap, "_trim", lambda: trimmed.append)
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
    heap._trim()(0)
    assert resident() < before - 20_000_000
    assert len(held) == 100_399
