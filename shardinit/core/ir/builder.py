"""Reads a jaxpr into a graph, once, from front to back.

``jax.make_jaxpr`` gives one long list of equations. Key derivations and small integers
leave it at once (``fold``); calls that only turn keys into numbers stay one node
(an unrolled model calls the same few a thousand times); other calls are inlined; and a
``scan`` becomes maps as far as only keys are carried from step to step (``scan``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardinit.core.ir import fold
from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.graph import Node, Subgraph, Value, constant
from shardinit.core.ir.scan import ScanSplit
from shardinit.core.types import Values

# Steps of a loop over integers that are written out one after the other. The search
# by halves of ``jax.random.choice`` takes no more than 32.
MAX_UNROLLED = 64


class Builder:
    """Reads jaxprs into graphs.

    Args:
      folds_keys: whether key derivations and integers are folded; not in the body of a
        scan, whose keys are operands.
      keeps_calls: whether calls that only turn keys into numbers stay one node.
    """

    def __init__(self, *, folds_keys: bool, keeps_calls: bool):
        self._folds_keys = folds_keys
        self._keeps_calls = keeps_calls
        # By the identity of a call's jaxpr, which is held so that no other gets it.
        self._may_be_kept: dict[int, tuple[jx.Jaxpr, bool]] = {}
        self._closed: dict[int, tuple[jx.Jaxpr, jx.ClosedJaxpr]] = {}
        self.effects: list[Node] = []

    def read(
        self, jaxpr: jx.Jaxpr, consts: Sequence[Values], args: Sequence[Value]
    ) -> list[Value]:
        """Adds a jaxpr's equations to the graph and returns its results."""
        env: dict[jx.Var, Value] = {}
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = constant(jx.on_host(const))
        env.update(zip(jaxpr.invars, args, strict=True))

        def look(atom: jx.Var | jx.Literal) -> Value:
            if not isinstance(atom, jx.Literal):
                return env[atom]
            value, aval = jx.on_host(atom.val), jx.aval(atom)
            return constant(value, None if jx.is_key(aval.dtype) else aval.dtype)

        for eqn in jaxpr.eqns:
            outs = self._equation(eqn, [look(a) for a in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [look(a) for a in jaxpr.outvars]

    def add(
        self,
        prim: jx.Primitive,
        params: jx.Params,
        args: Sequence[Value],
        avals: Sequence[jx.Aval],
    ) -> list[Value]:
        """Adds one primitive, folded if it can be."""
        name = prim.name
        if self._folds_keys:
            known = _known(args)
            if known is not None:
                folded = fold.fold_integers(name, params, known, avals[0])
                if folded is not None:
                    counted = name == "iota" or any(a.counted for a in args)
                    return [constant(f, counted=counted) for f in folded]
            derived = fold.fold_keys(name, params, args, avals[0]) if avals else None
            if derived is not None:
                return [
                    Value(a.shape, a.dtype, key=d)
                    for a, d in zip(avals, derived, strict=True)
                ]
        if name in jx.IDENTITY:
            return list(args[: len(avals)])
        return list(Node(name, prim, params, args, avals).outputs)

    def _equation(self, eqn: jx.JaxprEqn, args: list[Value]) -> list[Value]:
        avals = [jx.aval(v) for v in eqn.outvars]
        name = eqn.primitive.name
        # ``pure_callback`` states no effect, though JAX may call it twice or never.
        if eqn.effects or name in jx.CALLBACKS:
            node = Node(name, eqn.primitive, eqn.params, args, avals)
            self.effects.append(node)
            return list(node.outputs)
        if name in jx.INLINED:
            body, consts = jx.nested(eqn)
            if self._keeps_calls and self._may_stay(body):
                closed = self._close(body, consts)
                return list(Node("call", None, {"jaxpr": closed}, args, avals).outputs)
            return self.read(body, consts, args)
        if name == "scan":
            return self._scan(eqn, args)
        if name == "optimization_barrier":  # each operand alone: one may fold
            singles = zip(args, avals, strict=True)
            made = [self.add(eqn.primitive, eqn.params, [x], [a]) for x, a in singles]
            return [value for (value,) in made]
        return self.add(eqn.primitive, eqn.params, args, avals)

    def _close(self, body: jx.Jaxpr, consts: Sequence[Values]) -> jx.ClosedJaxpr:
        """One closed jaxpr an object, so that equal calls share their identity."""
        if id(body) not in self._closed:
            self._closed[id(body)] = (body, jx.as_closed(body, consts))
        return self._closed[id(body)][1]

    def _may_stay(self, body: jx.Jaxpr) -> bool:
        """Whether a call is one leaf's own arithmetic and derives no keys.

        One float result, and nothing inside that would fold or be made a map.
        """
        known = self._may_be_kept.get(id(body))
        if known is None:
            stays = (
                len(body.outvars) == 1
                and not jx.is_key(jx.aval(body.outvars[0]).dtype)
                and np.dtype(jx.aval(body.outvars[0]).dtype).kind not in "iu"
                and not body.effects
                and all(self._stays_inside(eqn) for eqn in body.eqns)
            )
            known = self._may_be_kept[id(body)] = (body, stays)
        return known[1]

    def _stays_inside(self, eqn: jx.JaxprEqn) -> bool:
        name = eqn.primitive.name
        if name in jx.KEY_DERIVATIONS or name in jx.CALLBACKS or name == "scan":
            return False
        return all(
            self._stays_inside(inner)
            for body in jx.subjaxprs(eqn)
            for inner in body.eqns
        )

    def _scan(self, eqn: jx.JaxprEqn, args: list[Value]) -> list[Value]:
        """A scan as maps, as far as only keys are carried; the rest stays a scan."""
        avals = [jx.aval(v) for v in eqn.outvars]
        parts = jx.scan_parts(eqn, args, avals)
        if not self._keeps_calls:
            steps = self.unrolled(parts, args, len(avals))
            if steps is not None:
                return steps
        reader = Builder(folds_keys=False, keeps_calls=True)
        inputs = [Value(a.shape, a.dtype) for a in map(jx.aval, parts.body.invars)]
        body = Subgraph(inputs, reader.read(parts.body, parts.consts, inputs))
        split = ScanSplit(parts, args, body)
        finals, stacks = split.unroll(self.add) if self._folds_keys else ({}, {})
        in_full: Node | None = None
        outs: list[Value] = []
        for number, aval in enumerate(avals):
            value = finals.get(number)
            if value is None and not reader.effects:
                value = split.as_map(number, stacks)
            if value is None:
                in_full = in_full or Node(
                    "scan", eqn.primitive, eqn.params, args, avals
                )
                value = in_full.outputs[number]
            assert value.shape == tuple(aval.shape)
            outs.append(value)
        return outs

    def unrolled(
        self, parts: jx.ScanParts, args: Sequence[Value], results: int
    ) -> list[Value] | None:
        """A short loop that carries integers alone, step after step; else None.

        With floats the compiler would see another program than the loop it was.
        """
        rest, carry = list(args[: parts.n_consts]), list(args[parts.n_consts :])
        if (
            parts.length > MAX_UNROLLED
            or not len(carry) == parts.n_carry == results
            or any(jx.is_key(v.dtype) for v in carry)
            or any(np.dtype(v.dtype).kind not in "iub" for v in carry)
        ):
            return None
        for _ in range(parts.length):
            carry = self.read(parts.body, parts.consts, [*rest, *carry])
        return carry


def _known(args: Sequence[Value]) -> list[np.ndarray] | None:
    """The contents of operands that are all known, and no keys."""
    consts = [a.const for a in args if a.const is not None]
    if len(consts) < len(args) or any(jx.is_key(c.dtype) for c in consts):
        return None
    if any(map(jx.is_tracer, consts)):
        return None
    return [np.asarray(c) for c in consts]
