"""The room of the file: a cut function as a message, the envelope around it."""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from shardinit.core.cut.cutter import cut
from shardinit.core.init_fn import AxisNames
from shardinit.core.plan.leaf_info import LeafInfo
from shardinit.core.plan.leaves import leaf_infos
from shardinit.core.prng import derivation as keys
from shardinit.core.program import axes
from shardinit.core.program.codec import read_cut, write_cut
from shardinit.core.program.program import FORMAT, InitProgram
from shardinit.core.program.treedef import read_tree, write_tree
from shardinit.errors import ProgramFormatError
from shardinit.v1 import program_pb2 as pb

F32 = np.dtype(np.float32)

KEY = jax.eval_shape(jax.random.key, 0)
DTYPES = "bool int4 int8 uint32 float8_e4m3fn bfloat16 float16 complex64".split()


class Pair(NamedTuple):
    left: object
    right: object


def message_of(fn):
    made = cut(fn, KEY)
    return made, write_cut(made, leaf_infos(made, None), "model")


def of_keys(key):
    """Keys by each kind of derivation; nothing that takes a module."""
    words = jax.random.key_data(key)
    return {
        "constant": jax.random.split(jax.random.key(7), 2),
        "folded": jax.random.fold_in(key, 3),
        "raw": words[::-1],
        "root": key,
        "split": jax.random.split(key, (2, 3)),
        "taken": jax.random.split(key, 5)[1:4],
    }


def test_derivations_of_keys_are_read_as_they_were_written():
    made, content = message_of(of_keys)
    again = read_cut(content)
    kinds = {node.WhichOneof("derivation") for node in content.key_nodes}
    assert kinds == {"root", "fold_in", "split", "words", "take"}
    takes = {node.take.WhichOneof("indices") for node in content.key_nodes}
    assert takes == {None, "range", "list"}
    words = np.asarray(jax.random.key_data(jax.random.key(5)))
    for old, new in zip(made.leaves, again.leaves, strict=True):
        assert (old.path, old.shape, old.dtype) == (new.path, new.shape, new.dtype)
        for mine, its in zip(old.operands, new.operands, strict=True):
            (want,), (got,) = (keys.derive([d], words) for d in (mine, its))
            assert np.array_equal(got, want)


@pytest.mark.parametrize("name", DTYPES)
def test_constants_of_each_dtype_keep_their_bits(name):
    held = np.arange(6).reshape(2, 3).astype(np.dtype(getattr(ml_dtypes, name, name)))
    _, content = message_of(lambda key: {"a": held, "empty": held[:, :0]})
    (leaf, empty) = read_cut(content).leaves
    assert (leaf.dtype, leaf.shape) == (held.dtype, held.shape)
    assert leaf.source.array.tobytes() == held.tobytes()
    assert (empty.dtype, empty.shape) == (held.dtype, (2, 0))


def test_functions_and_what_is_said_of_leaves_travel():
    def fn(key):
        drawn = jax.random.normal(key, (4, 32))
        again = jax.random.normal(key, (4, 32))
        return [drawn, again, jnp.sort(drawn.ravel()), 1.0, jnp.sin(jnp.arange(64.0))]

    made, content = message_of(fn)
    again = read_cut(content)
    assert again.fingerprint == made.fingerprint
    kinds = [[type(leaf.source) for leaf in x.leaves] for x in (made, again)]
    assert kinds[0] == kinds[1]
    for old, new in zip(made.programs, again.programs, strict=True):
        assert (old.kind, old.replicated_reason) == (new.kind, new.replicated_reason)
        assert (old.words, len(old.outs)) == (new.words, len(new.outs))
    assert [x.weak_type for x in again.leaves] == [False, False, False, True, False]
    assert again.repeats == made.repeats == ((0, 1),)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.key_nodes[1].fold_in.__setattr__("parent", 1), "not before it"),
        (lambda c: c.key_nodes.add(), "says nothing"),
        (lambda c: c.leaves[1].__setattr__("path", "constant"), "one path"),
        (lambda c: c.leaves[0].ClearField("host"), "comes from nowhere"),
        (lambda c: c.leaves[0].__setattr__("function", 4), "names function 4"),
        (lambda c: c.leaves[0].shape.__setitem__(0, -2), "the shape"),
        (lambda c: c.leaves[0].__setattr__("dtype", "O"), "dtype"),
        (lambda c: c.key_streams.extend(["b", "a"]), "streams"),
        (lambda c: c.__setattr__("fingerprint", "0" * 64), "fingerprint"),
        (lambda c: c.__setattr__("x64", not c.x64), "jax_enable_x64"),
    ],
)
def test_a_message_that_contradicts_itself_is_refused(change, says):
    _, content = message_of(of_keys)
    change(content)
    with pytest.raises((ValueError, TypeError, ProgramFormatError), match=says):
        read_cut(content)


