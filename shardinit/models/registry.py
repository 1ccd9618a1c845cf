"""The registry: names that a spec may use, and what each of them builds.

A spec is untrusted data, so it never says what to import. It gives a name, and a name
means something only if the operator made it so: by installing a package that
declares an entry point in the group ``shardinit.models``, or by naming a module when
the program starts (`load_package`). Either way the module registers its builders as
it is imported::

    @register("my-model", schema={"type": "object", "properties": {...}})
    def build(config):
        return shardinit.frontends.nnx.init_fn(MyModel, **config)

An entry point is called like the model it provides and refers to that module. It is
imported when a spec first asks for its name, so that a broken package of one model
does not take the others down.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from shardinit.errors import SpecError
from shardinit.models.spec import ModelSpec

if TYPE_CHECKING:
    from shardinit.core.init_fn import InitFn

GROUP = "shardinit.models"

# Provided by this package itself, also where it runs without being installed.
_OWN = {
    "decoder": "shardinit.models.decoder",
    "hf": "shardinit.models.hf",
}


@dataclass(frozen=True)
class Builder:
    """What a registered name builds.

    Attributes:
      name: the name that a spec gives.
      build: from a normalised config to an `InitFn`; raises `SpecError` with every
        fault of the config, and allocates nothing.
      schema: the config keys in the manner of JSON Schema: ``properties`` with
        ``type``, ``description`` and ``default`` a key, and ``required``.

    Example:
      >>> from shardinit.models import builder
      >>> builder("decoder").schema["properties"]["vocab_size"]["type"]
      'integer'
    """

    name: str
    build: Callable[[Mapping[str, Any]], InitFn]
    schema: Mapping[str, Any] = field(default_factory=dict)


_builders: dict[str, Builder] = {}


def register(
    name: str, schema: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., InitFn]], Callable[..., InitFn]]:
    """Registers the decorated function as the builder of models called ``name``.

    Args:
      name: the name that specs give.
      schema: the config keys in the manner of JSON Schema.

    Raises:
      ValueError: another function has the name already.

    Example:
      >>> import jax
      >>> from shardinit import InitFn
      >>> @register("bias", schema={"properties": {"size": {"type": "integer"}}})
      ... def build_bias(config):
      ...     return InitFn(lambda key: jax.random.normal(key, (config["size"],)))
      >>> build(ModelSpec("bias", {"size": 8})).fn(jax.random.key(0)).shape
      (8,)
    """

    def decorate(build: Callable[..., InitFn]) -> Callable[..., InitFn]:
        known = _builders.get(name)
        if known is not None and _origin(known.build) != _origin(build):
            raise ValueError(
                f"a model named {name!r} is registered already, by "
                f"{'.'.join(_origin(known.build))}"
            )
        _builders[name] = Builder(name, build, schema or {})
        return build

    return decorate


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    # By name: a module that is imported anew registers the same builder as another
    # object.
    return function.__module__, getattr(function, "__qualname__", repr(function))


def _entry_points() -> dict[str, metadata.EntryPoint]:
    points = {n: metadata.EntryPoint(n, v, GROUP) for n, v in _OWN.items()}
    for point in metadata.entry_points(group=GROUP):
        # A package that is installed cannot take over a name of this one's own.
        points.setdefault(point.name, point)
    return points


def load_package(module: str) -> tuple[str, ...]:
    """Imports a module of the operator's choice, so that it registers its builders.

    For the operator's command line and configuration only; nothing that arrives in a
    spec may reach this function.

    Args:
      module: dotted name of the module.

    Returns:
      The names registered by it.

    Raises:
      ImportError: the module cannot be imported.
      ValueError: it registers no builder.

    Example:
      >>> load_package("shardinit.models.decoder")
      ('decoder',)
    """
    loaded = importlib.import_module(module)
    inside = (loaded.__name__, loaded.__name__ + ".")
    names = tuple(
        name
        for name, b in _builders.items()
        if _origin(b.build)[0] == inside[0] or _origin(b.build)[0].startswith(inside[1])
    )
    if not names:
        raise ValueError(
            f"module {module!r} registers no model; decorate its build function with "
            f"shardinit.models.register"
        )
    return names


def registered_modules() -> tuple[str, ...]:
    """The modules that registered builders here; importing them does so elsewhere.

    Example:
      >>> from shardinit.models.registry import load_package, registered_modules
      >>> _ = load_package("shardinit.models.decoder")
      >>> "shardinit.models.decoder" in registered_modules()
      True
    """
    modules = {_origin(known.build)[0] for known in _builders.values()}
    return tuple(sorted(modules - {"__main__"}))


def model_names() -> tuple[str, ...]:
    """The names that a spec may give, sorted; imports no model.

    Example:
      >>> "decoder" in model_names()
      True
    """
    return tuple(sorted({*_builders, *_entry_points()}))


def builder(name: str) -> Builder:
    """The builder registered as ``name``, imported if need be.

    Raises:
      SpecError: there is none; says which names there are.
      ImportError: the package that provides it cannot be imported.

    Example:
      >>> builder("decoder").name
      'decoder'
    """
    if name not in _builders:
        point = _entry_points().get(name)
        if point is None:
            raise SpecError(name, [("model", _unknown(name))])
        point.load()
        if name not in _builders:
            raise ImportError(
                f"entry point {point.name} = {point.value} of group {GROUP} "
                f"registers no model named {name!r}"
            )
    return _builders[name]


def _unknown(name: str) -> str:
    names = model_names()
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"no model is registered as {name!r}; {hint}known: {', '.join(names)}"


def build(spec: ModelSpec) -> InitFn:
    """The `InitFn` of a spec; allocates nothing.

    Args:
      spec: the model and its config.

    Raises:
      SpecError: the model is unknown, or its config has faults; lists all of them.

    Example:
      >>> import shardinit
      >>> from shardinit.models import example_config
      >>> init_fn = build(ModelSpec("decoder", example_config("gpt2")))
      >>> shardinit.plan(init_fn).parameter_count
      124439808
    """
    return builder(spec.model).build(spec.config)
