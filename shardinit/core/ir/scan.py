"""A scan as maps: stacked layers without a loop.

``nn.scan`` and ``lax.map`` over keys are how large models stack their layers. A scan
whose carry holds nothing but keys is divided: the key steps run once a step while
tracing (they are a handful of derivations), their keys are stacked, and each result
that no other carry reaches becomes a *map* over the stacked keys, which windows like
any vmapped initializer. A result that a real carry reaches stays a scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import numpy as np

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.graph import (
    Node,
    Subgraph,
    Value,
    constant,
    interpret,
    leaves,
    topological,
)
from shardinit.core.prng import derivation as keys
from shardinit.core.types import Values

Add: TypeAlias = Callable[
    [jx.Primitive, jx.Params, Sequence[Value], Sequence[jx.Aval]], list[Value]
]
"""``Builder.add``: adds an equation to the graph, or folds it."""


class ScanSplit:
    """A scan's body as a graph of its own, divided into key steps and the rest.

    Args:
      parts: the scan.
      args: its operands.
      body: one step; its inputs are those of the body's jaxpr.
    """

    def __init__(self, parts: jx.ScanParts, args: Sequence[Value], body: Subgraph):
        self._length = parts.length
        self._steps = range(parts.length)[:: -1 if parts.reverse else 1]
        self._outs, self._n_carry = body.outs, parts.n_carry
        self._nodes = topological(body.outs)
        # The body's inputs, each with the scan's operand, by role.
        pairs = list(zip(body.inputs, args, strict=True))
        first, last = parts.n_consts, parts.n_consts + parts.n_carry
        self._consts = dict(pairs[:first])
        self._carries = dict(pairs[first:last])
        self._scanned = dict(pairs[last:])
        # What a step leaves in the place of each carry, for the next one.
        carried = body.outs[: parts.n_carry]
        self._after = dict(zip(self._carries, carried, strict=True))

    def unroll(self, add: Add) -> tuple[dict[int, Value], dict[Value, Value]]:
        """Runs the key steps once a step; returns finished results and stacked keys.

        Args:
          add: the builder's, which folds what it can.
        """
        carried, folded = self._what_folds(add)
        if not folded:
            return {}, {}
        state = {v: self._carries[v] for v in carried}
        wanted = self._read_by_the_rest(folded)
        rows: dict[int, list[Value]] = {}
        for step in self._steps:
            made = self._step(step, state, folded, add)
            rows[step] = [made[v] for v in wanted]
            state = {v: made.get(self._after[v], self._after[v]) for v in state}
        columns = zip(*(rows[step] for step in sorted(rows)), strict=True)
        # Of a scan without steps there are no columns.
        stacks = {v: _stack(column) for v, column in zip(wanted, columns, strict=False)}
        return self._finished(state, stacks), stacks

    def _finished(
        self, state: dict[Value, Value], stacks: dict[Value, Value]
    ) -> dict[int, Value]:
        """The results that are known, by number: last carries and stacked keys."""
        known = {n: state[v] for n, v in enumerate(self._carries) if v in state}
        for number, out in enumerate(self._outs):
            if number >= self._n_carry and out in stacks:
                known[number] = stacks[out]
        return known

    def _what_folds(self, add: Add) -> tuple[list[Value], set[Value]]:
        """The carries that are known before every step, and all that folds in one.

        A carry is known if it is at first and what a step makes of it is. One that is
        not may be what others are made of: so again without it, until none is lost.
        """
        carried = [v for v, arg in self._carries.items() if _is_folded(arg)]
        while True:
            folded = self._folds_with(carried, add)
            kept = [v for v in carried if _is_known(self._after[v], folded)]
            if len(kept) == len(carried):
                return carried, folded
            carried = kept

    def _folds_with(self, carried: Sequence[Value], add: Add) -> set[Value]:
        """The values that fold in each step if these carries are known before it."""
        outside = {**self._consts, **self._scanned}
        folded = {v for v, arg in outside.items() if _is_folded(arg)}.union(carried)
        for node in self._nodes:
            if node.prim is not None and all(_is_known(v, folded) for v in node.inputs):
                known = [_stand_in(v) for v in node.inputs]
                if all(
                    map(_is_folded, add(node.prim, node.params, known, node.outputs))
                ):
                    folded.update(node.outputs)
        return folded

    def _step(
        self, number: int, state: dict[Value, Value], folded: set[Value], add: Add
    ) -> dict[Value, Value]:
        """What folds in one step, by the body's values, from the carries before it."""
        made = dict(state)
        made |= {v: arg for v, arg in self._consts.items() if v in folded}
        rows = {v: arg for v, arg in self._scanned.items() if v in folded}
        made |= {v: _row(arg, number) for v, arg in rows.items()}
        for node in self._nodes:
            if node.prim is not None and node.outputs[0] in folded:
                ins = [made.get(v, v) for v in node.inputs]
                outs = add(node.prim, node.params, ins, node.outputs)
                made.update(zip(node.outputs, outs, strict=True))
        return made

    def _read_by_the_rest(self, folded: set[Value]) -> list[Value]:
        """Folded values that the rest of the body, or the scan's results, read."""
        read = [
            v
            for node in self._nodes
            if node.outputs[0] not in folded
            for v in node.inputs
        ]
        read += self._outs[self._n_carry :]
        return [v for v in dict.fromkeys(read) if v in folded]

    def as_map(self, number: int, stacks: dict[Value, Value]) -> Value | None:
        """Result ``number`` as a map over the steps, None if a carry reaches it."""
        if number < self._n_carry or not self._length:
            return None
        out = self._outs[number]
        inputs = leaves([out], stacks)
        outside = {**self._consts, **self._scanned, **stacks}
        if any(v not in outside for v in inputs):
            return None
        aval = jax.ShapeDtypeStruct((self._length, *out.shape), out.dtype)
        params = {
            "jaxpr": _as_jaxpr(inputs, out),
            "mapped": tuple(v in stacks or v in self._scanned for v in inputs),
            "length": self._length,
            "index": number,
        }
        return Node("map", None, params, [outside[v] for v in inputs], [aval]).outputs[
            0
        ]


