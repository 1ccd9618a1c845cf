"""ModelSpec: which model, as data.

Two specs are the same model exactly when their configurations are the same values,
wherever they came from. The wire knows only one kind of number (``Struct`` of
protobuf delivers 128256 as 128256.0), so numbers are normalised first: a float that is
a whole number becomes an int, and a builder that wants a float converts it back. What
is left has one canonical text, and the fingerprint is the digest of that text.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from os import PathLike
from types import MappingProxyType
from typing import Any

from shardinit.errors import SpecError
from shardinit.short import short_repr

_MAX_EXACT = 2**53  # beyond it a float no longer names one integer


def _normalise(value: Any, where: str, faults: list[tuple[str, str]]) -> Any:
    """A copy of ``value`` in dicts, lists, str, int, float, bool and None."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            faults.append((where, f"{value} is not a finite number"))
        return _number(value)
    if isinstance(value, Mapping):
        result = {}
        for key, item in value.items():
            inner = f"{where}.{key}" if where else str(key)
            if not isinstance(key, str):
                faults.append((inner, f"key {key!r} is no string"))
            result[str(key)] = _normalise(item, inner, faults)
        return result
    if isinstance(value, list | tuple):
        return [_normalise(x, f"{where}[{i}]", faults) for i, x in enumerate(value)]
    kind = type(value).__name__
    faults.append((where, f"a {kind} is no plain data (number, text, list, mapping)"))
    return None


def _number(value: float) -> float | int:
    """An int where a float is one exactly, as JSON of another writer may have it."""
    exact = value.is_integer() and abs(value) <= _MAX_EXACT
    return int(value) if exact else value


@dataclass(frozen=True)
class ModelSpec:
    """The name of a registered model and its configuration.

    Specs compare and hash by their fingerprint, so they serve as keys of a cache.

    Attributes:
      model: name of a registered builder, such as ``"decoder"``.
      config: configuration of the model, normalised and read-only; whole numbers are
        ints however they arrived.
      draw_dtype: as for ``shardinit.plan``, by name.
      key_streams: the names of the streams, in order, of a model whose function takes
        a key for each of several.
      fingerprint: sha256, in hex, of the canonical JSON of all that.

    Raises:
      SpecError: the config holds something other than plain data; lists every place.

    Example:
      >>> from shardinit.models import ModelSpec, example_config
      >>> spec = ModelSpec("decoder", example_config("gpt2"))
      >>> spec.config["n_layer"], len(spec.fingerprint)
      (12, 64)
    """

    __repr__ = short_repr

    model: str
    # A dict has no hash; the fingerprint stands for it.
    config: Mapping[str, Any] = field(compare=False)
    draw_dtype: str | None = None
    key_streams: tuple[str, ...] = ()
    fingerprint: str = field(init=False, repr=False)

    def __post_init__(self):
        faults: list[tuple[str, str]] = []
        if not isinstance(self.model, str) or not self.model:
            faults.append(("model", f"{self.model!r} is no name of a model"))
        config: Any = None
        if isinstance(self.config, Mapping):
            config = _normalise(self.config, "", faults)
        else:
            fault = f"a {type(self.config).__name__} is no mapping"
            if isinstance(self.config, str):
                fault += f"; shardinit.models.example_config({self.config!r}) reads one"
            faults.append(("config", fault))
        if faults:
            raise SpecError(str(self.model), faults)
        object.__setattr__(self, "key_streams", tuple(sorted(self.key_streams)))
        facts: dict[str, Any] = {"config": config, "model": self.model}
        # Named only where they are given: a spec from before they existed has the
        # fingerprint that it had.
        if self.draw_dtype:
            facts["draw_dtype"] = self.draw_dtype
        if self.key_streams:
            facts["key_streams"] = self.key_streams
        text = json.dumps(
            facts,
            sort_keys=True,
            separators=(",", ":"),
            # JSON may hold half of a surrogate pair, which UTF-8 cannot write.
            ensure_ascii=True,
            allow_nan=False,
        )
        object.__setattr__(self, "config", MappingProxyType(config))
        digest = hashlib.sha256(text.encode()).hexdigest()
        object.__setattr__(self, "fingerprint", digest)

    @classmethod
    def from_file(cls, path: str | PathLike[str], model: str = "decoder") -> ModelSpec:
        """Reads the configuration from a JSON file, such as a ``config.json``.

        Args:
          path: the file.
          model: name of the registered model that it configures.

        Raises:
          SpecError: the file is not JSON, or not a JSON object.
          OSError: the file cannot be read.

        Example:
          >>> import shardinit, tempfile
          >>> with tempfile.NamedTemporaryFile(suffix=".json") as file:
          ...     _ = file.write(b'{"model_type": "gpt2"}'), file.flush()
          ...     shardinit.ModelSpec.from_file(file.name).config["model_type"]
          'gpt2'
        """
        with open(path, "rb") as file:
            return cls.from_json(file.read(), model, name=str(path))

    @classmethod
    def from_json(
        cls, content: str | bytes, model: str = "decoder", *, name: str = "the text"
    ) -> ModelSpec:
        """Reads the configuration from JSON text.

        Args:
          content: the text of a ``config.json``.
          model: name of the registered model that it configures.
          name: where the text comes from, for errors.

        Raises:
          SpecError: it is not JSON, or not a JSON object.

        Example:
          >>> ModelSpec.from_json('{"model_type": "gpt2"}').config["model_type"]
          'gpt2'
        """
        try:
            config = json.loads(content)
        except ValueError as error:  # not UTF-8, or not JSON
            fault = f"{name} is not JSON: {error}"
            raise SpecError(model, [("config", fault)]) from error
        except RecursionError as error:
            fault = f"{name} is nested too deeply"
            raise SpecError(model, [("config", fault)]) from error
        return cls(model, config)


def example_names() -> tuple[str, ...]:
    """Names of the configurations that come with the package, sorted.

    Example:
      >>> "gpt2" in example_names()
      True
    """
    folder = resources.files("shardinit.models") / "configs"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(n.removesuffix(".json") for n in names if n.endswith(".json")))


def example_config(name: str) -> dict[str, Any]:
    """The configuration of a published model that comes with the package.

    Args:
      name: such as ``"llama-3.1-8b"``; see `example_names`.

    Raises:
      SpecError: there is no example of that name.

    Example:
      >>> example_config("gpt2")["n_embd"]
      768
    """
    if name not in example_names():
        near = difflib.get_close_matches(name, example_names(), n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        known = ", ".join(example_names())
        fault = f"no example config is named {name!r}{meant}; there are {known}"
        raise SpecError("decoder", [("config", fault)])
    file = resources.files("shardinit.models") / "configs" / f"{name}.json"
    return json.loads(file.read_bytes())
