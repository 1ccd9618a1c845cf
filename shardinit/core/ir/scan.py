"""A scan as maps: stacked layers without a loop.

``nn.scan`` and ``lax.map`` over keys are how large models stack their layers. A scan
whose carry holds nothing but keys is divided: the key steps run once a step while
tracing (they are a handful of derivations), their keys are stacked, and each result
that no other carry reaches becomes a *map* over the stacked keys, which windows like
any vmapped initializer. A result that a real carry reaches stays a scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.graph import (
    Node,
    Value,
    constant,
    interpret,
    leaves,
    topological,
)
from shardinit.core.prng import derivation as keys


class ScanSplit:
    """A scan's body as a graph of its own, divided into key steps and the rest."""

    def __init__(self, parts: jx.ScanParts, args: list[Value], reader: Any):
        self.parts = parts
        self.args = args
        self.inner = [Value(a.shape, a.dtype) for a in map(jx.aval, parts.body.invars)]
        self.outs = reader.read(parts.body, parts.consts, self.inner)
        self.effects = reader.effects
        self.nodes = topological(self.outs)
        self.derived: set[Value] = set()

    def _role(self, number: int) -> str:
        if number < self.parts.n_consts:
            return "const"
        if number < self.parts.n_consts + self.parts.n_carry:
            return "carry"
        return "xs"

    def unroll(self, add: Any) -> tuple[dict[int, Value], dict[Value, Value]]:
        """Runs the key steps once a step; returns finished results and stacked keys.

        Args:
          add: the builder's ``add``, which folds what it can.
        """
        carry = {
            i
            for i in range(len(self.inner))
            if self._role(i) == "carry" and _is_prelude(self.args[i])
        }
        while True:
            self.derived = self._find_derived(carry, add)
            lost = {
                i for i in carry if not self._known(self.outs[i - self.parts.n_consts])
            }
            if not lost:
                break
            carry -= lost
        if not self.derived:
            return {}, {}
        return self._run_steps(add, carry)

    def _known(self, value: Value) -> bool:
        return value in self.derived or value.const is not None

    def _find_derived(self, carry: set[int], add: Any) -> set[Value]:
        derived = set()
        for i, value in enumerate(self.inner):
            is_known = _is_prelude(self.args[i]) if self._role(i) != "carry" else False
            if is_known or i in carry:
                derived.add(value)
        for node in self.nodes:
            if node.prim is not None and all(
                v in derived or v.const is not None for v in node.inputs
            ):
                ins = [_stand_in(v) for v in node.inputs]
                outs = add(node.prim, node.params, ins, node.outputs)
                if all(_is_prelude(o) for o in outs):
                    derived.update(node.outputs)
        return derived

    def _run_steps(
        self, add: Any, carry: set[int]
    ) -> tuple[dict[int, Value], dict[Value, Value]]:
        parts = self.parts
        steps = range(parts.length)
        state = {self.inner[i]: self.args[i] for i in carry}
        rows: dict[Value, list[Value]] = {v: [] for v in self._boundary()}
        for step in reversed(steps) if parts.reverse else steps:
            env: dict[Value, Value] = dict(state)
            for i, value in enumerate(self.inner):
                if value in self.derived and i not in carry:
                    arg = self.args[i]
                    env[value] = _row(arg, step) if self._role(i) == "xs" else arg
            for node in self.nodes:
                if node.prim is not None and node.outputs[0] in self.derived:
                    ins = [env.get(v, v) for v in node.inputs]
                    outs = add(node.prim, node.params, ins, node.outputs)
                    env.update(zip(node.outputs, outs, strict=True))
            for value, row in rows.items():
                row.append(env[value])
            for i in carry:
                after = self.outs[i - parts.n_consts]
                state[self.inner[i]] = env.get(after) or after
        if parts.reverse:
            for row in rows.values():
                row.reverse()
        stacks = {v: _stack(row) for v, row in rows.items()} if parts.length else {}
        finals: dict[int, Value] = {
            i - parts.n_consts: state[self.inner[i]] for i in carry
        }
        for number, out in enumerate(self.outs):
            if number >= parts.n_carry and out in stacks:
                finals[number] = stacks[out]
        return finals, stacks

    def _boundary(self) -> list[Value]:
        """Derived values that the rest of the body, or the scan's results, read."""
        found: dict[Value, None] = {}
        for node in self.nodes:
            if node.outputs[0] not in self.derived:
                found.update((v, None) for v in node.inputs if v in self.derived)
        for out in self.outs[self.parts.n_carry :]:
            if out in self.derived:
                found[out] = None
        return list(found)

    def as_map(self, number: int, stacks: dict[Value, Value]) -> Value | None:
        """Result ``number`` as a map over the steps, None if a carry reaches it."""
        parts = self.parts
        if number < parts.n_carry or self.effects or not parts.length:
            return None
        out = self.outs[number]
        inputs, outer, mapped = [], [], []
        place = {v: i for i, v in enumerate(self.inner)}
        for value in leaves([out], stacks):
            if value in stacks:
                outer.append(stacks[value])
                mapped.append(True)
            else:
                role = self._role(place[value])
                if role == "carry":
                    return None
                outer.append(self.args[place[value]])
                mapped.append(role == "xs")
            inputs.append(value)
        body = _as_jaxpr(inputs, out)
        aval = jax.ShapeDtypeStruct((parts.length, *out.shape), out.dtype)
        params = {
            "jaxpr": body,
            "mapped": tuple(mapped),
            "length": parts.length,
            "index": number,
        }
        return Node("map", None, params, outer, [aval]).outputs[0]


def _is_prelude(value: Value) -> bool:
    if value.key is not None:
        return True
    return value.const is not None and np.dtype(value.const.dtype).kind in "iub"


def _stand_in(value: Value) -> Value:
    """A value of the same kind for asking the prelude whether it would fold."""
    if value.const is not None:
        return value
    if jx.is_key(value.dtype):
        impl = jx.key_impl(value.dtype)
        words = np.zeros(value.size * keys.words_per_key(impl), np.uint32)
        return Value(value.shape, value.dtype, key=keys.constant(words, impl))
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


def _stack(rows: list[Value]) -> Value:
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


def _as_jaxpr(inputs: Sequence[Value], out: Value) -> Any:
    """The part of a graph between ``inputs`` and ``out`` as a closed jaxpr."""

    def fn(*args: Any) -> Any:
        return interpret([out], dict(zip(inputs, args, strict=True)))[0]

    return jx.closed_from(fn, *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in inputs))
