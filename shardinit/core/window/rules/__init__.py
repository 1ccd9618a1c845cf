"""The windowing rules, one function a primitive (see ``rule``).

A module of this package registers its rules when it is imported, and all are imported
here: a new one is a new file and nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil

from shardinit.core.window.rules.rule import RULES as RULES

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
