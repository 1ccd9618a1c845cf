"""Recording: construction and initialisation run on tensors that have no memory.

Two of torch's modes stand between a module's code and torch. The `Recorder` below
torch's functions sees every operation. `Appearances` above them make a tensor say that
it is on the CPU, so that code which treats the meta device in its own way, as
``torch.nn.init.orthogonal_`` and Hugging Face's models do, initialises as it does for
real.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shardinit.frontends.torch.appearances import Appearances, patched
from shardinit.frontends.torch.recorder import Recorder, at_work


@contextmanager
def recording() -> Iterator[Recorder]:
    """Records all that torch does in this thread, in the block.

    Example:
      >>> import torch
      >>> with recording() as recorder:
      ...     weight = torch.nn.Linear(3, 4).weight
      >>> recorder.value_of(weight).node.name
      'uniform_'
    """
    recorder = Recorder()
    with patched(), Appearances(recorder), recorder, at_work(recorder):
        yield recorder
