"""Draws in another precision: narrow random numbers drawn wide and rounded.

A draw in bfloat16 has seven bits, so a normal has 128 values and none beyond 2.9
standard deviations. With ``draw_dtype`` each draw of a narrower float is made in that
dtype, of the same key, and rounded to its own; everything after it is as it was. The
draws are known by the names that JAX gives their calls (0.10.2 and 0.12.0.1), and one
that has no such name stays and is said to be narrow by the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import jax
import jax.numpy as jnp

from shardinit.core.ir import jaxpr as jx
from shardinit.core.types import DType, Values


def _uniform(
    key: Values, low: Values, high: Values, shape: Sequence[int], dtype: DType
) -> Values:
    return jax.random.uniform(key, shape, dtype, low, high)


# By the name of the call; its operands are the key and what the function takes next.
_DRAWS: Final[dict[str, tuple[int, Callable[..., Values]]]] = {
    "_cauchy": (0, jax.random.cauchy),
    "_exponential": (0, jax.random.exponential),
    "_laplace": (0, jax.random.laplace),
    "_logistic": (0, jax.random.logistic),
    "_normal": (0, jax.random.normal),
    "_normal_real": (0, jax.random.normal),
    "_truncated_normal": (2, jax.random.truncated_normal),
    "_uniform": (2, _uniform),
}


def widened(closed: jx.ClosedJaxpr, dtype: DType) -> jx.ClosedJaxpr:
    """The same function, its draws of narrower floats made in ``dtype``.

    Args:
      closed: the function.
      dtype: a float dtype.
    """
    return _Widener(dtype).closed(closed)


class _Widener:
    """Rewrites jaxprs, each body once: equal calls must stay one."""

    def __init__(self, dtype: DType):
        self._dtype = dtype
        self._made: dict[int, tuple[object, jx.ClosedJaxpr]] = {}

    def closed(self, closed: jx.ClosedJaxpr) -> jx.ClosedJaxpr:
        """A closed jaxpr, itself if nothing in it is to be changed."""
        if not self._any(closed.jaxpr):
            return closed
        if id(closed) not in self._made:
            avals = [jx.aval(var) for var in closed.jaxpr.invars]
            args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
            made = jx.closed_from(
                lambda *args: self._run(closed.jaxpr, closed.consts, args), *args
            )
            self._made[id(closed)] = (closed, made)
        return self._made[id(closed)][1]

    def _is_draw(self, eqn: jx.JaxprEqn) -> bool:
        """Whether a call is a draw that is too narrow."""
        if eqn.primitive.name != "jit" or eqn.params["name"] not in _DRAWS:
            return False
        operands = [jx.aval(atom) for atom in eqn.invars]
        count, _ = _DRAWS[eqn.params["name"]]
        if len(operands) != count + 1 or not jx.is_key(operands[0].dtype):
            return False
        out = jx.aval(eqn.outvars[0])
        batch = len(operands[0].shape)  # of keys, as vmap makes it
        if any(x.shape for x in operands[1:]) or batch > len(out.shape):
            return False
        narrow = jnp.issubdtype(out.dtype, jnp.floating)
        return narrow and jnp.finfo(out.dtype).bits < jnp.finfo(self._dtype).bits

    def _any(self, jaxpr: jx.Jaxpr) -> bool:
        return any(
            self._is_draw(eqn) or any(map(self._any, jx.subjaxprs(eqn)))
            for eqn in jaxpr.eqns
        )

    def _run(
        self, jaxpr: jx.Jaxpr, consts: Sequence[Values], args: Sequence[jx.Operand]
    ) -> list[jx.Operand]:
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            given = [x.val if isinstance(x, jx.Literal) else env[x] for x in eqn.invars]
            env.update(zip(eqn.outvars, self._equation(eqn, given), strict=True))
        return [x.val if isinstance(x, jx.Literal) else env[x] for x in jaxpr.outvars]

    def _equation(
        self, eqn: jx.JaxprEqn, given: Sequence[jx.Operand]
    ) -> Sequence[jx.Operand]:
        if self._is_draw(eqn):
            return [self._drawn(eqn, *given)]
        if not any(map(self._any, jx.subjaxprs(eqn))):
            return jx.rebind(eqn, given)
        if eqn.primitive.name in jx.INLINED - {"jit"}:
            return self._run(*jx.nested(eqn), given)
        return jx.rebind(eqn, given, self._inside)

    def _inside(self, value: object) -> object:
        """A parameter of an equation, jaxprs in it rewritten."""
        if isinstance(value, jx.ClosedJaxpr):
            return self.closed(value)
        if isinstance(value, tuple):
            return tuple(map(self._inside, value))
        return value

    def _drawn(self, eqn: jx.JaxprEqn, key: Values, *bounds: jx.Operand) -> Values:
        out = jx.aval(eqn.outvars[0])
        draw, dtype, batch = _DRAWS[eqn.params["name"]][1], self._dtype, key.ndim
        shape = tuple(out.shape[batch:])

        def one(key: Values) -> Values:
            wide = [jnp.asarray(bound, dtype) for bound in bounds]
            return draw(key, *wide, shape, dtype).astype(out.dtype)

        for _ in range(batch):
            one = jax.vmap(one)
        return one(key)
