"""Arguments: from what was typed to objects, with an error that says what to type."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from shardinit.cli.outcomes import UnreadableError, UsageError, model_code, reading
from shardinit.errors import CheckpointError, ShardinitError
from shardinit.models import ModelSpec, build, example_config, load_package
from shardinit.models.spec import example_names

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh

    from shardinit.core.init_fn import InitFn
    from shardinit.core.plan.rules import Rules
    from shardinit.core.program.program import InitProgram

# No more digits: of more than 4,300 Python's ``int`` raises an error of its own.
_SEED = re.compile(r"[+-]?[0-9]{1,20}")
_LOCAL = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def examples(incomplete: str) -> list[str]:
    """Names of examples, for a shell's completion, which knows files by itself."""
    return [name for name in example_names() if name.startswith(incomplete)]


def parse_mesh(text: str) -> dict[str, int]:
    """``data=2,model=4`` as axis sizes by name, in order.

    Raises:
      UsageError: it does not read like that.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        # ``"²".isdigit()`` is true, and ``int("²")`` a ValueError.
        right = equals and name and size.isascii() and size.isdigit()
        if not right or not 0 < int(size) < 1 << 31 or name in axes:
            raise UsageError(
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


def parse_rules(text: str | None, option: str = "--rules") -> Rules | None:
    """``embed=data,mlp=data+model,norm=`` as ``AxisRules``; None for None.

    ``fsdp`` and ``fsdp:data+model`` are ``fsdp()`` and ``fsdp("data", "model")``.

    Raises:
      UsageError: it does not read like that.
    """
    if text is None:
        return None
    from shardinit.core.plan.fsdp import fsdp
    from shardinit.core.plan.rules import AxisRules

    kind, _, over = text.partition(":")
    if kind.strip() == "fsdp":
        return fsdp(*(axis.strip() for axis in over.split("+") if axis.strip()))
    return AxisRules([_axis_rule(part, text, option) for part in text.split(",")])


def _axis_rule(part: str, text: str, option: str) -> tuple[str, list[str] | None]:
    """One logical axis and its mesh axes, of rules that were typed."""
    name, equals, axes = (piece.strip() for piece in part.partition("="))
    names = [axis.strip() for axis in axes.split("+")] if axes else []
    if not equals or not name or not all(names):
        raise UsageError(
            option,
            f"{part.strip()!r} in {text!r}",
            "logical axis = mesh axes, such as embed=data,mlp=data+model,norm=, or "
            "fsdp:data",
        )
    return name, names or None


def parse_seed(text: str | int) -> int | dict[str, int]:
    """``7`` as a seed; ``params=0,dropout=1`` as one for each stream, by name.

    Raises:
      typer.BadParameter: it does not read like that, or is of more than 64 bits.
    """
    if isinstance(text, int):
        return text
    streams: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.rpartition("="))
        right = _SEED.fullmatch(number) and -(1 << 63) <= int(number) < 1 << 63
        if not right or bool(name) != bool(equals) or name in streams:
            raise typer.BadParameter(
                f"{part.strip()!r} in {text!r}; expected a seed of 64 bits, or one for "
                "each stream, such as params=0,dropout=1"
            )
        streams[name] = int(number)
    if "" in streams and len(streams) > 1:
        raise typer.BadParameter(f"{text!r}; expected a name for each of several seeds")
    return streams.get("", streams)


def parse_bytes(text: str, option: str) -> int:
    """``5GB`` or ``512MiB`` as a number of bytes.

    Raises:
      UsageError: it does not read like that.
    """
    from shardinit.storage.layout import parse_size

    try:
        return parse_size(text, option)
    except CheckpointError as error:
        raise UsageError(option, repr(text), error.expected) from None


def parse_level(text: str) -> int:
    """A logging level by name.

    Raises:
      UsageError: there is none of that name.
    """
    names = ("debug", "info", "warning", "error")
    if text.lower() not in names:
        raise UsageError("--log-level", repr(text), " or ".join(names))
    return getattr(logging, text.upper())


def read_spec(source: str, model: str = "decoder") -> ModelSpec:
    """The spec that was typed: a name, a file, JSON itself, or ``-``.

    Args:
      source: the name of an example, a config.json, its text, or ``-`` for the text
        on standard input.
      model: name of the registered model that it is for.

    Raises:
      SpecError: there is no such example, or the config is faulty.
      UnreadableError: the file or the text cannot be read.
    """
    if source == "-":
        return _spec(_typed(), model, "standard input")
    # Not ``encode``: Python keeps bytes of a shell that are no text as surrogates,
    # which UTF-8 cannot write.
    if _is_json(os.fsencode(source)):
        return _spec(source, model, "the config that was typed")
    is_file = os.path.sep in source or source.endswith(".json")
    if not is_file and not os.path.exists(source):
        return ModelSpec(model, example_config(source))
    return _spec(_content(source), model, source)


def _typed() -> bytes:
    content = sys.stdin.buffer.read()
    if not content:
        raise UnreadableError("standard input is empty; expected a config or a program")
    return content


def read_source(
    source: str, model: str, modules: list[str] | None
) -> InitFn | InitProgram:
    """What was typed as an init function; see ``read_model``."""
    return read_model(source, model, modules)[0]


def read_model(
    source: str, model: str, modules: list[str] | None
) -> tuple[InitFn | InitProgram, ModelSpec | None]:
    """What was typed as an init function, and the spec that it is of, if it is one.

    Args:
      source: a spec as in ``read_spec``, a program file, or ``module:function``; ``-``
        is the content of either of the first two.
      model: name of the registered model that a config is for.
      modules: modules that register models.

    Raises:
      SpecError: there is no such example, or the config is faulty.
      UnreadableError: the file is neither a config nor a program.
    """
    if _LOCAL.fullmatch(source) and not os.path.exists(source):
        return local_function(source), None
    if source == "-":
        content, name = _typed(), "standard input"
    elif os.path.isfile(source) and not source.endswith(".json"):
        content, name = _content(source), source
    else:
        load_modules(modules)
        spec = read_spec(source, model)
        return build(spec), spec
    if _is_json(content):
        load_modules(modules)
        spec = _spec(content, model, name)
        return build(spec), spec
    from shardinit.core.program.program import InitProgram

    with reading():
        return InitProgram.from_bytes(content), None


def local_function(source: str) -> Any:
    """The init function ``module:function``, from here or from what is installed.

    Args:
      source: a dotted module and a name in it: a function of a key, an ``InitFn`` or a
        plan, or a function without arguments that returns one of these.

    Raises:
      ShardinitError: there is none of that name.
    """
    module, _, name = source.partition(":")
    if os.getcwd() not in sys.path:  # as `python -m` has it, and a console script not
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        if inspect.isroutine(found) and not inspect.signature(found).parameters:
            found = found()
    except Exception as error:  # whatever a user's module raises
        text = " ".join(f"{type(error).__name__}: {error}".split())
        place = model_code(error)
        raise ShardinitError(
            source,
            text if place is None else f"{text} ({place})",
            "module:function as `import` names the module (no .py), an init function, "
            "an InitFn, or what returns one",
        ) from error
    return found


def _is_json(content: bytes) -> bool:
    """Whether it is meant as JSON; no program begins so."""
    return content.lstrip()[:1] in (b"{", b"[")


def _content(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        text = f"cannot read {file!r}: {error.strerror or error}"
        raise UnreadableError(text) from error


def _spec(content: str | bytes, model: str, name: str) -> ModelSpec:
    with reading():
        return ModelSpec.from_json(content, model, name=name)


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
