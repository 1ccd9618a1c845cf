"""A leaf program: from the words of its keys to any window of one leaf.

It is a piece of the graph with inputs of its own, every call inlined, so that the
windowing rules see primitives only, and with a canonical form, so that equal programs
can be told from different ones in whatever process they were traced. A program that
cannot be windowed keeps its calls and loops as they were traced: XLA folds constants
differently across a call, and such a leaf's bits are to be those of plain ``jax.jit``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from shardinit.core.cut.fences import fence, looped
from shardinit.core.cut.scalars import from_word
from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.builder import Builder
from shardinit.core.ir.encoder import Encoder
from shardinit.core.ir.graph import Node, Subgraph, Value, extract, topological
from shardinit.core.prng import derivation as keys
from shardinit.core.types import Dim, DType, Values, Words
from shardinit.core.window import constants
from shardinit.core.window.analysis import Analysis, constants_among, covered
from shardinit.core.window.evaluate import evaluate_window
from shardinit.core.window.reasons import ReplicatedReason
from shardinit.core.window.replicated import evaluate_replicated


class Kind(enum.Enum):
    """What a leaf program makes. The values are names of the file format's."""

    WINDOWED = "windowed"
    """Any window of its leaf, computed alone."""
    REPLICATED = "replicated"
    """All of its leaves, on every device."""
    TABLE = "table"
    """A table of constants, made once on the host and handed out."""


@runtime_checkable
class Program(Protocol):
    """A leaf program, from a traced function or from a portable module."""

    @property
    def kind(self) -> Kind:
        """What it makes."""
        ...

    @property
    def digest(self) -> str:
        """Hash of the canonical form, in hex; equal programs have equal digests."""
        ...

    @property
    def replicated_reason(self) -> ReplicatedReason | None:
        """Why every device computes all of it; None if it computes windows."""
        ...

    @property
    def fills(self) -> bool:
        """Whether all elements are known to be one number, which takes no key."""
        ...

    @property
    def words(self) -> int:
        """Number of 32-bit words of all operands together."""
        ...

    @property
    def outs(self) -> Sequence[tuple[tuple[Dim, ...], DType]]:
        """Shape (symbolic in a file, where windowed) and dtype of each result."""
        ...

    def window(
        self,
        words: Words,
        starts: Sequence[Sequence[Dim]],
        shapes: Sequence[Sequence[Dim]],
        *,
        lanes: bool,
    ) -> list[Values]:
        """One window of each result (see ``LeafProgram.window``)."""
        ...


@dataclass(frozen=True, eq=False)
class LeafProgram:
    """A function from operands to one leaf, or to several that share replicated work.

    Attributes:
      graph: the computation; its inputs are the operands (typed keys or raw words).
      digest: hash of the canonical form, in hex; equal programs have equal digests.
      analysis: how it is windowed, or why it cannot be; None for a table of constants,
        which is made once on the host.
    """

    graph: Subgraph
    digest: str
    analysis: Analysis | None

    @property
    def kind(self) -> Kind:
        """What it makes."""
        if self.analysis is None:
            return Kind.TABLE
        replicated = self.analysis.replicated_reason is not None
        return Kind.REPLICATED if replicated else Kind.WINDOWED

    @property
    def replicated_reason(self) -> ReplicatedReason | None:
        """Why every device computes all of it; None if it computes windows."""
        return self.analysis.replicated_reason if self.analysis is not None else None

    @property
    def fills(self) -> bool:
        """Whether all elements are one number, a literal or an operand."""
        if self.kind is not Kind.WINDOWED:
            return False
        nodes = topological(self.graph.outs)
        if not nodes or any(node.name != "broadcast_in_dim" for node in nodes):
            return False
        number = nodes[0].inputs[0]
        return number.size == 1 and not jx.is_key(number.dtype)

    @property
    def outs(self) -> list[tuple[tuple[int, ...], DType]]:
        """Shape and dtype of each result."""
        return [(v.shape, v.dtype) for v in self.graph.outs]

    @property
    def words(self) -> int:
        """Number of 32-bit words of all operands together."""
        return sum(_operand_words(v) for v in self.graph.inputs)

    def operands(self, words: Words) -> list[Values]:
        """Splits one vector of words into the operands, typed keys wrapped."""
        out, start = [], 0
        for value in self.graph.inputs:
            count = _operand_words(value)
            part = words[start : start + count]
            start += count
            if jx.is_key(value.dtype):
                impl = jx.key_impl(value.dtype)
                width = keys.words_per_key(impl)
                part = part.reshape(*value.shape, width)
                out.append(jax.random.wrap_key_data(part, impl=impl))
            elif jax.numpy.issubdtype(value.dtype, np.floating):
                out.append(from_word(part, value.dtype).reshape(value.shape))
            else:
                out.append(part.reshape(value.shape))
        return out

    def window(
        self,
        words: Words,
        starts: Sequence[Sequence[Dim]],
        shapes: Sequence[Sequence[Dim]],
        *,
        lanes: bool,
    ) -> list[Values]:
        """One window of each result.

        Args:
          words: uint32 vector, the operands' words one after the other.
          starts: for each result where its window begins, a scalar an axis.
          shapes: for each result the window's shape.
          lanes: evaluate over flat lanes (CPU).
        """
        operands = self.operands(words)
        if self.analysis is None:
            return constants.evaluate_table(self.graph)
        if self.analysis.replicated_reason is not None:
            return evaluate_replicated(self.graph, operands, starts, shapes)
        return [
            evaluate_window(
                self.graph, self.analysis, operands, starts[0], shapes[0], lanes=lanes
            )
        ]


