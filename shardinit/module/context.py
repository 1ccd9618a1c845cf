"""What is under way: whose keys are handed out, and which module is running.

``init`` and the code it calls (``rng_init``, a forward call, an initialiser deep inside
a layer) have no argument in common, so what they share travels beside the call: one
immutable `Scope` in a context variable. Entering a scope is always a ``with`` block;
when it ends, by return or by exception, the scope before it is back. Each thread has a
context of its own, so modules that are initialised at the same time never meet.

A scope hands out keys through a *key source*. The default one is a sequence,
``key, state = split(state)``, the first half handed out: a value depends on how many
keys were taken before it. The other derives every key from the path of the field or
module that asks, so that a value depends on its own name alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import numpy as np

from shardinit.core.paths import path_str
from shardinit.core.plan import as_key
from shardinit.errors import ModuleStateError, NameClashError

KEY_POLICIES = ("sequence", "name")

# inlined: the same few equations in a trace, without the checks of their arguments
_halves = jax.jit(lambda key: tuple(jax.random.split(key)), inline=True)
fold_in = jax.jit(jax.random.fold_in, inline=True)


class KeySource(Protocol):
    """Something that hands out keys."""

    def take(self, path: str) -> jax.Array:
        """The next key for whatever lies at ``path``."""
        ...

    def part(self, path: str) -> KeySource:
        """The source of a module that is constructed at ``path``."""
        ...


class SequenceKeys:
    """``key, state = split(state)``, the first half handed out."""

    def __init__(self, key: jax.Array):
        self._state = key

    def take(self, path: str) -> jax.Array:
        """The next key, whoever asks."""
        key, self._state = _halves(self._state)
        return key

    def part(self, path: str) -> SequenceKeys:
        """A sequence of its own, begun by the next key."""
        return SequenceKeys(self.take(path))


class NamedKeys:
    """Keys derived from the root key and the name of what asks for them.

    The n-th key for a path is ``fold_in(root, int(sha1(f"{path}:{n}")[:4]))``. Two
    names with the same 32 bits are refused, as they would share a value.
    """

    def __init__(self, key: jax.Array):
        self._root = key
        self._taken: dict[str, int] = {}
        self._names: dict[int, str] = {}

    def take(self, path: str) -> jax.Array:
        """The next key of ``path``."""
        count = self._taken.get(path, 0)
        self._taken[path] = count + 1
        name = f"{path}:{count}"
        number = int.from_bytes(hashlib.sha1(name.encode()).digest()[:4], "big")
        other = self._names.setdefault(number, name)
        if other != name:
            raise NameClashError(
                f"module {path!r}",
                f"the names {other!r} and {name!r} have the same 32 bits of SHA-1",
                "names that tell all keys apart",
                "Rename one of the fields, or use key_policy='sequence'",
            )
        return fold_in(self._root, np.uint32(number))

    def part(self, path: str) -> NamedKeys:
        """The same source: the path tells the module apart."""
        return self


def key_source(key: jax.Array, policy: str) -> KeySource:
    """The key source of an ``init``.

    Raises:
      ValueError: a policy other than ``"sequence"`` and ``"name"``.
    """
    if policy not in KEY_POLICIES:
        raise ValueError(f"key_policy={policy!r}; expected one of {KEY_POLICIES}")
    return SequenceKeys(key) if policy == "sequence" else NamedKeys(key)


class Tree:
    """The modules of one tree by identity, with the path of each.

    Attributes:
      root: the outermost module.
    """

    def __init__(self, root: Any):
        self.root = root
        self._paths: dict[int, tuple[Any, tuple[Any, ...]]] = {}
        self.add((), root)

    def add(self, path: tuple[Any, ...], module: Any) -> None:
        """Adds ``module``, which lies at ``path``, and all below it."""
        from shardinit.module.walk import modules

        for below, found in modules(module):
            self._paths.setdefault(id(found), (found, (*path, *below)))

    def path(self, module: Any) -> tuple[Any, ...] | None:
        """The key path of ``module``; None when it is no part of the tree."""
        if id(module) not in self._paths:
            self.add((), self.root)  # it may have been attached since
        found = self._paths.get(id(module))
        return found[1] if found else None

    def where(self, module: Any) -> str:
        """``module`` as errors name it: its path and class."""
        path = self.path(module)
        if not path:
            return f"module {type(module).__name__}"
        return f"module {path_str(path)!r} ({type(module).__name__})"


@dataclass(frozen=True)
class Scope:
    """What is under way in this thread.

    Attributes:
      keys: where ``next_key`` takes keys from, None outside ``init`` and ``rng_key``.
      initializing: whether a module is being initialised.
      tree: the tree of the outermost module that is running, if one is.
      module: the module whose call or ``rng_init`` runs.
      path: what asks for keys when that is no module: an `Initializer` leaf.
      compact: the compact method whose modules are being constructed (a
        `shardinit.module.submodules.Frame`); None where construction makes no fields.
      running: the innermost of all compact methods that run in this thread. A call of
        another module clears ``compact`` and keeps this.
      calls: collects (inputs, outputs) of modules called by path, for ``tabulate``.
    """

    keys: KeySource | None = None
    initializing: bool = False
    tree: Tree | None = None
    module: Any = None
    path: str | None = None
    compact: Any = None
    running: Any = None
    calls: dict[str, tuple[Any, Any]] | None = None

    def where(self, module: Any) -> str:
        """``module`` as errors name it."""
        return self.tree.where(module) if self.tree else Tree(module).where(module)

    def asking(self) -> str:
        """Path of what asks for a key; empty for the root."""
        if self.path is not None:
            return self.path
        if self.tree is None or self.module is None:
            return ""
        return path_str(self.tree.path(self.module) or ())


_SCOPE: ContextVar[Scope] = ContextVar("shardinit.module", default=Scope())  # noqa: B039


def scope() -> Scope:
    """The scope of this thread."""
    return _SCOPE.get()


@contextmanager
def entered(inner: Scope) -> Iterator[Scope]:
    """Makes ``inner`` the scope for as long as the block runs."""
    token = _SCOPE.set(inner)
    try:
        yield inner
    finally:
        _SCOPE.reset(token)


@contextmanager
def calling(module: Any) -> Iterator[Scope]:
    """The scope in which a method of ``module`` runs.

    An exception that leaves it during ``init`` is given the path of the innermost
    module as a note.
    """
    outer = scope()
    tree = outer.tree or Tree(module)
    inner = replace(outer, tree=tree, module=module, path=None, compact=None)
    try:
        with entered(inner):
            yield inner
    except Exception as error:
        if outer.initializing:
            note(error, f"in {tree.where(module)}, while it was being initialised")
        raise


def note(error: BaseException, text: str) -> None:
    """Adds a note to an exception that has none of ours yet."""
    if not any("being initialised" in n for n in getattr(error, "__notes__", ())):
        error.add_note(text)


def next_key() -> jax.Array:
    """The next key of the ``init`` (or ``rng_key`` block) that is under way.

    Call it in an ``if self.initializing():`` block, in ``rng_init``, or in an
    ``rng_key`` block; never in ``__init__``, which describes a module and draws
    nothing.

    Raises:
      ModuleStateError: (a ``RuntimeError``) none of these is under way.

    Example:
      >>> import jax
      >>> from shardinit.module import next_key, rng_key
      >>> with rng_key(42):
      ...     first, second = next_key(), next_key()
      >>> bool(first == second)
      False
    """
    now = scope()
    if now.keys is None:
        raise ModuleStateError(
            now.where(now.module) if now.module is not None else "next_key()",
            "a key was asked for outside of init",
            "a call inside init: in rng_init or in an `if self.initializing():` block",
            "Initialise the module first with m.init(key, inputs), or wrap the code "
            "in `with rng_key(key):`. An __init__ draws nothing: assign "
            "Initializer(fn) there",
        )
    return now.keys.take(now.asking())


@contextmanager
def rng_key(key: Any) -> Iterator[None]:
    """Lets ``next_key`` hand out the sequence that begins with ``key``.

    Args:
      key: a key or an int seed.

    Example:
      >>> import jax
      >>> from shardinit.module import next_key, rng_key
      >>> with rng_key(42):
      ...     key = next_key()
      >>> bool(key == jax.random.split(jax.random.key(42))[0])
      True
    """
    with entered(replace(scope(), keys=SequenceKeys(as_key(key)), path=None)):
        yield


def initializing(module: Any) -> bool:
    """Whether ``module``, which is not initialised, is being initialised now.

    Raises:
      ModuleStateError: (a ``RuntimeError``) it is not.
    """
    now = scope()
    if now.initializing and now.tree is not None:
        if now.tree.path(module) is not None:
            return True
        raise ModuleStateError(
            f"module {type(module).__name__}",
            f"it is not initialised and no node of the {type(now.tree.root).__name__} "
            "that is being initialised",
            "a module in a node field",
            "Assign it to a field that is not static, before it is called; in a "
            "@compact method a module is a field by being constructed",
        )
    raise ModuleStateError(
        now.where(module),
        "it was called before it was initialised",
        "an initialised module",
        "Call m = m.init(key, inputs) first, where m is the outermost module",
    )


def sub_scope(path: Sequence[Any], module: Any) -> Scope:
    """The scope in which a module constructed in a compact method initialises itself.

    It takes one key of the sequence under way and runs a sequence of its own from it.
    """
    now = scope()
    assert now.keys is not None
    return replace(now, keys=now.keys.part(path_str(path)), module=module, compact=None)
