"""A cut function as a protobuf message, and back.

What is written is checked when it is read: every index lies inside its list, every
node names only nodes before itself, shapes are shapes, and the fingerprint is that of
the functions. A contradiction is a ``ValueError`` here and one clear error outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from shardinit.core.cut.cut import Cut, LeafCut
from shardinit.core.cut.leaf_program import Kind, Program
from shardinit.core.cut.sources import (
    Constant,
    Keys,
    Replicated,
    Source,
    Table,
    Windowed,
)
from shardinit.core.ir.jaxpr import is_key, key_impl, setting
from shardinit.core.plan.leaf_info import LeafInfo
from shardinit.core.prng.derivation import Derivation
from shardinit.core.program.axes import read_stated, write_axes, write_stated
from shardinit.core.program.exported import (
    ExportedProgram,
    current_convention,
    export_program,
)
from shardinit.core.program.key_nodes import read_keys, read_shape, write_keys
from shardinit.core.program.treedef import read_tree, write_tree
from shardinit.core.types import DType
from shardinit.core.window.reasons import Reason, ReplicatedReason
from shardinit.errors import ProgramFormatError
from shardinit.v1 import program_pb2 as pb

_KINDS = {
    Kind.WINDOWED: pb.Function.KIND_WINDOWED,
    Kind.REPLICATED: pb.Function.KIND_REPLICATED,
    Kind.TABLE: pb.Function.KIND_TABLE,
}
_KIND_OF = {number: kind for kind, number in _KINDS.items()}

# ---- writing -----------------------------------------------------------------------


def write_cut(cut: Cut, infos: Sequence[LeafInfo], name: str) -> pb.InitProgramContent:
    """The message of a cut function; exports each of its programs.

    Args:
      cut: the function.
      infos: for each leaf the names of its axes.
      name: what the model is called.
    """
    content = pb.InitProgramContent(
        jax_version=jax.__version__,
        key_impl=cut.impl,
        typed_key=cut.typed,
        x64=bool(setting("jax_enable_x64")),
        fingerprint=cut.fingerprint,
        name=name,
        calling_convention=current_convention(),
        key_streams=cut.streams,
    )
    content.nodes.extend(write_tree(cut.tree))
    content.same_key.extend(pb.SameKey(leaves=group) for group in cut.repeats)
    numbers = write_keys(cut, content)
    sources = [leaf.source for leaf in cut.leaves]
    tables = dict.fromkeys(x.program for x in sources if isinstance(x, Table))
    functions = [*cut.programs, *tables]  # tables last: the rest keeps its numbers
    numbers |= {id(table): functions.index(table) for table in tables}
    for leaf, info in zip(cut.leaves, infos, strict=True):
        _write_leaf(leaf, info, numbers, content)
    for function in functions:
        _write_function(export_program(function), content)
    return content


def _write_leaf(
    leaf: LeafCut,
    info: LeafInfo,
    numbers: dict[int, int],
    content: pb.InitProgramContent,
) -> None:
    out = content.leaves.add(path=leaf.path, shape=leaf.shape)
    out.weak_type = leaf.weak_type
    out.dtype = "uint32" if is_key(leaf.dtype) else str(leaf.dtype)
    if is_key(leaf.dtype):
        out.key_impl = key_impl(leaf.dtype)
    write_axes(info, out)
    out.optimizer = info.optimizer
    if info.stated is not None:
        write_stated(info.stated, out.stated)
    match leaf.source:
        case Windowed() | Replicated() as run:
            out.function, out.result = run.program, run.result
            for derived in run.operands:
                out.operands.add(key_node=numbers[id(derived)])
        case Table(program):
            out.function = numbers[id(program)]
        case Constant(array):
            constant = out.host.constant
            constant.dtype, constant.data = str(array.dtype), array.tobytes()
            constant.shape.extend(array.shape)
        case Keys(derivation):
            out.host.key_node = numbers[id(derivation)]


def _write_function(function: ExportedProgram, content: pb.InitProgramContent) -> None:
    shape, dtype = function.outs[0]
    why = function.replicated_reason
    content.functions.add(
        module=function.module,
        kind=_KINDS[function.kind],
        windowed=function.kind is Kind.WINDOWED,
        module_sha256=function.module_sha256,
        dtype=str(dtype),
        rank=len(shape),
        digest=bytes.fromhex(function.digest),
        platforms=function.platforms,
        reason="" if why is None else why.reason.value,
        whole="" if why is None else why.text,
    )


# ---- reading -----------------------------------------------------------------------


def read_cut(content: pb.InitProgramContent) -> Cut:
    """The cut function of a message.

    Raises:
      ProgramFormatError: it was traced with another 64-bit setting.
      ValueError: it contradicts itself (IndexError, TypeError, KeyError and
        OverflowError too, from what it says being impossible).
    """
    _refuse_other_x64(content)
    streams = tuple(content.key_streams)
    if streams != tuple(sorted(set(streams))):
        raise ValueError(f"the streams {streams}")
    derived = read_keys(content)
    functions, programs = _read_functions(content)
    leaves = [_read_leaf(leaf, derived, functions) for leaf in content.leaves]
    if len({leaf.path for leaf in leaves}) != len(leaves):
        raise ValueError("two leaves have one path")
    tree, order = read_tree(content.nodes, len(leaves))
    stated = [read_stated(leaf) for leaf in content.leaves]
    cut = Cut(
        tuple(leaves[i] for i in order),
        programs,
        tree,
        content.key_impl,
        content.typed_key,
        streams,
        tuple(stated[i] for i in order),
        _read_same_key(content, order),
    )
    if cut.fingerprint != content.fingerprint:
        raise ValueError("its fingerprint is not that of its functions")
    return cut


def _refuse_other_x64(content: pb.InitProgramContent) -> None:
    # A function that was traced with 64-bit types draws other numbers than without.
    x64 = bool(setting("jax_enable_x64"))
    if content.x64 != x64:
        raise ProgramFormatError(
            "init program",
            f"traced with jax_enable_x64={content.x64}",
            f"the setting of this process, {x64}",
            "Change the setting, or export the program again",
        )


def _read_functions(
    content: pb.InitProgramContent,
) -> tuple[tuple[ExportedProgram, ...], tuple[ExportedProgram, ...]]:
    """All functions, and the programs among them: those before the tables."""
    functions = tuple(_read_function(f) for f in content.functions)
    programs = tuple(f for f in functions if f.kind is not Kind.TABLE)
    if programs != functions[: len(programs)]:
        raise ValueError("a table stands before other functions")
    return functions, programs


def _read_same_key(
    content: pb.InitProgramContent, order: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Groups of leaves that one key drew, by their numbers in the tree.

    What is shared on purpose, as tied weights are, cannot be told from a repeated key
    by the functions and keys of a file: it has no graph.
    """
    place = {number: i for i, number in enumerate(order)}
    groups = [tuple(group.leaves) for group in content.same_key]
    for group in groups:
        if len(group) < 2 or list(group) != sorted(set(group)):
            raise ValueError(f"the leaves of one key are {group}")
        if group[-1] >= len(content.leaves):
            raise ValueError(f"one key drew leaf {group[-1]}, which is not there")
    return tuple(tuple(sorted(place[i] for i in group)) for group in groups)