def _operand_words(value: Value) -> int:
    if jx.is_key(value.dtype):
        return value.size * keys.words_per_key(jx.key_impl(value.dtype))
    return value.size


def flatten(outs: list[Value], operands: list[Value]) -> Subgraph:
    """A leaf program's graph with every call inlined and every map vmapped.

    A map whose steps no rule covers stays, as one whose bits are those of a loop alone:
    it is windowed by the step. Short loops over integers (``choice`` searches its table
    in one) are unrolled.
    """
    inliner = Builder(folds_keys=True, keeps_calls=False)

    def expand(node: Node, inputs: list[Value]) -> list[Value] | None:
        if node.name == "call":
            jaxpr, consts = jx.opened(node.params["jaxpr"])
            return inliner.read(jaxpr, consts, inputs)
        if node.name == "map":
            body, consts = jx.opened(_vmapped(node))
            flat = inliner.read(body, consts, inputs)
            # Under jit a loop's results are in memory before anything is made of them.
            return fence(flat) if _ruled(flat, inputs) and not looped(flat) else None
        if node.name == "scan":
            parts = jx.scan_parts(node, node.inputs, node.outputs)
            return inliner.unrolled(parts, inputs, len(node.outputs))
        if node.name == jx.HI_CALL:
            avals = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in node.inputs]
            body, consts = jx.opened(jx.expanded(node, avals))
            return inliner.read(body, consts, inputs)
        return None

    return extract(outs, operands, expand)


def _ruled(outs: list[Value], inputs: list[Value]) -> bool:
    """Whether all between the inputs and the results windows or derives keys."""
    order = topological(outs, set(inputs))
    known = constants_among(order)
    return covered(node for node in order if not known.issuperset(node.outputs))


def _vmapped(node: Node) -> jx.ClosedJaxpr:
    body = node.params["jaxpr"]
    axes = tuple(0 if m else None for m in node.params["mapped"])
    step = jax.vmap(
        lambda *args: jx.run(body, (), args)[0],
        in_axes=axes,
        axis_size=node.params["length"],
    )
    avals = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in node.inputs]
    return jx.closed_from(step, *avals)


def digest_of(graph: Subgraph) -> str:
    """Hash of the canonical form of a leaf program."""
    encoder = Encoder()
    names: dict[Value, tuple[str | int, int]] = {}
    for number, value in enumerate(graph.inputs):
        names[value] = ("in", number)
        encoder.aval(value.shape, value.dtype)

    def put(value: Value) -> None:
        if value in names:
            encoder.put(names[value])
        else:
            encoder.put("const")
            encoder.array(value.const)

    for number, node in enumerate(topological(graph.outs)):
        encoder.put(node.name)
        encoder.params(node.params)
        for value in node.inputs:
            put(value)
        for value in node.outputs:
            names[value] = (number, value.index)
            encoder.aval(value.shape, value.dtype)
    encoder.put("out")
    for value in graph.outs:
        put(value)
    return encoder.digest()
