"""Orbax: what plain ``orbax.checkpoint`` restores, on any mesh.

Every process of a job writes its own shards. The tree is written as plain dicts, lists
and tuples of arrays, so that whoever restores it needs neither the model's classes nor
this library::

    orbax.checkpoint.StandardCheckpointer().restore(folder, abstract_tree)

Orbax's format has one kind of sequence and forgets which were tuples, so their paths
stand in its custom metadata, the one thing of shardinit's in the folder. Orbax writes
under a temporary name and renames when all processes are done.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardinit.core.ir.jaxpr import is_key, setting
from shardinit.core.paths import path_str
from shardinit.core.plan import sharding as sh
from shardinit.core.plan.leaf_info import LeafInfo
from shardinit.core.plan.mesh import one_device
from shardinit.core.plan.plan import Plan
from shardinit.core.plan.rules import Rules
from shardinit.core.prng.root_key import KeyLike
from shardinit.core.run.completion import restore_into
from shardinit.core.run.settling import Allowed
from shardinit.errors import CheckpointError
from shardinit.extras import needs
from shardinit.storage.orbax_tree import (
    METADATA,
    OURS,
    UNREADABLE,
    checkpoint_in,
    is_array,
    is_metadata,
    plain,
    read_metadata,
    tuples_of,
    unreadable,
    with_tuples,
)

with needs("orbax", "shardinit[checkpoint]"):
    import orbax.checkpoint as ocp
    import tensorstore


def save(folder: str | os.PathLike[str], tree: Any) -> None:
    """Writes a pytree of sharded arrays; returns when it is complete under its name.

    In a job of several processes all of them must call this, with a folder that all
    of them see.

    Args:
      folder: the checkpoint's folder. Where the same checkpoint is there already, it is
        compared and nothing is written.
      tree: jax arrays with any sharding, typed keys, numpy arrays. A model object is
        written as nested dicts of its arrays, without boxes (plain Orbax restores it
        into ``flax.linen.meta.unbox(plan.abstract())``), a Variable that it holds in
        several places once, under the first of them.

    Raises:
      CheckpointError: something else is there, a leaf has no values, or Orbax cannot
        keep its dtype.

    Example:
      >>> import jax, tempfile
      >>> from shardinit.storage import orbax
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     orbax.save(f"{folder}/ckpt", {"w": jax.numpy.ones((8, 32))})
    """
    # "Checkpoint path should be absolute", says Orbax 0.12.8 of a relative one.
    target = Path(os.path.abspath(folder))
    tree = plain(tree)
    if not isinstance(tree, dict | list | tuple) or not jax.tree.leaves(tree):
        raise CheckpointError(
            f"checkpoint {str(target)!r}",
            f"got {type(tree).__name__} without leaves in it",
            "a dict, list or tuple of arrays, or a model",
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        _check_leaf(path_str(path), leaf)
    if (target / METADATA).exists():
        _compare(target, tree)
        return
    check_free(target)
    metadata = {OURS: {"tuples": list(tuples_of(tree, ""))}}
    try:
        # Its ``save`` returns before anything has its name; to leave the block waits
        # for it (Orbax 0.12.8).
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target, tree, custom_metadata=metadata)
    except (
        OSError,
        ValueError,
    ) as error:  # the latter is TensorStore's, of a full disk
        raise _unwritable(target, error) from error


def _compare(target: Path, tree: Any) -> None:
    """Holds a checkpoint that is there against a tree.

    Raises:
      CheckpointError: it is another one.
    """
    abstract = jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            if isinstance(x, jax.Array)
            else x
        ),
        tree,
    )
    with ocp.StandardCheckpointer() as checkpointer:
        held, _ = read_metadata(checkpointer, target)
        named = jax.tree_util.tree_leaves_with_path(held, is_leaf=is_metadata)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found = {path_str(path): _facts(leaf) for path, leaf in named}
        wanted = {path_str(path): _facts(leaf) for path, leaf in leaves}
        if found != wanted:
            raise CheckpointError.taken("checkpoint", target, "a tree of other leaves")
        got = jax.tree.leaves(checkpointer.restore(target, abstract))
    for (path, leaf), other in zip(leaves, got, strict=True):
        if not bool(_equal(leaf, other)):
            why = f"its leaf {path_str(path)!r} has other values"
            raise CheckpointError.taken("checkpoint", target, why)


def _facts(leaf: Any) -> tuple[tuple[int, ...], str]:
    if is_key(getattr(leaf, "dtype", None)):
        leaf = jax.random.key_data(leaf)
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
    return tuple(np.shape(leaf)), str(np.dtype(dtype))


def _equal(one: Any, other: Any) -> Any:
    """Whether two arrays are equal bit for bit, NaNs and signs of zero included."""
    if is_key(getattr(one, "dtype", None)):
        one, other = map(jax.random.key_data, (one, other))
    if not isinstance(one, jax.Array):
        return np.asarray(one).tobytes() == np.asarray(other).tobytes()
    return jax.jit(lambda a, b: jnp.all(_bits(a) == _bits(b)))(one, other)


def _bits(array: Any) -> Any:
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return jnp.stack([_bits(array.real), _bits(array.imag)])
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    bits = jnp.finfo(array.dtype).bits
    if bits < 8:  # no integer is as narrow, and these have no NaN
        return array
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}"))


def restore(
    folder: str | os.PathLike[str],
    plan: Plan | None = None,
    *,
    key: KeyLike | None = None,
    item: str | None = None,
    mesh: Any = None,
    rules: Rules | None = None,
    out_shardings: Any = None,
    **allowed: Any,
) -> Any:
    """Reads a checkpoint into sharded arrays; each process reads its own shards.

    Args:
      folder: of a checkpoint that ``save``, or Orbax itself, wrote; of a step of a
        ``CheckpointManager``, or of all its steps, of which the last one is read.
      plan: restore into this plan: its leaves, where it says, in the user's own
        classes. What the checkpoint lacks is initialised, such as the optimizer of
        parameters that were written alone.
      key: with a plan, for leaves that the checkpoint lacks; needed if one is drawn.
      item: which item of a manager's step; needed if there are several.
      mesh: without a plan, the devices; default the first one.
      rules: ``PathRules`` or ``fsdp(...)``; default ``fsdp()`` over all axes.
      out_shardings: a pytree prefix of shardings instead of rules.
      **allowed: with a plan, ``missing=``, ``unexpected=``, ``grow=``, ``shrink=``,
        ``cast=`` and ``paths=`` as for ``shardinit.plan_missing``.

    Returns:
      What ``init`` would return, with a plan. Else the tree as it was written: dicts,
      lists and tuples of jax arrays, strings as they are.

    Raises:
      CheckpointError: the folder has no checkpoint, or several.
      ShardingError: rules or shardings that do not fit.
      StructureMismatchError: the checkpoint does not fit the plan.

    Example:
      >>> import jax, tempfile
      >>> from shardinit.storage import orbax
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     orbax.save(f"{folder}/ckpt", {"w": jax.numpy.ones((8, 32))})
      ...     orbax.restore(f"{folder}/ckpt")["w"].shape
      (8, 32)
    """
    target = checkpoint_in(Path(os.path.abspath(folder)), item)
    # Not the StandardCheckpointer, which reads all or nothing: of a placeholder it says
    # "Unsupported type: <class 'ellipsis'>" (Orbax 0.12.8).
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = _Stored(checkpointer, target, plan)
        if plan is not None:
            found = _as_planned(stored.arrays, plan)
            return restore_into(plan, found, stored.read, key, Allowed(**allowed))
        for path, leaf in stored.arrays.items():
            _check_width(path, leaf)
        shardings = stored.shardings(mesh or one_device(), rules, out_shardings)
        wanted = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for (path, leaf), sharding in zip(
                stored.arrays.items(), shardings, strict=True
            )
        }
        return stored.read_tree(wanted)


class _Stored:
    """A checkpoint as its metadata describes it, and arrays of it.

    Attributes:
      arrays: metadata of the arrays by path: the plan's, where there is one.
    """

    def __init__(self, checkpointer: Any, target: Path, plan: Plan | None):
        self._checkpointer, self._target = checkpointer, target
        shapes, self._tuples = read_metadata(checkpointer, target)
        self._leaves, self._structure = jax.tree.flatten(shapes, is_leaf=is_metadata)
        named = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=is_metadata)
        paths = [path_str(path) for path, _ in named]
        self._paths = paths if plan is None else plan.paths_of(paths)
        both = zip(self._paths, self._leaves, strict=True)
        self.arrays = {path: leaf for path, leaf in both if is_array(leaf)}

    def read(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """The arrays that are wanted, by path."""
        got = dict(zip(self._paths, jax.tree.leaves(self._read(wanted)), strict=True))
        return {path: got[path] for path in wanted}

    def read_tree(self, wanted: dict[str, Any]) -> Any:
        """The tree as it was written."""
        made, tuples = self._read(wanted), set(self._tuples)
        if not tuples <= set(tuples_of(made, "", (list, tuple))):
            text = f"{self._tuples} are not all sequences in it"
            raise unreadable(self._target, text)
        return with_tuples(made, tuples, "")

    def shardings(self, mesh: Any, rules: Rules | None, out_shardings: Any) -> Any:
        """Where the arrays shall lie, in their order."""
        infos = [
            LeafInfo(path, tuple(leaf.shape), np.dtype(leaf.dtype))
            for path, leaf in self.arrays.items()
        ]
        if out_shardings is None:
            return sh.resolve(infos, mesh, rules)
        kept = [leaf if is_array(leaf) else None for leaf in self._leaves]
        whole = jax.tree.unflatten(self._structure, kept)
        places = jax.tree.structure(whole, is_leaf=is_metadata)
        return sh.from_tree(out_shardings, infos, places, mesh)

    def _read(self, wanted: dict[str, Any]) -> Any:
        """The tree with the arrays that are wanted, and strings."""
        items = [
            wanted.get(path, ocp.PLACEHOLDER if is_array(leaf) else "")
            for path, leaf in zip(self._paths, self._leaves, strict=True)
        ]
        tree = jax.tree.unflatten(self._structure, items)
        # Without these Orbax places the arrays as they were when they were written, on
        # devices that may not be here.
        restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
        args = ocp.args.PyTreeRestore(tree, restore_args=restore_args)
        try:
            return self._checkpointer.restore(self._target, args=args)
        except UNREADABLE as error:
            raise unreadable(self._target, error) from error


def _as_planned(arrays: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Shapes and dtypes by path; typed keys as such, of which Orbax notes the words."""
    found = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()}
    for leaf in plan.leaves:
        have = found.get(leaf.path)
        if have is not None and is_key(leaf.dtype):
            words = have.dtype == np.uint32 and have.shape[:-1] == leaf.shape
            if words and have.shape:
                found[leaf.path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return found


def _check_leaf(path: str, leaf: Any) -> None:
    """Refuses what cannot be written.

    Orbax finds it out in threads of its own, with what is written so far left behind.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise CheckpointError(
            f"leaf {path!r}",
            "it has a shape and no values",
            "an array",
            "Initialise it, or leave it out of the tree",
        )
    if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float):
        raise CheckpointError(
            f"leaf {path!r}",
            f"got {type(leaf).__name__}",
            "an array or a number",
            "Leave it out of the tree",
        )
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or is_key(dtype):
        return
    try:
        tensorstore.dtype(np.dtype(dtype).name)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"leaf {path!r}",
            f"its dtype {dtype} cannot be kept by Orbax",
            "a dtype that TensorStore has",
            "Cast it to a wider one, such as uint8",
        ) from error


def _check_width(path: str, leaf: Any) -> None:
    """Refuses arrays that JAX would narrow in silence; Python's numbers it may."""
    narrowed = jax.dtypes.canonicalize_dtype(leaf.dtype)
    # By name: to Orbax 0.12.8 a number's ScalarMetadata is an ArrayMetadata as well.
    array = type(leaf).__name__ == "ArrayMetadata"
    if array and narrowed != leaf.dtype and not setting("jax_enable_x64"):
        raise CheckpointError(
            f"leaf {path!r}",
            f"its dtype {leaf.dtype} cannot be kept without 64-bit numbers",
            "jax_enable_x64",
            'Set jax.config.update("jax_enable_x64", True) before it is restored',
        )


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
        raise CheckpointError.taken("checkpoint", target)
    above = next(folder for folder in target.parents if os.path.lexists(folder))
    try:
        with tempfile.TemporaryDirectory(prefix=".shardinit-", dir=above):
            pass
    except OSError as error:
        raise _unwritable(target, error.strerror or error) from error


def _unwritable(target: Path, why: object) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {str(target)!r}",
        f"it cannot be written ({' '.join(str(why).split())})",
        "a folder in which files may be made, on a disk with room for them",
    )
