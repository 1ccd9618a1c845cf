"""Appearances: tensors without memory behave to Python code as those of a CPU do.

Torch has a few functions that a mode below them never sees, since they are no
operations: where a tensor lies, its NumPy array, a deep copy, an index in a list. They
are answered here, above torch's functions. And two of ``torch.nn.init`` loop until
random numbers please them, or over columns: they are recorded as one call.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from shardinit.frontends.torch.graph import Call, Like, Value
from shardinit.frontends.torch.recorder import Recorder, active, user_line

_CPU = torch.device("cpu")
_ANSWERS: dict[Any, Callable[..., Any]] = {}
_Tensor: Any = torch.Tensor
_C: Any = torch._C


class Appearances(TorchFunctionMode):
    """The mode above torch's functions."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Answers in torch's place, or passes on."""
        kwargs = kwargs or {}
        answer = _ANSWERS.get(func)
        if answer is not None:
            return answer(self.recorder, *args, **kwargs)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **kwargs)


def _answers(*functions: Any) -> Callable[[Callable], Callable]:
    def register(answer: Callable) -> Callable:
        _ANSWERS.update((function, answer) for function in functions)
        return answer

    return register


@_answers(_Tensor.device.__get__)
def _device(recorder: Recorder, tensor: Any) -> torch.device:
    return _CPU


@_answers(_Tensor.is_meta.__get__)
def _is_meta(recorder: Recorder, tensor: Any) -> bool:
    return False


@_answers(_Tensor.is_cpu.__get__)
def _is_cpu(recorder: Recorder, tensor: Any) -> bool:
    return True


@_answers(_Tensor.get_device)
def _get_device(recorder: Recorder, tensor: Any) -> int:
    return -1


@_answers(_Tensor.data_ptr)
def _data_ptr(recorder: Recorder, tensor: Any) -> int:
    address = tensor.untyped_storage()._cdata
    return address + tensor.storage_offset() * tensor.element_size()


@_answers(_Tensor.numpy, _Tensor.__array__)
def _numpy(recorder: Recorder, tensor: Any, *args: Any, **kwargs: Any) -> np.ndarray:
    dtype = next((arg for arg in args if not isinstance(arg, bool)), None)
    array = np.asarray(recorder.known(tensor).numpy(), dtype)
    array.flags.writeable = False  # a write would not reach the tensor
    return array


@_answers(_Tensor.tolist)
def _tolist(recorder: Recorder, tensor: Any) -> Any:
    return recorder.known(tensor).tolist()


@_answers(_Tensor.__deepcopy__, torch.nn.Parameter.__deepcopy__)
def _deepcopy(recorder: Recorder, tensor: Any, memo: dict[int, Any]) -> Any:
    if id(tensor) not in memo:
        made = tensor.detach().clone(memory_format=torch.preserve_format)
        if isinstance(tensor, torch.nn.Parameter):
            made = torch.nn.Parameter(made, tensor.requires_grad)
        else:
            made.requires_grad_(tensor.requires_grad)
        vars(made).update(vars(tensor))
        memo[id(tensor)] = made
    return memo[id(tensor)]


@_answers(_Tensor.__repr__, _Tensor.__format__)
def _repr(recorder: Recorder, tensor: Any, *args: Any, **kwargs: Any) -> str:
    return f"tensor(..., size={tuple(tensor.size())}, dtype={tensor.dtype})"


@_answers(_Tensor.cpu, _Tensor.cuda)
def _stay(recorder: Recorder, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return tensor


@_answers(_Tensor.to)
def _to(recorder: Recorder, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    copy = kwargs.pop("copy", False)
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, torch.Tensor):
        dtype = other.dtype
    else:
        dtype = _C._nn._parse_to(*args, **kwargs)[1]
    return _Tensor.to(tensor, dtype or tensor.dtype, copy=copy)


@_answers(_Tensor.new_tensor)
def _new_tensor(recorder: Recorder, tensor: Any, data: Any, **kwargs: Any) -> Any:
    kwargs = {"dtype": tensor.dtype, **kwargs, "device": _CPU}
    with Appearances(recorder):
        return torch.tensor(data, **kwargs)


def _seen(index: Any) -> Any:
    """An index whose lists are tensors that the recorder sees."""
    if isinstance(index, tuple):
        return tuple(_seen(item) for item in index)
    if isinstance(index, list | np.ndarray):
        return torch.tensor(index)
    return index


@_answers(_Tensor.__getitem__)
def _getitem(recorder: Recorder, tensor: Any, index: Any) -> Any:
    return _Tensor.__getitem__(tensor, _seen(index))


@_answers(_Tensor.__setitem__)
def _setitem(recorder: Recorder, tensor: Any, index: Any, value: Any) -> Any:
    return _Tensor.__setitem__(tensor, _seen(index), value)


@_answers(_Tensor.data.__set__)
def _set_data(recorder: Recorder, tensor: Any, value: Any) -> None:
    if value.device.type != "meta":
        value = value.to(value.dtype, copy=True)
    _Tensor.data.__set__(tensor, value)


def _one_call(name: str, tensor: Any, *args: Any) -> Any:
    """Records a draw that torch itself makes of many operations."""
    recorder = active()
    assert recorder is not None
    with torch._C.DisableTorchFunction():
        like = Like(tuple(tensor.size()), tensor.dtype)
        line = user_line()
        call = Call(name, torch.clone, (like, *args), {}, (like,), line, draws=True)
        recorder._write(tensor, Value(call, 0), line)
    return tensor


def _trunc_normal_(
    tensor: Any, mean: Any, std: Any, a: Any, b: Any, generator: Any = None
) -> Any:
    if active() is None:
        return _ORIGINAL["_no_grad_trunc_normal_"](tensor, mean, std, a, b, generator)
    return _one_call("trunc_normal_", tensor, *map(float, (mean, std, a, b)))


def _sparse_(
    tensor: Any, sparsity: float, std: float = 0.01, generator: Any = None
) -> Any:
    if active() is None or tensor.ndimension() != 2:
        return _ORIGINAL["sparse_"](tensor, sparsity, std, generator)
    return _one_call("sparse_", tensor, float(sparsity), float(std))


_ORIGINAL = {
    name: getattr(torch.nn.init, name) for name in ("_no_grad_trunc_normal_", "sparse_")
}
_INSTEAD = {"_no_grad_trunc_normal_": _trunc_normal_, "sparse_": _sparse_}
_lock = threading.Lock()
_users = 0


def _put(functions: dict[str, Any], others: dict[str, Any]) -> None:
    """Puts functions where the others are bound, in Hugging Face's table too."""
    for module in list(sys.modules.values()):
        bound = getattr(module, "__dict__", {})
        for space in (bound, bound.get("TORCH_INIT_FUNCTIONS")):
            for name, function in functions.items():
                if isinstance(space, dict) and space.get(name) is others[name]:
                    space[name] = function


@contextmanager
def patched() -> Iterator[None]:
    """Records the two functions of ``torch.nn.init`` in threads that record."""
    global _users
    with _lock:
        _users += 1
        _put(_INSTEAD, _ORIGINAL)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _put(_ORIGINAL, _INSTEAD)
