"""What every tensor would hold that code makes or fills: the mode below torch.

A `TorchDispatchMode` sees each operation. The recorder gives factories the meta device
and notes what each tensor would hold. Where code asks for a value that no random number
enters, ``.item()`` of a ``linspace`` say, torch computes it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shardinit.errors import UnsupportedConfigError
from shardinit.frontends.torch.evaluate import evaluate, quietly
from shardinit.frontends.torch.geometry import Geometry
from shardinit.frontends.torch.graph import Call, Like, Line, Storage, Value
from shardinit.frontends.torch.schema import (
    ASKS,
    DRAWS,
    EMPTY,
    FILLS,
    RESTRIDES,
    RETYPED,
    written_by,
)

_META = torch.device("meta")
_OWN = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)

_active = threading.local()


def user_line() -> Line:
    """The line of the user's file that is being run: neither torch's nor ours."""
    frame = sys._getframe(1)
    line = frame.f_code.co_filename, frame.f_lineno
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_OWN) and not name.startswith("<"):
            return name, frame.f_lineno
        frame = frame.f_back
    return line


class Recorder(TorchDispatchMode):
    """Notes what every tensor would hold that is made or filled meanwhile.

    Example:
      >>> import torch
      >>> with Recorder() as recorder:
      ...     weight = torch.nn.Linear(3, 4).weight
      >>> recorder.value_of(weight).node.name
      'uniform_'
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, Storage] = {}
        self._twins: dict[int, tuple[Any, torch.Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation without memory, and notes it."""
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in ASKS:
            return self._ask(func, args, kwargs)
        if name in ("_conj", "lift_fresh_copy"):
            func = torch.ops.aten._conj_physical if name == "_conj" else func
        written = written_by(func)
        if name in RESTRIDES:
            return func(*args, **kwargs)
        if written:
            return self._in_place(name, func, args, kwargs, written)
        args, kwargs = _mapped((args, kwargs), self._twin)
        if kwargs.get("device") is not None:
            kwargs["device"] = _META
        # Recorded calls are run on a CPU by whoever asks for a value, where to pin
        # memory needs an accelerator.
        kwargs.pop("pin_memory", None)
        if func.is_view and name not in RETYPED and name != "view_dtype":
            return func(*args, **kwargs)
        return self._functional(name, func, args, kwargs)

    def _ask(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A number that the code wants to see."""
        given = _mapped((args, kwargs), self.known)
        with quietly():
            return func(*given[0], **given[1])

    def _in_place(
        self, name: str, func: Any, args: tuple, kwargs: dict, written: tuple
    ) -> Any:
        """An operation that writes into tensors that it is given."""
        targets = [args[w] if isinstance(w, int) else kwargs[w] for w in written]
        if any(not isinstance(target, torch.Tensor) for target in targets):
            raise _unsupported(name, "it writes into a list of tensors")
        line = user_line()
        read = _without_overwritten(name, args, kwargs, written)
        call_args, call_kwargs = _mapped(read, self.value_of)
        call = Call(
            name,
            func,
            tuple(call_args),
            call_kwargs,
            tuple(_like(target) for target in targets),
            line,
            name in DRAWS,
        )
        for index, target in enumerate(targets):
            self._write(target, Value(call, index), line)
        return targets[0] if len(targets) == 1 else tuple(targets)

    def _write(self, target: torch.Tensor, value: Value, line: Line) -> None:
        twin = self._twin(target)
        storage = self._storage(twin, line)
        if storage.copied or storage.dtype != twin.dtype:
            text = "a view of another dtype is written, which its tensor would not see"
            raise _unsupported("a write through a view", text)
        storage.write(Geometry.of(twin), value)

    def _functional(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        """An operation that returns new tensors."""
        line = user_line()
        made = self._on_meta(name, func, args, kwargs, line)
        outs = made if isinstance(made, tuple | list) else (made,)
        if name in EMPTY:
            self._storage(outs[0], line)
            return made
        tensors = [out for out in outs if isinstance(out, torch.Tensor)]
        given = {self._address(t) for t in _tensors((args, kwargs))}
        if name not in RETYPED and any(self._address(out) in given for out in tensors):
            return made  # it returned, or looks into, what it was given
        noted, named = _mapped((args, kwargs), self._read_or_like(name))
        if all(self._address(out) in self._storages for out in tensors):
            return made
        likes = tuple(map(_result_like, outs))
        call = Call(name, func, noted, named, likes, line, name in DRAWS)
        if name in RETYPED:  # their memory is the argument's: it gets its own
            made = torch.empty_like(outs[0])
            outs = (made,)
        self._hold(outs, call, line)
        return made

    def _on_meta(
        self, name: str, func: Any, args: tuple, kwargs: dict, line: Line
    ) -> Any:
        """The results of an operation as tensors without memory."""
        given = {k: v for k, v in kwargs.items() if k != "generator"}
        try:
            return func(*args, **given)
        except (NotImplementedError, RuntimeError):
            # ``nonzero`` raises the first of the two, ``item`` the other (torch 2.13).
            # torch has no kernel for the meta device, or its shape is in its values
            return self._computed(name, func, args, kwargs, line)

    def _hold(self, outs: Sequence[Any], call: Call, line: Line) -> None:
        """Notes that new tensors hold the results of a call."""
        for index, out in enumerate(outs):
            if isinstance(out, torch.Tensor):
                storage = self._storage(out, line)
                storage.copied = call.name in RETYPED
                storage.write(Geometry.of(out), Value(call, index))

    def _read_or_like(self, name: str) -> Callable[[torch.Tensor], Value | Like]:
        if name.endswith("_like") or name.startswith("new_"):
            return _like
        return self.value_of

    def _computed(
        self, name: str, func: Any, args: tuple, kwargs: dict, line: Line
    ) -> Any:
        """The results of what the meta device cannot do, from known values."""
        values = [self.value_of(t) for t in _tensors((args, kwargs))]
        if name in DRAWS or any(value.node.random for value in values):
            raise _unsupported(name, "its result has no shape before it has values")
        given = _mapped((args, kwargs), self.known)
        if given[1].get("device") is not None:
            given[1]["device"] = "cpu"
        with quietly():
            made = func(*given[0], **given[1])
        if isinstance(made, torch.Tensor):
            return self._literal(made, line)
        return type(made)(
            [self._literal(m, line) if isinstance(m, torch.Tensor) else m for m in made]
        )

    def _literal(self, real: torch.Tensor, line: Line) -> torch.Tensor:
        """A tensor without memory that stands for one whose values are known."""
        made = torch.empty_like(real, device=_META)
        call = Call("literal", torch.clone, (), {}, (_like(made),), line)
        call.known = [real.detach().clone()]
        self._storage(made, line).write(Geometry.of(made), Value(call, 0))
        return made

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, or one without memory that stands for a real one."""
        if tensor.device.type == "meta":
            return tensor
        held = tensor.untyped_storage()
        with quietly():
            flat = torch.empty(0, dtype=tensor.dtype).set_(held)
        if held._cdata not in self._twins:
            self._twins[held._cdata] = held, self._literal(flat, user_line())
        base = self._twins[held._cdata][1]
        storage = self._storages[self._address(base)]
        node = storage.writes[0][1].node if len(storage.writes) == 1 else None
        if node is not None and node.known and not _same(node.known[0], flat):
            node = self.value_of(self._literal(flat, user_line()))
            storage.write(Geometry.whole(storage.length), node)
        return torch.as_strided(
            base, tensor.size(), tensor.stride(), tensor.storage_offset()
        )

    def _address(self, tensor: torch.Tensor) -> int:
        # Not ``data_ptr()``, which is 0 for every tensor on the meta device (torch
        # 2.13).
        return tensor.untyped_storage()._cdata

    def _storage(self, tensor: torch.Tensor, line: Line) -> Storage:
        held = tensor.untyped_storage()
        if held._cdata not in self._storages:
            length = held.nbytes() // tensor.element_size()
            # It keeps ``held``: the address of a storage that is freed is given out
            # again.
            made = Storage(tensor.dtype, length, line, held)
            self._storages[held._cdata] = made
        return self._storages[held._cdata]

    def adopt(self, tensor: torch.Tensor) -> None:
        """Knows a tensor on the meta device that was made before: it holds nothing."""
        self._storage(tensor, ("", 0))

    def value_of(self, tensor: torch.Tensor) -> Value:
        """What a tensor would hold now.

        Raises:
          UnsupportedConfigError: the recorder did not see where it comes from.
        """
        with torch._C.DisableTorchFunction():
            twin = self._twin(tensor)
            storage = self._storages.get(self._address(twin))
            if storage is None:
                raise _unsupported(
                    f"a tensor of shape {tuple(twin.size())}",
                    "it was made on the meta device before, or from an unseen list",
                )
            if storage.dtype != twin.dtype:
                text = f"memory of {storage.dtype} is read as {twin.dtype}"
                raise _unsupported("view", text)
            return storage.read(Geometry.of(twin))

    def place_of(self, tensor: torch.Tensor) -> tuple[int, Geometry]:
        """Which elements of which storage a tensor is: equal for tied ones."""
        with torch._C.DisableTorchFunction():
            twin = self._twin(tensor)
            return self._address(twin), Geometry.of(twin)

    def known(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a tensor holds, computed by torch.

        Raises:
          UnsupportedConfigError: it depends on random numbers.
        """
        value = self.value_of(tensor)
        if value.node.random:
            raise _unsupported(
                "reading a number", "the code depends on the value of a random one"
            )
        return evaluate(value)


def _unsupported(what: str, why: str) -> UnsupportedConfigError:
    file, number = user_line()
    return UnsupportedConfigError(
        f"{file}:{number}", f"{what}: {why}", "an initialisation that can be recorded"
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    with quietly():
        # To ``torch.equal`` NaN differs from itself (torch 2.13): a buffer that holds
        # one would count as changed at every look.
        return one.numel() == other.numel() and bool(
            torch.equal(one.nan_to_num(), other.nan_to_num())
        )


def _without_overwritten(
    name: str, args: tuple, kwargs: dict, written: tuple
) -> tuple[Sequence[Any], dict]:
    """The arguments of a call; of those it writes without reading them, the shapes."""
    if not isinstance(written[0], int):  # out=
        return args, {k: _like(x) if k in written else x for k, x in kwargs.items()}
    if name in FILLS:
        target = args[written[0]]
        args = tuple(_like(arg) if arg is target else arg for arg in args)
    return args, kwargs


def _result_like(out: Any) -> Like:
    return _like(out) if isinstance(out, torch.Tensor) else Like((), torch.int64)


def _like(tensor: torch.Tensor) -> Like:
    return Like(tuple(tensor.size()), tensor.dtype)


def _mapped(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, torch.Size | Like):
        return tree
    if isinstance(tree, list | tuple):
        return type(tree)([_mapped(item, change) for item in tree])
    if isinstance(tree, dict):
        return {name: _mapped(item, change) for name, item in tree.items()}
    return tree


def _tensors(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _mapped(tree, found.append)
    return found


def active() -> Recorder | None:
    """The recorder of this thread, if one is at work."""
    return getattr(_active, "recorder", None)


@contextmanager
def at_work(recorder: Recorder) -> Iterator[None]:
    """Makes the recorder this thread's ``active`` one, in the block."""
    before = active()
    _active.recorder = recorder
    try:
        yield
    finally:
        _active.recorder = before
