"""What was freed goes back to the system while a server runs."""

import ctypes
import re
import subprocess
import sys
import threading
import time

import grpc
import pytest

from shardinit.service.server import heap
from shardinit.service.server.config import Config
from shardinit.service.server.server import Server
from shardinit.service.wire.service_pb2_grpc import InitServiceStub

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
from shardinit.service.server.config import Config
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


_COUNTS = """
    arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost
"""


class _Mallinfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _COUNTS.split())


def _in_use():
    """Bytes that C code of this process has allocated and not freed."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    return mallinfo().uordblks


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_calls_that_end_before_their_request_leave_nothing():
    def give_up(address, calls=90, seconds=0.5):
        gone = threading.Event()

        def never():
            gone.wait(seconds)
            yield from ()

        with grpc.insecure_channel(address) as channel:
            upload = InitServiceStub(channel).UploadProgram
            made = [upload.future(never(), timeout=seconds) for _ in range(calls)]
            ends = {call.exception().code() for call in made}
        assert grpc.StatusCode.DEADLINE_EXCEEDED in ends

    with Server(Config(allow_upload=True)) as server:
        give_up(server.address)
        before = _in_use()
        for _ in range(6):
            give_up(server.address)
        time.sleep(0.5)
        kept = (_in_use() - before) / (6 * 90)
    assert kept < 450  # bytes a call; 900 where each is answered