def _is_folded(value: Value) -> bool:
    """Whether a value left the graph: it is derived from keys, or small integers."""
    if value.key is not None:
        return True
    return value.const is not None and np.dtype(value.const.dtype).kind in "iub"


def _is_known(value: Value, folded: set[Value]) -> bool:
    return value in folded or value.const is not None


def _stand_in(value: Value) -> Value:
    """A value of the same kind for asking whether an equation of it would fold."""
    if value.const is not None:
        return value
    if jx.is_key(value.dtype):
        impl = jx.key_impl(value.dtype)
        words = np.zeros(value.size * keys.words_per_key(impl), np.uint32)
        return Value(value.shape, value.dtype, key=keys.constant(words, impl))
    # A raw key has no type of its own: it is two words of threefry or four of rbg.
    if np.dtype(value.dtype) == np.uint32 and value.shape[-1:] in ((2,), (4,)):
        words = np.zeros(value.size, np.uint32)
        impl = keys.THREEFRY if value.shape[-1] == 2 else "rbg"
        return Value(value.shape, value.dtype, key=keys.constant(words, impl))
    return constant(np.zeros(value.shape, value.dtype))


def _row(value: Value, step: int) -> Value:
    if value.const is not None:
        return constant(np.asarray(value.const)[step])
    assert value.key is not None
    words = value.key.words // max(value.shape[0], 1)
    places = np.arange(step * words, (step + 1) * words)
    return Value(value.shape[1:], value.dtype, key=keys.take([value.key], places))


def _stack(rows: Sequence[Value]) -> Value:
    shape = (len(rows), *rows[0].shape)
    if all(r.const is not None for r in rows):
        return constant(np.stack([np.asarray(r.const) for r in rows]))
    impl = next(r.key.impl for r in rows if r.key is not None)
    parents = [
        r.key if r.key is not None else keys.constant(np.asarray(r.const), impl)
        for r in rows
    ]
    places = np.arange(sum(p.words for p in parents))
    return Value(shape, rows[0].dtype, key=keys.take(parents, places, impl))


def _as_jaxpr(inputs: Sequence[Value], out: Value) -> jx.ClosedJaxpr:
    """The part of a graph between ``inputs`` and ``out`` as a closed jaxpr."""

    def fn(*args: Values) -> Values:
        return interpret([out], dict(zip(inputs, args, strict=True)))[0]

    return jx.closed_from(fn, *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in inputs))
