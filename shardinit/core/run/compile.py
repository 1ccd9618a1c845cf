"""Compile each distinct program once; run them so that every device makes its shard.

A shard is the window at the device's place in the mesh. Inside ``shard_map`` under
``jax.jit`` each device knows that place, evaluates its window and nothing else: no
collective can arise and nothing full-size can exist. With ``out_shardings`` alone that
is for the partitioner to decide, which makes some draws in full on every device
(https://github.com/jax-ml/jax/issues/19893). The keys are derived on the host
and reach the devices as a few words a leaf.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from shardinit.core.cut.sources import Hosted
from shardinit.core.ir.jaxpr import setting
from shardinit.core.plan.leaves import PlanProgram
from shardinit.core.plan.mesh import alone_on, one_device
from shardinit.core.plan.plan import Plan, checked
from shardinit.core.prng.root_key import KeyLike, RootKey, as_key
from shardinit.core.run import arguments as operands
from shardinit.core.run.batches import Batch, Call, batches
from shardinit.core.run.lower import anywhere, lower, replicated
from shardinit.core.run.processes import assert_same
from shardinit.core.run.shards import (
    as_keys,
    handed_out,
    one_for_all,
    sharded,
    typed,
)
from shardinit.core.types import Device, Leaf, Tree, Words
from shardinit.errors import ShardingError
from shardinit.progress import Report


class _Run(NamedTuple):
    """One call of an executable, by every device or by one."""

    executable: jax.stages.Compiled
    device: Device | None
    call: Call


@dataclass(frozen=True, eq=False)
class CompiledPlan:
    """A plan with its executables; call it with a key, as often as you like.

    Attributes:
      plan: what was compiled.
      batches: what the executables make.
      executables: one for each batch.
      shardings: of each leaf, on devices.
      devices: of each executable the one device that computes its leaves in full, of
        which every device then gets its shard; None where each computes its own.
      committed: for each leaf whether it is bound to its devices. Leaves of a plan
        without a mesh are not: JAX moves them to the mesh of what they meet.

    Example:
      >>> import jax, shardinit
      >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (64, 32))})
      >>> compiled = shardinit.compile_plan(plan)
      >>> first, second = compiled(0)["w"], compiled(jax.random.key(1))["w"]
      >>> bool((first == second).all())
      False
    """

    plan: Plan
    batches: tuple[Batch, ...]
    executables: tuple[jax.stages.Compiled, ...]
    devices: tuple[Device | None, ...]
    shardings: tuple[NamedSharding, ...]
    committed: tuple[bool, ...]
    _compared: list[bool] = field(default_factory=list, init=False, repr=False)

    def __repr__(self) -> str:
        return f"<CompiledPlan of {self.plan.summary()}>"

    def __call__(self, key: KeyLike, progress: Report | None = None) -> Tree:
        """Initialises.

        Args:
          key: a key of the type that was planned for, or an int seed; keys by the
            names of streams where those were planned for.
          progress: called with (leaves dispatched, leaves in all) as they go.

        Returns:
          The user's object (``InitFn.rebuild`` of the pytree), its leaves sharded as
          planned; leaves that ``select`` left out are ``jax.ShapeDtypeStruct``.

        Raises:
          TypeError: the key has another type than the plan's.
          FingerprintMismatchError: another process of the job, with devices of the
            mesh, brings another model, key, placement or version.
          MissingProcessesError: such a process did not come.

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (8, 32))})
          >>> params = shardinit.compile_plan(plan)(42)
          >>> params["w"].shape
          (8, 32)
        """
        return self.rebuild(self.run(as_key(key), progress))

    def leaves(self, key: KeyLike, progress: Report | None = None) -> list[Leaf]:
        """The leaves alone, in the order of the pytree (see ``__call__``).

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (8, 32))})
          >>> [leaf.shape for leaf in shardinit.compile_plan(plan).leaves(42)]
          [(8, 32)]
        """
        return self.run(as_key(key), progress)

    def rebuild(self, leaves: Sequence[Leaf]) -> Tree:
        """The user's object from its leaves.

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (8, 32))})
          >>> compiled = shardinit.compile_plan(plan)
          >>> list(compiled.rebuild(compiled.leaves(42)))
          ['w']
        """
        return self.plan.init_fn.rebuild(jax.tree.unflatten(self.plan.cut.tree, leaves))

    def run(self, key: RootKey, progress: Report | None = None) -> list[Leaf]:
        """``leaves`` for a key that ``as_key`` made.

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (8, 32))})
          >>> (leaf,) = shardinit.compile_plan(plan).run(as_key(42))
          >>> leaf.shape
          (8, 32)
        """
        # Under "disallow" even the key of a seed is refused: "Disallowed host-to-device
        # transfer" on 0.10.2 and 0.12.0.1, as in
        # https://github.com/jax-ml/jax/issues/15613.
        with jax.transfer_guard("allow"):  # of the words of keys, which no user sees
            return self._run(key, progress)

    def _run(self, key: RootKey, progress: Report | None) -> list[Leaf]:
        cut, leaves = self.plan.cut, self.plan.leaves
        words = operands.key_words(self.plan.root_key(key), cut)
        self._assert_same(words)
        runs = self._runs()
        hosted = [i for i, x in enumerate(leaves) if x.is_hosted and x.selected]
        derived = [run.call.operands(cut) for run in runs]
        derived += [cut.leaves[i].operands for i in hosted]
        vectors = operands.operand_words(derived, words)
        made: dict[int, Leaf] = {}
        done, total = 0, sum(len(run.call.leaves) for run in runs) + len(hosted)
        computed = self._computed(runs, vectors[: len(runs)])
        for count, found in chain(computed, self._hosted(hosted, vectors[len(runs) :])):
            made |= found
            done += count
            if progress is not None:
                progress(done, total)
        return [
            made[i] if leaf.selected else self._unselected(i)
            for i, leaf in enumerate(leaves)
        ]

    def _computed(
        self, runs: Sequence[_Run], vectors: Sequence[np.ndarray]
    ) -> Iterator[tuple[int, dict[int, Leaf]]]:
        """Of each run the number of its leaves, and those of them that are selected."""
        # The last word is the origin of all windows; see ``lower``.
        arguments = [np.append(words, np.uint32(0)) for words in vectors]
        for run, argument in zip(runs, self._put(runs, arguments), strict=True):
            numbers = run.call.leaves
            arrays = self._call(run.executable, argument, numbers)
            yield (
                len(numbers),
                {
                    i: self._placed(i, array, run.device)
                    for i, array in zip(numbers, arrays, strict=True)
                    if self.plan.leaves[i].selected
                },
            )

    def _hosted(
        self, numbers: Sequence[int], vectors: Sequence[np.ndarray]
    ) -> Iterator[tuple[int, dict[int, Leaf]]]:
        """The leaves that are there on the host, one after the other."""
        for i, words in zip(numbers, vectors, strict=True):
            yield 1, {i: typed(self.plan.cut.leaves[i], self._on_host(i, words))}

    def _runs(self) -> list[_Run]:
        made = zip(self.batches, self.executables, self.devices, strict=True)
        return [
            _Run(exe, device, x) for batch, exe, device in made for x in batch.calls
        ]

    def _put(self, runs: Sequence[_Run], vectors: list[np.ndarray]) -> Sequence[Words]:
        """All arguments onto their devices in one transfer, which costs a tenth."""
        places = [
            replicated(
                self.shardings[run.call.leaves[0]].mesh
                if run.device is None
                else one_device(run.device)
            )
            for run in runs
        ]
        # ``device_put`` of numpy onto devices of several processes first compares the
        # values among them (``multihost_utils.assert_equal``, 0.10.2): a collective for
        # each call, which a transfer guard stops
        # (https://github.com/jax-ml/jax/issues/25325). ``_assert_same`` has compared
        # the keys.
        if not all(place.is_fully_addressable for place in places):
            return vectors  # every process passes its own equal copy
        return jax.device_put(vectors, places) if vectors else []

    def _placed(self, number: int, array: jax.Array, device: Device | None) -> Leaf:
        """A leaf where it shall lie, from what a device has of it or all do."""
        leaf = self.plan.cut.leaves[number]
        if device is not None and self.committed[number]:
            array = handed_out(array, leaf, self.shardings[number])
        return typed(leaf, array)

    def _unselected(self, number: int) -> jax.ShapeDtypeStruct:
        """What stands for a leaf that is not selected."""
        # With its weak type: ``jax.jit`` of a step would else compile once for the
        # shapes and once more for the arrays.
        leaf, where = self.plan.cut.leaves[number], self.shardings[number]
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=where, weak_type=leaf.weak_type
        )

    def _assert_same(self, words: np.ndarray) -> None:
        """Before the first dispatch: all processes of a job bring the same."""
        if not self._compared:
            pairs = zip(self.shardings, self.plan.leaves, strict=True)
            shardings = [where for where, leaf in pairs if leaf.selected]
            key = f"{self.plan.cut.impl} {words.tolist()}"
            assert_same({"fingerprint": self.plan.fingerprint, "key": key}, shardings)
            self._compared.append(True)

    def _call(
        self, executable: jax.stages.Compiled, argument: Words, leaves: Sequence[int]
    ) -> Sequence[jax.Array]:
        try:
            return executable(argument)
        except Exception as error:  # JAX's own class for it is private
            if not (setting("jax_debug_nans") or setting("jax_debug_infs")):
                raise
            paths = ", ".join(self.plan.leaves[i].path for i in leaves)
            raise FloatingPointError(f"leaf {paths!r}: {error}") from error

    def _on_host(self, number: int, words: np.ndarray) -> jax.Array:
        """A constant, a table or a leaf of keys: each device gets its part."""
        leaf, sharding = self.plan.cut.leaves[number], self.shardings[number]
        assert isinstance(leaf.source, Hosted)
        device = min(sharding.addressable_devices, key=lambda device: device.id)
        with alone_on(one_device(device)):
            array = leaf.source.on_host(leaf.shape, words, device)
        if not self.committed[number]:
            # Not by ``device_put`` onto the device: that commits the array, and JAX
            # refuses to compute with it and arrays of a mesh ("Received incompatible
            # devices for jitted computation", 0.10.2 and 0.12.0.1).
            with anywhere(device):
                return as_keys(jax.numpy.array(array), leaf)
        return sharded(array, leaf, sharding)


def compile_plan(plan: Plan, *, mesh: Mesh | None = None) -> CompiledPlan:
    """Compiles each distinct program of a plan once, in parallel threads.

    Programs that fill their leaves with one number share an executable.

    Args:
      plan: from ``shardinit.plan``.
      mesh: devices for a plan that was made on an ``AbstractMesh``; its shape must be
        the same.

    Raises:
      InitFnError: called inside ``jax.jit`` or another transformation.
      ShardingError: the plan's mesh has no devices and none were given, or its shape
        differs from ``mesh``.

    Example:
      >>> import jax, shardinit
      >>> split, normal = jax.random.split, jax.random.normal
      >>> init = lambda key: [normal(k, (8, 32)) for k in split(key, 9)]
      >>> compiled = shardinit.compile_plan(shardinit.plan(init))
      >>> len(compiled(0)), len(compiled.executables)
      (9, 1)
    """
    checked(plan, "compile_plan")
    shardings = on_devices(plan, mesh)

    # What ``jax.jit(fn)(key)`` gives without a mesh is not committed either.
    bound = tuple(mesh is not None or x.sharding is not None for x in plan.leaves)
    by_spec = dict(zip((leaf.sharding for leaf in plan.leaves), shardings, strict=True))
    gspmd = plan.whole_mode == "gspmd"
    # Tracing needs the interpreter and this thread's JAX settings; the compiler runs
    # beside it and needs neither.
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        pending, devices = [], []
        made = batches(plan)
        for batch in made:
            programs = [plan.programs[number] for number in batch.programs]
            places = [by_spec[s] for program in programs for s in program.shardings]
            device = _sole_device(plan, programs[0], places[0], mesh)
            devices.append(device)
            lowered = lower(programs, places, gspmd=gspmd, device=device)
            pending.append(pool.submit(lowered.compile))
        executables = tuple(job.result() for job in pending)
    return CompiledPlan(
        plan, tuple(made), executables, tuple(devices), tuple(shardings), bound
    )


def _sole_device(
    plan: Plan, program: PlanProgram, place: NamedSharding, mesh: Mesh | None
) -> Device | None:
    """The one device that makes a program's leaves in full; None: each its shards."""
    if mesh is None and program.shardings[0] is None:  # bound to no mesh
        (device,) = place.device_set
        return device
    in_full = program.program.replicated_reason is not None
    return one_for_all(place) if in_full and plan.whole_mode != "gspmd" else None


def on_devices(plan: Plan, mesh: Mesh | None = None) -> list[NamedSharding]:
    """The sharding of each leaf on devices that are there; see ``compile_plan``."""
    fallback = mesh or plan.mesh
    if fallback is None:
        fallback = one_device()
    if isinstance(fallback, AbstractMesh):
        raise ShardingError(
            "mesh",
            f"the plan was made on an abstract mesh {dict(fallback.shape)}",
            "devices to compile for",
            "Pass compile_plan(plan, mesh=...) a Mesh of the same shape",
        )
    if mesh is not None and plan.mesh is not None and mesh.shape != plan.mesh.shape:
        raise ShardingError(
            "mesh",
            f"got {dict(mesh.shape)}",
            f"the shape that was planned for, {dict(plan.mesh.shape)}",
        )
    placed = []
    for leaf in plan.leaves:
        own = leaf.sharding
        if own is None:
            placed.append(replicated(fallback))
        elif mesh is not None or isinstance(own.mesh, AbstractMesh):
            kind = own.memory_kind
            placed.append(NamedSharding(fallback, own.spec, memory_kind=kind))
        else:
            placed.append(own)
    return placed
