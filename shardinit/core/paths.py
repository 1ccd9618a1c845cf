"""Leaf paths: key paths of a pytree as strings, and globs over them.

A path joins the keys on the way to a leaf with ``/``, as in
``decoder/layers_3/mlp/up/kernel``. A ``/`` inside a key is written ``~1`` and a ``~``
is written ``~0`` (as in JSON Pointer, RFC 6901). The path of a bare leaf is empty.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from shardinit.errors import SelectError

_SHOWN = 3


def path_str(key_path: Sequence[Any]) -> str:
    """The ``/``-joined form of a JAX key path."""
    # Not ``jax.tree_util.keystr``, which leaves a ``/`` inside a key as it is, such as
    # those of Haiku's ``mlp/~/linear_0``: two paths could be one text.
    import jax  # here: who only matches paths needs none of it

    parts = []
    for entry in key_path:
        if isinstance(entry, jax.tree_util.GetAttrKey):
            part = entry.name
        elif isinstance(entry, jax.tree_util.SequenceKey):
            part = entry.idx
        elif isinstance(
            entry, (jax.tree_util.DictKey, jax.tree_util.FlattenedIndexKey)
        ):
            part = entry.key
        else:
            part = entry
        parts.append(escape(str(part)))
    return "/".join(parts)


def entry_name(entry: Hashable) -> Hashable:
    """What one entry of a JAX key path says: a key, a field's name or an index."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)


def named_leaves(
    tree: object, is_leaf: Callable[[object], bool] | None = None
) -> list[tuple[str, Any]]:
    """Path and leaf of what a tree holds, whatever classes hold it, in its order.

    The box around an array (of an NNX module, of a Linen variable with names), a node
    that has a ``value`` and nothing else, is no part of its path. What `passed_over`
    finds does not count.

    Example:
      >>> named_leaves({"w": [1, 2]})
      [('w/0', 1), ('w/1', 2)]
    """
    import jax

    value = (jax.tree_util.GetAttrKey("value"),)
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    over, named = passed_over(tree), []
    for number, (path, leaf) in enumerate(pairs):
        if path in over:
            continue
        outer = path[:-1]
        beside = pairs[number - 1 : number] + pairs[number + 1 : number + 2]
        alone = all(other[: len(outer)] != outer for other, _ in beside)
        boxed = path[-1:] == value and alone
        named.append((path_str(outer if boxed else path), leaf))
    return named


def passed_over(tree: object) -> set[tuple[object, ...]]:
    """Key paths of leaves that are no values of their own.

    Those are the arrays in a Variable that the tree has in a place before, too: by the
    Variable's identity, as Flax NNX has it, never by an array's, since a moving average
    that begins as the weights is not the weights. And what is no array in an Equinox
    module: activations and settings.
    """
    import jax

    seen: set[int] = set()
    found: set[tuple[object, ...]] = set()
    for is_one in (_is_variable, _is_equinox):
        for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_one):
            if not is_one(node):
                continue
            # By ``id``, as a Variable's ``==`` compares arrays; the tree keeps them all
            # alive.
            again = _is_variable(node) and id(node) in seen
            seen.add(id(node))
            for rest, leaf in jax.tree_util.tree_leaves_with_path(node):
                if again or (_is_equinox(node) and not hasattr(leaf, "dtype")):
                    found.add((*path, *rest))
    return found


def _is_variable(node: object) -> bool:
    return hasattr(type(node), "get_raw_value")


def _is_equinox(node: object) -> bool:
    bases = ((x.__module__.partition(".")[0], x.__name__) for x in type(node).__mro__)
    return ("equinox", "Module") in bases


def nested(
    paths: Iterable[Sequence[object]], values: Iterable[object]
) -> dict[Any, Any]:
    """Values in dicts within dicts, a level for each key of their paths."""
    root: dict[Any, Any] = {}
    for (*outer, last), value in zip(paths, values, strict=True):
        node = root
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = value
    return root


def escape(part: str) -> str:
    """One key as it stands inside a path."""
    # In this order: else the ``~`` of ``~1`` would be escaped again.
    return part.replace("~", "~0").replace("/", "~1")


def keys_of(path: str) -> list[str]:
    """The keys that a path joins, as they are outside of it.

    >>> keys_of("mlp~1~0~1linear_0/w")
    ['mlp/~/linear_0', 'w']
    """
    # In this order: ``~01`` is an escaped ``~1`` and no ``/`` (RFC 6901, section 4).
    return [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")]


def glob(pattern: str) -> Callable[[str], bool]:
    """A test whether a path matches: ``*`` within one key, ``**`` over any number.

    ``layers/*/kernel`` matches ``layers/3/kernel``; ``layers/**`` matches all below
    ``layers``; ``**/bias`` matches every bias, one at the root among them.
    """
    # Not ``fnmatch``, whose ``*`` crosses ``/``.
    compiled = re.compile(glob_text(pattern))
    return lambda path: compiled.fullmatch(path) is not None


def glob_text(pattern: str) -> str:
    """The regular expression of a glob, for a whole path."""
    text = ""
    rest = pattern
    while rest:
        if rest.startswith("**/"):
            text, rest = text + "(?:.*/)?", rest[3:]
        elif rest.startswith("**"):
            text, rest = text + ".*", rest[2:]
        elif rest[0] == "*":
            text, rest = text + "[^/]*", rest[1:]
        elif rest[0] == "?":
            text, rest = text + "[^/]", rest[1:]
        else:
            text, rest = text + re.escape(rest[0]), rest[1:]
    return text


def nearest(wanted: str, paths: Iterable[str]) -> str:
    """What to say of a path that is none: the nearest ones, or the first if none is.

    >>> nearest("mlp.upp.kernel", ["embed", "mlp/down/kernel", "mlp/up/kernel"])
    "a path such as 'mlp/up/kernel', 'mlp/down/kernel'"
    """
    known = list(paths)
    meant = wanted.replace(".", "/")
    below = [path for path in known if path.startswith(f"{meant}/")]
    near = below or difflib.get_close_matches(meant, known, n=_SHOWN, cutoff=0.6)
    return "a path such as " + ", ".join(map(repr, (near or known)[:_SHOWN]))


def chosen(
    select: str | Iterable[str] | Callable[[str], bool] | None,
    paths: Sequence[str],
    argument: str = "select",
) -> list[bool]:
    """For each path whether ``select`` takes it.

    Args:
      select: a glob, several globs, a predicate on paths, or None for all.
      paths: the paths of all leaves.
      argument: what the caller knows ``select`` as.

    Raises:
      SelectError: a glob that matches no path, or what is no glob.
    """
    if select is None:
        return [True] * len(paths)
    if callable(select):
        return [bool(select(path)) for path in paths]
    taken = [False] * len(paths)
    several = isinstance(select, Iterable) and not isinstance(select, str)
    for pattern in select if several else [select]:
        if not isinstance(pattern, str):
            raise SelectError(
                f"{argument}={pattern!r}",
                f"got {type(pattern).__name__}",
                "a glob, several globs, or a predicate on paths",
            )
        matches = glob(pattern)
        hits = [matches(path) for path in paths]
        if not any(hits):
            raise SelectError(
                f"{argument}={pattern!r}",
                "matches no leaf",
                "a glob, or " + nearest(pattern, paths),
                "`*` stays within one key, `**` crosses keys",
            )
        taken = [a or b for a, b in zip(taken, hits, strict=True)]
    return taken
