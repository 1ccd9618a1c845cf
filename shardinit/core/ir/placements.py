"""Shardings that an init function states itself.

``jax.lax.with_sharding_constraint`` leaves an equation in the trace that names a
sharding, ``out_sharding=`` the type of the result on explicit mesh axes. The graph
drops both, since a plan decides where leaves lie; here they are read, so that the plan
can heed them or say that it does not.
"""

from __future__ import annotations

from typing import Any

from jax.sharding import NamedSharding

from shardinit.core.ir import jaxpr as jx

# Behind these a leaf still lies as was stated.
_KEEPING = frozenset(
    {"convert_element_type", "copy", "copy_p", "name", "optimization_barrier"}
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
        name = eqn.primitive.name
        if name == "sharding_constraint":
            found = eqn.params["sharding"]
            return found if isinstance(found, NamedSharding) else None
        if name in jx.INLINED:
            jaxpr, _ = jx.nested(eqn)
            var = jaxpr.outvars[eqn.outvars.index(var)]
        elif name in _KEEPING:
            var = eqn.invars[eqn.outvars.index(var)]
        else:
            return None
    return None
