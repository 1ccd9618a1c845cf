"""Messages: what a caller asks for, as protobuf messages and as Python's objects.

Answers are read beside this: what a model consists of in ``description``, a failure in
``errors``; the tree and the axis names inside them in ``core.program``.

Each pair of functions is one message: ``x_to_proto`` for who asks, ``x_from_proto``
for who answers. What comes from the wire has passed ``limits`` before it gets here.
JAX is imported only by the functions that make one of its objects, since a client
that only asks needs none of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from google.protobuf import struct_pb2

from shardinit.core.plan.entries import as_entry, mesh_axes
from shardinit.errors import SpecError
from shardinit.service.wire import patterns
from shardinit.v1 import service_pb2, spec_pb2

if TYPE_CHECKING:
    import jax
    import numpy as np
    from jax.sharding import AbstractMesh

    from shardinit.core.init_fn import AnyMesh
    from shardinit.core.plan.placement import Placement
    from shardinit.core.plan.rules import Rules
    from shardinit.core.prng.root_key import KeyLike
    from shardinit.core.program.program import InitProgram
    from shardinit.models import ModelSpec

    Spec = ModelSpec | InitProgram | str
    MeshLike = AnyMesh | Mapping[str, int]

_MAX_EXACT = 2**53  # a Struct has doubles only
_MAX_DEPTH = 30  # beyond it protobuf refuses to parse a Struct


def spec_to_proto(spec: Spec) -> spec_pb2.ModelSpec:
    """A ``ModelSpec``, an ``InitProgram`` or a program's sha256 (hex) as a message.

    Raises:
      SpecError: the config holds what the wire cannot carry.
      TypeError: ``spec`` is none of these.
    """
    digest = spec if isinstance(spec, str) else getattr(spec, "sha256", None)
    if isinstance(digest, str):
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            fault = f"{digest[:80]!r} is no SHA-256 in hex, 64 digits"
            raise SpecError("program", [("program_sha256", fault)])
        return spec_pb2.ModelSpec(program_sha256=bytes.fromhex(digest))
    model, config = getattr(spec, "model", None), getattr(spec, "config", None)
    if not isinstance(model, str) or not isinstance(config, Mapping):
        raise TypeError(
            f"spec: got {type(spec).__name__}; expected a shardinit.ModelSpec or the "
            f"sha256 of a program in hex"
        )
    faults: list[tuple[str, str]] = []
    _check_plain("", config, faults)
    if faults:
        raise SpecError(model, faults)
    named = spec_pb2.NamedModel(model=model)
    named.config.update(dict(config))
    draw_dtype = getattr(spec, "draw_dtype", None) or ""
    streams = getattr(spec, "key_streams", ())
    return spec_pb2.ModelSpec(named=named, draw_dtype=draw_dtype, key_streams=streams)


def spec_for(spec: Spec, key: KeyLike, draw_dtype: str | None = None) -> Spec:
    """The spec of what is made of a key: it names the streams that have one each.

    Raises:
      ValueError: ``draw_dtype`` for a program, whose draws are settled.
    """
    streams = tuple(sorted(key)) if isinstance(key, Mapping) else ()
    named = hasattr(spec, "config")
    if draw_dtype is not None and not named:
        raise ValueError(
            f"draw_dtype={draw_dtype!r} for a program, whose draws are settled; "
            "expected a ModelSpec"
        )
    if not named or not (streams or draw_dtype):
        return spec
    own: Any = spec
    kept = {"draw_dtype": draw_dtype or own.draw_dtype}
    return replace(own, key_streams=streams or own.key_streams, **kept)


def _check_plain(
    where: str, value: object, faults: list[tuple[str, str]], depth: int = 0
) -> None:
    if depth > _MAX_DEPTH:
        faults.append(("config", f"nested deeper than {_MAX_DEPTH}"))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            inner = f"{where}.{key}" if where else str(key)
            _check_plain(inner, item, faults, depth + 1)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_plain(f"{where}[{i}]", item, faults, depth + 1)
    elif isinstance(value, int) and abs(value) > _MAX_EXACT:
        faults.append((where, f"{value} is beyond 2^53, which the wire cannot carry"))


def spec_from_proto(message: spec_pb2.ModelSpec) -> ModelSpec | str:
    """A ``ModelSpec``, or the sha256 (hex) of a program.

    Raises:
      SpecError: the config is not plain data.
    """
    from shardinit.models import ModelSpec

    if message.WhichOneof("spec") == "program_sha256":
        return message.program_sha256.hex()
    return ModelSpec(
        message.named.model,
        struct_to_dict(message.named.config),
        draw_dtype=message.draw_dtype or None,
        key_streams=tuple(message.key_streams),
    )


def struct_to_dict(struct: struct_pb2.Struct) -> dict[str, Any]:
    """A ``Struct`` as plain Python data."""
    return {key: _plain(value) for key, value in struct.fields.items()}


def _plain(value: struct_pb2.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return struct_to_dict(value.struct_value)
    if kind == "list_value":
        return [_plain(item) for item in value.list_value.values]
    return None if kind in (None, "null_value") else getattr(value, kind)


def mesh_to_proto(mesh: MeshLike) -> spec_pb2.MeshSpec:
    """A ``Mesh``, an ``AbstractMesh`` or a mapping of axis name to size."""
    shape = mesh if isinstance(mesh, Mapping) else mesh.shape
    axes = [spec_pb2.MeshAxis(name=str(n), size=int(s)) for n, s in shape.items()]
    return spec_pb2.MeshSpec(axes=axes)


def mesh_from_proto(message: spec_pb2.MeshSpec) -> AbstractMesh:
    """An ``AbstractMesh``: no device is looked for."""
    from jax.sharding import AbstractMesh

    return AbstractMesh(
        tuple(axis.size for axis in message.axes),
        tuple(axis.name for axis in message.axes),
    )


def rules_to_proto(rules: Rules) -> spec_pb2.ShardingRules:
    """``AxisRules``, ``PathRules`` or ``fsdp(...)`` as a message.

    Raises:
      TypeError: ``rules`` is none of these.
    """
    from shardinit.core.plan import rules as known
    from shardinit.core.plan.placement import axes_of, kind_of

    result = spec_pb2.ShardingRules()
    if isinstance(rules, known.AxisRules):
        result.axis_rules.SetInParent()
        for name, axes in rules.rules:
            result.axis_rules.rules.add(
                logical=name,
                mesh_axes=mesh_axes(axes_of(axes)),
                memory_kind=kind_of(axes) or "",
            )
    elif isinstance(rules, known.PathRules):
        result.path_rules.SetInParent()
        for pattern, spec in rules.rules:
            entries = [
                spec_pb2.Dimension(mesh_axes=mesh_axes(entry))
                for entry in axes_of(spec)
            ]
            kind = kind_of(spec) or ""
            result.path_rules.rules.add(
                pattern=pattern, dimensions=entries, memory_kind=kind
            )
    elif isinstance(rules, known.Fsdp):
        result.fsdp.mesh_axes.extend(rules.axes)
        result.fsdp.min_bytes = rules.min_bytes
    else:
        raise TypeError(
            f"rules: got {type(rules).__name__}; expected AxisRules([...]), "
            f"PathRules([...]) or fsdp(...)"
        )
    return result


def rules_from_proto(message: spec_pb2.ShardingRules) -> Rules:
    """``AxisRules``, ``PathRules`` or ``fsdp(...)``."""
    from jax.sharding import PartitionSpec

    from shardinit.core.plan import rules
    from shardinit.core.plan.placement import Placement

    def value(axes: Any, rule: spec_pb2.AxisRule | spec_pb2.PathRule) -> Any:
        return Placement(axes, rule.memory_kind) if rule.memory_kind else axes

    kind = message.WhichOneof("rules")
    if kind == "axis_rules":
        return rules.AxisRules(
            (rule.logical, value(as_entry(rule.mesh_axes), rule))
            for rule in message.axis_rules.rules
        )
    if kind == "path_rules":

        class Patterns(rules.PathRules):
            """Of a stranger, so that RE2 matches them."""

            def matches(self, pattern: str, path: str) -> bool:
                return patterns.found(pattern, path)

        return Patterns(
            (
                rule.pattern,
                value(
                    PartitionSpec(*(as_entry(d.mesh_axes) for d in rule.dimensions)),
                    rule,
                ),
            )
            for rule in message.path_rules.rules
        )
    return rules.fsdp(*message.fsdp.mesh_axes, min_bytes=message.fsdp.min_bytes)


def placing_to_proto(
    request: service_pb2.DescribeModelRequest,
    rules: Rules | None,
    opt_rules: Rules | Placement | None,
    opt_state: str | Iterable[str] | None,
) -> None:
    """Writes where leaves shall lie into a request.

    Raises:
      TypeError: rules that are none, or ``opt_state`` is a predicate.
    """
    if rules is not None:
        request.rules.CopyFrom(rules_to_proto(rules))
    if opt_rules is not None:
        # whoever has rules has imported JAX already
        from shardinit.core.plan.placement import axes_of, kind_of

        if axes_of(opt_rules) is not None:
            request.opt_rules.CopyFrom(rules_to_proto(axes_of(opt_rules)))
        request.opt_memory_kind = kind_of(opt_rules) or ""
    if callable(opt_state):
        raise TypeError("opt_state: got a function; the wire carries globs")
    globs = [opt_state] if isinstance(opt_state, str) else opt_state or ()
    request.opt_state.extend(globs)


def placing_from_proto(request: service_pb2.DescribeModelRequest) -> dict[str, Any]:
    """The rules of a request, as ``shardinit.plan`` takes them."""
    from shardinit.core.paths import glob_text
    from shardinit.core.plan.placement import Placement

    found: dict[str, Any] = {}
    for name in ("rules", "opt_rules"):
        if request.HasField(name):
            found[name] = rules_from_proto(getattr(request, name))
    if kind := request.opt_memory_kind:
        found["opt_rules"] = Placement(found.get("opt_rules"), kind)
    if request.opt_state:  # of a stranger, so that RE2 matches them
        texts = [f"^(?:{glob_text(glob)})$" for glob in request.opt_state]
        found["opt_state"] = lambda path: any(patterns.found(x, path) for x in texts)
    return found


def key_to_proto(key: KeyLike) -> service_pb2.RootKey:
    """An int seed, a JAX key, the raw words of one, or a mapping of them as a message.

    Raises:
      TypeError: ``key`` is none of these.
    """
    if not isinstance(key, Mapping):
        return _one_to_proto(key)
    message = service_pb2.RootKey()
    for name in sorted(key):
        one = _one_to_proto(key[name])
        stream = message.streams.streams.add(name=name)
        if one.WhichOneof("key") == "seed":
            stream.seed = one.seed
        else:
            stream.data.CopyFrom(one.data)
    return message


def _one_to_proto(key: Any) -> service_pb2.RootKey:
    if isinstance(key, int) and not isinstance(key, bool):
        if not -(2**63) <= key < 2**63:
            raise TypeError(f"key: the seed {key} has more than 64 bits")
        return service_pb2.RootKey(seed=key)
    dtype, impl = str(getattr(key, "dtype", "")), ""
    words: Any = key
    if dtype.startswith("key<"):
        import jax  # whoever has such a key has imported it already

        impl, words = str(jax.random.key_impl(key)), jax.random.key_data(key)
    elif dtype != "uint32":
        raise TypeError(
            f"key: got {type(key).__name__}; expected an int seed, a JAX key or its "
            f"words as a uint32 array"
        )
    data = service_pb2.KeyData(impl=impl, words=[int(word) for word in words])
    return service_pb2.RootKey(data=data)


def key_from_proto(message: service_pb2.RootKey) -> KeyLike:
    """An int seed, a JAX key, raw words, or a dict of these by stream."""
    if message.WhichOneof("key") == "streams":
        return {x.name: _one_from_proto(x) for x in message.streams.streams}
    return _one_from_proto(message)


def _one_from_proto(
    message: service_pb2.RootKey | service_pb2.KeyStream,
) -> int | jax.Array | np.ndarray:
    import jax
    import numpy as np

    if message.WhichOneof("key") == "seed":
        return message.seed
    words: Any = np.array(message.data.words, np.uint32)
    if not message.data.impl:
        return words
    return jax.random.wrap_key_data(words, impl=message.data.impl)
