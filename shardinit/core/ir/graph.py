"""The traced init function as a graph that leaf programs are cut from.

Values and nodes have links backwards only, so that a leaf finds what it needs by
walking from its result towards the key. ``builder`` makes graphs of jaxprs; here are
the data and what is done with a piece of it: order it, run it, copy it out.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import jax
import numpy as np

from shardinit.core.ir import jaxpr as jx
from shardinit.core.prng import derivation as keys
from shardinit.core.types import DType, Values


class Value:
    """One array in the graph.

    Attributes:
      shape: its shape; dtype: its dtype (a key dtype for typed keys).
      node: the node that makes it, None for an input, a constant or a derived key.
      index: which result of the node it is.
      const: its contents when they are known while tracing.
      counted: whether the contents were folded from an ``iota``, which is no constant
        to XLA.
      key: its derivation when it is made of keys alone.
    """

    __slots__ = ("const", "counted", "dtype", "index", "key", "node", "shape")

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: DType,
        node: Node | None = None,
        index: int = 0,
        const: Values | None = None,
        key: keys.Derivation | None = None,
    ):
        self.shape, self.dtype = tuple(shape), dtype
        self.node, self.index = node, index
        self.const, self.key = const, key
        self.counted = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)


class Node:
    """One equation: a primitive, a call that was kept, or a map over a leading axis.

    Attributes:
      name: the primitive's name, ``"call"``, ``"map"`` or ``"fence"``.
      prim: the primitive; None for those three.
      params: the primitive's parameters; for a call ``jaxpr`` (closed); for a map
        ``jaxpr`` (of one step, one result), ``mapped`` (for each input whether its
        leading axis is mapped), ``length`` and ``index`` (the map's result among the
        scan's, for the reader).
      inputs, outputs: the values.
    """

    __slots__ = ("inputs", "name", "outputs", "params", "prim")

    def __init__(
        self,
        name: str,
        prim: jx.Primitive | None,
        params: jx.Params,
        inputs: Sequence[Value],
        out_avals: Iterable[jx.Aval],
    ):
        self.name, self.prim, self.params = name, prim, params
        self.inputs = tuple(inputs)
        self.outputs = tuple(
            Value(a.shape, a.dtype, self, i) for i, a in enumerate(out_avals)
        )


def constant(value: jx.Operand, dtype: DType = None, *, counted: bool = False) -> Value:
    """A value known while tracing; ``dtype`` where a literal does not carry its own."""
    if not hasattr(value, "dtype") or dtype is not None:
        value = np.asarray(value, dtype)
    made = Value(value.shape, value.dtype, const=value)
    made.counted = counted
    return made


def topological(wanted: Iterable[Value], stop: Container[Value] = ()) -> list[Node]:
    """The nodes that ``wanted`` need, each after those it reads.

    Values in ``stop`` are taken as given: nothing behind them is visited.
    """

    def makers(values: Iterable[Value]) -> list[Node]:
        return [v.node for v in values if v.node is not None and v not in stop]

    order: list[Node] = []
    seen: set[int] = set()
    stack = [(node, False) for node in reversed(makers(wanted))]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((n, False) for n in reversed(makers(node.inputs)))
    return order


def interpret(wanted: Sequence[Value], known: Mapping[Value, Values]) -> list[Values]:
    """Runs the graph plainly on arrays or tracers, as the jaxpr would have run.

    Args:
      wanted: the values to compute.
      known: the inputs, or any other values to take as given.
    """
    values = dict(known)

    def read(value: Value) -> Values:
        if value.const is not None and value not in values:
            return value.const
        return values[value]

    for node in topological(wanted, known):
        args = [read(v) for v in node.inputs]
        if node.name == "call":
            outs = jx.call(node.params["jaxpr"], args)
        elif node.name == "map":
            outs = [_run_map(node, args)]
        elif node.prim is None:  # a fence: what it holds apart is apart here
            outs = args
        else:
            outs = jx.bind(node.prim, args, node.params)
        values.update(zip(node.outputs, outs, strict=True))
    return [read(v) for v in wanted]


def _run_map(node: Node, args: Sequence[Values]) -> Values:
    # A loop again and no vmap: in loops XLA's CPU compiler gives some functions other
    # last places (``cut.fences.looped``).
    mapped = node.params["mapped"]
    xs = [a for a, m in zip(args, mapped, strict=True) if m]

    def step(_: None, x: Sequence[Values]) -> tuple[None, Values]:
        scanned = iter(x)
        full = [next(scanned) if m else a for a, m in zip(args, mapped, strict=True)]
        return None, jx.run(node.params["jaxpr"], (), full)[0]

    return jax.lax.scan(step, None, xs, length=node.params["length"])[1]


def leaves(wanted: Sequence[Value], stop: Container[Value]) -> list[Value]:
    """The inputs that ``wanted`` need, taking the values of ``stop`` as inputs."""
    found: dict[Value, None] = {}
    seen: set[Value] = set()
    stack = list(reversed(wanted))
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in stop or (value.node is None and value.const is None):
            found[value] = None
        elif value.node is not None:
            stack.extend(reversed(value.node.inputs))
    return list(found)


class Subgraph:
    """A piece of a graph with inputs of its own (see ``extract``)."""

    def __init__(self, inputs: list[Value], outs: list[Value]):
        self.inputs, self.outs = inputs, outs


def extract(
    wanted: Sequence[Value],
    boundary: Sequence[Value],
    expand: Callable[[Node, list[Value]], list[Value] | None] | None = None,
) -> Subgraph:
    """Copies the nodes between ``boundary`` and ``wanted``.

    Args:
      wanted: the values to keep.
      boundary: values that become inputs, whether or not something makes them.
      expand: replaces a node by values of its own making; the default copies it.

    Returns:
      The copy; its inputs are in the order of ``boundary``.
    """
    copies: dict[Value, Value] = {b: Value(b.shape, b.dtype) for b in boundary}

    def copy(value: Value) -> Value:
        if value not in copies:
            copies[value] = Value(value.shape, value.dtype, const=value.const)
            copies[value].counted = value.counted
        return copies[value]

    for node in topological(wanted, set(boundary)):
        ins = [copy(v) for v in node.inputs]
        outs = expand(node, ins) if expand else None
        if outs is None:
            outs = list(
                Node(node.name, node.prim, node.params, ins, node.outputs).outputs
            )
        for old, new in zip(node.outputs, outs, strict=True):
            copies.setdefault(old, new)
    return Subgraph([copies[b] for b in boundary], [copy(w) for w in wanted])
