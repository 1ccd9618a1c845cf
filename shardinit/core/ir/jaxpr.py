"""What depends on JAX's version: how a jaxpr is made, taken apart and run.

JAX's intermediate representation changes between versions (the parameters of ``scan``
did from 0.10 to 0.12, ``unstack`` became a primitive). How to get at a nested jaxpr,
how to tell the parts of a scan apart and how to name a key's implementation is here;
the other files of this room read equations by it, and no other room reads any. Only
this file imports ``jax.core`` and ``jax.extend``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeAlias, TypeGuard, TypeVar, cast, runtime_checkable

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.extend import core as jex

from shardinit.core.types import DType, Init, Tree, Values

# Calls whose bodies stand in the caller's place in a windowed program. What some say of
# derivatives goes: an initializer is not differentiated.
INLINED = frozenset(
    {
        "jit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "remat2",  # jax.checkpoint
    }
)
# Primitives that return their operands; sharding hints are ours to decide.
IDENTITY = frozenset(
    {
        "copy",
        "device_put",
        "name",
        "pvary",
        "random_clone",
        "reshard",
        "sharding_constraint",
        "stop_gradient",
    }
)
CALLBACKS = frozenset({"pure_callback", "io_callback", "debug_callback", "debug_print"})
KEY_DERIVATIONS = frozenset(
    {"random_seed", "random_fold_in", "random_split", "random_wrap", "random_unwrap"}
)
# A primitive of primitives, since JAX 0.12: ``searchsorted`` is one.
HI_CALL = "call_hi_primitive"

Literal = jex.Literal
Jaxpr = jex.Jaxpr
ClosedJaxpr = jex.ClosedJaxpr
Primitive = jex.Primitive
JaxprEqn = jex.JaxprEqn
Var = jex.Var

Params: TypeAlias = Mapping[str, Any]
"""A primitive's parameters by name; what they are, each primitive says for itself."""

Operand: TypeAlias = Any
"""An array, a tracer, or the value of a literal, whose class is private to JAX."""

T = TypeVar("T")


@runtime_checkable
class HasParams(Protocol):
    """An equation, or a graph's node of it: what has its parameters."""

    @property
    def params(self) -> Params:
        """The primitive's parameters."""
        ...


@runtime_checkable
class Aval(Protocol):
    """What has a shape and a dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> DType:
        """Its dtype."""
        ...


def aval(atom: Var | Literal) -> Aval:
    """Shape and dtype of an equation's operand or result, which JAX's stubs omit."""
    return cast(Aval, atom.aval)


def nested(eqn: HasParams) -> tuple[Jaxpr, tuple[Values, ...]]:
    """Returns the jaxpr of a call equation and its constants.

    Which parameter holds it, and whether it is closed, depends on the primitive and on
    the JAX version.
    """
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            return opened(eqn.params[name])
    raise KeyError(f"no nested jaxpr among {sorted(eqn.params)}")


def opened(jaxpr: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, tuple[Values, ...]]:
    """Splits a closed jaxpr into the jaxpr and its constants; an open one has none."""
    if isinstance(jaxpr, jex.ClosedJaxpr):
        return jaxpr.jaxpr, tuple(jaxpr.consts)
    return jaxpr, ()


def weak_types(closed: ClosedJaxpr) -> list[bool]:
    """For each result whether its dtype gives way to others, as a Python number's."""
    return [aval.weak_type for aval in closed.out_avals]


def returns_operand(jaxpr: Jaxpr, number: int) -> bool:
    """Whether a jaxpr's first result is that operand, and it does nothing else."""
    return not jaxpr.eqns and jaxpr.outvars[0] is jaxpr.invars[number]


def expanded(node: HasParams, avals: Sequence[Aval]) -> ClosedJaxpr:
    """What a primitive of primitives is made of, as a closed jaxpr."""
    return closed_from(node.params["_prim"].expand, *avals)


def is_jaxpr(value: object) -> TypeGuard[Jaxpr | ClosedJaxpr]:
    """Whether ``value`` is a jaxpr, open or closed."""
    return isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr))


def subjaxprs(eqn: HasParams) -> Iterator[Jaxpr]:
    """All jaxprs in an equation's parameters (branches of a cond among them)."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if is_jaxpr(item):
                yield opened(item)[0]


@dataclass(frozen=True)
class ScanParts:
    """A scan's body and the numbers of its operands by role."""

    body: Jaxpr
    consts: tuple[Values, ...]
    n_consts: int
    n_carry: int
    length: int
    reverse: bool


