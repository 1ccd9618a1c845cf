"""Pipe: what the process that listens and its workers say to each other.

A frame is a kind, a length and that many bytes. A worker may run a stranger's program,
so nothing on either side is unpickled: messages, statuses and JSON only. The bytes of
windows do not travel in frames but lie in memory that both sides see.

A worker is sent its settings first and then jobs, one at a time; a job is answered by
any number of answers and pieces, and then it is done or has failed.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import tempfile
import threading
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import NamedTuple

from shardinit.v1 import service_pb2

HEAD = struct.Struct("<BQ")
COUNTS = struct.Struct("<QQ")


class Kind(IntEnum):
    """What a frame is."""

    SETTINGS = 0  # to a worker: modules with models, and a `Config`, as JSON
    JOB = 1  # to a worker: a `Task`
    READY = 2  # of a worker: its models, as a ListModelsResponse
    ANSWER = 3  # a message of the job's answer
    # The number of bytes in the memory, behind those before, and how many times they
    # come; a ShardHeader.
    PIECE = 4
    DONE = 5
    FAILED = 6  # a google.rpc.Status
    LOG = 7  # a line of the worker's log, as JSON
    EVICTED = 8  # of a worker: a plan that it kept went to make room


class Task(NamedTuple):
    """What a worker is asked.

    Attributes:
      method: name of the worker's method.
      request_id: of the call that asks.
      request: the serialised message.
      trace: of the span that asks, as W3C's ``traceparent``; empty without one.
      owner: whose the program is that it is about; a caller finds in what is kept
        what is its own, so that no time tells of another's.
    """

    method: str
    request_id: str
    request: bytes
    trace: str = ""
    owner: str = ""

    def pack(self) -> bytes:
        """As the bytes of a frame."""
        head = json.dumps([*self[:2], *self[3:]]).encode()
        return struct.pack("<I", len(head)) + head + self.request

    @classmethod
    def unpack(cls, data: bytes) -> Task:
        """Of the bytes of a frame."""
        (size,) = struct.unpack_from("<I", data)
        method, request_id, trace, owner = json.loads(data[4 : 4 + size])
        return cls(method, request_id, data[4 + size :], trace, owner)


class Piece(NamedTuple):
    """Bytes of a window.

    Attributes:
      header: whose ``offset`` is where they begin.
      data: the bytes.
      times: how many times they come, one after the other; a window of zeros is one
        element and a number.
    """

    header: service_pb2.ShardHeader
    data: memoryview
    times: int = 1


@dataclass(frozen=True)
class Prepared:
    """What a write will be.

    Attributes:
      identity: what it writes: format, function and key. Equal writes are one.
      total_bytes: of all parameters.
      receipt: of a write that is complete already; empty if it is not.
    """

    identity: str
    total_bytes: int
    receipt: str = ""

    def to_json(self) -> bytes:
        """For the process that listens."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Prepared:
        """What a worker said."""
        return cls(**json.loads(data))


class Frames:
    """Frames over a socket, for a side that may wait.

    Args:
      connection: the socket.
    """

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._sending = threading.Lock()  # a line of the log may come from any thread

    def send(self, kind: Kind, data: bytes = b"") -> None:
        """Sends a frame."""
        with self._sending:
            self._connection.sendall(HEAD.pack(kind, len(data)) + data)

    def receive(self) -> tuple[Kind, bytes]:
        """The next frame.

        Raises:
          EOFError: the other side has gone.
        """
        kind, size = HEAD.unpack(self._exactly(HEAD.size))
        return Kind(kind), self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            count = self._connection.recv_into(view[done:])
            if not count:
                raise EOFError
            done += count
        return bytes(data)


def make_memory(size: int) -> int:
    """Memory that another process can see too; a file descriptor."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("shardinit")
    else:  # not Linux: a file without a name
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    os.ftruncate(handle, size)
    return handle


def map_memory(handle: int, size: int) -> memoryview:
    """The memory behind a file descriptor."""
    return memoryview(mmap.mmap(handle, size))
