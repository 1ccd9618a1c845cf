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


def stated_shardings(closed: Any) -> list[NamedSharding | None]:
    """For each result of a jaxpr the sharding that it was last constrained to."""
    jaxpr, _ = jx.opened(closed)
    makers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    return [_stated(var, makers) for var in jaxpr.outvars]


def _stated(var: Any, makers: dict[Any, Any]) -> NamedSharding | None:
    typed = getattr(var.aval, "sharding", None)
    if isinstance(typed, NamedSharding) and any(e is not None for e in typed.spec):
        return typed
    while not isinstance(var, jx.Literal) and var in makers:
        eqn = makers[var]
        name = eqn.primitive.name
        if name == "sharding_constraint":
            found = eqn.params["sharding"]
            return found if isinstance(found, NamedSharding) else None
        if name in jx.INLINED:
            body, _ = jx.nested(eqn)
            var = body.outvars[eqn.outvars.index(var)]
            makers = {v: inner for inner in body.eqns for v in inner.outvars}
        elif name in _KEEPING:
            var = eqn.invars[eqn.outvars.index(var)]
        else:
            return None
    return None
