"""Replaying: a recorded value as a function of keys, in JAX.

What no random number enters is a constant, which torch computes. The rest is traced
from ``draws`` and ``operations``. Values that were recorded alike share one function,
and so one program, however many layers there are.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

from shardinit.errors import ShardinitError, UnsupportedConfigError
from shardinit.frontends.torch import arrangements, reductions  # noqa: F401
from shardinit.frontends.torch.draws import DRAWS, Site
from shardinit.frontends.torch.evaluate import evaluate, quietly
from shardinit.frontends.torch.graph import (
    Call,
    Like,
    Read,
    Value,
    replaced,
    topological,
)
from shardinit.frontends.torch.operations import OPERATIONS
from shardinit.frontends.torch.views import read

_TABLE = 1 << 24  # elements of a constant that is kept as an array
_INCIDENTAL = frozenset(
    """device layout pin_memory generator memory_format non_blocking dtype out
    requires_grad names""".split()
)
_SCALARS = {"zeros": 0, "zero_": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1}
_SCALARS |= {"ones_like": 1, "new_ones": 1}
_FILLED = {"full": 1, "full_like": 1, "new_full": 2, "fill_": 1, "scalar_tensor": 0}


def dtype_of(dtype: torch.dtype) -> np.dtype:
    """NumPy's dtype of the same name.

    Example:
      >>> import torch
      >>> dtype_of(torch.bfloat16)
      dtype(bfloat16)
    """
    return np.dtype(jnp.dtype(str(dtype).removeprefix("torch.")))


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """The array of a tensor on the CPU, of its dtype."""
    with quietly():
        dtype = dtype_of(tensor.dtype)
        if dtype.kind != "V" and not hasattr(ml_dtypes, dtype.name):
            return tensor.resolve_conj().resolve_neg().numpy()
        words = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
        return tensor.contiguous().view(words).numpy().view(dtype)


@dataclass(frozen=True, eq=False)
class Replay:
    """A value as a function of the keys of its draws.

    Attributes:
      run: from the keys to the array.
      draws: the calls that draw, in the order of the keys.
    """

    run: Callable[..., Any]
    draws: tuple[Call, ...]


class Replayer:
    """Makes replays; values that were recorded alike get the same function."""

    def __init__(self) -> None:
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._arrays: dict[bytes, np.ndarray] = {}
        self._constants: dict[Value, np.ndarray | None] = {}

    def replay(self, value: Value, where: str) -> Replay:
        """The function of a value.

        Args:
          value: what was recorded.
          where: the parameter's name, for errors.

        Raises:
          UnsupportedConfigError: an operation has no counterpart in JAX.
        """
        constant = self._constant(value)
        if constant is not None:
            _refuse_wide(constant, where)
            return Replay(_constant(constant), ())
        nodes = list(topological([value], lambda v: self._constant(v) is not None))
        for node in nodes:
            if isinstance(node, Call) and _rule_of(node) is None:
                raise _unsupported(where, node, "it has no counterpart in JAX")
        form = self._form(nodes, value)
        if form not in self._functions:
            self._functions[form] = self._traced(nodes, value, where)
        draws = tuple(n for n in nodes if isinstance(n, Call) and n.draws)
        return Replay(self._functions[form], draws)

    def _constant(self, value: Value) -> np.ndarray | None:
        """The array of a value that no random number enters, unless it is large."""
        if value.node.random:
            return None
        if value not in self._constants:
            self._constants[value] = self._computed(value)
        return self._constants[value]

    def _computed(self, value: Value) -> np.ndarray | None:
        if int(np.prod(value.shape)) > _TABLE and _has_rules(value):
            return None
        array = array_of(evaluate(value))
        flat = array.reshape(-1)
        if (
            flat.size > 1
            and (
                flat.view(np.uint8).reshape(flat.size, -1) == flat[:1].view(np.uint8)
            ).all()
        ):
            return np.broadcast_to(flat[0], array.shape)
        content = repr((array.shape, array.dtype)).encode() + array.tobytes()
        return self._arrays.setdefault(hashlib.sha256(content).digest(), array)

    def _token(self, numbers: dict[int, int], item: Any) -> Any:
        """An argument as it enters a form: a value by its node's number, or content."""
        if isinstance(item, list | tuple):
            return tuple(self._token(numbers, part) for part in item)
        if isinstance(item, float | int | bool | complex):
            return type(item), repr(item)
        if not isinstance(item, Value):
            return str(item)
        if id(item.node) in numbers:
            return "value", numbers[id(item.node)], item.output
        array = self._constant(item)
        assert array is not None
        if not any(array.strides):
            return "fill", array.shape, str(array.dtype), array.tobytes()[:16]
        return "array", id(array)

    def _form(self, nodes: Sequence[Call | Read], value: Value) -> Any:
        """What is equal for values that are computed alike."""
        numbers = {id(node): number for number, node in enumerate(nodes)}
        token = partial(self._token, numbers)
        forms = []
        for node in nodes:
            if isinstance(node, Read):
                pieces = tuple((where, token(v)) for where, v in node.pieces)
                forms.append((pieces, node.geometry, node.length, node.outputs))
            else:
                named = _meaning(node.kwargs).items()
                kwargs = tuple((name, token(arg)) for name, arg in named)
                name = str(node.func) if not node.draws else node.name
                forms.append((name, token(node.args), kwargs, node.outputs))
        return tuple(forms), token(value)

    def _traced(
        self, nodes: Sequence[Call | Read], value: Value, where: str
    ) -> Callable[..., Any]:
        constants = {
            v: array
            for node in nodes
            for v in node.inputs
            if (array := self._constant(v)) is not None
        }

        for array in constants.values():
            _refuse_wide(array, where)

        def run(*keys: jax.Array) -> jax.Array:
            results: dict[int, tuple[Any, ...]] = {}
            rest = iter(keys)

            def result(v: Value) -> Any:
                if id(v.node) in results:
                    return results[id(v.node)][v.output]
                return _constant(constants[v])()

            for node in nodes:
                if isinstance(node, Read):
                    made = (
                        read(node, result, _narrowed(dtype_of(node.outputs[0].dtype))),
                    )
                else:
                    key = next(rest) if node.draws else None
                    made = _called(node, result, key, where)
                results[id(node)] = tuple(map(_cast, made, node.outputs))
            return result(value)

        traced = jax.jit(run)
        count = sum(1 for n in nodes if isinstance(n, Call) and n.draws)
        jax.eval_shape(traced, *[jax.eval_shape(jax.random.key, 0)] * count)
        return traced


