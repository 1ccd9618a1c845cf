"""The cut: one traced function into the few distinct leaf programs it is made of.

For every leaf, walk back to the derived keys: what lies between is the leaf program
and the keys are its operands. Equal leaves are found twice. First by a cheap form of
the graph as it was traced, in which a call counts by identity, so that fifty thousand
leaves cost a short walk each. Then, for the few different forms, everything is inlined
and written down canonically; programs are equal when those bytes are.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax
import numpy as np

from shardinit.core.cut.cut import Cut, LeafCut
from shardinit.core.cut.factors import move_factors
from shardinit.core.cut.fences import fence_moves
from shardinit.core.cut.leaf_program import (
    Kind,
    LeafProgram,
    digest_of,
    flatten,
)
from shardinit.core.cut.reciprocals import multiply_by_reciprocals
from shardinit.core.cut.repeats import repeated_draws
from shardinit.core.cut.scalars import lift_scalars
from shardinit.core.cut.sources import (
    Constant,
    Keys,
    Replicated,
    Source,
    Table,
    Windowed,
)
from shardinit.core.cut.statics import refuse_static_tracers
from shardinit.core.cut.trace import (
    refuse_effects,
    refuse_long_axes,
    refuse_no_values,
    trace,
    tracer_error,
)
from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.builder import Builder
from shardinit.core.ir.draws import widened
from shardinit.core.ir.encoder import Encoder
from shardinit.core.ir.graph import Node, Value, extract, topological
from shardinit.core.ir.placements import stated_shardings
from shardinit.core.paths import path_str
from shardinit.core.prng import derivation as keys
from shardinit.core.prng.root_key import keys_of, streams_of
from shardinit.core.types import DType, Init, Tree
from shardinit.core.window import constants
from shardinit.core.window.analysis import analyse


def cut(fn: Init, key_aval: Tree, draw_dtype: DType = None) -> Cut:
    """Traces ``fn`` once and cuts it.

    Args:
      fn: ``key -> pytree of arrays``.
      key_aval: shape and dtype of the root key, typed or raw uint32; a dict of them by
        the names of streams.
      draw_dtype: narrower floats are drawn in this dtype and rounded.

    Raises:
      InitFnError: the function cannot be cut; the message names the leaf.
    """
    closed, out_shape = trace(fn, key_aval)
    with jx.no_mesh():
        with_paths, tree = jax.tree_util.tree_flatten_with_path(out_shape)
        refuse_static_tracers(out_shape, tree)
        paths = [path_str(p) for p, _ in with_paths]
        roots = keys_of(key_aval)
        typed = jx.is_key(roots[0].dtype)
        impl = jx.key_impl(roots[0].dtype) if typed else _raw_impl(roots[0])
        builder = Builder(folds_keys=True, keeps_calls=True)
        drawn = closed if draw_dtype is None else widened(closed, draw_dtype)
        outs = builder.read(*jx.opened(drawn), _root_values(roots, impl))
        refuse_effects(builder.effects, outs, paths)
        refuse_no_values(outs, paths)
        weak = jx.weak_types(closed)
        leaves, programs = _Cutter(outs, paths, weak).run()
        repeats = repeated_draws([leaf.source for leaf in leaves], outs)
        stated = tuple(stated_shardings(closed))
        streams = streams_of(key_aval)
        return Cut(leaves, programs, tree, impl, typed, streams, stated, repeats)


def _root_values(roots: Sequence[jx.Aval], impl: str) -> list[Value]:
    """What a function is called with: of each stream its part of the root."""
    root = keys.root(impl, len(roots))
    width = root.words // len(roots)
    return [
        Value(x.shape, x.dtype, key=keys.take([root], np.arange(width) + width * i))
        for i, x in enumerate(roots)
    ]


def _raw_impl(key_aval: jx.Aval) -> str:
    # Four words are a key of rbg or of unsafe_rbg: raw data does not say which.
    default = str(jx.setting("jax_default_prng_impl"))
    if key_aval.shape == (keys.words_per_key(default),):
        return default
    return keys.THREEFRY if key_aval.shape == (2,) else "rbg"


class _Cutter:
    """Groups the leaves of one graph into programs."""

    def __init__(self, outs: list[Value], paths: list[str], weak: list[bool]):
        self._outs = outs
        self._paths = paths
        self._weak = weak
        self._tokens: dict[int, tuple[object, str]] = {}
        self._by_form: dict[Hashable, tuple[LeafProgram, list[Value]]] = {}
        self._windowed: dict[str, LeafProgram] = {}
        self._programs: dict[str, int] = {}
        self._list: list[LeafProgram] = []

    def run(self) -> tuple[tuple[LeafCut, ...], tuple[LeafProgram, ...]]:
        """Cuts every leaf."""
        sources: list[Source | None] = [None] * len(self._outs)
        replicated: list[int] = []
        for number, (out, path) in enumerate(zip(self._outs, self._paths, strict=True)):
            sources[number] = self._hosted(out, path)
            if sources[number] is not None:
                continue
            refuse_long_axes(out, path)
            program, operands = self._one(out, path)
            if program.kind is Kind.TABLE:
                sources[number] = Table(program)
            elif program.kind is Kind.REPLICATED:
                replicated.append(number)
            else:
                sources[number] = Windowed(self._number(program), _derived(operands))
        for numbers in self._sharing(replicated):
            outs = [self._outs[n] for n in numbers]
            names = ", ".join(self._paths[n] for n in numbers)
            program, operands = self._make(outs, names)
            derived = _derived(operands)
            for result, number in enumerate(numbers):
                index = self._number(program)
                sources[number] = Replicated(index, derived, result)
        leaves = [
            LeafCut(path, out.shape, out.dtype, source, weak)
            for out, path, source, weak in zip(
                self._outs, self._paths, sources, self._weak, strict=True
            )
            if source is not None
        ]
        return tuple(leaves), tuple(self._list)

    def _hosted(self, out: Value, path: str) -> Source | None:
        """The source of a leaf that no program computes, or None."""
        if 0 in out.shape and not jx.is_key(out.dtype):
            return Constant(np.zeros(out.shape, out.dtype))
        if out.const is None:
            return Keys(out.key) if out.key is not None else None
        if jx.is_tracer(out.const):
            raise tracer_error(path)
        if not jx.is_key(out.dtype):
            return Constant(np.asarray(out.const))
        words = np.asarray(jax.random.key_data(out.const))
        return Keys(keys.constant(words, jx.key_impl(out.dtype)))

    def _number(self, program: LeafProgram) -> int:
        """The program's number, the next one for a program not met before."""
        if program.digest not in self._programs:
            self._programs[program.digest] = len(self._list)
            self._list.append(program)
        return self._programs[program.digest]

    def _sharing(self, replicated: list[int]) -> list[list[int]]:
        """Replicated leaves in groups that share a node: computed once together."""
        first_of: dict[int, int] = {}
        owner: dict[int, int] = {number: number for number in replicated}

        def find(number: int) -> int:
            while owner[number] != number:
                number = owner[number]
            return number

        for number in replicated:
            for node in topological([self._outs[number]]):
                other = find(first_of.setdefault(id(node), number))
                mine = find(number)
                owner[max(mine, other)] = min(mine, other)
        groups: dict[int, list[int]] = {}
        for number in replicated:
            groups.setdefault(find(number), []).append(number)
        return list(groups.values())

    def _one(self, out: Value, path: str) -> tuple[LeafProgram, list[Value]]:
        """The program of one leaf, from the cheap form where it was met before."""
        form, operands = self._form(out, path)
        if form not in self._by_form:
            program, all_operands = self._make([out], path)
            self._by_form[form] = program, all_operands[len(operands) :]
        program, lifted = self._by_form[form]
        return program, operands + lifted

    def _make(self, outs: list[Value], path: str) -> tuple[LeafProgram, list[Value]]:
        operands = _operands(outs, path)
        graph, lifted = flatten(outs[:1], operands), []
        table = constants.is_table(graph)
        if not table:
            graph = move_factors(multiply_by_reciprocals(graph))
            graph, lifted = lift_scalars(graph)
            graph = fence_moves(graph)
        digest = digest_of(graph)
        if digest in self._windowed:
            return self._windowed[digest], operands + lifted
        analysis = None if table else analyse(graph)
        if table or (analysis is not None and analysis.replicated_reason is not None):
            # Calls and loops stay as they were traced: XLA folds constants differently
            # across a call (``ir.jaxpr.call``), and the bits are to be plain jit's.
            graph, lifted = extract(outs, operands), []
            if not table and len(outs) == 1:
                graph, lifted = lift_scalars(graph)
            made = LeafProgram(graph, digest_of(graph), analysis)
            return made, operands + lifted
        program = self._windowed[digest] = LeafProgram(graph, digest, analysis)
        return program, operands + lifted

    def _form(self, out: Value, path: str) -> tuple[Hashable, list[Value]]:
        """A hashable form of the leaf's piece of the graph, and its operands."""
        numbers: dict[Value, Hashable] = {}
        operands: list[Value] = []
        tokens: list[Hashable] = []

        def read(value: Value) -> Hashable:
            if value not in numbers:
                if value.const is not None:
                    return self._const_token(value, path)
                numbers[value] = ("o", len(operands), value.shape, str(value.dtype))
                operands.append(value)
            return numbers[value]

        for count, node in enumerate(topological([out])):
            refs = tuple(read(v) for v in node.inputs)
            avals = tuple((v.shape, str(v.dtype)) for v in node.outputs)
            tokens.append((node.name, self._token(node), refs, avals))
            numbers.update((v, (count, v.index)) for v in node.outputs)
        return (tuple(tokens), read(out)), operands

    def _const_token(self, value: Value, path: str) -> Hashable:
        const = value.const
        if jx.is_tracer(const):
            raise tracer_error(path)
        if id(const) not in self._tokens:
            encoder = Encoder()
            encoder.array(const)
            self._tokens[id(const)] = (const, encoder.digest())
        return ("c", self._tokens[id(const)][1])

    def _token(self, node: Node) -> Hashable:
        """A call by its identity; parameters by a hash of what they say."""
        if node.name == "call":
            return id(node.params["jaxpr"])
        items = node.params
        if not items:
            return None
        if id(items) not in self._tokens:
            encoder = Encoder()
            encoder.params(items)
            self._tokens[id(items)] = ((items, encoder.by_identity), encoder.digest())
        return self._tokens[id(items)][1]


def _derived(operands: list[Value]) -> tuple[keys.Derivation, ...]:
    return tuple(v.key for v in operands if v.key is not None)


def _operands(outs: list[Value], path: str) -> list[Value]:
    """The derived keys that ``outs`` read, in the order in which they are met."""
    found: dict[Value, None] = {}
    for node in topological(outs):
        for value in node.inputs:
            if value.node is None and value.const is None:
                found[value] = None
            elif value.const is not None and jx.is_tracer(value.const):
                raise tracer_error(path)
    return list(found)
