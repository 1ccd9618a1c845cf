"""Limits: what one request may cost, decided before anything is done for it.

A request is small, yet what it asks for may not be: a config nested a thousand deep, a
mesh of 2^60 devices, a pattern that backtracks for an hour. So every part of a request
is held against a cap while it is still nothing but a parsed message. All faults of a
request are gathered and told at once, each by its field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardinit.errors import SpecError

Faults = list[tuple[str, str]]

# Config keys that multiply the number of leaves, whichever family has them.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")

# Words of a key by implementation; without a name, of raw ones.
KEY_WORDS = {
    "": (2, 4),
    "threefry2x32": (2,),
    "rbg": (4,),
    "unsafe_rbg": (4,),
}

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


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
      pattern_repeats: unbounded repetitions in one pattern.
    """

    request_bytes: int = 1 << 20
    response_bytes: int = 8 << 20
    program_bytes: int = 256 << 20
    chunk_bytes: int = 1 << 20
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
    pattern_repeats: int = 3

    def check_spec(self, spec: Any) -> Faults:
        """Faults of a ``ModelSpec`` message."""
        kind = spec.WhichOneof("spec")
        if kind is None:
            return [("spec", "missing; give a model by name or a program's sha256")]
        if kind == "program_sha256":
            size = len(spec.program_sha256)
            text = f"{size} bytes; a SHA-256 has 32"
            return [] if size == 32 else [("program_sha256", text)]
        faults = self._name("model", spec.named.model)
        size = spec.named.config.ByteSize()
        if size > self.config_bytes:
            faults.append(("config", f"{size} bytes; at most {self.config_bytes}"))
        else:
            faults += self._config(spec.named.config)
            faults += self._counts(spec.named.config)
        return faults

    def check_mesh(self, mesh: Any) -> Faults:
        """Faults of a ``MeshSpec`` message."""
        count = len(mesh.axes)
        if not 1 <= count <= self.mesh_axes:
            return [("mesh.axes", f"{count} axes; 1 to {self.mesh_axes} are allowed")]
        faults: Faults = []
        seen: set[str] = set()
        for i, axis in enumerate(mesh.axes):
            faults += self._name(f"mesh.axes[{i}].name", axis.name)
            if axis.name in seen:
                faults.append((f"mesh.axes[{i}].name", f"{axis.name!r} comes twice"))
            seen.add(axis.name)
            if axis.size < 1:
                text = f"{axis.size}; an axis has 1 device or more"
                faults.append((f"mesh.axes[{i}].size", text))
        devices = math.prod(max(axis.size, 1) for axis in mesh.axes)
        if devices > self.mesh_devices:
            text = f"{devices} devices; at most {self.mesh_devices}"
            faults.append(("mesh.axes", text))
        return faults

    def check_rules(self, rules: Any) -> Faults:
        """Faults of a ``ShardingRules`` message."""
        kind = rules.WhichOneof("rules")
        if kind is None:
            return [("rules", "empty; give axis rules, path rules or fsdp")]
        if kind == "fsdp":
            return self._mesh_axes("rules.fsdp.mesh_axes", rules.fsdp.mesh_axes)
        where = f"rules.{kind}.rules"
        listed = getattr(rules, kind).rules
        if len(listed) > self.rules:
            return [(where, f"{len(listed)} rules; at most {self.rules}")]
        faults: Faults = []
        for i, rule in enumerate(listed):
            here = f"{where}[{i}]"
            if kind == "axis_rules":
                faults += self._name(f"{here}.logical", rule.logical)
                faults += self._mesh_axes(f"{here}.mesh_axes", rule.mesh_axes)
                continue
            faults += self._pattern(f"{here}.pattern", rule.pattern)
            if len(rule.dimensions) > self.rank:
                text = f"{len(rule.dimensions)} entries; at most {self.rank}"
                faults.append((f"{here}.dimensions", text))
                continue
            for j, entry in enumerate(rule.dimensions):
                inner = f"{here}.dimensions[{j}].mesh_axes"
                faults += self._mesh_axes(inner, entry.mesh_axes)
        return faults

    def check_key(self, key: Any) -> Faults:
        """Faults of a ``RootKey`` message."""
        kind = key.WhichOneof("key")
        if kind == "seed":
            return []
        if kind is None:
            return [("key", "missing; give a seed or the words of a key")]
        impl, count = key.data.impl[:64], len(key.data.words)
        if impl not in KEY_WORDS:
            known = ", ".join(filter(None, KEY_WORDS))
            return [("key.data.impl", f"{impl!r} is none of {known}")]
        if count not in KEY_WORDS[impl]:
            return [("key.data.words", f"{count} words; a key has {KEY_WORDS[impl]}")]
        return []

    def check_windows(self, windows: Any) -> Faults:
        """Faults of ``Window`` messages that show without the model."""
        if not 1 <= len(windows) <= self.windows:
            text = f"{len(windows)} windows; 1 to {self.windows} are allowed"
            return [("windows", text)]
        faults: Faults = []
        for i, window in enumerate(windows):
            if len(window.path) > self.path:
                text = f"{len(window.path)} characters; at most {self.path}"
                faults.append((f"windows[{i}].path", text))
            if max(len(window.start), len(window.shape)) > self.rank:
                faults.append((f"windows[{i}]", f"more than {self.rank} dimensions"))
        return faults[:64]

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

    def _name(self, where: str, name: str) -> Faults:
        if not name:
            return [(where, "empty; a name is expected")]
        if len(name) > self.name:
            return [(where, f"{len(name)} characters; at most {self.name}")]
        if _CONTROL.search(name):
            return [(where, f"{name!r} has control characters")]
        return []

    def _mesh_axes(self, where: str, names: Any) -> Faults:
        if len(names) > self.mesh_axes:
            return [(where, f"{len(names)} axes; at most {self.mesh_axes}")]
        pairs = [self._name(f"{where}[{i}]", name) for i, name in enumerate(names)]
        return [fault for faults in pairs for fault in faults]

    def _config(self, config: Any) -> Faults:
        """Walks a Struct with a list for a stack, so that depth costs no recursion."""
        faults: Faults = []
        waiting: list[tuple[str, Any, int]] = [("", config, 1)]
        while waiting:
            where, node, depth = waiting.pop()
            if depth > self.config_depth:
                text = f"nested deeper than {self.config_depth}"
                faults.append((where or "config", text))
                continue
            if hasattr(node, "fields"):
                for key in sorted(node.fields):
                    if len(key) > self.name:
                        text = f"{len(key)} characters; at most {self.name}"
                        faults.append((f"config key {key[:16]!r}…", text))
                        continue
                    inner = f"{where}.{key}" if where else key
                    faults += self._value(inner, node.fields[key], depth, waiting)
            else:
                for i, value in enumerate(node.values):
                    faults += self._value(f"{where}[{i}]", value, depth, waiting)
        return faults

    def _value(
        self, where: str, value: Any, depth: int, waiting: list[tuple[str, Any, int]]
    ) -> Faults:
        kind = value.WhichOneof("kind")
        if kind in ("struct_value", "list_value"):
            waiting.append((where, getattr(value, kind), depth + 1))
        elif kind is None:
            return [(where, "no value")]
        elif kind == "string_value" and len(value.string_value) > self.text:
            text = f"{len(value.string_value)} characters; at most {self.text}"
            return [(where, text)]
        elif kind == "number_value" and not math.isfinite(value.number_value):
            return [(where, f"{value.number_value} is not a finite number")]
        return []

    def _counts(self, config: Any) -> Faults:
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

    def _pattern(self, where: str, pattern: str) -> Faults:
        """A regular expression from a stranger, in a subset that cannot run away."""
        if len(pattern) > self.pattern:
            return [(where, f"{len(pattern)} characters; at most {self.pattern}")]
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            return [(where, f"{pattern!r} is no regular expression ({error})")]
        bare = re.sub(r"\\[^0-9A-Z]|\[\^?\]?[^\]]*\]", "x", pattern)
        if re.search(r"\)[*+?{]|\\\d|\(\?P=", bare):
            return [(where, f"{pattern!r} repeats a group or refers back to one")]
        if len(re.findall(r"[*+]|\{\d*,?\d*\}", bare)) > self.pattern_repeats:
            text = f"{pattern!r} has more than {self.pattern_repeats} repetitions"
            return [(where, text)]
        return []
