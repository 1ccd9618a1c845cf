"""One program and its shardings, lowered: what every device runs for its shard."""

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
from shardinit.core.types import Device, Values, Words
from shardinit.errors import InitFnError


def lower(
    program: PlanProgram,
    shardings: Sequence[NamedSharding],
    *,
    gspmd: bool = False,
    committed: bool = True,
) -> jax.stages.Lowered:
    """Lowers one program for its shardings; ``.compile()`` of it is what runs.

    The executable takes one replicated uint32 vector, the words of the leaf's
    operands and a zero, and returns a tuple with the program's results. The zero is
    the origin of all windows: a place that the compiler knew would let it compute
    numbers while it compiles, with other last places than the loops that run where
    the place depends on the device.
    """
    mesh = shardings[0].mesh
    assert isinstance(mesh, Mesh)  # a plan on an AbstractMesh has no devices to run on
    leaf = program.program
    lanes = mesh.devices.flat[0].platform == "cpu"
    specs = tuple(s.spec for s in shardings)
    shapes = [
        s.shard_shape(shape) for s, shape in zip(shardings, program.shapes, strict=True)
    ]

    def leaf_program(words: Words) -> tuple[Values, ...]:
        starts = [
            _starts(mesh, spec, shape, words[-1])
            for spec, shape in zip(specs, shapes, strict=True)
        ]
        return tuple(leaf.window(words[:-1], starts, shapes, lanes=lanes))

    def whole_program(words: Words) -> tuple[Values, ...]:
        # Numbers, not arrays: with arrays here the TPU's compiler hands back replicated
        # results, which JAX refuses ("Unexpected XLA sharding override", 0.12.0.1).
        starts = [[0] * len(shape) for shape in program.shapes]
        return tuple(leaf.window(words[:-1], starts, program.shapes, lanes=lanes))

    if not committed:
        with anywhere(mesh.devices.flat[0]):
            words = jax.ShapeDtypeStruct((leaf.words + 1,), np.uint32)
            return jax.jit(leaf_program).lower(words)
    if gspmd and leaf.replicated_reason is not None:
        run = whole_program
    else:
        run = jax.shard_map(
            leaf_program,
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=specs,
            # The check wants constants marked as varying before they meet a window's
            # coordinates: "shift_right_logical requires varying manual axes to match"
            # on JAX 0.10.2 and 0.12.0.1.
            check_vma=False,
        )
    argument = jax.ShapeDtypeStruct(
        (leaf.words + 1,), np.uint32, sharding=replicated(mesh)
    )
    with _set_mesh(mesh), no_mesh():  # the caller's mesh may have other devices
        return jax.jit(run, out_shardings=tuple(shardings)).lower(argument)


@contextmanager
def anywhere(device: Device) -> Iterator[None]:
    """A context without any mesh, in which results are bound to no device."""
    empty = Mesh(np.empty((), dtype=object), ())
    with _set_mesh(empty), no_mesh(), jax.default_device(device):
        yield


def _set_mesh(mesh: Mesh) -> AbstractContextManager[object]:
    try:
        return jax.set_mesh(mesh)
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
            place = place + lax.axis_index(name).astype(np.uint32)
        starts.append(place * np.uint32(size) + origin)
    return starts


def replicated(mesh: AnyMesh) -> NamedSharding:
    """In full on every device of a mesh."""
    return NamedSharding(mesh, PartitionSpec())
