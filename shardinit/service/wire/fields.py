"""Fields: what one of a request must be, beside what protobuf makes of it.

What holds for a field stands in one of two tables under the field's name: how many
entries a list may have, and what else is asked of a value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from shardinit.service.wire import patterns
from shardinit.v1 import service_pb2, spec_pb2
from shardinit.version import release

if TYPE_CHECKING:
    from shardinit.service.wire.limits import Limits

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

# By JAX's name of a type of keys: its implementation, and the words of a key.
KEY_TYPES = {
    "key<fry>": ("threefry2x32", 2),
    "key<rbg>": ("rbg", 4),
    "key<urbg>": ("unsafe_rbg", 4),
}
_KEY_WORDS = {impl: (words,) for impl, words in KEY_TYPES.values()} | {"": (2, 4)}


def longer(text: str, most: int) -> str:
    """What is wrong with a text of more characters than are allowed."""
    return f"{len(text)} characters; at most {most}" if len(text) > most else ""


def _name(limits: Limits, name: str, _: Message) -> str:
    if not name:
        return "empty; a name is expected"
    if _CONTROL.search(name[: limits.name]):
        return f"{name[: limits.name]!r} has control characters"
    return longer(name, limits.name)


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
    names = [stream.name for stream in keys.streams[: limits.key_streams + 1]]
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
    return longer(pattern, limits.pattern) or patterns.fault(pattern)


def _uri(limits: Limits, uri: str, _: Message) -> str:
    """The place of a checkpoint, beside which lie files with longer names."""
    name = len(uri.rpartition("/")[2].encode())
    if name > limits.uri_name_bytes:
        return f"a last part of {name} bytes; at most {limits.uri_name_bytes}"
    return longer(uri, limits.uri)


# Of a list: the least number of entries, and the cap on them.
COUNTS = {
    "MeshSpec.axes": (1, "mesh_axes"),
    "AxisRules.rules": (0, "rules"),
    "AxisRule.mesh_axes": (0, "mesh_axes"),
    "PathRules.rules": (0, "rules"),
    "PathRule.dimensions": (0, "rank"),
    "Dimension.mesh_axes": (0, "mesh_axes"),
    "FsdpRule.mesh_axes": (0, "mesh_axes"),
    "ModelSpec.key_streams": (0, "key_streams"),
    "KeyStreams.streams": (1, "key_streams"),
    "DescribeModelRequest.opt_state": (0, "rules"),
    "StreamShardsRequest.windows": (1, "windows"),
    "Window.start": (0, "rank"),
    "Window.shape": (0, "rank"),
}

# Of a value, or of each entry of a list: from the limits, the value and the message
# that it is in to what is wrong with it; empty if nothing is.
RULES: dict[str, Callable[[Limits, Any, Any], str]] = {
    "NamedModel.model": _name,
    "ModelSpec.program_sha256": _sha256,
    "ModelSpec.draw_dtype": _draw_dtype,
    "ModelSpec.key_streams": _name,
    "DescribeModelRequest.mesh": _mesh,
    "DescribeModelRequest.rules": _with_mesh,
    "DescribeModelRequest.opt_rules": _with_mesh,
    "DescribeModelRequest.opt_memory_kind": _opt_memory_kind,
    "DescribeModelRequest.opt_state": lambda limits, glob, _: longer(
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
    "Window.path": lambda limits, path, _: longer(path, limits.path),
    "WriteCheckpointRequest.uri": _uri,
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
