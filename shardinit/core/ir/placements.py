"""Shardings that an init function states itself.

``jax.lax.with_sharding_constraint`` and ``jax.device_put`` leave an equation in the
trace that names a sharding, ``out_shardings=`` one at a nested ``jax.jit``, and
``out_sharding=`` the type of the result on explicit mesh axes. The graph drops them,
since a plan decides where leaves lie; here they are read, so that the plan can heed
them or say that it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from shardinit.core.ir import jaxpr as jx

# Behind these a leaf still lies as was stated.
_KEEPING = frozenset(
    """convert_element_type copy copy_p device_put name optimization_barrier""".split()
)


def stated_shardings(closed: jx.ClosedJaxpr) -> list[NamedSharding | None]:
    """For each result of a jaxpr the sharding that it was last constrained to."""
    makers: dict[int, dict[Any, Any]] = {}
    jaxpr, _ = jx.opened(closed)
    return [_stated(var, jaxpr, makers) for var in jaxpr.outvars]


def _stated(
    var: Any, jaxpr: Any, makers: dict[int, dict[Any, Any]]
) -> NamedSharding | None:
    """The sharding of one result.

    Args:
      var: the result.
      jaxpr: whose it is.
      makers: what makes each variable, by jaxpr: one may make thousands of leaves.
    """
    typed = getattr(var.aval, "sharding", None)
    if isinstance(typed, NamedSharding) and any(e is not None for e in typed.spec):
        return typed
    while not isinstance(var, jx.Literal):
        if id(jaxpr) not in makers:
            makers[id(jaxpr)] = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        eqn = makers[id(jaxpr)].get(var)
        if eqn is None:
            return None
        name, number = eqn.primitive.name, eqn.outvars.index(var)
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


def _named(params: Mapping[str, Any], number: int) -> NamedSharding | None:
    """The sharding that an equation itself gives a result; it names a mesh."""
    given = params.get("sharding")  # of sharding_constraint
    for several in ("devices", "out_shardings"):  # of device_put, of jit
        given = params[several][number] if several in params else given
    if not isinstance(given, NamedSharding):
        return None
    free = PartitionSpec.UNCONSTRAINED  # a plan has to say: whole
    spec = PartitionSpec(*[None if entry is free else entry for entry in given.spec])
    return NamedSharding(given.mesh, spec, memory_kind=given.memory_kind)
