"""Sharded parameter initialisation for JAX: initial weights as a program, not as data.

The public names are resolved when they are first used, so that a process which only
talks to the service over numpy never imports JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shardinit.version import __version__ as __version__

if TYPE_CHECKING:
    from shardinit import deferred as deferred
    from shardinit import errors as errors
    from shardinit import frontends as frontends
    from shardinit import initializers as initializers
    from shardinit import models as models
    from shardinit import module as module
    from shardinit import storage as storage
    from shardinit import verify as verify
    from shardinit.core.init_fn import InitFn as InitFn
    from shardinit.core.plan.fsdp import fsdp as fsdp
    from shardinit.core.plan.padding import padded as padded
    from shardinit.core.plan.placement import Placement as Placement
    from shardinit.core.plan.plan import Plan as Plan
    from shardinit.core.plan.planning import plan as plan
    from shardinit.core.plan.rules import AxisRules as AxisRules
    from shardinit.core.plan.rules import PathRules as PathRules
    from shardinit.core.program.program import InitProgram as InitProgram
    from shardinit.core.program.program import export_plan as export_plan
    from shardinit.core.program.program import load_program as load_program
    from shardinit.core.run.compile import CompiledPlan as CompiledPlan
    from shardinit.core.run.compile import compile_plan as compile_plan
    from shardinit.core.run.init import init as init
    from shardinit.core.run.lazy import open as open
    from shardinit.core.run.lazy import read as read
    from shardinit.core.run.missing import init_missing as init_missing
    from shardinit.core.run.missing import plan_missing as plan_missing
    from shardinit.models import ModelSpec as ModelSpec
    from shardinit.service.client.client import connect as connect
    from shardinit.storage.executables import load_executables as load_executables
    from shardinit.storage.executables import save_executables as save_executables
    from shardinit.verify.audit.audit import audit as audit
    from shardinit.verify.compare.diff import diff as diff
    from shardinit.verify.digest.devices import digest as digest
    from shardinit.verify.inspect.inspect import inspect as inspect
    from shardinit.verify.receipt import receipt as receipt
    from shardinit.verify.receipt import verify_receipt as verify_receipt

_HOMES = {
    "AxisRules": "core.plan.rules",
    "CompiledPlan": "core.run.compile",
    "InitFn": "core.init_fn",
    "InitProgram": "core.program.program",
    "ModelSpec": "models",
    "PathRules": "core.plan.rules",
    "Placement": "core.plan.placement",
    "Plan": "core.plan.plan",
    "audit": "verify.audit.audit",
    "compile_plan": "core.run.compile",
    "connect": "service.client.client",
    "deferred": "deferred",
    "errors": "errors",
    "frontends": "frontends",
    "initializers": "initializers",
    "inspect": "verify.inspect.inspect",
    "models": "models",
    "verify": "verify",
    "diff": "verify.compare.diff",
    "digest": "verify.digest.devices",
    "export_plan": "core.program.program",
    "fsdp": "core.plan.fsdp",
    "init": "core.run.init",
    "init_missing": "core.run.missing",
    "load_executables": "storage.executables",
    "load_program": "core.program.program",
    "module": "module",
    "open": "core.run.lazy",
    "padded": "core.plan.padding",
    "plan": "core.plan.planning",
    "plan_missing": "core.run.missing",
    "read": "core.run.lazy",
    "receipt": "verify.receipt",
    "save_executables": "storage.executables",
    "storage": "storage",
    "verify_receipt": "verify.receipt",
}

# A star import leaves Python's own open alone.
__all__ = [n for n in _HOMES if n != "open"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shardinit' has no attribute {name!r}")
    value: Any = importlib.import_module(f"shardinit.{_HOMES[name]}")
    if _HOMES[name] != name:  # a room is a public name itself
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
