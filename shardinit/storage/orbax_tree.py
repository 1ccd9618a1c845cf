"""The trees of Orbax's folders: which one a folder holds, and what it was written as.

Orbax keeps dicts and one kind of sequence, and a ``CheckpointManager`` keeps a folder a
step and in it a folder an item.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

import jax

from shardinit.core.paths import escape, keys_of, passed_over, path_str
from shardinit.errors import CheckpointError

METADATA: Final = "_METADATA"
_NOTES: Final = "_CHECKPOINT_METADATA"
OURS: Final = "shardinit"  # the key of what we note in Orbax's custom metadata
# What Orbax and TensorStore raise over a folder that is damaged, or is none.
UNREADABLE: Final = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    AssertionError,
)
_VALUE: Final = jax.tree_util.GetAttrKey("value")  # of a box around an array
_LEFT_OUT: Final = object()
_STEP = re.compile(r"(?:.*[_-])?(\d+)")  # a prefix and leading zeros, as Orbax lets


def checkpoint_in(target: Path, item: str | None) -> Path:
    """The folder of the checkpoint itself: of an item, of a manager's last step.

    Raises:
      CheckpointError: a step has several items.
    """
    if not target.is_dir() or (target / METADATA).exists():
        return target
    inside = {entry.name: entry for entry in target.iterdir() if entry.is_dir()}
    items = {name: x for name, x in inside.items() if (x / METADATA).exists()}
    steps = {int(m[1]): x for n, x in inside.items() if (m := _STEP.fullmatch(n))}
    if steps and item not in items and set(items.values()) <= set(steps.values()):
        return checkpoint_in(steps[max(steps)], item)
    return _item_of(target, items, item)


def _item_of(target: Path, items: dict[str, Path], item: str | None) -> Path:
    """The item of a step that is asked for, or its only one."""
    if item is not None and item not in items:
        raise CheckpointError(
            f"checkpoint {str(target)!r}",
            f"it has no item {item!r}",
            " or ".join(map(repr, sorted(items))) or "a step with items",
        )
    if len(items) > 1 and item is None:
        raise CheckpointError(
            f"checkpoint {str(target)!r}",
            f"it holds several items, {', '.join(map(repr, sorted(items)))}",
            "one of them",
            f"Pass item={min(items)!r}",
        )
    return items[item or next(iter(items))] if items else target


def read_metadata(checkpointer: Any, target: Path) -> tuple[Any, list[str]]:
    """The tree of a checkpoint, metadata for leaves, and the paths of its tuples."""
    try:
        found = checkpointer.metadata(target)
        if (target / _NOTES).exists():  # Orbax 0.12.8 takes a damaged one for an empty
            json.loads((target / _NOTES).read_bytes())
        tree = getattr(found.item_metadata, "tree", found.item_metadata)
        ours = (found.custom_metadata or {}).get(OURS, {"tuples": []})
        tuples = list(ours["tuples"])
    except UNREADABLE as error:
        raise unreadable(target, error) from error
    if tree is None:
        raise unreadable(target, "it has no metadata")
    return tree, tuples


def tuples_of(
    tree: Any, path: str, kinds: Collection[type] = (tuple,)
) -> Iterator[str]:
    """The paths of the tuples, or of other kinds of nodes, in a plain tree."""
    if type(tree) in kinds:
        yield path
    if isinstance(tree, dict):
        children = tree.items()
    else:
        children = enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, child in children:
        yield from tuples_of(child, _inside(path, key), kinds)


def with_tuples(tree: Any, tuples: set[str], path: str) -> Any:
    """The tree with tuples at those paths."""
    if isinstance(tree, dict):
        return {k: with_tuples(x, tuples, _inside(path, k)) for k, x in tree.items()}
    if not isinstance(tree, list):
        return tree
    made = [with_tuples(x, tuples, _inside(path, i)) for i, x in enumerate(tree)]
    return tuple(made) if path in tuples else made


def _inside(path: str, key: Any) -> str:
    return f"{path}/{escape(str(key))}"


def plain(tree: Any) -> Any:
    """A tree without the model's classes: dicts, lists, tuples and None.

    What has attributes becomes a dict of them, as Orbax would have it, so that it is
    restored into the same classes; boxes are left out, and what
    `core.paths.named_leaves` passes over.
    """
    made = _plain(tree, (), passed_over(tree))
    return {} if made is _LEFT_OUT else made


def _plain(node: Any, path: tuple[Any, ...], over: Collection[Any]) -> Any:
    if node is None:
        return None
    inner = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    if [keys for keys, _ in inner] == [()]:
        if path not in over:
            return node
        return _LEFT_OUT if hasattr(node, "dtype") else None
    made = {keys[-1]: _plain(x, (*path, *keys), over) for keys, x in inner}
    if type(node) in (list, tuple):
        return type(node)(None if x is _LEFT_OUT else x for x in made.values())
    return _as_dict(node, made)


def _as_dict(node: Any, children: dict[Any, Any]) -> Any:
    """A dict of a node's children, or what is in it if it is a box around an array."""
    there = {key: x for key, x in children.items() if x is not _LEFT_OUT}
    if isinstance(node, dict):
        return {key.key: x for key, x in there.items()}
    if children and not there:
        return _LEFT_OUT
    arrays = jax.tree_util.tree_leaves_with_path(node)
    if [keys for keys, _ in arrays] == [(_VALUE,)]:
        return there[_VALUE]
    return {keys_of(path_str([key]))[0]: x for key, x in there.items()}


def unreadable(target: Path, why: Any) -> CheckpointError:
    """The error over a folder that cannot be read as a checkpoint."""
    text = " ".join(str(why).split())[:200]
    return CheckpointError(
        f"checkpoint {str(target)!r}", f"it cannot be read ({text})", "an Orbax folder"
    )


def is_metadata(node: Any) -> bool:
    """Whether a node says of a leaf what it is: an array, a number or a string."""
    return hasattr(node, "directory")


def is_array(leaf: Any) -> bool:
    """Whether a leaf's metadata is that of an array, or of a number."""
    return getattr(leaf, "dtype", None) is not None