def _constant(array: np.ndarray) -> Callable[..., Any]:
    """A function that gives the array: as a number filled in, where it is one."""

    def filled() -> Any:
        return jnp.full(array.shape, array.reshape(-1)[0], _narrowed(array.dtype))

    if array.ndim and array.size and not any(array.strides):
        return filled
    return lambda: jnp.asarray(array, _narrowed(array.dtype))


def _refuse_wide(array: np.ndarray, where: str) -> None:
    """Refuses whole numbers that JAX's integers would wrap around."""
    dtype = _narrowed(array.dtype)
    if array.dtype.kind not in "iu" or dtype == array.dtype or not array.size:
        return
    room = np.iinfo(dtype)
    if array.min() < room.min or array.max() > room.max:
        raise UnsupportedConfigError(
            where,
            f"{array.min()} to {array.max()} do not fit {dtype.name}",
            f"numbers of {dtype.name}, which JAX has by default",
            "Set jax_enable_x64, with which they are int64",
        )


def _narrowed(dtype: Any) -> Any:
    return jax.dtypes.canonicalize_dtype(dtype)


def _meaning(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: arg for name, arg in kwargs.items() if name not in _INCIDENTAL}


def _rule_of(node: Call) -> Callable[..., Any] | None:
    """The function that replays a call: of a site and its arguments."""
    if node.draws:
        return DRAWS.get(node.name)
    if node.name in _SCALARS:
        return functools.partial(_full, _SCALARS[node.name])
    if node.name in _FILLED:
        at = _FILLED[node.name]
        return lambda site, *args: _full(args[at], site)
    rule = OPERATIONS.get(node.name) or OPERATIONS.get(node.name.removesuffix("_"))
    return rule and (lambda site, *args, **kwargs: rule(*args, **kwargs))


def _full(fill: Any, site: Site, *args: Any) -> Any:
    return jnp.broadcast_to(jnp.asarray(fill), site.shape)


def _has_rules(value: Value) -> bool:
    nodes = topological([value])
    return all(
        isinstance(node, Read) or (node.known is None and _rule_of(node) is not None)
        for node in nodes
    )


def _called(
    node: Call, result: Callable[[Value], Any], key: Any, where: str
) -> tuple[Any, ...]:
    rule = _rule_of(node)
    assert rule is not None
    like = node.outputs[0]
    dtype = _narrowed(dtype_of(like.dtype))
    if node.draws and (dtype.itemsize < 4 or not like.dtype.is_floating_point):
        dtype = np.dtype(np.float32)
    args = replaced(node.args, result)
    kwargs = replaced(_meaning(node.kwargs), result)
    try:
        made = rule(Site(key, like.shape, dtype), *args, **kwargs)
    except ShardinitError as error:
        raise _unsupported(where, node, str(error)) from None
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise _unsupported(where, node, text) from error
    return tuple(made) if isinstance(made, tuple | list) else (made,)


def _cast(out: Any, like: Like) -> Any:
    dtype = _narrowed(dtype_of(like.dtype))
    return jnp.broadcast_to(jnp.asarray(out).astype(dtype), like.shape)


def _unsupported(where: str, node: Call, why: str) -> UnsupportedConfigError:
    file, number = node.line
    return UnsupportedConfigError(
        where,
        f"{node.name} at {file}:{number} cannot be replayed: {why}",
        "operations of shardinit.frontends.torch.operations and draws",
        "Register a function for it there, or initialise by functions of torch.nn.init",
    )
