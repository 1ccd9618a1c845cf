"""Values that no random number enters, computed by torch itself.

Tables of positions, masks, literals and what follows from them are torch's own numbers,
whatever operations made them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from shardinit.errors import UnsupportedConfigError
from shardinit.frontends.torch.graph import (
    Call,
    Like,
    Read,
    Value,
    replaced,
    topological,
)

_MOST = 1 << 28  # elements of a table that torch computes
_KEPT = 1 << 16  # elements of a result that is kept for who asks again


@contextmanager
def quietly() -> Iterator[None]:
    """Torch without modes and gradients, for the front end's own use."""
    # The recorder is such a mode: it would note what the front end computes for itself.
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
        yield


def evaluate(value: Value) -> torch.Tensor:
    """The value as a tensor on the CPU, which is the caller's own.

    Args:
      value: of a graph without draws; elements never written are zeros.

    Raises:
      UnsupportedConfigError: it has more elements than fit.

    Example:
      >>> import torch
      >>> from shardinit.frontends.torch.record import recording
      >>> with recording() as recorder:
      ...     steps = torch.arange(4) * 2
      >>> evaluate(recorder.value_of(steps))
      tensor([0, 2, 4, 6])
    """
    found: dict[int, list[torch.Tensor]] = {}

    def result(wanted: Value) -> torch.Tensor:
        kept = wanted.node.known
        return (found[id(wanted.node)] if kept is None else kept)[wanted.output]

    with quietly():
        for node in topological([value], lambda v: v.node.known is not None):
            if max(math.prod(like.shape) for like in node.outputs) > _MOST:
                raise UnsupportedConfigError(
                    f"{node.line[0]}:{node.line[1]}",
                    f"a table of shape {node.outputs[0].shape}",
                    f"at most {_MOST} elements where no operation of JAX computes them",
                )
            made = _run(node, result)
            found[id(node)] = made
            if sum(out.numel() for out in made) <= _KEPT:
                node.known = made
        return result(value).clone()


def _run(node: Call | Read, result: Any) -> list[torch.Tensor]:
    if isinstance(node, Read):
        return [_read(node, result)]
    fresh: list[torch.Tensor] = []

    def like(tree: Any) -> Any:
        if isinstance(tree, Like):
            fresh.append(torch.empty(tree.shape, dtype=tree.dtype))
            return fresh[-1]
        if isinstance(tree, list | tuple) and not isinstance(tree, Value):
            return type(tree)([like(item) for item in tree])
        return tree

    def own(value: Value) -> torch.Tensor:
        return result(value).clone()

    args = replaced(like(node.args), own)
    kwargs = {key: replaced(like(arg), own) for key, arg in node.kwargs.items()}
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    made = node.func(*args, **kwargs)
    outs = list(made) if isinstance(made, tuple | list) else [made]
    return [
        out if isinstance(out, torch.Tensor) else torch.as_tensor(out) for out in outs
    ]


def _read(node: Read, result: Any) -> torch.Tensor:
    # In strides of the whole memory: views of one storage may overlap in ways that no
    # slice of an array can name.
    memory = torch.zeros(node.length, dtype=node.outputs[0].dtype)
    for where, value in node.pieces:
        memory.as_strided(*where).copy_(result(value))
    return memory.as_strided(*node.geometry).clone()