def named_by_modules(cut: Cut) -> Cut:
    """The cut of a stranger's program: each function is known by its module's bytes.

    What a file says of a function cannot be derived from its module, so whoever made
    the file could say of any module that it is another program's.
    """

    def named(function: Program) -> ExportedProgram:
        assert isinstance(function, ExportedProgram)  # as in every file
        return replace(function, digest=function.module_sha256.hex())

    leaves = [
        replace(leaf, source=Table(named(leaf.source.program)))
        if isinstance(leaf.source, Table)
        else leaf
        for leaf in cut.leaves
    ]
    return replace(cut, leaves=(*leaves,), programs=(*map(named, cut.programs),))


def _read_function(function: pb.Function) -> ExportedProgram:
    kind = _KIND_OF.get(function.kind)
    if kind is None or len(function.digest) != 32:
        raise ValueError("a function that does not say what it makes")
    windowed = kind is Kind.WINDOWED
    if function.windowed != windowed or bool(function.reason) != (
        kind is Kind.REPLICATED
    ):
        raise ValueError("a function whose kind is not what its fields say")
    made = ExportedProgram(function.module, function.digest.hex(), kind, _why(function))
    if made.module_sha256 != function.module_sha256:
        raise ValueError(
            f"the module of function {made.digest[:12]} is not that of its record"
        )
    return made


def _why(function: pb.Function) -> ReplicatedReason | None:
    if not function.reason:
        return None
    known = {reason.value: reason for reason in Reason}
    reason = known.get(function.reason, Reason.UNKNOWN)
    return ReplicatedReason(reason, function.whole or function.reason)


def _read_leaf(
    leaf: pb.Leaf,
    derived: Sequence[Derivation],
    functions: Sequence[ExportedProgram],
) -> LeafCut:
    shape = read_shape(leaf.shape)
    dtype: DType = _dtype(leaf.dtype)
    if leaf.key_impl:  # there is no public name for the dtype of keys: as it is traced
        dtype = jax.eval_shape(lambda: jax.random.key(0, impl=leaf.key_impl)).dtype
    source = _read_source(leaf, derived, functions)
    if isinstance(source, Constant):
        array = source.array
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"leaf {leaf.path!r} is not like its constant")
    return LeafCut(leaf.path, shape, dtype, source, leaf.weak_type)


def _read_source(
    leaf: pb.Leaf,
    derived: Sequence[Derivation],
    functions: Sequence[ExportedProgram],
) -> Source:
    operands = tuple(derived[o.key_node] for o in leaf.operands)
    kind = leaf.WhichOneof("source")
    if kind == "function":
        if leaf.function >= len(functions):
            raise ValueError(f"leaf {leaf.path!r} names function {leaf.function}")
        function = functions[leaf.function]
        if function.kind is Kind.TABLE:
            return Table(function)
        if function.kind is Kind.REPLICATED:
            return Replicated(leaf.function, operands, leaf.result)
        if leaf.result:
            raise ValueError(f"leaf {leaf.path!r} is result {leaf.result} of one")
        return Windowed(leaf.function, operands)
    if kind != "host":
        raise ValueError(f"leaf {leaf.path!r} comes from nowhere")
    if leaf.host.WhichOneof("value") != "constant":
        return Keys(derived[leaf.host.key_node])
    constant = leaf.host.constant
    array = np.frombuffer(constant.data, _dtype(constant.dtype))
    return Constant(array.reshape(read_shape(constant.shape)))


def _dtype(name: str) -> np.dtype:
    dtype = np.dtype(jax.numpy.dtype(name))
    kinds = (np.number, np.bool_)
    if not any(jax.numpy.issubdtype(dtype, kind) for kind in kinds):
        raise ValueError(f"the dtype {name!r}")
    return dtype
