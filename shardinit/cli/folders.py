"""Folders: the digest of a checkpoint that is there, whoever named its tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from shardinit.errors import CheckpointError
from shardinit.progress import counted, progress

if TYPE_CHECKING:
    from shardinit.verify.digest.host import Digest


class Naming(NamedTuple):
    """How a checkpoint names its tensors, if not by the leaves' paths.

    Attributes:
      names: ``hf``, or a file of lines.
      config: what describes the model, for ``hf``: a file, or a spec.
    """

    names: str | None
    config: Any = None

    def digest(
        self, folder: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]]
    ) -> Digest:
        """The digest of the leaves that a checkpoint's tensors make.

        Args:
          folder: the checkpoint's.
          shapes: of the leaves, by path, where the tensors have other names.
        """
        if self.names is None:
            return digest_folder(os.fspath(folder))
        from shardinit.storage import safetensors
        from shardinit.storage.layout import plan_files
        from shardinit.storage.windows import windows
        from shardinit.verify.digest.devices import Digester

        leaves = safetensors.open_leaves(folder, shapes, names=self.names)
        kinds = {path: (x.shape, x.dtype) for path, x in leaves.items()}
        digester = Digester(kinds)
        for file in plan_files(
            ((path, *kind) for path, kind in kinds.items()), 1 << 62
        ):
            for window in windows(file, 64 << 20):
                path, region = window.tensor.path, window.region
                digester.add(path, region.start, leaves[path][region.slices])
        return digester.digest()


def digest_folder(folder: str) -> Digest:
    """The digest of a checkpoint of either format.

    Raises:
      CheckpointError: there is none.
    """
    from shardinit.storage.layout import INDEX, SINGLE

    if any(os.path.exists(os.path.join(folder, name)) for name in (INDEX, SINGLE)):
        return _digest_windows(folder)
    if not os.path.isdir(folder):
        is_file = os.path.exists(folder)
        got = "it is a file" if is_file else "there is no such folder"
        raise CheckpointError(f"checkpoint {folder!r}", got, "a checkpoint's folder")
    from shardinit.verify.digest.devices import digest

    return digest(quiet_orbax().restore(folder))


def quiet_orbax() -> Any:
    """The room of Orbax folders; its log says again, at length, what our errors say."""
    from absl import logging

    from shardinit.storage import orbax

    logging.set_verbosity(logging.FATAL)
    return orbax


def _digest_windows(folder: str) -> Digest:
    from shardinit.storage import safetensors
    from shardinit.verify.digest.devices import Digester

    arrays = safetensors.open(folder)
    digester = Digester({path: (x.shape, x.dtype) for path, x in arrays.items()})
    with progress("digest") as report:
        advance = counted(report, sum(x.nbytes for x in arrays.values()))
        for path, start, window in safetensors.read_windows(folder):
            digester.add(path, start, window)
            advance(window.nbytes)
    return digester.digest()
