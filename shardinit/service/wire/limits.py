"""Limits: what one request may cost, decided before anything is done for it.

A request is small, yet what it asks for may not be: a config nested a thousand deep, a
mesh of 2^60 devices, a thousand rules for a hundred thousand leaves. So every part of a
request is held against a cap while it is still nothing but a parsed message. All faults
of a request are gathered and told at once, each by its field.

What holds for a field stands in the tables of ``fields``. One walk over a message holds
all of it against them. What a cap bounds is said beside it alone: ``shardinit serve
--help``, docs/service.md and the protos' comments have that text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, get_type_hints

from google.protobuf import struct_pb2
from google.protobuf.message import Message

from shardinit.errors import SpecError
from shardinit.service.wire.fields import COUNTS, RULES, longer
from shardinit.v1 import service_pb2

Faults = list[tuple[str, str]]

# Config keys that multiply the number of leaves, whichever family has them.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")

_PACKAGE = "shardinit.v1."
_NEEDED = ("spec", "key")  # messages that a request must have
_TRANSPARENT = ("spec", "named")  # their fields are known by their own names


@dataclass(frozen=True)
class Limits:
    """Caps on requests and on what is made for them; what each bounds, it says."""

    request_bytes: Annotated[int, "A message of a request."] = 1 << 20
    response_bytes: Annotated[int, "A message of an answer."] = 8 << 20
    program_bytes: Annotated[int, "A serialised program."] = 256 << 20
    chunk_bytes: Annotated[int, "A chunk of a stream."] = 1 << 19
    name: Annotated[
        int,
        "Characters of a name of a model, an axis, a stream of keys, a config key.",
    ] = 128
    text: Annotated[int, "Characters of a string in a config."] = 4096
    config_bytes: Annotated[int, "A serialised config."] = 64 << 10
    config_depth: Annotated[int, "How deep lists and mappings in a config nest."] = 16
    layers: Annotated[int, "Layers of a model."] = 4096
    leaves: Annotated[int, "Leaves of a model; layers times experts."] = 1 << 16
    elements: Annotated[int, "Elements of a leaf."] = 1 << 48
    windows: Annotated[int, "Windows in a request."] = 1 << 16
    path: Annotated[int, "Characters of a leaf's path."] = 4096
    rank: Annotated[int, "Dimensions of a leaf, a window or a placement."] = 32
    key_streams: Annotated[int, "Streams of a model's keys."] = 32
    mesh_axes: Annotated[int, "Axes of a mesh, and of one dimension of a leaf."] = 16
    mesh_devices: Annotated[int, "Devices of a mesh."] = 1 << 20
    rules: Annotated[int, "Sharding rules, or globs, in one list of a request."] = 1024
    pattern: Annotated[int, "Characters of a path rule's pattern, or a glob."] = 256
    matches: Annotated[int, "Path rules, or globs, times leaves."] = 1 << 22
    uri: Annotated[int, "Characters of a checkpoint's place."] = 1024
    uri_name_bytes: Annotated[int, "The last part of a checkpoint's place."] = 200

    @classmethod
    def meanings(cls) -> dict[str, str]:
        """What each limit bounds, by name."""
        hints = get_type_hints(cls, include_extras=True)
        return {name: hint.__metadata__[0] for name, hint in hints.items()}

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
        if full in COUNTS:
            least, cap = COUNTS[full]
            most = getattr(self, cap)
            if not least <= len(value) <= most:
                text = f"{len(value)} of them; {least} to {most} are allowed"
                return [(here, text)]
        items = [(here, value)]
        if field.is_repeated:
            items = [(f"{here}[{i}]", item) for i, item in enumerate(value)]
        rule, faults = RULES.get(full), []
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
                if text := longer(key, self.name):
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
            return longer(value.string_value, self.text)
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


def amount(name: str, value: float) -> str:
    """A limit as people read it, in the unit that its name or its type says.

    Args:
      name: of the limit; bytes have one that ends in ``_bytes``.
      value: a float is seconds.

    Example:
      >>> amount("chunk_bytes", 1 << 19), amount("grace", 30.0), amount("rank", 32)
      ('512 KiB', '30 s', '32')
    """
    if isinstance(value, float):
        return f"{value:g} s" if value < 1e6 else f"{value:.0f} s"
    if name.endswith("_bytes"):
        steps = min((value & -value).bit_length() - 1, 40) // 10 if value else 0
        unit = ("bytes", "KiB", "MiB", "GiB", "TiB")[steps]
        return f"{value >> 10 * steps} {unit}"
    power = value.bit_length() - 1
    return f"2^{power}" if power >= 20 and value == 1 << power else str(value)


def _missing(message: Message, where: str) -> Faults:
    """The choices that a message does not make."""
    return [
        (where or one.name, f"missing; give {' or '.join(x.name for x in one.fields)}")
        for one in message.DESCRIPTOR.oneofs
        if message.WhichOneof(one.name) is None
    ]
