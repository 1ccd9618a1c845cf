"""Limits: what one request may cost, decided before anything is done for it.

A request is small, yet what it asks for may not be: a config nested a thousand deep, a
mesh of 2^60 devices, a thousand rules for a hundred thousand leaves. So every part of a
request is held against a cap while it is still nothing but a parsed message. All faults
of a request are gathered and told at once, each by its field.

What holds for a field stands in one of two tables under the field's name: how many
entries a list may have, and what else is asked of a value. One walk over a message
holds all of it against the tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import struct_pb2
from google.protobuf.message import Message

from shardinit.errors import SpecError
from shardinit.service.wire import patterns
from shardinit.v1 import service_pb2, spec_pb2
from shardinit.version import release

Faults = list[tuple[str, str]]

# Config keys that multiply the number of leaves, whichever family has them.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")

# By JAX's name of a type of keys: its implementation, and the words of a key.
KEY_TYPES = {
    "key<fry>": ("threefry2x32", 2),
    "key<rbg>": ("rbg", 4),
    "key<urbg>": ("unsafe_rbg", 4),
}
_KEY_WORDS = {impl: (words,) for impl, words in KEY_TYPES.values()} | {"": (2, 4)}

_PACKAGE = "shardinit.v1."
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NEEDED = ("spec", "key")  # messages that a request must have
_TRANSPARENT = ("spec", "named")  # their fields are known by their own names


@dataclass(frozen=True)
class Limits:
    """Caps on requests and on what is made for them.

    Attributes:
      request_bytes: size of one serialised request.
      response_bytes: size of one serialised response message.
      program_bytes: size of one serialised init program.
      chunk_bytes: size of one chunk of a stream.
      name: characters of a name (model, axis, config key).
      text: characters of one string in a config.
      config_bytes: size of a serialised config.
      config_depth: how deep lists and mappings in a config nest.
      layers: layers of a model.
      leaves: leaves of a model, and layers times experts.
      elements: elements of one leaf.
      windows: windows in one request.
      path: characters of a leaf's path.
      rank: dimensions of a leaf or of a placement.
      mesh_axes: axes of a mesh.
      mesh_devices: devices of a mesh.
      rules: sharding rules in one request.
      pattern: characters of one path rule's pattern.
      matches: path rules of a request times leaves of its model.
    """

    request_bytes: int = 1 << 20
    response_bytes: int = 8 << 20
    program_bytes: int = 256 << 20
    chunk_bytes: int = 1 << 19
    name: int = 128
    text: int = 4096
    config_bytes: int = 64 << 10
    config_depth: int = 16
    layers: int = 4096
    leaves: int = 1 << 16
    elements: int = 1 << 48
    windows: int = 1 << 16
    path: int = 4096
    rank: int = 32
    mesh_axes: int = 16
    mesh_devices: int = 1 << 20
    rules: int = 1024
    pattern: int = 256
    matches: int = 1 << 22

    def check(self, message: Message, where: str = "") -> Faults:
        """The faults of a message and of all that is inside it.

        Args:
          message: any message of a request.
          where: the field that it is; what is inside is named after it.
        """
        faults = _missing(message, where)
        for field in message.DESCRIPTOR.fields:
            name = field.name
            optional = field.has_presence and name not in _NEEDED
            if not optional or message.HasField(name):
                here = where if name in _TRANSPARENT else f"{where}.{name}".lstrip(".")
                faults += self._field(message, name, here)
        return faults

    def _field(self, message: Message, name: str, here: str) -> Faults:
        """The faults of one field: of its length, then of each of its items."""
        field, value = message.DESCRIPTOR.fields_by_name[name], getattr(message, name)
        full = field.full_name.removeprefix(_PACKAGE)
        if full in _COUNTS:
            least, cap = _COUNTS[full]
            most = getattr(self, cap)
            if not least <= len(value) <= most:
                text = f"{len(value)} of them; {least} to {most} are allowed"
                return [(here, text)]
        items = [(here, value)]
        if field.is_repeated:
            items = [(f"{here}[{i}]", item) for i, item in enumerate(value)]
        rule, faults = _RULES.get(full), []
        for place, item in items:
            if rule is not None and (text := rule(self, item, message)):
                faults.append((place, text))
            elif full == "NamedModel.config":
                faults += self._config(item)
            elif field.message_type is not None:
                faults += self.check(item, place)
        return faults

    def check_leaves(self, model: str, shapes: Sequence[tuple[int, ...]]) -> None:
        """Holds a traced model against the caps on leaves, elements and rank.

        Raises:
          SpecError: it has too many leaves, or one that is too large.
        """
        ranks = [len(shape) for shape in shapes]
        faults: Faults = []
        if len(ranks) > self.leaves:
            faults.append(("config", f"{len(ranks)} leaves; at most {self.leaves}"))
        if max(map(math.prod, shapes), default=0) > self.elements:
            faults.append(("config", f"a leaf of more than {self.elements} elements"))
        if max(ranks, default=0) > self.rank:
            text = f"a leaf of {max(ranks)} dimensions; at most {self.rank}"
            faults.append(("config", text))
        if faults:
            raise SpecError(model, faults)

    def check_rules(
        self, request: service_pb2.DescribeModelRequest, leaves: int
    ) -> None:
        """Holds path rules and globs against the model that they are for.

        Raises:
          SpecError: there is too much to match.
        """
        given = {
            "rules.path_rules.rules": request.rules.path_rules.rules,
            "opt_rules.path_rules.rules": request.opt_rules.path_rules.rules,
            "opt_state": request.opt_state,
        }
        for where, texts in given.items():
            if len(texts) * leaves > self.matches:
                text = f"{len(texts)} for {leaves} leaves; at most {self.matches}"
                raise SpecError("rules", [(where, f"{text} matches")])

    def _config(self, config: struct_pb2.Struct) -> Faults:
        """Walks a Struct with a list for a stack, so that depth costs no recursion."""
        size = config.ByteSize()
        if size > self.config_bytes:
            return [("config", f"{size} bytes; at most {self.config_bytes}")]
        faults: Faults = []
        waiting = [("", struct_pb2.Value(struct_value=config), 1)]
        while waiting:
            where, value, depth = waiting.pop()
            nested = value.WhichOneof("kind") in ("struct_value", "list_value")
            if nested and depth > self.config_depth:
                faults.append((where, f"nested deeper than {self.config_depth}"))
                continue
            for key, item in sorted(value.struct_value.fields.items()):
                if text := _longer(key, self.name):
                    faults.append((f"config key {key[:16]!r}…", text))
                    continue
                waiting.append((f"{where}.{key}".lstrip("."), item, depth + 1))
            for i, item in enumerate(value.list_value.values):
                waiting.append((f"{where}[{i}]", item, depth + 1))
            if text := self._of_scalar(value):
                faults.append((where, text))
        return faults + self._multiplied(config)

    def _of_scalar(self, value: struct_pb2.Value) -> str:
        """What is wrong with a text or a number of a config, or with no value."""
        kind = value.WhichOneof("kind")
        if kind == "string_value":
            return _longer(value.string_value, self.text)
        if kind == "number_value" and not math.isfinite(value.number_value):
            return f"{value.number_value} is not a finite number"
        return "no value" if kind is None else ""

    def _multiplied(self, config: struct_pb2.Struct) -> Faults:
        """A trace takes time for every leaf, so their number is bounded beforehand."""

        def largest(names: tuple[str, ...]) -> tuple[str, float]:
            found = [name for name in names if name in config.fields]
            numbers = {name: config.fields[name].number_value for name in found}
            name = max(numbers, key=lambda key: numbers[key], default="")
            return name, numbers.get(name, 1)

        (layers_key, layers), (experts_key, experts) = map(largest, (_LAYERS, _EXPERTS))
        if layers > self.layers:
            return [(layers_key, f"{layers:g} layers; at most {self.layers}")]
        if layers * experts > self.leaves:
            text = f"{experts:g} experts in {layers:g} layers; at most {self.leaves}"
            return [(experts_key, f"{text} together")]
        return []


DEFAULTS = Limits()  # what a client keeps to, and asks of a server's answers


def _missing(message: Message, where: str) -> Faults:
    """The choices that a message does not make."""
    return [
        (where or one.name, f"missing; give {' or '.join(x.name for x in one.fields)}")
        for one in message.DESCRIPTOR.oneofs
        if message.WhichOneof(one.name) is None
    ]


def _longer(text: str, most: int) -> str:
    return f"{len(text)} characters; at most {most}" if len(text) > most else ""


def _name(limits: Limits, name: str, _: Message) -> str:
    if not name:
        return "empty; a name is expected"
    if _CONTROL.search(name[: limits.name]):
        return f"{name[: limits.name]!r} has control characters"
    return _longer(name, limits.name)


def _sha256(limits: Limits, digest: bytes, _: Message) -> str:
    return "" if len(digest) == 32 else f"{len(digest)} bytes; a SHA-256 has 32"


def _mesh(limits: Limits, mesh: spec_pb2.MeshSpec, _: Message) -> str:
    if len(mesh.axes) > limits.mesh_axes:
        return ""  # said of the list, before anything is multiplied
    if text := _twice(limits, [axis.name for axis in mesh.axes]):
        return text
    devices = math.prod(max(axis.size, 1) for axis in mesh.axes)
    most = limits.mesh_devices
    return f"{devices} devices; at most {most}" if devices > most else ""


def _key(limits: Limits, data: service_pb2.KeyData, _: Message) -> str:
    impl, count = data.impl[:64], len(data.words)
    if impl not in _KEY_WORDS:
        return f"{impl!r} is none of {', '.join(filter(None, _KEY_WORDS))}"
    known = _KEY_WORDS[impl]
    return "" if count in known else f"{count} words; a key has {known}"


def _streams(limits: Limits, keys: service_pb2.KeyStreams, _: Message) -> str:
    names = [stream.name for stream in keys.streams[: limits.rank + 1]]
    return _twice(limits, names)


def _twice(limits: Limits, names: list[str]) -> str:
    twice = [name for name in names if names.count(name) > 1]
    return f"{twice[0][: limits.name]!r} comes twice" if twice else ""


def _draw_dtype(limits: Limits, dtype: str, spec: spec_pb2.ModelSpec) -> str:
    if dtype and spec.WhichOneof("spec") != "named":
        return "given for a program, whose draws are settled"
    known = dtype in ("", "float32", "float64")
    return "" if known else f"{dtype[: limits.name]!r} is no float32 or float64"


def _with_mesh(
    _: Limits, rules: Message, request: service_pb2.DescribeModelRequest
) -> str:
    return "" if request.HasField("mesh") else "given without a mesh"


def _memory_kind(limits: Limits, kind: str, message: Message) -> str:
    return _name(limits, kind, message) if kind else ""


def _opt_memory_kind(
    limits: Limits, kind: str, request: service_pb2.DescribeModelRequest
) -> str:
    wrong = _memory_kind(limits, kind, request)
    return wrong or (_with_mesh(limits, request, request) if kind else "")


def _pattern(limits: Limits, pattern: str, _: Message) -> str:
    """A regular expression, which RE2 must take."""
    return _longer(pattern, limits.pattern) or patterns.fault(pattern)


# Of a list: the least number of entries, and the cap on them.
_COUNTS = {
    "MeshSpec.axes": (1, "mesh_axes"),
    "AxisRules.rules": (0, "rules"),
    "AxisRule.mesh_axes": (0, "mesh_axes"),
    "PathRules.rules": (0, "rules"),
    "PathRule.dimensions": (0, "rank"),
    "Dimension.mesh_axes": (0, "mesh_axes"),
    "FsdpRule.mesh_axes": (0, "mesh_axes"),
    "ModelSpec.key_streams": (0, "rank"),
    "KeyStreams.streams": (1, "rank"),
    "DescribeModelRequest.opt_state": (0, "rules"),
    "StreamShardsRequest.windows": (1, "windows"),
    "Window.start": (0, "rank"),
    "Window.shape": (0, "rank"),
}

# Of a value, or of each entry of a list: from the limits, the value and the message
# that it is in to what is wrong with it; empty if nothing is.
_RULES: dict[str, Callable[[Limits, Any, Any], str]] = {
    "NamedModel.model": _name,
    "ModelSpec.program_sha256": _sha256,
    "ModelSpec.draw_dtype": _draw_dtype,
    "ModelSpec.key_streams": _name,
    "DescribeModelRequest.mesh": _mesh,
    "DescribeModelRequest.rules": _with_mesh,
    "DescribeModelRequest.opt_rules": _with_mesh,
    "DescribeModelRequest.opt_memory_kind": _opt_memory_kind,
    "DescribeModelRequest.opt_state": lambda limits, glob, _: _longer(
        glob, limits.pattern
    ),
    "MeshAxis.name": _name,
    "MeshAxis.size": lambda _, size, axis: (
        "" if size >= 1 else f"{size}; an axis has 1 device or more"
    ),
    "AxisRule.logical": _name,
    "AxisRule.mesh_axes": _name,
    "AxisRule.memory_kind": _memory_kind,
    "PathRule.pattern": _pattern,
    "PathRule.memory_kind": _memory_kind,
    "Dimension.mesh_axes": _name,
    "FsdpRule.mesh_axes": _name,
    "RootKey.data": _key,
    "RootKey.streams": _streams,
    "KeyStream.name": _name,
    "KeyStream.data": _key,
    "Window.path": lambda limits, path, _: _longer(path, limits.path),
    "GetVersionRequest.min": lambda _, least, request: (
        "" if 1 <= least <= request.max else f"{least} to {request.max} is no range"
    ),
    "GetProgramRequest.jax_version": lambda _, version, request: (
        "" if not version or release(version) else f"{version[:32]!r} is no version"
    ),
    "GetProgramRequest.known_sha256": lambda limits, digest, _: (
        _sha256(limits, digest, _) if digest else ""
    ),
    "UploadHeader.size": lambda limits, size, _: (
        ""
        if 0 < size <= limits.program_bytes
        else f"{size} bytes; the cap is {limits.program_bytes}"
    ),
    "UploadHeader.sha256": _sha256,
}
