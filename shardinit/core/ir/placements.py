"""Shardings that an init function states itself.

``jax.lax.with_sharding_constraint`` and ``jax.device_put`` leave an equation in the
trace that names a sharding, ``out_shardings=`` one at a nested ``jax.jit``, and
``out_sharding=`` the type of the result on explicit mesh axes. The graph drops them,
since a plan decides where leaves lie; here they are read, so that the plan can heed
them or say that it does not.
"""

from __future__ import annotations

from typing import TypeAlias

from jax.sharding import NamedSharding, PartitionSpec

from shardinit.core.ir import jaxpr as jx

# Behind these a leaf still lies as was stated.
_KEEPING = frozenset(
    "convert_element_type copy device_put name optimization_barrier".split()
)


_Maker: TypeAlias = tuple[jx.JaxprEqn, int]
"""The equation that makes a variable, and which of its results that is."""

_Makers: TypeAlias = dict[int, dict[jx.Var, _Maker]]
"""What makes each variable, by jaxpr: one may make thousands of leaves."""


def stated_shardings(closed: jx.ClosedJaxpr) -> list[NamedSharding | None]:
    """For each result of a jaxpr the sharding that it was last constrained to."""
    makers: _Makers = {}
    jaxpr, _ = jx.opened(closed)
    return [_stated(var, jaxpr, makers) for var in jaxpr.outvars]


def _stated(
    var: jx.Var | jx.Literal, jaxpr: jx.Jaxpr, makers: _Makers
) -> NamedSharding | None:
    """The sharding of one result of a jaxpr."""
    typed = getattr(var.aval, "sharding", None)
    if isinstance(typed, NamedSharding) and any(e is not None for e in typed.spec):
        return typed
    while made := _maker(var, jaxpr, makers):
        eqn, number = made
        name = eqn.primitive.name
        found = _named(eqn.params, number)
        if found is not None or name == "sharding_constraint":
            return found
        if name in jx.INLINED:
            jaxpr, _ = jx.nested(eqn)
            var = jaxpr.outvars[number]
        elif name in _KEEPING:
            var = eqn.invars[number]
        else:
            return None
    return None


def _maker(var: jx.Var | jx.Literal, jaxpr: jx.Jaxpr, makers: _Makers) -> _Maker | None:
    """What makes a variable; nothing makes an operand or a literal."""
    if isinstance(var, jx.Literal):
        return None
    if id(jaxpr) not in makers:
        makers[id(jaxpr)] = {
            v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)
        }
    return makers[id(jaxpr)].get(var)


def _named(params: jx.Params, number: int) -> NamedSharding | None:
    """The sharding that an equation itself gives a result; it names a mesh."""
    given = params.get("sharding")  # of sharding_constraint
    for several in ("devices", "out_shardings"):  # of device_put, of jit
        given = params[several][number] if several in params else given
    if not isinstance(given, NamedSharding):
        return None
    free = PartitionSpec.UNCONSTRAINED  # a plan has to say: whole
    spec = PartitionSpec(*[None if entry is free else entry for entry in given.spec])
    return NamedSharding(given.mesh, spec, memory_kind=given.memory_kind)
