"""Examples in docstrings run, and every public name has one."""

import contextlib
import doctest
import importlib.util
import inspect
import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import shardinit
from shardinit.service.client import client as client_module
from shardinit.service.server.config import Config
from shardinit.service.server.server import Server

pytestmark = pytest.mark.once

# Where the names are that users call: what a package exports, or its modules' own.
PUBLIC = {
    "module": ["."],
    "deferred": ["."],
    "initializers": ["."],
    "doctor": ["."],
    "extras": ["."],
    "files": ["."],
    "progress": ["."],
    "version": ["."],
    "models": ["."],
    "frontends": None,  # every module: a new one has no other place
    "storage": ["orbax", "safetensors", "executables"],
    "verify": [
        "receipt",
        "audit.audit",
        "audit.report",
        "audit.topology",
        "digest.devices",
        "digest.host",
    ],
}
# What JAX calls of a class that it is to know as a pytree.
JAX_CALLS = {"tree_flatten", "tree_unflatten"}
FLOORS = ["cli", "core", "errors", "service", *PUBLIC]


def modules_of(name):
    """A package or module of shardinit, with all inside."""
    package = importlib.import_module(f"shardinit.{name}")
    yield package
    inside = getattr(package, "__path__", ())
    for found in pkgutil.walk_packages(inside, f"{package.__name__}."):
        if found.name.endswith(".penzai") and not importlib.util.find_spec("penzai"):
            continue
        if {"torch", "hf"} & set(found.name.split(".")) and not _has_torch():
            continue
        yield importlib.import_module(found.name)


def _has_torch():
    return all(map(importlib.util.find_spec, ("torch", "transformers")))


def test_examples_run():
    # In one process, whose compilers do little: to compile is most of what they cost,
    # and no other test is to meet code that was compiled like that.
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_docstrings"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-5000:]}{done.stderr[-5000:]}"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_an_example(name):
    package = f"shardinit.{name}"
    if PUBLIC[name] is None:
        modules = [m for m in modules_of(name) if m.__name__.count(".") <= 2]
    else:
        at = [package if part == "." else f"{package}.{part}" for part in PUBLIC[name]]
        modules = [importlib.import_module(path) for path in at]
    assert [text for module in modules for text in lacking(module)] == []


def test_every_name_of_the_package_has_an_example():
    assert [*lacking(shardinit), *bare(client_module.Client)] == []
    assert all(">>>" in getattr(shardinit, room).__doc__ for room in rooms(shardinit))


def lacking(module):
    """The classes, functions and methods that a module offers without an example."""
    names = getattr(module, "__all__", [n for n in vars(module) if n[0] != "_"])
    offered = [getattr(module, name) for name in names]
    return [
        f"{it.__module__}.{it.__qualname__}"
        for own in offered
        if inspect.isclass(own) or inspect.isfunction(own)
        if f"{own.__module__}.".startswith(f"{module.__name__}.")
        for it in [*([] if "Example:" in (own.__doc__ or "") else [own]), *bare(own)]
    ]


def bare(cls):
    """The public methods of a class that have no example of their own.

    One that the example of the class calls has that.
    """
    members = vars(cls).items() if inspect.isclass(cls) else ()
    functions = {name: getattr(it, "__func__", it) for name, it in members}
    return [
        it
        for name, it in functions.items()
        if getattr(it, "__qualname__", "") == f"{cls.__qualname__}.{name}"
        if name[0] != "_" and name not in JAX_CALLS
        if ">>>" not in (it.__doc__ or "") and f".{name}(" not in (cls.__doc__ or "")
    ]


def rooms(module):
    """The public names that are packages themselves."""
    return [n for n in module.__all__ if inspect.ismodule(getattr(module, n))]


@contextlib.contextmanager
def served():
    """What the examples of the client's methods use: one server for all of them."""
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 32}
    config |= {"n_positions": 16, "vocab_size": 64}
    with tempfile.TemporaryDirectory() as folder:
        allowed = Config(allow_upload=True, checkpoint_roots=(Path(folder),))
        with Server(allowed) as server, shardinit.connect(server.address) as client:
            spec = shardinit.ModelSpec("decoder", config)
            yield {"client": client, "spec": spec, "folder": folder}


if __name__ == "__main__":
    every = [module for name in FLOORS for module in modules_of(name)]
    with served() as given:
        names = {client_module: given}
        found = [doctest.testmod(it, extraglobs=names.get(it)) for it in every]
    sys.exit(min(sum(result.failed for result in found), 100))