def scan_parts(eqn: HasParams, ins: Sequence[Aval], outs: Sequence[Aval]) -> ScanParts:
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
        if len(aval(inner).shape) != len(outer.shape):
            break
        n_carry += 1
    n_xs = 0
    pairs = list(zip(body.invars, ins, strict=True))
    for inner, outer in reversed(pairs):
        if len(aval(inner).shape) == len(outer.shape):
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


def setting(name: str) -> object:
    """The value of a JAX configuration option in this thread."""
    return getattr(jax.config, name)


def is_key(dtype: DType) -> bool:
    """Whether ``dtype`` is that of typed keys."""
    return jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)


@lru_cache(maxsize=64)
def key_impl(dtype: DType) -> str:
    """Name of the key implementation of a typed key dtype, such as ``threefry2x32``."""
    # ``jax.random.key_impl`` takes keys; of their dtype nothing public says it (0.10.2
    # and 0.12.0.1). So it is asked of keys that exist in a trace only.
    seen: list[object] = []

    def look(key: jax.Array) -> jax.Array:
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


def no_mesh() -> AbstractContextManager[None]:
    """A context without a mesh, whatever the caller has set.

    What is traced under ``jax.set_mesh`` carries that mesh in every equation and
    could not run on another; where a leaf lies is the plan's to say.
    """
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def without_mesh(call: Callable[[], T]) -> T:
    """What a trace gives without a mesh, or under the caller's if it asks for one.

    A ``PartitionSpec`` in ``with_sharding_constraint`` or ``out_sharding=`` means a
    mesh that is set; without one JAX refuses it, by ValueError or RuntimeError.
    """
    try:
        with no_mesh():
            return call()
    except (ValueError, RuntimeError):
        if jax.sharding.get_abstract_mesh().empty:
            raise
        return call()


def coordinator() -> Any:
    """The client of the store of a ``jax.distributed`` job's coordinator, or None."""
    # The one private thing of JAX that is used: it has no public name for the client
    # (0.10.2 and 0.12.0.1), and without it processes can exchange nothing but arrays.
    # The public module of its tools for many hosts holds the private one by this name.
    return vars(multihost_utils)["distributed"].global_state.client


def on_host(value: T) -> T | np.ndarray:
    """A captured array as numpy, so that no device or sharding comes with it."""
    if (
        isinstance(value, jax.Array)
        and not is_tracer(value)
        and not is_key(value.dtype)
    ):
        return np.asarray(value)
    return value


def trace(fn: Init, key: Tree) -> tuple[ClosedJaxpr, Tree]:
    """Traces ``fn`` once; returns its closed jaxpr and the pytree of output shapes."""
    return jax.make_jaxpr(fn, return_shape=True)(key)


def closed_from(fn: Callable[..., Tree], *avals: Aval) -> ClosedJaxpr:
    """The closed jaxpr of ``fn`` at abstract arguments."""
    return jax.make_jaxpr(fn)(*avals)


def run(
    jaxpr: Jaxpr | ClosedJaxpr, consts: Sequence[Values], args: Sequence[Values]
) -> list[Values]:
    """Evaluates a jaxpr on arrays or tracers."""
    return jex.jaxpr_as_fun(as_closed(jaxpr, consts))(*args)


def call(closed: ClosedJaxpr, args: Sequence[Values]) -> list[Values]:
    """Calls a closed jaxpr as the nested ``jax.jit`` it was.

    XLA folds constants differently across a call than within one body, so that
    inlining a call can change last places.
    """
    return jax.jit(jex.jaxpr_as_fun(closed))(*args)


def as_closed(jaxpr: Jaxpr | ClosedJaxpr, consts: Sequence[Values]) -> ClosedJaxpr:
    """Closes a jaxpr over its constants, on every supported version."""
    if isinstance(jaxpr, jex.ClosedJaxpr):
        return jaxpr
    return jex.ClosedJaxpr(jaxpr, list(consts))


def is_tracer(value: object) -> bool:
    """Whether ``value`` belongs to a trace that is still under way."""
    return isinstance(value, Tracer)


def bind(prim: Primitive, args: Sequence[Operand], params: Params) -> list[Values]:
    """Applies a primitive; always returns a list of results."""
    out = prim.bind(*args, **params)
    return list(out) if prim.multiple_results else [out]


def rebind(
    eqn: JaxprEqn,
    args: Sequence[Operand],
    change: Callable[[object], object] = lambda value: value,
) -> list[Values]:
    """Applies an equation to arrays or tracers, its parameters changed beforehand."""
    params = {name: change(value) for name, value in eqn.params.items()}
    return bind(eqn.primitive, args, eqn.primitive.get_bind_params(params))
