"""Windows into their places: files that are filled a window at a time, or compared."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shardinit.errors import CheckpointError
from shardinit.storage.layout import File, read_files
from shardinit.storage.sources import Leaf
from shardinit.storage.unfinished import Unfinished
from shardinit.storage.windows import Window, windows

WORKERS = 2

OnWindow = Callable[[str, tuple[int, ...], np.ndarray], None]


def compare(
    target: Path,
    files: Sequence[File],
    leaves: Mapping[str, Leaf],
    window_bytes: int,
    on_window: OnWindow | None,
) -> None:
    """Holds a checkpoint that is there against what would be written.

    Raises:
      CheckpointError: it is another one.
    """
    held = read_files(target)
    if [(x.name, x.header) for x in held] != [(x.name, x.header) for x in files]:
        raise CheckpointError.taken("checkpoint", target, "a model of other leaves")
    for file in files:
        mapped = np.memmap(target / file.name, np.uint8, "r")
        for window in windows(file, window_bytes):
            array = read_window(leaves[window.tensor.path], window)
            there = mapped[window.offset : window.offset + window.nbytes]
            if not np.array_equal(array.reshape(-1).view(np.uint8), there):
                path = window.tensor.path
                why = f"its leaf {path!r} has other values"
                raise CheckpointError.taken("checkpoint", target, why)
            if on_window is not None:
                on_window(window.tensor.path, window.region.start, array)


class Writer:
    """Writes file after file, with a few windows under way at a time."""

    def __init__(
        self,
        begun: Unfinished,
        leaves: Mapping[str, Leaf],
        window_bytes: int,
        *,
        trusted: bool,
    ):
        self._begun = begun
        self._leaves = leaves
        self._window_bytes = window_bytes
        self._trusted = trusted

    def write(self, file: File, on_window: OnWindow | None) -> None:
        """Writes what is not there yet of one file, and syncs it."""
        path = self._begun.folder / file.name
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        pending: deque[tuple[Window, Future[np.ndarray]]] = deque()
        pool = ThreadPoolExecutor(WORKERS)
        try:
            _write_at(handle, 0, memoryview(file.header))
            # The whole size at once: windows are written at their places, in any order.
            os.truncate(handle, file.size)
            for window in windows(file, self._window_bytes):
                pending.append((window, pool.submit(self._one, handle, file, window)))
                while len(pending) >= 2 * WORKERS:
                    _see(*pending.popleft(), on_window)
            while pending:
                _see(*pending.popleft(), on_window)
            os.fsync(handle)
        finally:
            pool.shutdown(cancel_futures=True)
            os.close(handle)

    def _one(self, handle: int, file: File, window: Window) -> np.ndarray:
        """Writes one window if it is not there; its elements.

        Of a lazy source what is there can be believed, as its values have a name.
        """
        tensor = window.tensor
        if (
            self._trusted
            and (file.name, window.offset, window.nbytes) in self._begun.done
        ):
            held = bytearray(window.nbytes)
            _read_at(handle, window.offset, memoryview(held))
            if self._begun.holds(file.name, window.offset, memoryview(held)):
                return np.frombuffer(held, tensor.dtype).reshape(window.region.shape)
        array = read_window(self._leaves[tensor.path], window)
        data = array.reshape(-1).view(np.uint8).data
        _write_at(handle, window.offset, data)
        self._begun.note(file.name, window.offset, data)
        return array


def _see(
    window: Window, pending: Future[np.ndarray], on_window: OnWindow | None
) -> None:
    array = pending.result()
    if on_window is not None:
        on_window(window.tensor.path, window.region.start, array)


def read_window(leaf: Leaf, window: Window) -> np.ndarray:
    """A window's elements, contiguous and little-endian."""
    array = np.ascontiguousarray(leaf.read(window.region.start, window.region.shape))
    return array.reshape(window.region.shape)


def _write_at(handle: int, offset: int, data: memoryview) -> None:
    while data:
        # ``pwrite``, as the threads share the handle and would move each other's place
        # in the file. And in a loop: Linux writes at most 2 GiB less a page in one call
        # (write(2)).
        done = os.pwrite(handle, data, offset)
        offset, data = offset + done, data[done:]


def _read_at(handle: int, offset: int, data: memoryview) -> None:
    while data:
        done = os.preadv(handle, [data], offset)
        if not done:
            return  # shorter than it was: its checksum will say so
        offset, data = offset + done, data[done:]
