"""The only door to jaxprs: trace a function, read its equations, encode them, run them.

JAX's intermediate representation changes between versions (the parameters of ``scan``
did from 0.10 to 0.12, ``unstack`` became a primitive). All that shardinit knows of it
is here: how to get at a nested jaxpr, how to tell the parts of a scan apart, how to
name a key's implementation, and how to write an equation's parameters down so that two
equal functions give equal bytes and two different ones never do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.extend import core as jex

# Calls whose body can stand in the caller's place without changing a value.
INLINED = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "remat2",
        "checkpoint",
    }
)
# Primitives that return their operands; sharding hints are ours to decide.
IDENTITY = frozenset(
    {
        "copy",
        "copy_p",
        "device_put",
        "mesh_cast",
        "name",
        "pvary",
        "random_clone",
        "reshard",
        "sharding_constraint",
        "stop_gradient",
    }
)
CALLBACKS = frozenset(
    {"pure_callback", "io_callback", "debug_callback", "debug_print", "python_callback"}
)
KEY_DERIVATIONS = frozenset(
    {"random_seed", "random_fold_in", "random_split", "random_wrap", "random_unwrap"}
)
# A primitive of primitives, since JAX 0.12: ``searchsorted`` is one.
HI_CALL = "call_hi_primitive"

Literal = jex.Literal
ClosedJaxpr = jex.ClosedJaxpr


def nested(eqn: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns the jaxpr of a call equation and its constants.

    Which parameter holds it, and whether it is closed, depends on the primitive and on
    the JAX version.
    """
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            return opened(eqn.params[name])
    raise KeyError(f"no nested jaxpr in {eqn.primitive.name}")


def opened(jaxpr: Any) -> tuple[Any, tuple[Any, ...]]:
    """Splits a closed jaxpr into the jaxpr and its constants; an open one has none."""
    if hasattr(jaxpr, "consts") and hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, tuple(jaxpr.consts)
    return jaxpr, tuple(getattr(jaxpr, "consts", ()))


def expanded(node: Any, avals: Sequence[Any]) -> Any:
    """What a primitive of primitives is made of, as a closed jaxpr."""
    return closed_from(node.params["_prim"].expand, *avals)


def is_jaxpr(value: Any) -> bool:
    """Whether ``value`` is a jaxpr, open or closed."""
    return isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr))


def subjaxprs(eqn: Any) -> Iterator[Any]:
    """All jaxprs in an equation's parameters (branches of a cond among them)."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if is_jaxpr(item):
                yield opened(item)[0]


@dataclass(frozen=True)
class ScanParts:
    """A scan's body and the numbers of its operands by role."""

    body: Any
    consts: tuple[Any, ...]
    n_consts: int
    n_carry: int
    length: int
    reverse: bool


def scan_parts(eqn: Any, ins: Sequence[Any], outs: Sequence[Any]) -> ScanParts:
    """Reads a scan equation without its version-dependent bookkeeping.

    Args:
      eqn: the equation, or a graph's node of it: what has its ``params``.
      ins: its operands, or what else has their ``shape``.
      outs: its results, likewise.

    A carry keeps its rank and a scanned operand or result has one axis more outside
    than inside, so the ranks tell the roles apart.
    """
    body, consts = nested(eqn)
    n_carry = 0
    for inner, outer in zip(body.outvars, outs, strict=True):
        if len(inner.aval.shape) != len(outer.shape):
            break
        n_carry += 1
    n_xs = 0
    pairs = list(zip(body.invars, ins, strict=True))
    for inner, outer in reversed(pairs):
        if len(inner.aval.shape) == len(outer.shape):
            break
        n_xs += 1
    return ScanParts(
        body,
        consts,
        len(pairs) - n_carry - n_xs,
        n_carry,
        int(eqn.params["length"]),
        bool(eqn.params["reverse"]),
    )


def setting(name: str) -> Any:
    """The value of a JAX configuration option in this thread."""
    return getattr(jax.config, name)


def is_key(dtype: Any) -> bool:
    """Whether ``dtype`` is that of typed keys."""
    return jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)


@lru_cache(maxsize=64)
def key_impl(dtype: Any) -> str:
    """Name of the key implementation of a typed key dtype, such as ``threefry2x32``."""
    seen: list[Any] = []

    def look(key: Any) -> Any:
        seen.append(jax.random.key_impl(key))
        return jax.random.key_data(key)

    jax.eval_shape(look, jax.ShapeDtypeStruct((), dtype))
    return str(seen[0])


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keeps the garbage collector from walking what tracing makes.

    It is millions of objects, and they stay: walking them again and again takes a
    growing part of the time (``python -m shardinit.bench --case plan``).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def no_mesh() -> Any:
    """A context without a mesh, whatever the caller has set.

    What is traced under ``jax.set_mesh`` carries that mesh in every equation and
    could not run on another; where a leaf lies is the plan's to say.
    """
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def coordinator() -> Any:
    """The client of the store of a ``jax.distributed`` job's coordinator, or None.

    JAX has no public name for it; the module of its tools for many hosts holds it.
    """
    return vars(multihost_utils)["distributed"].global_state.client


def on_host(value: Any) -> Any:
    """A captured array as numpy, so that no device or sharding comes with it."""
    if (
        isinstance(value, jax.Array)
        and not is_tracer(value)
        and not is_key(value.dtype)
    ):
        return np.asarray(value)
    return value


def trace(fn: Callable[[Any], Any], key: Any) -> tuple[Any, Any]:
    """Traces ``fn`` once; returns its closed jaxpr and the pytree of output shapes."""
    return jax.make_jaxpr(fn, return_shape=True)(key)


def closed_from(fn: Callable[..., Any], *avals: Any) -> Any:
    """The closed jaxpr of ``fn`` at abstract arguments."""
    return jax.make_jaxpr(fn)(*avals)


def run(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    """Evaluates a jaxpr on arrays or tracers."""
    return jex.jaxpr_as_fun(as_closed(jaxpr, consts))(*args)


def call(closed: Any, args: Any) -> list[Any]:
    """Calls a closed jaxpr as the nested ``jax.jit`` it was.

    XLA folds constants differently across a call than within one body, so that
    inlining a call can change last places.
    """
    return jax.jit(jex.jaxpr_as_fun(closed))(*args)


def as_closed(jaxpr: Any, consts: Any) -> Any:
    """Closes a jaxpr over its constants, on every supported version."""
    if isinstance(jaxpr, jex.ClosedJaxpr):
        return jaxpr
    return jex.ClosedJaxpr(jaxpr, list(consts))


def is_tracer(value: Any) -> bool:
    """Whether ``value`` belongs to a trace that is still under way."""
    return isinstance(value, Tracer)


def bind(prim: Any, args: Any, params: dict[str, Any]) -> list[Any]:
    """Applies a primitive; always returns a list of results."""
    out = prim.bind(*args, **params)
    return list(out) if prim.multiple_results else [out]
