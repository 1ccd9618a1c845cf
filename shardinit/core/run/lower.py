"""Programs and their shardings, lowered: what every device runs for its shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardinit.core.ir.jaxpr import no_mesh
from shardinit.core.plan.entries import mesh_axes
from shardinit.core.plan.leaves import PlanProgram
from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.types import Device, Dim, Values, Words
from shardinit.errors import InitFnError


def lower(
    programs: Sequence[PlanProgram],
    shardings: Sequence[NamedSharding],
    *,
    gspmd: bool = False,
    device: Device | None = None,
) -> jax.stages.Lowered:
    """Lowers programs, side by side; ``.compile()`` of it is what runs.

    Args:
      programs: what is computed.
      shardings: of each result.
      gspmd: whether results that are computed in full are the partitioner's to cut.
      device: one that computes all results in full, bound to no mesh, in place of
        every device its shards.

    The executable takes one replicated uint32 vector, the words of the programs'
    operands and a zero, and returns a tuple with their results. The zero is
    the origin of all windows: a place that the compiler knew would let it compute
    numbers while it compiles, with other last places than the loops that run where
    the place depends on the device.
    """
    mesh = shardings[0].mesh
    assert isinstance(mesh, Mesh)  # a plan on an AbstractMesh has no devices to run on
    lanes = mesh.devices.flat[0].platform == "cpu"
    full = [shape for program in programs for shape in program.shapes]
    if device is None:
        specs, shapes = _shards(shardings, full)
    else:
        specs, shapes = (PartitionSpec(),) * len(full), full

    # JAX caches executables under these names (storage/executables.py reads them).
    def leaf_program(words: Words) -> tuple[Values, ...]:
        origin = words[-1]
        windows = zip(specs, shapes, strict=True)
        starts = [_starts(mesh, spec, shape, origin) for spec, shape in windows]
        return _side_by_side(programs, words, starts, shapes, lanes)

    def whole_program(words: Words) -> tuple[Values, ...]:
        # Numbers, not arrays: with arrays here the TPU's compiler hands back replicated
        # results, which JAX refuses ("Unexpected XLA sharding override", 0.12.0.1).
        starts = [[0] * len(shape) for shape in full]
        return _side_by_side(programs, words, starts, full, lanes)

    size = sum(program.program.words for program in programs) + 1

    if device is not None:
        with anywhere(device):
            words = jax.ShapeDtypeStruct((size,), np.uint32)
            # Without ``out_shardings``, which commit the results to their device,
            # whichever it is (0.10.2 and 0.12.0.1).
            return jax.jit(leaf_program).lower(words)
    if gspmd and any(program.program.replicated_reason for program in programs):
        run = whole_program
    else:
        run = jax.shard_map(
            leaf_program,
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=specs,
            # The check wants constants marked as varying before they meet a window's
            # coordinates: "shift_right_logical requires varying manual axes to match"
            # on JAX 0.10.2 and 0.12.0.1, as for any array that is made inside
            # (https://github.com/microsoft/folx/pull/36).
            check_vma=False,
        )
    argument = jax.ShapeDtypeStruct((size,), np.uint32, sharding=replicated(mesh))
    with _set_mesh(mesh), no_mesh():  # the caller's mesh may have other devices
        return jax.jit(run, out_shardings=tuple(shardings)).lower(argument)


def _shards(
    shardings: Sequence[NamedSharding], shapes: Sequence[tuple[int, ...]]
) -> tuple[tuple[PartitionSpec, ...], Sequence[tuple[int, ...]]]:
    """The spec of each result and the shape of its shards."""
    pairs = zip(shardings, shapes, strict=True)
    return tuple(s.spec for s in shardings), [s.shard_shape(n) for s, n in pairs]


def _side_by_side(
    programs: Sequence[PlanProgram],
    words: Words,
    starts: Sequence[Sequence[Dim]],
    shapes: Sequence[Sequence[Dim]],
    lanes: bool,
) -> tuple[Values, ...]:
    """The windows of all programs' results; each takes its part of the words."""
    made: list[Values] = []
    used = 0
    for one in (program.program for program in programs):
        results = slice(len(made), len(made) + len(one.outs))
        part = words[used : used + one.words]
        made += one.window(part, starts[results], shapes[results], lanes=lanes)
        used += one.words
    return tuple(made)


@contextmanager
def anywhere(device: Device) -> Iterator[None]:
    """A context without any mesh, in which results are bound to no device."""
    empty = Mesh(np.empty((), dtype=object), ())
    with _set_mesh(empty), no_mesh(), jax.default_device(device):
        yield


def _set_mesh(mesh: Mesh) -> AbstractContextManager[object]:
    try:
        return jax.set_mesh(mesh)
    # "`set_mesh` can only be used outside of `jax.jit`", on 0.10.2 and 0.12.0.1.
    except ValueError as error:
        raise InitFnError(
            "the call",
            f"it is inside jax.jit or another transformation ({error})",
            "a call outside of them: it compiles and places arrays by itself",
            "Initialise first and pass the arrays in; shardinit.plan has the shapes",
        ) from error


def _starts(
    mesh: Mesh, spec: PartitionSpec, shape: Sequence[int], origin: Words
) -> list[Words]:
    """Where this device's window begins along each axis, as uint32 scalars."""
    starts: list[Words] = []
    for dim, size in enumerate(shape):
        place: Words = np.uint32(0)
        for name in mesh_axes(spec[dim] if dim < len(spec) else None):
            place = place * np.uint32(mesh.shape[name])
            # ``axis_index`` is int32, in which the places of an axis of 2**31 elements
            # overflow.
            place = place + lax.axis_index(name).astype(np.uint32)
        starts.append(place * np.uint32(size) + origin)
    return starts


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The sharding of an array of which every device of a mesh holds all."""
    return NamedSharding(mesh, PartitionSpec())
