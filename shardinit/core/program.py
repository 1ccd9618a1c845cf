"""InitProgram: the second waist. A cut function without its code, without a mesh.

It holds the tree of the result, every leaf with the derivation of its keys, and the
few distinct functions as portable modules: a 405B-parameter model in a file of some
tens of kilobytes. It is accepted wherever an init function is, gives the same bits,
and needs neither the model's code nor its framework.

The envelope carries a SHA-256 of the content, checked before anything inside is
parsed, since a damaged module can crash the process that loads it.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from google.protobuf.message import DecodeError

from shardinit.core import keys, slicing
from shardinit.core import plan as planning
from shardinit.core.exported import ExportedProgram, export_program
from shardinit.core.init_fn import InitFn
from shardinit.core.jaxpr import is_key, key_impl, setting
from shardinit.core.tree import read_tree, write_tree
from shardinit.errors import ProgramFormatError
from shardinit.v1 import program_pb2 as pb

FORMAT = 1
MAX_CONTENT_BYTES = 1 << 30
MAX_ELEMENTS = 1 << 62


@dataclass(frozen=True, eq=False)
class InitProgram:
    """Initial weights as a portable program.

    Attributes:
      content: the serialised ``InitProgramContent`` message.
    """

    content: bytes

    @cached_property
    def sha256(self) -> str:
        """Digest of the content in hex: the program's name in caches."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def message(self) -> pb.InitProgramContent:
        """The parsed content."""
        try:
            return pb.InitProgramContent.FromString(self.content)
        except DecodeError as error:
            raise ProgramFormatError(
                "init program",
                "its content is no protobuf message",
                "InitProgramContent",
            ) from error

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the functions, equal to that of the plan it came from."""
        return self.message.fingerprint

    @property
    def jax_version(self) -> str:
        """JAX version of the producer; the program runs on that one or a newer one."""
        return self.message.jax_version

    @property
    def name(self) -> str:
        """What the producer called the model."""
        return self.message.name or "program"

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """Paths of all leaves."""
        return tuple(leaf.path for leaf in self.message.leaves)

    def to_bytes(self) -> bytes:
        """The envelope: format version, digest, content."""
        return pb.InitProgram(
            format=FORMAT,
            sha256=hashlib.sha256(self.content).digest(),
            content=zlib.compress(self.content, 9),
            compression=pb.COMPRESSION_ZLIB,
            content_size=len(self.content),
        ).SerializeToString(deterministic=True)

    @classmethod
    def from_bytes(cls, data: bytes) -> InitProgram:
        """Reads an envelope and checks all that can be checked without running it.

        Raises:
          ProgramFormatError: another format version, a wrong digest, a content that
            contradicts itself, or a program of a newer JAX.
        """
        try:
            envelope = pb.InitProgram.FromString(data)
        except DecodeError as error:
            raise ProgramFormatError(
                "init program", f"{len(data)} bytes that are no protobuf message"
            ) from error
        if envelope.format != FORMAT:
            raise ProgramFormatError(
                "init program",
                f"format version {envelope.format}",
                f"version {FORMAT}",
                "Load it with the shardinit release that wrote it, or export it again",
            )
        content = _unpack(envelope)
        if hashlib.sha256(content).digest() != envelope.sha256:
            raise ProgramFormatError(
                "init program",
                "its content does not match its SHA-256: it is damaged or cut short",
                remedy="Fetch or export it again",
            )
        program = cls(content)
        _check_version(program.jax_version)
        program.as_cut()
        return program

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the program to ``path``: complete under its name, or not at all."""
        path = os.fspath(path)
        folder = os.path.dirname(os.path.abspath(path))
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".program-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self.to_bytes())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def as_cut(self) -> slicing.Cut:
        """The program as what a traced function becomes."""
        return self._cut

    @cached_property
    def _cut(self) -> slicing.Cut:
        try:
            return _read(self.message)
        except (IndexError, ValueError, TypeError, KeyError, OverflowError) as error:
            if isinstance(error, ProgramFormatError):
                raise
            raise ProgramFormatError(
                "init program", f"its content contradicts itself ({error})"[:300]
            ) from error

    def as_init_fn(self) -> InitFn:
        """The program as an init function, with the leaves' logical axes."""
        axes = [
            tuple(a or None for a in leaf.axes) if leaf.has_axes else None
            for leaf in self.message.leaves
        ]
        order = [self.paths.index(leaf.path) for leaf in self._cut.leaves]
        tree = jax.tree.unflatten(self._cut.tree, [axes[i] for i in order])
        return InitFn(self._run, axes=tree, name=self.name)

    def _run(self, key: Any) -> Any:
        """Runs on one device: what a plain init function would have done."""
        from shardinit.core.compiled import init

        return init(self, key)