@pytest.mark.parametrize("levels", [900, 5000, 20_000])
def test_a_tree_deeper_than_python_recurses(levels):
    opened = pb.Node(kind=pb.Node.KIND_LIST, children=1)
    nodes = [*[opened] * levels, pb.Node(kind=pb.Node.KIND_LEAF)]
    tree = [0]
    for _ in range(levels - 1):
        tree = [tree]
    try:
        structure = jax.tree.structure(tree)
    except (RecursionError, SystemError):  # of JAX: how deep depends on Python
        with pytest.raises(ValueError, match="deeper than JAX"):
            read_tree(nodes, 1)
    else:
        assert write_tree(structure) == nodes
        assert read_tree(nodes, 1) == (structure, [0])


def test_trees_keep_dicts_lists_tuples_and_none_and_name_all_else():
    tree = {3: [1, (2, None)], 7: {}, 9: Pair(Pair((), 5), {"b": 6, "a": 4})}
    structure = jax.tree.structure(tree)
    again, order = read_tree(write_tree(structure), structure.num_leaves)
    read = again.unflatten([jax.tree.leaves(tree)[i] for i in order])
    pairs = {"left": {"right": 5}, "right": {"a": 4, "b": 6}}
    assert read == {3: [1, (2, None)], 7: {}, 9: pairs}


@pytest.mark.parametrize(
    "info",
    [
        LeafInfo("w", (4, 8), F32, (None, None), named=0),
        LeafInfo("w", (4, 8), F32, ("embed", None), named=1),
        LeafInfo("w", (4, 8), F32, (("a", "b"), "mlp"), passes=True),
        LeafInfo("w", (4, 8), F32, ("x", "y"), own_rules=(("x", "a"), ("y", None))),
        LeafInfo("w", (4, 8), F32, optimizer=True),
    ],
)
def test_names_of_axes_travel(info):
    leaf = pb.Leaf(shape=info.shape, optimizer=info.optimizer)
    axes.write_axes(info, leaf)
    got = axes.read_axes(leaf)
    assert isinstance(got, AxisNames)
    names = info.axes or ()
    named = len(names) if info.named is None else info.named
    assert (tuple(got), got.named) == ((*names[:named], *[None] * (2 - named)), named)
    assert (got.passes, tuple(got.rules)) == (info.passes, info.own_rules)
    assert got.optimizer == info.optimizer


def test_a_sharding_that_the_function_states_travels():
    mesh = AbstractMesh((2, 4), ("a", "b"))
    stated = NamedSharding(mesh, PartitionSpec(None, ("a", "b")))
    leaf = pb.Leaf(shape=(4, 8))
    assert axes.read_stated(leaf) is None
    axes.write_stated(stated, leaf.stated)
    assert axes.read_stated(leaf) == stated
    leaf.stated.dimensions[0].dimension = 2
    with pytest.raises(ValueError, match="cuts dimension 2"):
        axes.read_stated(leaf)


def envelope(inside, **changes):
    data = pb.InitProgram.FromString(InitProgram(inside).to_bytes())
    for field, value in changes.items():
        setattr(data, field, value)
    return data.SerializeToString()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff", "no protobuf message"),
        (envelope(b"x", format=FORMAT + 1), f"format version {FORMAT + 1}"),
        (envelope(b"x", sha256=b"0" * 32), "SHA-256"),
        (envelope(b"x", content=b"plain"), "does not decompress"),
        (envelope(b"x", content=zlib.compress(b"xy")), "2 bytes or more"),
        (envelope(b"x", content=zlib.compress(b"x") + b"y"), "1 bytes or more"),
        (envelope(b"x", content_size=1 << 40), "at most"),
        (envelope(b"x", compression=0), "compression 0"),
        (envelope(b"\xff"), "InitProgramContent"),
    ],
)
def test_an_envelope_that_is_not_whole_is_refused(data, says):
    with pytest.raises(ProgramFormatError, match=says):
        InitProgram.from_bytes(data)
