"""Streaming: how fast the bytes of a leaf come, and what the server holds meanwhile.

A stream of constant leaves is held against raw TCP on the same loopback, what the wire
could carry, and against gRPC with nothing behind it, what Python makes of the wire. One
of random leaves is held against the same windows computed in this process, which is
what the arithmetic gives.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from shardinit.bench.case import Bench, Figures, Job, Row, Target, register, sample
from shardinit.bench.server import memory, processor_seconds, server
from shardinit.core.region import Region

_ROW_BYTES = 4096 * 4
_MIB = 1 << 20
_PIECE_MIB = 16

_GRPC_SERVER = """
import sys, grpc
from concurrent.futures import ThreadPoolExecutor
data = bytes(1 << 20)
class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        send = lambda request, context: (data for _ in range(int(request)))
        return grpc.unary_stream_rpc_method_handler(send)
server = grpc.server(ThreadPoolExecutor(2))
server.add_generic_rpc_handlers((Handler(),))
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
server.wait_for_termination()
"""


class _Taken:
    """Time from here on: of the clock, of this process and of a server's."""

    def __init__(self, server: int | None = None):
        self._server = server
        self._begin = self._now()

    def _now(self) -> tuple[float, float, float]:
        server = 0.0 if self._server is None else processor_seconds(self._server)
        return time.perf_counter(), time.process_time(), server

    def figures(self, size: int) -> Figures:
        """Bytes a second, and processor seconds a GB of both sides."""
        ends = zip(self._begin, self._now(), strict=True)
        clock, here, there = (end - begin for begin, end in ends)
        made = {"bytes_per_second": size / clock, "here_per_gb": here / size * 1e9}
        return made | ({"server_per_gb": there / size * 1e9} if self._server else {})


def tcp(mebibytes: int) -> Figures:
    """Raw bytes over loopback from one process to another."""
    code = (
        "import socket, sys\n"
        "with socket.create_connection(('127.0.0.1', int(sys.argv[1]))) as s:\n"
        "    data = bytes(1 << 20)\n"
        "    for _ in range(int(sys.argv[2])): s.sendall(data)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        command = [sys.executable, "-c", code, port, str(mebibytes)]
        with subprocess.Popen(command):
            connection, _ = listener.accept()
            buffer = bytearray(_MIB)
            begin, count = time.perf_counter(), 0
            while got := connection.recv_into(buffer):
                count += got
            seconds = time.perf_counter() - begin
            connection.close()
    return {"bytes_per_second": count / seconds}


def raw_grpc(mebibytes: int) -> Figures:
    """Messages of 1 MiB over gRPC, with no message format and nothing behind them."""
    import grpc

    command = [sys.executable, "-c", _GRPC_SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        options = [("grpc.max_receive_message_length", 4 * _MIB)]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            send = channel.unary_stream("/raw/send")
            # The first call connects, which is not what is measured.
            sum(map(len, send(b"8")))
            taken = _Taken(process.pid)
            count = sum(map(len, send(str(mebibytes).encode())))
            figures = taken.figures(count)
        process.terminate()
    return figures


def stream(mebibytes: int, model: str) -> Figures:
    """Windows of one leaf from a server into numpy arrays here, one stream.

    Each window is let go when it is complete, as the baselines let go of what they
    have: otherwise this measures how fast the machine hands out fresh memory.
    """
    import numpy as np

    from shardinit.models import ModelSpec
    from shardinit.service.client.client import connect
    from shardinit.service.client.transfer import Piece

    rows, step = mebibytes * _MIB // _ROW_BYTES, _PIECE_MIB * _MIB // _ROW_BYTES
    spec = ModelSpec(model, {"rows": rows})
    with (
        tempfile.TemporaryDirectory() as folder,
        server() as (address, pid),
        connect(address, cache_dir=folder) as client,
    ):
        (leaf,) = client.describe(spec).leaves
        width = leaf.shape[1]
        pieces = [
            Piece(leaf.path, Region((first, 0), (step, width)), np.dtype(leaf.dtype))
            for first in range(0, rows, step)
        ]
        for _ in client.receive(spec, 0, pieces[:1]):  # compiles the block
            pass
        before = memory(pid, "VmRSS")
        taken = _Taken(pid)
        count = sum(array.nbytes for array in client.receive(spec, 0, pieces))
        figures = taken.figures(count)
        grown = memory(pid, "VmHWM") - before
    return {**figures, "grown_bytes": grown}


def windows(mebibytes: int) -> Figures:
    """The same blocks of normals, computed in this process."""
    from shardinit.bench import serving_models
    from shardinit.core.run.lazy import open as open_lazily
    from shardinit.service.server.windows import Wanted

    fn = serving_models.build_random({"rows": mebibytes * _MIB // _ROW_BYTES})
    leaf = open_lazily(fn, 0)["w"]
    window = Wanted(leaf, Region.full(leaf.shape))
    done = begun = len(window.from_byte(0, 4 * _MIB))  # compiles it
    taken = _Taken()
    while done < window.nbytes:
        done += len(window.from_byte(done, 4 * _MIB))
    return taken.figures(done - begun)


def stream_rows(bench: Bench) -> Iterator[Row]:
    """Speeds as ratios, and the growth of the server."""
    size = 32 if bench.options.quick else 2048
    sizes = {"mebibytes": size}
    constant, raw, bare, drawn, computed = bench.measure(
        STREAM,
        Job("shardinit", {**sizes, "model": "bench-constant"}),
        Job("tcp", sizes),
        Job("grpc", sizes),
        Job("shardinit", {**sizes, "model": "bench-random"}),
        Job("windows", sizes),
    )
    for name, mine, theirs, against in (
        ("constant", constant, raw, "raw TCP"),
        ("constant", constant, bare, "gRPC alone"),
        ("random", drawn, computed, "windows in process"),
    ):
        yield STREAM.compare(
            bench,
            f"StreamShards, {name} leaves, {size} MiB",
            mine,
            theirs,
            against,
            "bytes_per_second",
            over=True,
            unit="GB",
            target=(name, against),
            note=f"GB a second, in windows of {_PIECE_MIB} MiB",
        )
    grown = sample([*constant, *drawn], "grown_bytes", 1e-9)
    yield STREAM.row(
        bench,
        f"server RSS growth while it streams {size} MiB",
        max(grown.values) / 0.256,
        grown,
        against="256 MB",
        side_unit="GB",
        target="memory",
        note="peak over what it had before the stream, the worst of all runs",
    )


STREAM = register(
    name="service-stream",
    measures="bytes of a leaf from a server into numpy, and the server's memory",
    baseline="raw TCP and gRPC on loopback; windows computed in process; 256 MB",
    sides={
        "shardinit": stream,
        "tcp": tcp,
        "grpc": raw_grpc,
        "windows": windows,
    },
    rows=stream_rows,
    targets={
        ("constant", "gRPC alone"): Target(0.7, 0.75),
        ("random", "windows in process"): Target(0.4, 0.48),
        "memory": Target(1.0, 0.5, higher=False),
    },
)
