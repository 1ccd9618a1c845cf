"""Orbax: what plain ``orbax.checkpoint`` restores, on any mesh.

Every process of a job writes its own shards. Nothing of shardinit is in the folder:
the tree is written as plain dicts, lists and tuples of arrays, so that whoever restores
it needs neither the model's classes nor this library::

    orbax.checkpoint.StandardCheckpointer().restore(folder, abstract_tree)

Orbax writes under a temporary name and renames when all processes are done.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from shardinit.core.paths import path_str
from shardinit.core.plan import sharding as sh
from shardinit.core.plan.leaf_info import LeafInfo
from shardinit.core.plan.mesh import one_device
from shardinit.core.plan.rules import Rules
from shardinit.errors import CheckpointError


def save(folder: str | os.PathLike[str], tree: Any) -> None:
    """Writes a pytree of sharded arrays; returns when it is complete under its name.

    In a job of several processes all of them must call this, with a folder that all
    of them see.

    Args:
      folder: the checkpoint's folder; it must not be there.
      tree: jax arrays with any sharding, typed keys, numpy arrays. A model object is
        written as nested dicts of its arrays.

    Raises:
      CheckpointError: the folder exists, or a leaf has no values.

    Example:
      >>> import jax, tempfile
      >>> from shardinit.storage import orbax
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     orbax.save(f"{folder}/ckpt", {"w": jax.numpy.ones((8, 32))})
    """
    target = Path(os.path.abspath(folder))
    tree = _plain(tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"leaf {path_str(path)!r}",
                "it has a shape and no values",
                "an array",
                "Initialise it, or leave it out of the tree",
            )
    check_free(target)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target, tree)


def restore(
    folder: str | os.PathLike[str],
    *,
    mesh: Any = None,
    rules: Rules | None = None,
    out_shardings: Any = None,
) -> Any:
    """Reads a checkpoint into sharded arrays; each process reads its own shards.

    Args:
      folder: of a checkpoint that ``save``, or Orbax itself, wrote.
      mesh: the devices; default the first one.
      rules: ``PathRules`` or ``fsdp(...)``; default ``fsdp()`` over all axes.
      out_shardings: a pytree prefix of shardings instead of rules.

    Returns:
      The tree as it was written: dicts, lists and tuples of jax arrays.

    Raises:
      CheckpointError: the folder has no checkpoint.
      ShardingError: rules or shardings that do not fit.

    Example:
      >>> import jax, tempfile
      >>> from shardinit.storage import orbax
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     orbax.save(f"{folder}/ckpt", {"w": jax.numpy.ones((8, 32))})
      ...     orbax.restore(f"{folder}/ckpt")["w"].shape
      (8, 32)
    """
    target = Path(os.path.abspath(folder))
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            found = checkpointer.metadata(target).item_metadata
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise _none(target, error) from error
        if found is None:
            raise _none(target, "it has no metadata")
        shapes = found.tree if hasattr(found, "tree") else found
        leaves, structure = jax.tree.flatten(shapes, is_leaf=_is_shape)
        paths = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=_is_shape)
        infos = [
            LeafInfo(path_str(path), tuple(leaf.shape), _itemsize(leaf.dtype))
            for path, leaf in paths
        ]
        if mesh is None:
            mesh = one_device()
        if out_shardings is not None:
            shardings = sh.from_tree(out_shardings, infos, structure, mesh)
        else:
            shardings = sh.resolve(infos, mesh, rules)
        abstract = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for leaf, sharding in zip(leaves, shardings, strict=True)
        ]
        return checkpointer.restore(target, jax.tree.unflatten(structure, abstract))


def _plain(tree: Any) -> Any:
    """A tree without the model's classes: nested dicts, unless it is plain already."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    plain = jax.tree_util.DictKey | jax.tree_util.SequenceKey
    if all(isinstance(entry, plain) for path, _ in named for entry in path):
        return tree
    root: dict[str, Any] = {}
    for path, leaf in named:
        parts = [path_str([entry]) for entry in path]
        if path[-1] == jax.tree_util.GetAttrKey("value"):  # the box around an array
            parts.pop()
        node = root
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = leaf
    return root


def check_free(target: Path) -> None:
    """Refuses a target that exists or has no place where a folder can be made.

    Orbax finds the latter in a thread of its own, and then waits for that thread.

    Raises:
      CheckpointError: there is something of that name, or nothing can be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     check_free(Path(folder) / "ckpt")
    """
    if os.path.lexists(target):
        raise CheckpointError(
            f"checkpoint {str(target)!r}",
            "something of that name is there",
            "a name that is free",
            "Nothing is overwritten: remove it or choose another name",
        )
    above = next(folder for folder in target.parents if os.path.lexists(folder))
    try:
        with tempfile.TemporaryDirectory(prefix=".shardinit-", dir=above):
            pass
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {str(target)!r}",
            f"it cannot be written ({error.strerror or error})",
            "a folder in which files may be made",
        ) from error


def _none(target: Path, why: Any) -> CheckpointError:
    text = " ".join(str(why).split())[:200]
    return CheckpointError(
        f"checkpoint {str(target)!r}", f"it cannot be read ({text})", "an Orbax folder"
    )


def _is_shape(node: Any) -> bool:
    return hasattr(node, "shape") and hasattr(node, "dtype")


def _itemsize(dtype: Any) -> int:
    return getattr(dtype, "itemsize", 4)
