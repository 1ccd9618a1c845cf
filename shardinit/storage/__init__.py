"""Checkpoints: Orbax for jobs, safetensors for everyone.

``shardinit.storage.orbax`` and ``shardinit.storage.safetensors``, each imported when it
is first used.

Example:
  >>> import jax, shardinit, tempfile
  >>> params = shardinit.init(lambda key: {"w": jax.random.normal(key, (8, 32))}, 0)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...     shardinit.storage.safetensors.write(f"{folder}/ckpt", params)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardinit.storage import orbax as orbax
    from shardinit.storage import safetensors as safetensors


def __getattr__(name: str) -> Any:
    if name not in ("orbax", "safetensors"):
        raise AttributeError(f"module 'shardinit.storage' has no attribute {name!r}")
    return importlib.import_module(f"shardinit.storage.{name}")
