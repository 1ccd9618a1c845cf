"""Compact methods: submodules are constructed where they are used.

::

    class Block(Module):
        @compact
        def __call__(self, x):
            x = Linear(32)(x)          # field `linear`
            return Linear(8)(x)        # field `linear2`

The first run of a compact method, inside ``init``, assigns each module that it
constructs to a field, named after the class in snake case or by the ``name`` of the
module, and initialises it at once with a new key sequence that starts from one
``next_key()``. In later runs the constructors return these modules again, in the same
order, and ignore their arguments. So each run must construct modules of the same
classes in the same order.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypeVar

from jax.tree_util import GetAttrKey

from shardinit.errors import ModuleFieldError, ModuleStateError
from shardinit.module import context, steps
from shardinit.module.walk import ModuleNode

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Frame:
    """One run of a compact method.

    Attributes:
      module: the module whose method it is.
      method: name of the method; with a number if a subclass overrides it.
      outer: the run of a compact method, of any module, that led to this one.
      known: names of the fields that the first run made; None in the first run.
      made: names of the fields that this run has made or used so far.
    """

    module: ModuleNode
    method: str
    outer: Frame | None
    known: tuple[str, ...] | None
    made: list[str] = field(default_factory=list)


def snake_case(name: str) -> str:
    """Converts a class name: ``BatchNorm`` to ``batch_norm``, ``MLP`` to ``mlp``.

    Each capital starts a word, except after a word of one letter.
    """
    words = re.split(r"(?<!^)(?=[A-Z])", name)
    text = words[0]
    for before, word in itertools.pairwise(words):
        text += word if len(before) == 1 else f"_{word}"
    return text.lower()


def _unique(name: str, taken: Any) -> str:
    """Makes a name unique by a number: linear, linear2, linear3."""
    if name not in taken:
        return name
    stem = re.sub(r"\d+$", "", name)
    digits = name[len(stem) :]
    number = int(digits) if digits else 2
    while f"{stem}{number:0{len(digits)}}" in taken:
        number += 1
    return f"{stem}{number:0{len(digits)}}"


def compact(method: Callable[P, R]) -> Callable[P, R]:
    """Decorates a method: modules constructed in it become fields of its module.

    Example:
      >>> import jax.numpy as jnp
      >>> from shardinit.module import Linear, Module, compact
      >>> class Block(Module):
      ...     @compact
      ...     def __call__(self, x):
      ...         x = Linear(8)(x)
      ...         return Linear(2)(x)
      >>> block = Block().init(42, jnp.ones((1, 3)))
      >>> block.linear.kernel.shape, block.linear2.kernel.shape
      ((3, 8), (8, 2))
    """
    name = getattr(method, "__name__", "__call__")

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        module: Any = args[0]
        with _running(module, _key(type(module), name, wrapper)):
            return method(*args, **kwargs)

    # Not as an attribute, which a type checker does not know of a function.
    setattr(wrapper, "_is_compact", True)  # noqa: B010
    return wrapper


@functools.cache
def _key(cls: type, name: str, method: Any) -> str:
    """The name of a compact method; numbered if a subclass overrides it.

    A method that calls its parent's of the same name runs both on one module, and each
    makes modules of its own.
    """
    overriding = 0
    for parent in cls.__mro__:
        found = vars(parent).get(name)
        while found is not None and found is not method:
            found = getattr(found, "__wrapped__", None)
        if found is not None:
            return f"{name}^{overriding}" if overriding else name
        overriding += name in vars(parent)
    return name


@contextmanager
def _running(module: ModuleNode, method: str) -> Iterator[None]:
    scope = context.current_scope()
    _refuse_recursion(scope, module, method)
    known = (module._subtrees or {}).get(method)
    frame = Frame(module, method, scope.running, known)
    tree = scope.tree or context.Tree(module)
    inner = replace(scope, compact=frame, running=frame, tree=tree, module=module)
    with context.entered(inner):
        yield
    if known is None and scope.initializing:
        subtrees = {**(module._subtrees or {}), method: tuple(frame.made)}
        module.__dict__["_subtrees"] = subtrees


def _refuse_recursion(scope: context.Scope, module: ModuleNode, method: str) -> None:
    frame: Frame | None = scope.running
    while frame is not None:
        if frame.module is module and frame.method == method:
            raise ModuleStateError(
                scope.where(module),
                f"its compact method {method!r} was called while it runs",
                "a compact method that does not call itself, directly or through "
                "another module",
                "Repeat layers with a loop in the method, or construct another module "
                "for the inner call",
            )
        frame = frame.outer


def first_run(module: ModuleNode) -> bool:
    """Whether the running compact method constructs its modules in this call.

    Raises:
      ModuleStateError: no compact method of ``module`` is running.
    """
    frame = context.current_scope().compact
    if frame is None or frame.module is not module:
        raise ModuleStateError(
            context.current_scope().where(module),
            "first_run was read outside of a compact method",
            "a method decorated with @compact",
        )
    return frame.known is None


def met_again(cls: type) -> Any:
    """Returns the module that the first run constructed here; None in the first run.

    Raises:
      ModuleStateError: the first run constructed an instance of another class here, or
        none; or this is the first run and no ``init`` is running.
    """
    scope = context.current_scope()
    frame: Frame | None = scope.compact
    if frame is None:
        return None
    where = f"{scope.where(frame.module)}, compact method {frame.method!r}"
    if frame.known is None:
        if scope.keys is None or not scope.initializing:
            raise ModuleStateError(
                where,
                f"it constructs a {cls.__name__} for the first time outside of init",
                "an initialised module",
                "Call m = m.init(key, inputs) first",
            )
        return None
    number = len(frame.made)
    if number >= len(frame.known):
        raise ModuleStateError(
            where,
            f"it constructs a {cls.__name__} after all {number} modules of its first "
            "run",
            "the modules of the first run, in the same order",
            "Construct modules unconditionally, or in __init__",
        )
    name = frame.known[number]
    found = getattr(frame.module, name)
    if not _same_class(type(found), cls):
        raise ModuleStateError(
            where,
            f"it constructs a {cls.__name__} where its first run made {name!r}, a "
            f"{type(found).__name__}",
            "the modules of the first run, in the same order",
            "Construct modules unconditionally, or in __init__",
        )
    frame.made.append(name)
    return found if type(found) is cls else _seen_as(cls, found, name, scope)


def _same_class(known: type, cls: type) -> bool:
    """Whether two classes are one, or made by one statement inside a function."""
    if known is cls:
        return True
    names = [(c.__module__, c.__qualname__) for c in (known, cls)]
    return names[0] == names[1] and "<locals>" in cls.__qualname__


def _seen_as(cls: type, found: Any, name: str, scope: context.Scope) -> Any:
    """A module with the fields of ``found``, and the code of a class made since.

    The code of a class that is made in a compact method may refer to variables of the
    run that made it, which in an earlier run held values of an earlier trace.
    """
    # The fields are shared and not copied: what the call assigns is to stay.
    view = object.__new__(cls)
    view.__dict__ = found.__dict__
    assert scope.tree is not None
    owner = scope.tree.path(scope.compact.module) or ()
    scope.tree.add((*owner, GetAttrKey(name)), view)
    return view


def adopt(module: Any) -> None:
    """Assigns a new module to a field if a compact method runs; initialises it."""
    scope = context.current_scope()
    frame: Frame | None = scope.compact
    if frame is None:
        return
    owner = frame.module
    name = _unique(module.name or snake_case(type(module).__name__), vars(owner))
    declared = owner._fields.get(name)
    if declared is not None and declared.metadata.get("node") is False:
        raise ModuleFieldError(
            scope.where(owner),
            f"a {type(module).__name__} is constructed for its field {name!r}, which "
            "is declared static",
            "a node field, or another name",
            "Pass the constructor another name, or change the declaration",
        )
    setattr(owner, name, module)
    frame.made.append(name)
    assert scope.tree is not None
    path = (*(scope.tree.path(owner) or ()), GetAttrKey(name))
    scope.tree.add(path, module)
    with context.entered(context.sub_scope(path, module)):
        steps.initialise(module, prefix=path)
