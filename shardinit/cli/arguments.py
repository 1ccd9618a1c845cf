"""Arguments: from what was typed to objects, with an error that says what to type."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shardinit.errors import ShardingError, ShardinitError, SpecError
from shardinit.models import ModelSpec, build, example_config, load_package

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh

    from shardinit.core.init_fn import InitFn
    from shardinit.core.plan.rules import AxisRules
    from shardinit.core.program.program import InitProgram


def parse_mesh(text: str) -> dict[str, int]:
    """``data=2,model=4`` as axis sizes by name, in order.

    Raises:
      ShardingError: it does not read like that.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        right = equals and name and size.isascii() and size.isdigit()
        if not right or not 0 < int(size) < 1 << 31 or name in axes:
            raise ShardingError(
                "--mesh",
                f"{part.strip()!r} in {text!r}",
                "each axis once with its size, such as data=2,model=4",
            )
        axes[name] = int(size)
    return axes


def abstract_mesh(axes: dict[str, int]) -> AbstractMesh:
    """An ``AbstractMesh``: a plan on it needs no device."""
    from jax.sharding import AbstractMesh

    return AbstractMesh(tuple(axes.values()), tuple(axes))


def parse_rules(text: str | None) -> AxisRules | None:
    """``embed=data,mlp=data+model,norm=`` as ``AxisRules``; None for None.

    Raises:
      ShardingError: it does not read like that.
    """
    if text is None:
        return None
    from shardinit.core.plan.rules import AxisRules

    rules: list[tuple[str, Any]] = []
    for part in text.split(","):
        name, equals, axes = (piece.strip() for piece in part.partition("="))
        names = [axis.strip() for axis in axes.split("+")] if axes else []
        if not equals or not name or not all(names):
            raise ShardingError(
                "--rules",
                f"{part.strip()!r} in {text!r}",
                "logical axis = mesh axes, such as embed=data,mlp=data+model,norm=",
            )
        rules.append((name, names or None))
    return AxisRules(rules)


def parse_level(text: str) -> int:
    """A logging level by name.

    Raises:
      ShardinitError: there is none of that name.
    """
    names = ("debug", "info", "warning", "error")
    if text.lower() not in names:
        raise ShardinitError("--log-level", repr(text), " or ".join(names))
    return getattr(logging, text.upper())


def read_spec(config: str, model: str = "decoder") -> ModelSpec:
    """The spec of a config file, or of an example by name.

    Raises:
      SpecError: there is no such example, or the file cannot be read or is faulty.
    """
    try:
        if os.path.sep in config or config.endswith(".json") or os.path.exists(config):
            return ModelSpec.from_file(config, model)
        return ModelSpec(model, example_config(config))
    except OSError as error:
        fault = f"cannot read {config!r}: {error.strerror or error}"
        raise SpecError(model, [("config", fault)]) from error
    except RecursionError as error:
        fault = f"{config!r} is nested too deeply"
        raise SpecError(model, [("config", fault)]) from error


def read_model(config: str, model: str, modules: list[str] | None) -> InitFn:
    """The model of a config file, or of an example by name.

    Args:
      config: a config.json or the name of an example.
      model: name of the registered model that it is for.
      modules: modules that register models.

    Raises:
      SpecError: there is no such example, or the config is faulty.
    """
    load_modules(modules)
    return build(read_spec(config, model))


def read_source(
    source: str, model: str, modules: list[str] | None
) -> InitFn | InitProgram:
    """What to initialise: a program file, or the model of a config.

    Args:
      source: a program file, a config.json or the name of an example.
      model: name of the registered model that a config is for.
      modules: modules that register models.

    Raises:
      SpecError: there is no such example, or the config is faulty.
      ProgramFormatError: the file is neither a config nor a program.
    """
    if os.path.isfile(source) and not source.endswith(".json"):
        from shardinit.core.program.program import load_program

        return load_program(source)
    return read_model(source, model, modules)


def load_modules(modules: Sequence[str] | None) -> None:
    """Imports the operator's modules, so that they register their models.

    Raises:
      ShardinitError: one cannot be imported, or registers no model.
    """
    for module in modules or ():
        try:
            load_package(module)
        except Exception as error:  # whatever a stranger's module raises
            text = f"{type(error).__name__}: {error}"
            raise ShardinitError(
                f"--models {module}", " ".join(text.split()), "a module with models"
            ) from error
