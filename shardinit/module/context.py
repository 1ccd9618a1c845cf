"""The state of a running ``init``: the source of keys and the current module.

``init`` and the code it calls (``rng_init``, a forward call, an `Initializer` deep
inside a layer) have no argument in common. The state that they share is an immutable
`Scope` in a context variable. A scope is entered with a ``with`` block; at its end, by
return or by exception, the previous scope is restored. Each thread has its own context,
so threads may initialise modules at the same time.

A scope holds a *key source*. The default source is a sequence, ``key, state =
split(state)``, which returns the first half: a value depends on how many keys were
taken before. The other source derives each key from the path of the field or module
that it is for, so that a value depends on this path alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import jax

from shardinit.core.paths import path_str
from shardinit.core.prng.names import key_for_name, words_of
from shardinit.core.prng.root_key import as_single_key
from shardinit.errors import ModuleStateError, NameClashError
from shardinit.module import walk

# inlined: the same few equations in a trace, without the checks of their arguments
_halves = jax.jit(lambda key: tuple(jax.random.split(key)), inline=True)
fold_in = jax.jit(jax.random.fold_in, inline=True)


class SequenceKeys:
    """Keys by repeated splitting: ``key, state = split(state)``."""

    def __init__(self, key: jax.Array):
        self._state = key

    def take(self, path: str) -> jax.Array:
        """Returns the next key; ``path`` does not matter."""
        key, self._state = _halves(self._state)
        return key

    def part(self, path: str) -> SequenceKeys:
        """Returns a new sequence that starts from the next key."""
        return SequenceKeys(self.take(path))


class NamedKeys:
    """Keys derived from the root key and the path that each key is for.

    The n-th key for a path is that for the name ``f"{path}:{n}"`` (see
    ``core.prng.names``). Two names with the same 32 bits are an error, as they would
    share a key.
    """

    def __init__(self, key: jax.Array):
        self._root = key
        self._taken: dict[str, int] = {}
        self._names: dict[tuple[int, ...], str] = {}

    def take(self, path: str) -> jax.Array:
        """Returns the next key for ``path``."""
        count = self._taken.get(path, 0)
        self._taken[path] = count + 1
        name = f"{path}:{count}"
        other = self._names.setdefault(words_of(name), name)
        if other != name:
            raise NameClashError(
                f"module {path!r}",
                f"the names {other!r} and {name!r} have the same 32 bits of SHA-1",
                "names that tell all keys apart",
                "Rename one of the fields, or use key_policy='sequence'",
            )
        return key_for_name(self._root, name)

    def part(self, path: str) -> NamedKeys:
        """Returns this source, as paths are unique within the whole tree."""
        return self


KeySource = SequenceKeys | NamedKeys
_POLICIES = {"sequence": SequenceKeys, "name": NamedKeys}


def key_source(key: jax.Array, policy: str) -> KeySource:
    """Returns the key source of an ``init``.

    Raises:
      ValueError: the policy is neither ``"sequence"`` nor ``"name"``.
    """
    if policy not in _POLICIES:
        raise ValueError(f"key_policy={policy!r}; expected one of {tuple(_POLICIES)}")
    return _POLICIES[policy](key)


class Tree:
    """The paths of the modules of one tree, by identity.

    Attributes:
      root: the outermost module.
    """

    def __init__(self, root: Any):
        self.root = root
        # With each module itself: as long as it is kept no other object has its id.
        self._paths: dict[int, tuple[Any, tuple[Any, ...]]] = {}
        self.add((), root)

    def add(self, path: tuple[Any, ...], module: Any) -> None:
        """Adds ``module``, which is at ``path``, and all modules below it."""
        for below, found in walk.modules(module):
            # A module in two places keeps its first path: keys by name derive from it.
            self._paths.setdefault(id(found), (found, (*path, *below)))

    def path(self, module: Any) -> tuple[Any, ...] | None:
        """The key path of ``module``; None if it is not part of the tree."""
        if id(module) not in self._paths:
            self.add((), self.root)  # it may have been attached since
        found = self._paths.get(id(module))
        return found[1] if found else None

    def where(self, module: Any) -> str:
        """The path and class of ``module``, for error messages."""
        path = self.path(module)
        if not path:
            return f"module {type(module).__name__}"
        return f"module {path_str(path)!r} ({type(module).__name__})"


@dataclass(frozen=True)
class Scope:
    """The state of the initialisation or call that runs in this thread.

    Attributes:
      keys: the source of ``next_key``; None outside ``init`` and ``rng_key``.
      root_key: the key that ``init`` was given; None outside of it.
      initializing: whether a module is being initialised.
      tree: the tree of the outermost running module, if there is one.
      module: the module whose call or ``rng_init`` runs.
      path: the path of the `Initializer` that is evaluated, if one is.
      compact: the compact method whose modules are being constructed (a
        `shardinit.module.submodules.Frame`); None where construction makes no fields.
      running: the innermost of all compact methods that run in this thread. A call of
        another module clears ``compact`` and keeps this.
      calls: shapes of inputs and outputs of called modules by path, for ``tabulate``.
    """

    keys: KeySource | None = None
    root_key: Any = None
    initializing: bool = False
    tree: Tree | None = None
    module: Any = None
    path: str | None = None
    compact: Any = None
    running: Any = None
    calls: dict[str, tuple[Any, Any]] | None = None

    def where(self, module: Any) -> str:
        """The path and class of ``module``, for error messages."""
        return self.tree.where(module) if self.tree else Tree(module).where(module)

    def path_of_request(self) -> str:
        """Path of the field or module that needs a key; empty for the root."""
        if self.path is not None:
            return self.path
        if self.tree is None or self.module is None:
            return ""
        return path_str(self.tree.path(self.module) or ())


# A default that all threads share: a scope is frozen, and is replaced and not changed.
_SCOPE: ContextVar[Scope] = ContextVar("shardinit.module", default=Scope())  # noqa: B039


def current_scope() -> Scope:
    """Returns the current scope of this thread."""
    return _SCOPE.get()


@contextmanager
def entered(inner: Scope) -> Iterator[Scope]:
    """Makes ``inner`` the current scope during a ``with`` block."""
    token = _SCOPE.set(inner)
    try:
        yield inner
    finally:
        _SCOPE.reset(token)


@contextmanager
def calling(module: Any) -> Iterator[Scope]:
    """Enters the scope in which a method of ``module`` runs.

    An exception raised in it during ``init`` gets a note with the path of the innermost
    module.
    """
    outer = current_scope()
    tree = outer.tree or Tree(module)
    # A method that is not compact constructs no fields, not for the compact one around
    # it either.
    inner = replace(outer, tree=tree, module=module, path=None, compact=None)
    try:
        with entered(inner):
            yield inner
    except Exception as error:
        if outer.initializing:
            note(error, f"in {tree.where(module)}, while it was being initialised")
        raise


def note(error: BaseException, text: str) -> None:
    """Adds a note to an exception that has no note on initialisation yet."""
    if not any("being initialised" in n for n in getattr(error, "__notes__", ())):
        error.add_note(text)


def next_key(*, axis_name: str | None = None) -> jax.Array:
    """Returns the next key of the running ``init`` or ``rng_key`` block.

    Call it in an ``if self.initializing():`` block, in ``rng_init``, or in an
    ``rng_key`` block. In ``__init__`` there are no keys: assign an `Initializer` there.

    Args:
      axis_name: a mapped axis (``jax.vmap`` or ``shard_map``), of which each index gets
        a key of its own.

    Raises:
      ModuleStateError: (a ``RuntimeError``) it was called anywhere else.

    Example:
      >>> import jax
      >>> from shardinit.module import next_key, rng_key
      >>> with rng_key(42):
      ...     first, second = next_key(), next_key()
      >>> bool(first == second)
      False
    """
    scope = current_scope()
    if scope.keys is None:
        raise ModuleStateError(
            scope.where(scope.module) if scope.module is not None else "next_key()",
            "a key was asked for outside of init",
            "a call inside init: in rng_init or in an `if self.initializing():` block",
            "Initialise the module first with m.init(key, inputs), or wrap the code "
            "in `with rng_key(key):`. An __init__ draws nothing: assign "
            "Initializer(fn) there",
        )
    key = scope.keys.take(scope.path_of_request())
    return key if axis_name is None else fold_in(key, jax.lax.axis_index(axis_name))


@contextmanager
def rng_key(key: Any) -> Iterator[None]:
    """Makes ``next_key`` return keys split from ``key`` during a ``with`` block.

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
    with entered(
        replace(current_scope(), keys=SequenceKeys(as_single_key(key)), path=None)
    ):
        yield


def initializing(module: Any) -> bool:
    """Whether an uninitialised module is being initialised by a running ``init``.

    Raises:
      ModuleStateError: (a ``RuntimeError``) it is not.
    """
    scope = current_scope()
    if scope.initializing and scope.tree is not None:
        if scope.tree.path(module) is not None:
            return True
        raise ModuleStateError(
            f"module {type(module).__name__}",
            "it is not initialised and no node of the "
            f"{type(scope.tree.root).__name__} that is being initialised",
            "a module in a node field",
            "Assign it to a field that is not static, before it is called; in a "
            "@compact method a module is a field by being constructed",
        )
    raise ModuleStateError(
        scope.where(module),
        "it was called before it was initialised",
        "an initialised module",
        "Call m = m.init(key, inputs) first, where m is the outermost module",
    )


def sub_scope(path: Sequence[Any], module: Any) -> Scope:
    """Returns the scope in which a module of a compact method is initialised.

    A sequence of keys is replaced by a new one that starts from its next key.
    """
    scope = current_scope()
    assert scope.keys is not None
    return replace(
        scope, keys=scope.keys.part(path_str(path)), module=module, compact=None
    )
