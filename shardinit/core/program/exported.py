"""One leaf program as a portable module: exported once, run anywhere, on any mesh.

The module takes the words of the leaf's operands, where the window starts, and an
empty array whose dimensions are the window's sizes. The sizes are symbolic, so one
module serves every shard of every mesh, and it is lowered for CPU, TPU and CUDA at
once, each with its own way to lay the window out. A replicated program takes its words
and gives the full leaf, which is cropped where it is called.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NoReturn

import jax
import numpy as np
from jax import export, lax

from shardinit.core.cut.leaf_program import Kind, Program
from shardinit.core.ir.jaxpr import no_mesh, setting
from shardinit.core.types import Dim, DType, Values, Words
from shardinit.core.window.reasons import ReplicatedReason
from shardinit.core.window.replicated import crop
from shardinit.errors import ProgramFormatError

# A module runs where it was lowered for, and cannot be lowered anew where it is loaded:
# https://docs.jax.dev/en/latest/export/export.html#cross-platform-and-multi-platform-export
PLATFORMS = ("cpu", "tpu", "cuda")
# JAX's setting of that name is the process's: of two exports at once one would restore
# what the other one has set, for good.
_LOCATIONS = threading.Lock()

# Calls out of the module that JAX promises to keep and that are linear algebra or
# bookkeeping of its own. Kernels that a module brings along are not among them.
_CUSTOM_CALL = re.compile(r"custom_call\s*@(\"[^\"]*\"|[\w.$-]+)")
_ALLOWED_CALLS = re.compile(
    r"""lapack_[sdcz][a-z]{4,5}_ffi | (cusolver|hipsolver|cusparse)_[a-z]+2?_ffi
    | (cu|hip)_(lu_pivots_to_permutation|threefry2x32_ffi) | Eigh | Qr | LuDecomposition
    | ProductOfElementaryHouseholderReflectors | shape_assertion
    | stablehlo\.dynamic_(reduce_window|rng_bit_generator|top_k)""",
    re.VERBOSE,
)


def current_convention() -> int:
    """The calling convention of what is exported here, as jax.export counts them."""
    return export.maximum_supported_calling_convention_version


def check_convention(version: int) -> None:
    """Refuses modules that this JAX does not run, before any is parsed.

    JAX promises to run what was exported in the last six months:
    https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees

    Raises:
      ProgramFormatError: their calling convention is too old or too new.
    """
    low = export.minimum_supported_calling_convention_version
    high = export.maximum_supported_calling_convention_version
    if not low <= version <= high:
        raise ProgramFormatError(
            "init program",
            f"functions of calling convention {version}",
            f"{low} to {high}, which JAX {jax.__version__} runs",
            "Export it again with a JAX of the last half year",
        )


@dataclass(frozen=True, eq=False)
class ExportedProgram:
    """A leaf program made from its serialised module.

    Attributes:
      module: the serialised module.
      digest: hash of the leaf program's canonical form, in hex.
      kind: what it makes.
      replicated_reason: why every device computes all of it; None if none does.
    """

    module: bytes
    digest: str
    kind: Kind
    replicated_reason: ReplicatedReason | None = None

    @property
    def _is_windowed(self) -> bool:
        return self.kind is Kind.WINDOWED

    @property
    def fills(self) -> bool:
        """Unknown: a module is not looked into."""
        return False

    @cached_property
    def module_sha256(self) -> bytes:
        """Digest of the module."""
        return hashlib.sha256(self.module).digest()

    @cached_property
    def _exported(self) -> export.Exported:
        try:
            return export.deserialize(bytearray(self.module))
        except Exception as error:
            raise ProgramFormatError(
                f"function {self.digest[:12]}",
                f"its module cannot be read ({type(error).__name__}: {error})"[:300],
                "a module made by jax.export",
            ) from error

    def check(self, shapes: Sequence[Sequence[int]], dtypes: Sequence[DType]) -> None:
        """Refuses a module that is not what a leaf program's export looks like.

        Args:
          shapes: of the leaves that its results are.
          dtypes: of those leaves.

        Raises:
          ProgramFormatError: it is unreadable, has effects, asks for several devices,
            calls what JAX does not vouch for, or makes other leaves.
        """
        # What a module calls is said nowhere but in its text (JAX 0.10.2 and 0.12.0.1).
        made = self._exported
        try:
            text = str(made.mlir_module())
        except Exception as error:
            self._refuse(f"its module cannot be read ({type(error).__name__})")
        for called in sorted(c.strip('"') for c in _CUSTOM_CALL.findall(text)):
            if not _ALLOWED_CALLS.fullmatch(called):
                self._refuse(f"it calls {called!r} outside the module")
        if made.disabled_safety_checks:
            self._refuse("it was exported with safety checks switched off")
        if made.ordered_effects or made.unordered_effects or made.nr_devices != 1:
            self._refuse("it has effects or runs on several devices")
        outs = [(a.shape, a.dtype) for a in made.out_avals]
        if self._kinds(outs) != self._kinds(zip(shapes, dtypes, strict=True)):
            self._refuse(f"its results are {outs}, not the leaves {list(shapes)}")

    def _kinds(self, leaves: Iterable[tuple[Sequence[Dim], DType]]) -> list[object]:
        """What a leaf's function has to fit; the sizes of a window are anyone's."""
        return [
            (len(shape) if self._is_windowed else tuple(shape), dtype)
            for shape, dtype in leaves
        ]

    def _refuse(self, got: str) -> NoReturn:
        raise ProgramFormatError(
            f"function {self.digest[:12]}",
            got,
            "a module that shardinit.export_plan made",
        )

    @property
    def words(self) -> int:
        """Number of 32-bit words of all operands together."""
        return int(self._exported.in_avals[0].shape[0])

    @property
    def outs(self) -> list[tuple[tuple[Dim, ...], DType]]:
        """Shape (symbolic where windowed) and dtype of each result."""
        return [(a.shape, a.dtype) for a in self._exported.out_avals]

    @property
    def platforms(self) -> tuple[str, ...]:
        """What the module was lowered for."""
        return tuple(self._exported.platforms)

    def window(
        self,
        words: Words,
        starts: Sequence[Sequence[Dim]],
        shapes: Sequence[Sequence[Dim]],
        *,
        lanes: bool,
    ) -> list[Values]:
        """One window of each result (see ``LeafProgram.window``).

        ``lanes`` is decided inside the module, by the platform it is lowered for.
        """
        if not self._is_windowed:
            return crop(lambda: list(self._exported.call(words)), starts, shapes)
        start = [jax.numpy.asarray(s, np.uint32) for s in starts[0]]
        place = jax.numpy.stack(start) if start else np.zeros(0, np.uint32)
        sizes = np.zeros((0, *shapes[0]), np.uint8)
        return [self._exported.call(words, place, sizes)[0]]


def export_program(program: Program) -> ExportedProgram:
    """Exports a leaf program; one that was exported before is returned as it is.

    The bytes depend on the program and on the JAX version, not on where the source
    code lies.
    """
    if isinstance(program, ExportedProgram):
        return program
    words = jax.ShapeDtypeStruct((program.words,), np.uint32)
    if program.kind is not Kind.WINDOWED:
        arguments: tuple[jax.ShapeDtypeStruct, ...] = (words,)
        function = _in_full(program)
    else:
        ((shape, _),) = program.outs
        start = jax.ShapeDtypeStruct((len(shape),), np.uint32)
        # jax.export learns symbolic sizes from the shapes of arguments alone: so an
        # argument of that shape it is, empty, so that it costs nothing.
        sizes = jax.ShapeDtypeStruct((0, *_symbolic(shape)), np.uint8)
        arguments = (words, start, sizes)
        function = _windowed(program)
    # A config setting is the only way to keep source paths out of the module. With
    # them equal programs would have other bytes, and another SHA-256, in each checkout.
    with _LOCATIONS, no_mesh():
        limit = setting("jax_traceback_in_locations_limit")
        jax.config.update("jax_traceback_in_locations_limit", 0)
        try:
            made = export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
        finally:
            jax.config.update("jax_traceback_in_locations_limit", limit)
    return ExportedProgram(
        bytes(made.serialize()),
        program.digest,
        program.kind,
        program.replicated_reason,
    )


def _symbolic(shape: Sequence[int]) -> tuple[Dim, ...]:
    """A symbolic size for each axis that has more than one element."""
    names = [f"w{i}" if size > 1 else str(size) for i, size in enumerate(shape)]
    return tuple(export.symbolic_shape(",".join(names))) if names else ()


def _windowed(program: Program) -> Callable[..., tuple[Values, ...]]:
    def leaf_program(words: Words, start: Words, sizes: Values) -> tuple[Values, ...]:
        shape = sizes.shape[1:]

        def window(words: Words, start: Words, *, lanes: bool) -> Values:
            place = [start[i] for i in range(len(shape))]
            return program.window(words, [place], [shape], lanes=lanes)[0]

        # One module for all platforms: which branch runs is known when it is compiled.
        in_lanes, in_axes = partial(window, lanes=True), partial(window, lanes=False)
        return (lax.platform_dependent(words, start, cpu=in_lanes, default=in_axes),)

    return leaf_program


def _in_full(program: Program) -> Callable[..., tuple[Values, ...]]:
    def leaf_program(words: Words) -> tuple[Values, ...]:
        starts = [[np.uint32(0)] * len(shape) for shape, _ in program.outs]
        full = [shape for shape, _ in program.outs]
        return tuple(program.window(words, starts, full, lanes=True))

    return leaf_program
