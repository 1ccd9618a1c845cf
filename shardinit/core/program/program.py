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
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import jax
from google.protobuf.message import DecodeError

from shardinit.core.cut.cut import Cut, LeafCut
from shardinit.core.cut.leaf_program import Program
from shardinit.core.cut.sources import Table
from shardinit.core.init_fn import AxisNames, InitFn
from shardinit.core.plan.leaves import gather_results, leaf_infos
from shardinit.core.plan.plan import Plan
from shardinit.core.plan.planning import plan
from shardinit.core.program import format_1
from shardinit.core.program.axes import read_axes
from shardinit.core.program.codec import named_by_modules, read_cut, write_cut
from shardinit.core.program.envelope import content_of
from shardinit.core.program.exported import ExportedProgram, check_convention
from shardinit.core.program.trial import try_in_process
from shardinit.core.types import Tree
from shardinit.errors import ArgumentError, ProgramFormatError
from shardinit.files import write_file
from shardinit.v1 import program_pb2 as pb
from shardinit.version import release

FORMAT = 2


@dataclass(frozen=True, eq=False)
class InitProgram:
    """Initial weights as a portable program.

    Attributes:
      content: the serialised ``InitProgramContent`` message, as it was written.
      format: of that message; a program of format 1 is kept and sent as it is.
      untrusted: whether a stranger made it. Its functions are then known by their bytes
        and not by what it says of them: it has a fingerprint of its own.

    Example:
      >>> import jax, shardinit
      >>> program = shardinit.export_plan(lambda key: jax.random.normal(key, (8, 32)))
      >>> again = shardinit.InitProgram.from_bytes(program.to_bytes())
      >>> again.sha256 == program.sha256, shardinit.init(again, 0).shape
      (True, (8, 32))
    """

    content: bytes
    format: int = FORMAT
    untrusted: bool = False

    def __repr__(self) -> str:
        return f"<InitProgram of {len(self.content):,} bytes, sha256 {self.sha256}>"

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
        return self._cut.fingerprint if self.untrusted else self.message.fingerprint

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
        """The envelope: format version, digest, content.

        Example:
          >>> import jax, shardinit
          >>> init = lambda key: jax.random.normal(key, (1024, 64))
          >>> len(shardinit.export_plan(init).to_bytes()) < 4 * 1024 * 64  # the weights
          True
        """
        # Deterministic: by default protobuf promises no order for the entries of a map,
        # nor the same bytes from two runs
        # (https://protobuf.dev/programming-guides/serialization-not-canonical/).
        return pb.InitProgram(
            format=self.format,
            sha256=hashlib.sha256(self.content).digest(),
            content=zlib.compress(self.content, 9),
            compression=pb.COMPRESSION_ZLIB,
            content_size=len(self.content),
        ).SerializeToString(deterministic=True)

    @classmethod
    def from_bytes(cls, data: bytes, *, untrusted: bool = False) -> InitProgram:
        """Reads an envelope and checks all that can be checked without running it.

        Args:
          data: what ``to_bytes`` gave.
          untrusted: somebody may have made it who wants harm: see ``load_program``.

        Raises:
          ProgramFormatError: another format version, a wrong digest, a content that
            contradicts itself, a program of a newer JAX or of one too old, or a
            function that calls what JAX does not vouch for.

        Example:
          >>> import jax, shardinit
          >>> program = shardinit.export_plan(lambda key: {"w": jax.random.normal(key)})
          >>> shardinit.InitProgram.from_bytes(program.to_bytes()).paths
          ('w',)
        """
        try:
            envelope = pb.InitProgram.FromString(data)
        except DecodeError as error:
            raise ProgramFormatError(
                "init program",
                f"{len(data)} bytes that are no protobuf message",
                "what InitProgram.save wrote",
            ) from error
        if envelope.format not in (1, FORMAT):
            raise ProgramFormatError(
                "init program",
                f"format version {envelope.format}",
                f"version 1 or {FORMAT}",
                "Load it with the shardinit release that wrote it, or export it again",
            )
        program = cls(content_of(envelope), envelope.format, untrusted)
        _check_version(program.jax_version)
        check_convention(program.message.calling_convention)
        _ = program._axes
        if untrusted:
            try_in_process(data)
        _check_functions(program.as_cut())
        return program

    def save(self, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Writes the program to ``path``: complete under its name, or not at all.

        Args:
          path: the file; where this program is already, it is left.
          replace: whether something else that is there may be replaced.

        Raises:
          ProgramFormatError: something else is there.

        Example:
          >>> import jax, shardinit, tempfile
          >>> program = shardinit.export_plan(lambda key: {"w": jax.random.normal(key)})
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     program.save(f"{folder}/model.program")
          ...     shardinit.load_program(f"{folder}/model.program").paths
          ('w',)
        """
        try:
            write_file(path, self.to_bytes(), replace=replace)
        except FileExistsError as error:
            with suppress(ProgramFormatError, OSError):
                if load_program(path).fingerprint == self.fingerprint:
                    return
            raise ProgramFormatError.taken(
                "init program", path, "it is not this program"
            ) from error

    def as_cut(self) -> Cut:
        """The program as what a traced function becomes.

        Example:
          >>> import jax, shardinit
          >>> program = shardinit.export_plan(lambda key: {"w": jax.random.normal(key)})
          >>> [leaf.path for leaf in program.as_cut().leaves]
          ['w']
        """
        return self._cut

    @cached_property
    def _cut(self) -> Cut:
        try:
            message = self.message
            message = format_1.upgrade(message) if self.format == 1 else message
            found = read_cut(message)
            return named_by_modules(found) if self.untrusted else found
        except (IndexError, ValueError, TypeError, KeyError, OverflowError) as error:
            if isinstance(error, ProgramFormatError):
                raise
            raise ProgramFormatError(
                "init program", f"its content contradicts itself ({error})"[:300]
            ) from error

    @cached_property
    def _axes(self) -> list[AxisNames | None]:
        try:
            return [read_axes(leaf) for leaf in self.message.leaves]
        except ValueError as error:
            raise ProgramFormatError(
                "init program", f"its content contradicts itself ({error})"[:300]
            ) from error

    def as_init_fn(self) -> InitFn:
        """The program as an init function, with the leaves' logical axes.

        Example:
          >>> import jax, shardinit
          >>> program = shardinit.export_plan(lambda key: {"w": jax.random.normal(key)})
          >>> list(program.as_init_fn()(jax.random.key(0)))
          ['w']
        """
        axes = self._axes
        order = [self.paths.index(leaf.path) for leaf in self._cut.leaves]
        tree = jax.tree.unflatten(self._cut.tree, [axes[i] for i in order])
        return InitFn(self._run, axes=tree, name=self.name)

    def _run(self, key: jax.Array) -> Tree:
        """Runs on one device: what a plain init function would have done."""
        from shardinit.core.run.init import init

        return init(self, key)


def _check_functions(cut: Cut) -> None:
    """Holds every function against the leaves that it makes and what they give it."""
    for leaf in cut.leaves:
        if isinstance(leaf.source, Table):
            _check_table(leaf, leaf.source.program)
    seen: set[int] = set()
    for group in gather_results(cut):
        leaves = [cut.leaves[i] for i in group]
        number = cut.run_of(group[0]).program
        function = cut.programs[number]
        assert isinstance(function, ExportedProgram)
        if number not in seen:
            function.check([x.shape for x in leaves], [x.dtype for x in leaves])
            seen.add(number)
        given = sum(d.words for d in leaves[0].operands)
        if given != function.words:
            raise ProgramFormatError(
                f"leaf {leaves[0].path!r}",
                f"its operands have {given} words",
                f"the {function.words} that its function takes",
            )


def _check_table(leaf: LeafCut, function: Program) -> None:
    assert isinstance(function, ExportedProgram)
    function.check([leaf.shape], [leaf.dtype])
    if function.words:
        raise ProgramFormatError(
            f"leaf {leaf.path!r}",
            f"it is a table and its function takes {function.words} words",
            "a function without operands",
        )


def _check_version(producer: str) -> None:
    # A module with symbolic sizes that JAX 0.12 exported does not load on 0.10.2.
    if release(producer) > release(jax.__version__):
        raise ProgramFormatError(
            "init program",
            f"made by JAX {producer}",
            f"a producer not newer than the JAX here, {jax.__version__}",
            "Update JAX, or export the program with this version",
        )


def load_program(
    path: str | os.PathLike[str], *, untrusted: bool = False
) -> InitProgram:
    """Reads a program that ``InitProgram.save`` wrote.

    Args:
      path: the file.
      untrusted: the file comes from somebody who may want harm. Its functions are
        compiled in a process of their own first, which takes some seconds: an altered
        module can end the process that parses it, whatever its digests say. And its
        fingerprint is made of its modules' bytes: it is that of no other program,
        whatever the file says, and no plan's.

    Raises:
      ProgramFormatError: the file is no init program that may be run here.
      OSError: it cannot be read.

    Example:
      >>> import jax, shardinit, tempfile
      >>> program = shardinit.export_plan(lambda key: jax.random.normal(key, (8, 32)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     program.save(f"{folder}/model.program")
      ...     loaded = shardinit.load_program(f"{folder}/model.program")
      >>> loaded.fingerprint == program.fingerprint
      True
    """
    ArgumentError.check_path("load_program", path)
    with open(path, "rb") as file:
        return InitProgram.from_bytes(file.read(), untrusted=untrusted)


def export_plan(fn: object) -> InitProgram:
    """Makes the portable program of a plan, or of an init function.

    The mesh and the shardings of a plan do not enter, nor does ``select``: the
    program holds every leaf and runs on any mesh.

    Example:
      >>> import jax, shardinit
      >>> init = lambda key: {"w": jax.random.normal(key, (1 << 20, 64))}
      >>> program = shardinit.export_plan(init)
      >>> program.paths, len(program.to_bytes()) < 1 << 15  # the weights: 256 MiB
      (('w',), True)
    """
    made = fn if isinstance(fn, Plan) else plan(fn)
    infos = leaf_infos(made.cut, made.init_fn.axes)
    content = write_cut(made.cut, infos, made.name)
    return InitProgram(content.SerializeToString(deterministic=True))
