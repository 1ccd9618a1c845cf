"""Examples in docstrings run, and every public name has one."""

import doctest
import importlib.util
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import shardinit

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
    assert lacking(shardinit) == []
    assert all(">>>" in getattr(shardinit, room).__doc__ for room in rooms(shardinit))


def lacking(module):
    """The classes and functions that a module offers without an example."""
    names = getattr(module, "__all__", [n for n in vars(module) if n[0] != "_"])
    return [
        f"{module.__name__}.{name}"
        for name in names
        if (inspect.isclass(it := getattr(module, name)) or inspect.isfunction(it))
        and f"{it.__module__}.".startswith(f"{module.__name__}.")
        and "Example:" not in (inspect.getdoc(it) or "")
    ]


def rooms(module):
    """The public names that are packages themselves."""
    return [n for n in module.__all__ if inspect.ismodule(getattr(module, n))]


if __name__ == "__main__":
    every = [module for name in FLOORS for module in modules_of(name)]
    sys.exit(min(sum(doctest.testmod(module).failed for module in every), 100))
