"""Equations written down, so that equal functions give equal bytes."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from shardinit.core.ir.jaxpr import (
    Jaxpr,
    Literal,
    Params,
    Var,
    aval,
    is_jaxpr,
    is_key,
    opened,
)
from shardinit.core.types import Dim, DType, Values


class Encoder:
    """Writes equations into a hash so that equal functions give equal bytes.

    Variables are numbered by first appearance and parameters are sorted, so names and
    order do not matter; constants count by dtype, shape and bytes, so contents do.
    What cannot be written down for certain (a callable, an object with an address in
    its text) counts by identity: such programs are never merged by mistake.
    """

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self.by_identity: list[object] = []  # kept alive: an id may not be used again

    def digest(self) -> str:
        """The hash so far, in hex."""
        return self._sha.hexdigest()

    def put(self, *values: object) -> None:
        """Appends values, each with its type and length, to the hash."""
        for value in values:
            self._put(value)

    def _raw(self, tag: str, data: bytes) -> None:
        self._sha.update(f"{tag}{len(data)}:".encode())
        self._sha.update(data)

    def _put(self, value: object) -> None:
        atom = _atom(value)
        if atom is not None:
            self._raw(*atom)
        elif is_jaxpr(value):
            self._jaxpr(*opened(value))
        elif hasattr(value, "dtype") and hasattr(value, "shape"):
            self.array(value)
        elif isinstance(value, dict):
            self._raw("dict", str(len(value)).encode())
            for name in sorted(value, key=str):
                self.put(str(name), value[name])
        elif isinstance(value, (tuple, list)):
            self._raw(type(value).__name__, str(len(value)).encode())
            self.put(*value)
        elif callable(value) or " at 0x" in repr(value):
            self.by_identity.append(value)
            self._raw("id", str(id(value)).encode())
        else:
            self._raw(type(value).__name__, repr(value).encode())

    def array(self, value: Values) -> None:
        """Appends an array's dtype, shape and bytes."""
        if is_key(value.dtype):
            self._put(str(value.dtype))
            value = jax.random.key_data(value)
        value = np.asarray(value)
        self.put("array", str(value.dtype), value.shape)
        self._raw("", np.ascontiguousarray(value).tobytes())

    def aval(self, shape: Sequence[Dim], dtype: DType) -> None:
        """Appends a shape and a dtype."""
        self.put(tuple(int(n) for n in shape), str(dtype))

    def params(self, params: Params) -> None:
        """Appends an equation's parameters; names of functions do not count."""
        # Where it was traced and under which mesh: no value depends on it, and equal
        # functions of other names or contexts would be two programs.
        skip = {"name", "ctx_mesh", "context_mesh", "debug_info", "sharding"}
        if "jaxpr" in params:
            skip.add("computation")  # of ``reduce``: the function that the jaxpr is of
        self.put({k: v for k, v in params.items() if k not in skip})

    def _jaxpr(self, jaxpr: Jaxpr, consts: Sequence[Values]) -> None:
        number: dict[Var, int] = {}
        for var in (*jaxpr.constvars, *jaxpr.invars):
            number[var] = len(number)
            self.aval(aval(var).shape, aval(var).dtype)
        self.put("consts", consts)
        for eqn in jaxpr.eqns:
            self.put(eqn.primitive.name)
            self.params(eqn.params)
            self._atoms(eqn.invars, number)
            for var in eqn.outvars:
                number[var] = len(number)
                self.aval(aval(var).shape, aval(var).dtype)
        self.put("out")
        self._atoms(jaxpr.outvars, number)

    def _atoms(self, atoms: Iterable[Var | Literal], number: dict[Var, int]) -> None:
        for atom in atoms:
            if isinstance(atom, Literal):
                self.put("literal", str(aval(atom).dtype), atom.val)
            else:
                self.put("var", number[atom])


def _atom(value: object) -> tuple[str, bytes] | None:
    """Tag and bytes of a value without parts; None for all others."""
    if value is None or isinstance(value, (bool, int, str)):
        return type(value).__name__, str(value).encode()
    if isinstance(value, bytes):
        return "bytes", value
    if isinstance(value, (float, complex)):
        return "num", np.asarray(value).tobytes()  # -0.0 and NaN told apart
    if isinstance(value, enum.Enum):
        return "enum", f"{type(value).__name__}.{value.name}".encode()
    if isinstance(value, np.dtype) or (
        isinstance(value, type) and issubclass(value, np.generic)
    ):
        return "dtype", str(np.dtype(value)).encode()
    if isinstance(value, (set, frozenset)):
        return "set", repr(sorted(map(str, value))).encode()
    return None
