"""Client: a training job asks for a model's initial weights by spec.

What comes over the network is the init program, a few hundred kilobytes; the weights
are made on the job's own devices, as if the model's code were here. A job that cannot
run programs asks for bytes: `Client.init` with ``via="stream"`` for sharded arrays,
`Client.numpy` and `Client.read` for a process without JAX. Importing this module, and
reading into numpy, imports neither JAX nor Flax.

    with shardinit.connect("localhost:50051") as client:
        params = client.init(spec, key, mesh=mesh, rules=rules)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shardinit.core.plan.findings import refuse
from shardinit.core.region import covering
from shardinit.progress import Report, counted
from shardinit.progress import progress as shown
from shardinit.service.client import transfer, writing
from shardinit.service.client.connection import (
    Connection,
    Credentials,
    check_target,
)
from shardinit.service.client.disk import Store
from shardinit.service.client.programs import Programs
from shardinit.service.wire import messages as wire
from shardinit.service.wire.description import Description, description_from_proto
from shardinit.service.wire.versions import PROTOCOL
from shardinit.v1 import service_pb2

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from shardinit.core.plan.options import Select
    from shardinit.core.plan.placement import Placement
    from shardinit.core.plan.rules import Rules
    from shardinit.core.prng.root_key import KeyLike
    from shardinit.core.program.program import InitProgram
    from shardinit.service.wire.messages import MeshLike, Spec

Path = str | os.PathLike[str]

_NOT_STREAMED = ("whole", "indivisible", "memory_limit", "prng")
"""Options of a plan that a service knows nothing of."""


def connect(
    target: str,
    *,
    timeout: float = 120.0,
    cache_dir: Path | None = None,
    tls: bool = False,
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    token: Path | None = None,
    insecure: bool = False,
) -> Client:
    """A client of the service at ``target``; the first call connects.

    Args:
      target: ``host:port``, or any target that gRPC resolves; of several addresses
        (``ipv4:10.0.0.1:50051,10.0.0.2:50051``) all are used in turns.
      timeout: seconds that each call may take, building the program included; for a
        stream of bytes, seconds without any.
      cache_dir: folder for programs; None for the user's cache folder.
      tls: encrypt, and trust the authorities that gRPC knows.
      ca: file with the authorities to trust instead (PEM).
      cert: file with the client's own certificate chain (PEM).
      key: file with its private key (PEM).
      token: a bearer token; a ``pathlib.Path`` names a file with one.
      insecure: send the token in clear to another machine too.

    Raises:
      ArgumentError: the target is no address.
      ServiceError: the folder cannot be written, a file cannot be read, or the token
        would be sent in clear.

    Example:
      >>> import shardinit
      >>> from shardinit.models import example_config
      >>> from shardinit.service.server.server import Server
      >>> spec = shardinit.ModelSpec("decoder", example_config("gpt2"))
      >>> with Server() as server, shardinit.connect(server.address) as client:
      ...     client.read(spec, 0, "embed/embedding", (slice(2), slice(32))).shape
      (2, 32)
    """
    check_target(target, timeout)
    credentials = Credentials(tls, ca, cert, key, token, insecure)
    return Client(Store(cache_dir), Connection(target, timeout, credentials))


class Client:
    """Calls of one service; made by `connect`, also a context manager.

    Safe to use from several threads. In every method ``spec`` is a `ModelSpec`, or the
    sha256 in hex of a program that the service holds; ``key`` is a JAX key, its words
    as a uint32 array, or an int seed; a job without JAX has the last two; or, by their
    names, such a key for each of a model's streams. ``progress``
    is called with (done, in all); without it, a terminal shows a bar.

    Every failure is a `ServiceError` with the code's name in ``code``; faults of a
    spec, a mesh or rules are a `SpecError`. What else a method raises, it says.

    In the examples ``client`` is connected to a server that takes uploads and writes
    checkpoints below ``folder``; ``spec`` is of a decoder of one layer.

    Example:
      >>> import shardinit
      >>> with shardinit.connect("localhost:50051") as client:  # no call: none connects
      ...     client.target
      'localhost:50051'
    """

    def __init__(self, store: Store, connection: Connection):
        self.target = connection.target
        self._connection = connection
        self._programs = Programs(connection, store)

    def version(self) -> dict[str, Any]:
        """The versions of the protocol, of the service and of its JAX, by name.

        Example:
          >>> sorted(client.version())
          ['jax', 'protocol', 'shardinit']
        """
        request = service_pb2.GetVersionRequest(min=PROTOCOL, max=PROTOCOL)
        found = self._connection.call("GetVersion", request)
        return {
            "protocol": found.version,
            "shardinit": found.server_version,
            "jax": found.jax_version,
        }

    def models(self) -> dict[str, dict[str, Any]]:
        """The models that the operator installed: config schema by name.

        Example:
          >>> "decoder" in client.models()
          True
        """
        request = service_pb2.ListModelsRequest()
        response = self._connection.call("ListModels", request)
        return {m.name: wire.struct_to_dict(m.config_schema) for m in response.models}

    def describe(
        self,
        spec: Spec,
        mesh: MeshLike | None = None,
        rules: Rules | None = None,
        *,
        opt_rules: Rules | Placement | None = None,
        opt_state: str | Iterable[str] | None = None,
    ) -> Description:
        """The leaves of a model, their bytes, and with a mesh where they lie.

        Args:
          spec: the model.
          mesh: a ``Mesh``, an ``AbstractMesh``, or a mapping of axis name to size.
          rules: ``AxisRules``, ``PathRules`` or ``fsdp(...)``.
          opt_rules: as for ``shardinit.plan``.
          opt_state: globs over the paths of leaves that are optimizer state.

        Example:
          >>> client.describe(spec, {"data": 2}).leaf("embed/embedding").shape
          (64, 32)
        """
        request = service_pb2.DescribeModelRequest(spec=wire.spec_to_proto(spec))
        if mesh is not None:
            request.mesh.CopyFrom(wire.mesh_to_proto(mesh))
        wire.placing_to_proto(request, rules, opt_rules, opt_state)
        response = self._connection.call("DescribeModel", request)
        return description_from_proto(response, placed=mesh is not None)

    def program(self, spec: Spec) -> InitProgram:
        """The init program of a model, from the cache if it is there and current.

        Raises:
          ProgramFormatError: this version cannot run the program.

        Example:
          >>> len(client.program(spec).paths)
          20
        """
        data = self._programs.get(spec)
        from shardinit.core.program.program import InitProgram

        return InitProgram.from_bytes(data)

    def upload(self, program: InitProgram) -> str:
        """Registers the program of a model of one's own; returns its sha256 (hex).

        The digest is a spec from then on, for every client of that server. The
        operator must allow it; faults of the program are a `SpecError`.

        Example:
          >>> import jax, shardinit
          >>> program = shardinit.export_plan(lambda key: {"w": jax.random.normal(key)})
          >>> client.read(client.upload(program), 0, "w").shape
          ()
        """
        self._programs.upload(program.to_bytes(), program.sha256)
        return program.sha256

    def init(
        self,
        spec: Spec,
        key: KeyLike,
        *,
        mesh: Mesh | None = None,
        rules: Rules | None = None,
        out_shardings: Any = None,
        select: Select | None = None,
        strict: bool | Collection[str] = False,
        whole: str = "replicate",
        indivisible: str = "error",
        memory_limit: int | None = None,
        prng: str | None = None,
        draw_dtype: str | None = None,
        opt_rules: Rules | Placement | None = None,
        opt_state: str | Iterable[str] | None = None,
        via: str = "program",
        progress: Report | None = None,
    ) -> Any:
        """Initialises a model by spec, every device making its own shard.

        Args:
          spec: the model.
          key: the root key.
          mesh: the mesh of devices; None for one device.
          rules: ``AxisRules``, ``PathRules`` or ``fsdp(...)``.
          out_shardings: a pytree of shardings instead of rules.
          select: globs over leaf paths: the leaves to initialise.
          strict: refuse findings, as for ``shardinit.plan``.
          whole: as for ``shardinit.plan``; not by stream, as are the next three.
          indivisible: as for ``shardinit.plan``.
          memory_limit: as for ``shardinit.plan``.
          prng: as for ``shardinit.plan``.
          draw_dtype: as for ``shardinit.plan``, by name; of a `ModelSpec`.
          opt_rules: as for ``shardinit.plan``.
          opt_state: globs over the paths of leaves that are optimizer state.
          via: ``"program"``, or ``"stream"`` to have the service compute the bytes and
            send them, each process asking for those of its own devices only.
          progress: counts leaves that are dispatched.

        Returns:
          dicts, lists and tuples of arrays, sharded.

        Raises:
          ShardingError: the rules do not fit the leaves.
          FindingsError: ``strict`` refuses what the findings say.

        Example:
          >>> params = client.init(spec, 42, select="embed/*")
          >>> params["embed"]["embedding"].shape
          (64, 32)
        """
        if via not in ("program", "stream"):
            raise ValueError(f"via={via!r}; expected 'program' or 'stream'")
        spec = wire.spec_for(spec, key, draw_dtype)
        # Not above: what follows imports JAX, and the module does without.
        from shardinit.core.plan.options import PlanOptions

        options = PlanOptions(
            mesh=mesh,
            rules=rules,
            out_shardings=out_shardings,
            select=select,
            strict=strict,
            whole=whole,
            indivisible=indivisible,
            memory_limit=memory_limit,
            prng=prng,
            opt_rules=opt_rules,
            opt_state=opt_state,
        )
        if via == "program":
            program = self.program(spec)
            from shardinit.core.run.init import initialised

            with shown("initialise", progress, "leaves") as report:
                return initialised(program, key, options, report)
        if given := options.differing(_NOT_STREAMED):
            raise ValueError(
                f"via='stream' with {', '.join(given)}: the service computes and "
                f"places leaves without them; expected via='program'"
            )
        from shardinit.service.client.arrays import from_windows

        # A service places by rules alone: with shardings of the caller's own it is
        # asked for shapes, and those are laid over them here.
        placed_on = mesh if out_shardings is None else None
        described = self.describe(
            spec, placed_on, rules, opt_rules=opt_rules, opt_state=opt_state
        )
        refuse(described.findings, strict, str(spec))
        with shown("receive", progress, "leaves") as report:
            return from_windows(
                described,
                lambda pieces: self.receive(spec, key, pieces),
                mesh=mesh,
                out_shardings=out_shardings,
                select=select,
                progress=report,
            )

    def numpy(
        self,
        spec: Spec,
        key: KeyLike,
        *,
        select: Select | None = None,
        progress: Report | None = None,
    ) -> dict[str, np.ndarray]:
        """The leaves of a model as numpy arrays by path, in the order of the pytree.

        Needs no JAX. Leaves of keys come as their words, in a last dimension.

        Args:
          spec: the model.
          key: the root key.
          select: globs over leaf paths, or a predicate; None for all leaves.
          progress: counts bytes that are received.

        Raises:
          SelectError: a glob that matches no leaf.

        Example:
          >>> client.numpy(spec, 42, select="embed/*")["embed/embedding"].shape
          (64, 32)
        """
        spec = wire.spec_for(spec, key)
        pieces = [transfer.full_piece(x) for x in self.describe(spec).chosen(select)]
        total = sum(piece.nbytes for piece in pieces)
        with shown("receive", progress) as report:
            arrays = self.receive(spec, key, pieces, counted(report, total))
            return {x.path: array for x, array in zip(pieces, arrays, strict=True)}

    def read(
        self, spec: Spec, key: KeyLike, path: str, window: Any = ...
    ) -> np.ndarray:
        """One window of one leaf as a numpy array; only its bytes are sent.

        Needs no JAX. A leaf of keys reads as their words, in a last dimension.

        Args:
          spec: the model.
          key: the root key.
          path: the leaf's key path.
          window: a numpy index of ints, slices and ``...``; default the whole leaf.

        Raises:
          SelectError: no leaf has that path.
          IndexError: the window does not lie inside the leaf.

        Example:
          >>> client.read(spec, 42, "embed/embedding", (slice(4, 6), slice(32))).shape
          (2, 32)
        """
        spec = wire.spec_for(spec, key)
        full = transfer.full_piece(self.describe(spec).leaf(path))
        region, rest = covering(window, full.region.shape, f"leaf {path!r}")
        (array,) = self.receive(spec, key, [replace(full, region=region)])
        return np.asarray(array[rest])

    def write_checkpoint(
        self,
        spec: Spec,
        key: KeyLike,
        uri: Path,
        *,
        format: str = "safetensors",
        detach: bool = False,
        progress: Report | None = None,
    ) -> writing.Written:
        """Has the service write a checkpoint on its own storage.

        Args:
          spec: the model.
          key: the root key.
          uri: where, below a folder that the operator allows; nothing may be there.
          format: ``"safetensors"`` or ``"orbax"``.
          detach: the write goes on when this client goes away; ask again to see it.
          progress: counts bytes that are written.

        Returns:
          where it is, and its receipt.

        Example:
          >>> written = client.write_checkpoint(spec, 42, f"{folder}/initial")
          >>> written.receipt.seed
          42
        """
        if format not in writing.FORMATS:
            raise ValueError(f"format={format!r}; expected 'safetensors' or 'orbax'")
        request = service_pb2.WriteCheckpointRequest(
            spec=wire.spec_to_proto(wire.spec_for(spec, key)),
            key=wire.key_to_proto(key),
            uri=os.fspath(uri),
            format=writing.FORMATS[format],
            detach=detach,
        )
        with shown("write", progress) as report:
            return writing.write(self._connection, request, report)

    def receive(
        self,
        spec: Spec,
        key: KeyLike,
        pieces: Sequence[transfer.Piece],
        moved: Callable[[int], None] = lambda count: None,
    ) -> Iterator[np.ndarray]:
        """Many windows, one after the other, in streams as long as requests allow.

        Args:
          spec: the model.
          key: the root key.
          pieces: what is wanted, in order.
          moved: called with the number of bytes whenever some have come.

        Yields:
          each window when it is complete and checked.

        Example:
          >>> from shardinit.service.client.transfer import full_piece
          >>> leaves = client.describe(spec).leaves[:2]
          >>> len(list(client.receive(spec, 42, [full_piece(leaf) for leaf in leaves])))
          2
        """
        message = wire.spec_to_proto(wire.spec_for(spec, key))
        root = wire.key_to_proto(key)
        yield from transfer.receive(self._connection, message, root, pieces, moved)

    def close(self) -> None:
        """Ends running calls and the connection; a second time does nothing.

        Example:
          >>> import shardinit
          >>> client = shardinit.connect("localhost:50051")
          >>> client.close()
        """
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
