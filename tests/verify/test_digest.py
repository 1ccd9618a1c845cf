"""The digest: of values and places, never of meshes, windows or their order."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import shardinit
from shardinit.errors import DigestError
from shardinit.verify.digest import devices as on_devices
from shardinit.verify.digest import host as digest_numpy

pytestmark = pytest.mark.once

DTYPES = [
    "bool",
    "int4",
    "uint4",
    "int8",
    "uint16",
    "int32",
    "float16",
    "bfloat16",
    "float32",
    "float8_e4m3fn",
    "float8_e5m2",
    "complex64",
]
MESHES = [
    ((1, 8), ("a", "b"), PartitionSpec("a", "b")),
    ((2, 4), ("a", "b"), PartitionSpec("a", "b")),
    ((2, 4), ("a", "b"), PartitionSpec("b", "a")),
    ((2, 4), ("a", "b"), PartitionSpec(("b", "a"))),
    ((2, 4), ("a", "b"), PartitionSpec(None, ("a", "b"))),
    ((8, 1), ("a", "b"), PartitionSpec("a", "b")),
    ((2, 2, 2), ("a", "b", "c"), PartitionSpec("a", ("c", "b"))),
    ((2, 2, 2), ("a", "b", "c"), PartitionSpec("c")),
    ((2, 4), ("a", "b"), PartitionSpec()),
    ((2, 4), ("a", "b"), PartitionSpec("a")),
    ((2, 4), ("a", "b"), PartitionSpec(None, "b")),
]


def values(shape, dtype, seed=0):
    """An array whose elements have random bits."""
    dtype = np.dtype(dtype)
    drawn = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize))
    if dtype.kind == "b" or dtype.name.endswith("int4"):
        return (drawn[..., 0] % 2).astype(dtype)
    return drawn.astype(np.uint8).view(dtype).reshape(shape)


def placed(array, shape, names, spec):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), names)
    return jax.device_put(array, NamedSharding(mesh, spec))


def digest_arrays(arrays):
    """The digest of numpy arrays by path, by numpy alone."""
    digester = digest_numpy.Digester({k: (x.shape, x.dtype) for k, x in arrays.items()})
    for path, array in arrays.items():
        digester.add(path, (0,) * array.ndim, array)
    return digester.digest()


def of(array):
    return digest_arrays({"x": array})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.few(4)
def test_every_mesh_and_numpy_agree(dtype):
    for shape in ((16, 24), (16, 8192)):
        array = values(shape, dtype)
        found = {shardinit.digest({"x": placed(array, *how)}).root for how in MESHES}
        assert found == {of(array).root}


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (3, 0), (1,), (7,), (80_001,), (3, 5, 130), (60_000, 3), (2, 33_000)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_shape(shape, dtype):
    array = values(shape, dtype)
    assert shardinit.digest({"x": jnp.asarray(array)}) == of(array)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8,), (3, 5, 70), (16, 2049)])
@pytest.mark.parametrize("dtype", [*DTYPES, "int64", "float64", "complex128"])
def test_what_accelerators_run_gives_the_same(shape, dtype):
    with jax.enable_x64(True):
        array = values(shape, dtype)
        start = np.zeros((len(shape), 2), np.uint32)
        sums = jax.jit(on_devices.fused_sums)(array, start)
        assert sums.dtype == np.uint32
        assert np.array_equal(sums, digest_numpy.window_sums(array, (0,) * len(shape)))


def test_wide_elements():
    with jax.enable_x64(True):
        for dtype in ("int64", "float64", "complex128"):
            array = values((16, 5), dtype)
            tree = {"x": placed(array, *MESHES[3])}
            assert shardinit.digest(tree) == of(array)


def test_nan_payloads_and_signs_of_zero_count():
    zeros = np.zeros(4, np.float32)
    assert of(zeros) != of(-zeros)
    quiet, other = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert of(np.full(4, quiet)) != of(np.full(4, other))


def test_typed_keys_count_as_their_data():
    keys = jax.random.split(jax.random.key(1), 8)
    mesh = jax.make_mesh((8,), ("a",))
    spread = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("a")))
    assert shardinit.digest([keys]) == shardinit.digest([spread])
    assert shardinit.digest([keys]) == shardinit.digest([jax.random.key_data(keys)])
    assert shardinit.digest([keys]) != shardinit.digest([keys[::-1]])


@given(data=st.data())
@settings(max_examples=40)
def test_one_flipped_bit_anywhere_changes_it(data):
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES[3:])))
    shape = data.draw(st.sampled_from([(), (5,), (3, 70), (2, 3, 130)]))
    array = values(shape, dtype)
    flipped = array.copy()
    raw = flipped.reshape(-1).view(np.uint8)
    where = data.draw(st.integers(0, raw.size - 1))
    raw[where] ^= 1 << data.draw(st.integers(0, 7))
    before, after = of(array), of(flipped)
    assert before.leaves["x"] != after.leaves["x"]
    assert before.root != after.root


@given(data=st.data())
@settings(max_examples=30)
def test_a_swap_of_two_unequal_elements_changes_it(data):
    shape = data.draw(st.sampled_from([(50,), (5, 70), (3, 4, 40)]))
    array = values(shape, "bfloat16")
    places = st.integers(0, array.size - 1)
    i, j = data.draw(places), data.draw(places)
    swapped = array.copy()
    flat = swapped.reshape(-1)
    flat[[i, j]] = flat[[j, i]]
    assert (of(array) == of(swapped)) == (array.tobytes() == swapped.tobytes())


def test_every_swap_in_a_small_matrix_changes_it():
    array = np.arange(48, dtype=np.int8).reshape(6, 8)
    seen = {of(array).root}
    for i, j in itertools.combinations(range(array.size), 2):
        swapped = array.copy()
        swapped.reshape(-1)[[i, j]] = array.reshape(-1)[[j, i]]
        seen.add(of(swapped).root)
    assert len(seen) == 1 + 48 * 47 // 2


def test_two_equal_changes_do_not_cancel():
    array = np.ones((64, 64), np.float32)
    seen = {of(array).root}
    for other in range(1, 200):
        changed = array.copy()
        changed.reshape(-1)[[0, other]] *= -1
        seen.add(of(changed).root)
    assert len(seen) == 200


def test_swapped_leaves_names_shapes_and_dtypes_count():
    a, b = values((4, 6), "float32", 1), values((4, 6), "float32", 2)
    trees = [
        {"a": a, "b": b},
        {"a": b, "b": a},
        {"a": a, "c": b},
        {"a": a, "b": b.reshape(6, 4)},
        {"a": a, "b": b.view(np.int32)},
        {"a": a},
    ]
    assert len({digest_arrays(t).root for t in trees}) == len(trees)


def test_the_order_of_the_tree_is_kept_and_is_no_part_of_the_root():
    a, b = values((4,), "float32", 1), values((4,), "float32", 2)
    forth, back = digest_arrays({"a": a, "b": b}), digest_arrays({"b": b, "a": a})
    assert list(forth.leaves) == ["a", "b"]
    assert list(back.leaves) == ["b", "a"]
    assert forth.root == back.root


@pytest.mark.parametrize("dtype", ["bfloat16", "int4", "float32", "float64"])
@pytest.mark.parametrize("maker", [digest_numpy.Digester, on_devices.Digester])
def test_windows_in_any_order_are_the_whole(dtype, maker):
    rng = np.random.default_rng(3)
    array = values((200, 3, 130), dtype)
    cuts = [sorted({0, n, *rng.integers(0, n, 2)}) for n in array.shape]
    boxes = list(itertools.product(*[list(itertools.pairwise(c)) for c in cuts]))
    rng.shuffle(boxes)
    digester = maker({"x": (array.shape, array.dtype)})
    for box in boxes:
        start = tuple(low for low, _ in box)
        digester.add("x", start, array[tuple(slice(*edge) for edge in box)])
    assert digester.digest() == of(array)


def test_coordinates_beyond_32_bits_count():
    shape, one = (1 << 34,), np.ones(1, np.int8)
    sums = []
    for at in (5, 5 + (1 << 32), 5 + (1 << 33)):
        digester = digest_numpy.Digester({"x": (shape, np.int8)})
        digester.add("x", (at,), one)
        sums.append(tuple(digester._sums["x"]))
    assert len(set(sums)) == 3


def test_windows_are_checked():
    leaves = {"x": ((4, 6), np.float32)}
    whole = np.zeros((4, 6), np.float32)
    for path, start, window in [
        ("y", (0, 0), whole),
        ("x", (1, 0), whole),
        ("x", (0,), whole[0]),
        ("x", (0, 0), whole.astype(np.float64)),
    ]:
        with pytest.raises(DigestError, match=r"leaf"):
            digest_numpy.Digester(leaves).add(path, start, window)
    digester = digest_numpy.Digester(leaves)
    digester.add("x", (0, 0), whole[:3])
    with pytest.raises(DigestError, match="18 elements were added"):
        digester.digest()


def test_leaves_without_values_are_refused_by_name():
    tree = {"a": jnp.ones(3), "b": {"c": jax.ShapeDtypeStruct((3,), jnp.float32)}}
    with pytest.raises(DigestError, match=r"leaf 'b/c'.*no values"):
        shardinit.digest(tree)
    with pytest.raises(DigestError, match=r"leaf 'b'.*a str"):
        shardinit.digest({"b": "text"})
    with pytest.raises(DigestError, match="dtype <U4"):
        shardinit.digest({"x": np.array(["text"])})
    with pytest.raises(DigestError, match="two leaves"):
        shardinit.digest(_Twice())


@jax.tree_util.register_pytree_with_keys_class
class _Twice:
    def tree_flatten_with_keys(self):
        key = jax.tree_util.DictKey("x")
        return [(key, np.ones(3)), (key, np.ones(3))], None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls()


def test_numbers_and_numpy_leaves():
    tree = {"step": 3, "scale": np.float32(2.5), "flag": True, "w": np.ones(3)}
    expected = {k: np.asarray(v) for k, v in sorted(tree.items())}
    assert shardinit.digest(tree) == digest_arrays(expected)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize("shape", [(1024, 4096), (1 << 22,), (1 << 20, 2, 2)])
def test_temporaries_stay_small(shape, dtype):
    bits = jax.ShapeDtypeStruct(shape, dtype)
    start = jax.ShapeDtypeStruct((len(shape), 2), np.uint32)
    used = jax.jit(on_devices.loop_sums).lower(bits, start).compile().memory_analysis()
    assert used.temp_size_in_bytes < 2 << 20


@pytest.mark.parametrize("dtype", ["bool", "bfloat16", "float8_e5m2", "complex64"])
def test_bits_of_an_array_on_cpu_are_no_copy(dtype):
    array = jnp.ones((64, 128), dtype)
    bits = digest_numpy.bits_of(np.asarray(array))
    assert bits.ctypes.data == array.unsafe_buffer_pointer()
    assert jax.device_put(bits).unsafe_buffer_pointer() == bits.ctypes.data


def test_the_format_stands():
    """Digests are kept in receipts: these must never change."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    digest = digest_arrays({"a/b": array, "": np.array(7, np.int64)})
    assert digest.leaves == {
        "a/b": "ad738847d6ef534db592f687f7d64d13",
        "": "95579ce68631458fc80f11fad9d3316d",
    }
    assert digest.root == (
        "5b69aa0cd370de54696d7fc6ab5c94ecb817c4444214b04601f5fbcf2747270f"
    )


def test_numpy_digests_need_no_jax():
    code = (
        "import sys, numpy as np\n"
        "from shardinit.verify.digest.host import Digester\n"
        "digester = Digester({'x': ((3,), 'float64')})\n"
        "digester.add('x', (0,), np.ones(3))\n"
        "digester.digest().root\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
