"""Examples in docstrings run, and every public name of these packages has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

PACKAGES = (
    "module",
    "deferred",
    "frontends",
    "initializers",
    "files",
    "progress",
    "version",
)


def _modules(name):
    package = importlib.import_module(f"shardinit.{name}")
    yield package
    for found in pkgutil.iter_modules(getattr(package, "__path__", ())):
        if found.name == "penzai":
            pytest.importorskip("penzai")
        yield importlib.import_module(f"{package.__name__}.{found.name}")


@pytest.mark.parametrize("name", PACKAGES)
def test_examples_run(name):
    for module in _modules(name):
        result = doctest.testmod(module)
        assert result.failed == 0, module.__name__


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_have_an_example(name):
    missing = [
        f"{module.__name__}.{public}"
        for module in _modules(name)
        for public in _public(module)
        if "Example:" not in (inspect.getdoc(getattr(module, public)) or "")
    ]
    assert missing == []


def _public(module):
    """Names of the classes and functions that a module exports of its own package."""
    if module.__name__.count(".") > 1 and not module.__name__.startswith(
        "shardinit.frontends."
    ):
        return []
    names = getattr(module, "__all__", [n for n in vars(module) if n[0] != "_"])
    return [
        name
        for name in names
        if (inspect.isclass(it := getattr(module, name)) or inspect.isfunction(it))
        and it.__module__.startswith(module.__name__)
    ]
