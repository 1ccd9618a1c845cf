"""safetensors: checkpoints of any size, written and read by windows.

Example:
  >>> import jax, shardinit, tempfile
  >>> from shardinit.storage import safetensors
  >>> weights = shardinit.open(lambda key: {"w": jax.random.normal(key, (8, 32))}, 0)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...     safetensors.write(f"{folder}/ckpt", weights)
  ...     safetensors.load(f"{folder}/ckpt")["w"].shape
  (8, 32)
"""

from shardinit.storage.reading import load, open, open_leaves, read_windows, restore
from shardinit.storage.sources import Leaf
from shardinit.storage.writing import write

__all__ = ["Leaf", "load", "open", "open_leaves", "read_windows", "restore", "write"]