def _unpack(envelope: pb.InitProgram) -> bytes:
    """The content, decompressed to no more than was announced and is allowed."""
    size = envelope.content_size
    if envelope.compression != pb.COMPRESSION_ZLIB or size > MAX_CONTENT_BYTES:
        raise ProgramFormatError(
            "init program",
            f"a content of {size:,} bytes, compression {envelope.compression}",
            f"at most {MAX_CONTENT_BYTES:,} bytes, compressed with zlib",
        )
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(envelope.content, size + 1)
    except zlib.error as error:
        raise ProgramFormatError(
            "init program", f"its content does not decompress ({error})"
        ) from error
    if len(content) != size or unpacker.unused_data:
        raise ProgramFormatError(
            "init program",
            f"its content has {len(content):,} bytes or more",
            f"the {size:,} that are announced",
        )
    return content


def _check_version(producer: str) -> None:
    def numbers(version: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", version)[:3]]

    if numbers(producer) > numbers(jax.__version__):
        raise ProgramFormatError(
            "init program",
            f"made by JAX {producer}",
            f"a producer not newer than the JAX here, {jax.__version__}",
            "Update JAX, or export the program with this version",
        )


def load_program(path: str | os.PathLike[str]) -> InitProgram:
    """Reads a program that ``InitProgram.save`` wrote.

    Raises:
      ProgramFormatError: the file is no init program that may be run here.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return InitProgram.from_bytes(file.read())


def export_plan(fn: Any) -> InitProgram:
    """Makes the portable program of a plan, or of an init function.

    The mesh and the shardings of a plan do not enter, nor does ``select``: the
    program holds every leaf and runs on any mesh.
    """
    made = fn if isinstance(fn, planning.Plan) else planning.plan(fn)
    cut = made.cut
    content = pb.InitProgramContent(
        jax_version=jax.__version__,
        key_impl=cut.impl,
        typed_key=cut.typed,
        x64=bool(setting("jax_enable_x64")),
        fingerprint=cut.fingerprint,
        name=made.name,
    )
    content.nodes.extend(write_tree(cut.tree))
    numbers = _write_keys(cut, content)
    infos = planning.leaf_infos(cut, made.init_fn.axes)
    for leaf, info in zip(cut.leaves, infos, strict=True):
        _write_leaf(leaf, info.axes, numbers, content)
    for program in cut.programs:
        _write_function(export_program(program), cut, content)
    return InitProgram(content.SerializeToString(deterministic=True))


# ---- writing -----------------------------------------------------------------------


def _write_keys(cut: slicing.Cut, content: pb.InitProgramContent) -> dict[int, int]:
    numbers: dict[int, int] = {}
    for node in keys.topological(d for leaf in cut.leaves for d in leaf.operands):
        out = content.key_nodes.add()
        parents = [numbers[id(p)] for p in node.parents]
        numbers[id(node)] = len(numbers)
        foreign = node.impl if node.impl != cut.impl else ""
        if node.op == "root":
            out.root.SetInParent()
        elif node.op == "fold_in":
            out.fold_in.parent = parents[0]
            out.fold_in.data.extend(node.data.tolist())
            if len(node.data) != 1:
                out.fold_in.shape.append(len(node.data))
        elif node.op == "split":
            out.split.parent = parents[0]
            out.split.shape.extend(node.shape)
        elif node.op == "words":
            out.words.data = node.data.astype("<u4").tobytes()
            out.words.key_impl = foreign
        else:
            out.take.parents.extend(parents)
            out.take.key_impl = foreign
            start = int(node.data[0]) if node.data.size else 0
            if np.array_equal(node.data, np.arange(start, start + node.data.size)):
                out.take.range.start = start
                out.take.range.count = node.data.size
            else:
                out.take.list.words.extend(node.data.tolist())
    return numbers


def _write_leaf(
    leaf: slicing.LeafCut,
    axes: Sequence[str | None] | None,
    numbers: dict[int, int],
    content: pb.InitProgramContent,
) -> None:
    out = content.leaves.add(path=leaf.path, shape=leaf.shape, result=leaf.result)
    out.dtype = "uint32" if is_key(leaf.dtype) else str(leaf.dtype)
    if is_key(leaf.dtype):
        out.key_impl = key_impl(leaf.dtype)
    if axes is not None:
        out.has_axes = True
        out.axes.extend(a or "" for a in axes)
    if leaf.program >= 0:
        out.function = leaf.program
        for derived in leaf.operands:
            out.operands.add(key_node=numbers[id(derived)])
    elif leaf.const is not None:
        constant = out.host.constant
        constant.dtype, constant.data = str(leaf.const.dtype), leaf.const.tobytes()
        constant.shape.extend(leaf.const.shape)
    else:
        out.host.key_node = numbers[id(leaf.operands[0])]


def _write_function(
    function: ExportedProgram, cut: slicing.Cut, content: pb.InitProgramContent
) -> None:
    shape, dtype = function.outs[0]
    content.functions.add(
        module=function.module,
        windowed=not function.whole,
        whole=function.whole,
        dtype=str(dtype),
        rank=len(shape),
        digest=bytes.fromhex(function.digest),
        platforms=function.platforms,
    )


# ---- reading -----------------------------------------------------------------------


def _read(content: pb.InitProgramContent) -> slicing.Cut:
    x64 = bool(setting("jax_enable_x64"))
    if content.x64 != x64:
        raise ProgramFormatError(
            "init program",
            f"traced with jax_enable_x64={content.x64}",
            f"the setting of this process, {x64}",
            "Change the setting, or export the program again",
        )
    derived = _read_keys(content)
    functions = tuple(_read_function(f) for f in content.functions)
    leaves = [_read_leaf(leaf, derived, functions) for leaf in content.leaves]
    if len({leaf.path for leaf in leaves}) != len(leaves):
        raise ValueError("two leaves have one path")
    tree, order = read_tree(content.nodes, len(leaves))
    cut = slicing.Cut(
        tuple(leaves[i] for i in order),
        functions,
        tree,
        content.key_impl,
        content.typed_key,
    )
    if cut.fingerprint != content.fingerprint:
        raise ValueError("its fingerprint is not that of its functions")
    return cut


def _read_keys(content: pb.InitProgramContent) -> list[keys.Derivation]:
    made: list[keys.Derivation] = []

    def parent(number: int) -> keys.Derivation:
        if number >= len(made):
            raise ValueError(f"key node {len(made)} names node {number}, not before it")
        return made[number]

    for node in content.key_nodes:
        kind = node.WhichOneof("derivation")
        if kind == "root":
            made.append(keys.root(content.key_impl))
        elif kind == "fold_in":
            source = parent(node.fold_in.parent)
            data = np.asarray(node.fold_in.data, np.uint32)
            if data.size * keys.words_per_key(source.impl) != source.words:
                raise ValueError("fold_in of another number of keys")
            made.append(keys.fold_in(source, data))
        elif kind == "split":
            made.append(keys.split(parent(node.split.parent), _shape(node.split.shape)))
        elif kind == "words":
            words = np.frombuffer(node.words.data, "<u4")
            made.append(keys.constant(words, node.words.key_impl or content.key_impl))
        elif kind == "take":
            made.append(_read_take(node.take, parent, content.key_impl))
        else:
            raise ValueError(f"key node {len(made)} says nothing")
    return made


def _read_take(take: Any, parent: Any, impl: str) -> keys.Derivation:
    parents = [parent(number) for number in take.parents]
    there = sum(p.words for p in parents)
    if take.WhichOneof("indices") == "range":
        begin, count = take.range.start, take.range.count
        if begin + count > there:
            raise ValueError("take beyond the words of its parents")
        places = np.arange(begin, begin + count)
    else:
        places = np.asarray(take.list.words, np.int64)
        if places.size and places.max() >= there:
            raise ValueError("take beyond the words of its parents")
    return keys.take(parents, places, take.key_impl or impl)


def _read_function(function: pb.Function) -> ExportedProgram:
    if function.windowed == bool(function.whole) or len(function.digest) != 32:
        raise ValueError("a function that is neither windowed nor whole")
    return ExportedProgram(
        function.module,
        function.digest.hex(),
        function.whole,
    )


def _read_leaf(
    leaf: pb.Leaf,
    derived: Sequence[keys.Derivation],
    functions: Sequence[ExportedProgram],
) -> slicing.LeafCut:
    shape = _shape(leaf.shape)
    dtype: Any = np.dtype(jax.numpy.dtype(leaf.dtype))
    if leaf.key_impl:
        dtype = jax.eval_shape(lambda: jax.random.key(0, impl=leaf.key_impl)).dtype
    source = leaf.WhichOneof("source")
    operands = tuple(derived[o.key_node] for o in leaf.operands)
    if source == "function":
        if leaf.function >= len(functions):
            raise ValueError(f"leaf {leaf.path!r} names function {leaf.function}")
        return slicing.LeafCut(
            leaf.path, shape, dtype, leaf.function, leaf.result, operands
        )
    if source != "host":
        raise ValueError(f"leaf {leaf.path!r} comes from nowhere")
    if leaf.host.WhichOneof("value") == "constant":
        constant = leaf.host.constant
        array = np.frombuffer(constant.data, jax.numpy.dtype(constant.dtype))
        array = array.reshape(_shape(constant.shape))
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"leaf {leaf.path!r} is not like its constant")
        return slicing.LeafCut(leaf.path, shape, dtype, -1, 0, (), array)
    key = derived[leaf.host.key_node]
    return slicing.LeafCut(leaf.path, shape, dtype, -1, 0, (key,))


def _shape(dims: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(n) for n in dims)
    size = 1
    for n in shape:
        size *= max(n, 1)
        if n < 0 or size > MAX_ELEMENTS:
            raise ValueError(f"the shape {shape}")
    return shape
