"""Every framework is optional: where one is missing, the error says how to get it."""

import importlib
import sys

import pytest

from shardinit.errors import MissingFrameworkError

pytestmark = pytest.mark.once

FRAMEWORKS = {
    "equinox": ("equinox", "equinox"),
    "haiku": ("haiku", "dm-haiku"),
    "keras": ("keras", "keras"),
    "penzai": ("penzai", "penzai"),
}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_missing_framework_is_named_with_its_package(name, monkeypatch):
    framework, package = FRAMEWORKS[name]
    here = f"shardinit.frontends.{name}"
    monkeypatch.delitem(sys.modules, here, raising=False)
    for module in [m for m in sys.modules if m.split(".")[0] == framework]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, framework, None)  # as if it was not installed
    with pytest.raises(MissingFrameworkError, match=f"pip install {package}$") as error:
        importlib.import_module(here)
    assert isinstance(error.value, ImportError)
