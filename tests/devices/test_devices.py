"""What is promised, on whatever devices there are: one card, eight, or simulated CPUs.

On an accelerator all of these are run by ``make accelerator``; elsewhere a few run with
the others. Nothing here knows how many devices there are, nor of which kind.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import shardinit
from shardinit.core.cut.cutter import cut
from shardinit.core.run.arguments import key_words, operand_words

pytestmark = pytest.mark.devices

COUNT = len(jax.devices())
SHAPES = [(8 * COUNT, 96), (3, 16 * COUNT, 32)]
INIT = jax.nn.initializers
LAWS = {
    "normal": INIT.normal(0.02),
    "lecun": INIT.lecun_normal(),
    "truncated": INIT.truncated_normal(),
    "uniform": INIT.uniform(),
    "orthogonal": INIT.orthogonal(),
    "bernoulli": lambda key, shape, dtype: jax.random.bernoulli(key, 0.3, shape),
    "integers": lambda key, shape, dtype: jax.random.randint(key, shape, -5, 99),
    "ones": lambda key, shape, dtype: jnp.ones(shape, dtype),
}


def model(key):
    """A leaf of each law, dtype and shape."""
    leaves = {}
    for number, (name, draw) in enumerate(LAWS.items()):
        for dtype in (jnp.float32, jnp.bfloat16):
            for shape in SHAPES:
                if name == "orthogonal" and (len(shape) > 2 or dtype != jnp.float32):
                    continue
                sub = jax.random.fold_in(key, number * 100 + len(leaves))
                path = f"{name}_{jnp.dtype(dtype).name}_{len(shape)}"
                leaves[path] = draw(sub, shape, dtype)
    return leaves


def meshes():
    """Every way to lay the devices out along two axes."""
    ways = [n for n in range(1, COUNT + 1) if COUNT % n == 0]
    return [jax.make_mesh((n, COUNT // n), ("data", "model")) for n in ways]


def same(got, wanted):
    """Whether two arrays have the same bits."""
    one, two = np.asarray(got), np.asarray(wanted)
    return one.dtype == two.dtype and one.tobytes() == two.tobytes()


@pytest.fixture(scope="module")
def wanted():
    """What this backend's own jit makes of it on one device."""
    return jax.device_get(jax.jit(model)(jax.random.key(7)))


@pytest.mark.parametrize("mesh", meshes(), ids=lambda mesh: str(dict(mesh.shape)))
@pytest.mark.few(1)
def test_the_values_are_those_of_this_backends_jit_on_every_mesh(mesh, wanted):
    got = shardinit.init(model, 7, mesh=mesh, rules=shardinit.fsdp())
    for path, array in got.items():
        assert same(array, wanted[path]), path
        shard = array.sharding.shard_shape(array.shape)
        assert {s.data.shape for s in array.addressable_shards} == {shard}


@pytest.mark.slow
def test_a_program_and_windows_of_it_give_the_same_bits(tmp_path, wanted):
    path = tmp_path / "model.shardinit"
    shardinit.export_plan(model).save(path)
    program = shardinit.load_program(path)
    made = shardinit.init(program, 7, mesh=meshes()[-1], rules=shardinit.fsdp())
    lazy = shardinit.open(program, 7)
    for name, array in wanted.items():
        assert same(made[name], array), name
        window = tuple(slice(1, size - 1) for size in array.shape)
        assert same(lazy[name][window], array[window]), name


@pytest.mark.parametrize("windows", [2, 8])
def test_one_device_makes_every_window_of_a_mesh_that_is_not_there(windows):
    """Each window is computed as the device at its place in a larger mesh would."""
    shape = (8 * windows, 48)
    key = jax.random.key(3)
    draw = INIT.variance_scaling(1.0, "fan_in", "truncated_normal")
    made = cut(lambda key: draw(key, shape), jax.ShapeDtypeStruct((), key.dtype))
    (leaf,), (program,) = made.leaves, made.programs
    (words,) = operand_words([leaf.operands], key_words(key, made))
    lanes = jax.devices()[0].platform == "cpu"
    size = (shape[0] // windows, shape[1])

    @jax.jit
    def window(words, row):
        return program.window(words, [[row, np.uint32(0)]], [size], lanes=lanes)[0]

    rows = [np.uint32(n * size[0]) for n in range(windows)]
    got = np.concatenate([np.asarray(window(words, row)) for row in rows])
    assert same(got, jax.jit(lambda key: draw(key, shape))(key))


def test_a_device_holds_its_shard_and_no_more():
    """By the devices' own account, which simulated ones do not keep."""
    device = jax.local_devices()[0]
    if device.memory_stats() is None:
        pytest.skip(f"{device.platform} devices keep no account of their memory")
    mesh = meshes()[-1]
    shape = (1 << 14, 1 << 14)
    compiled = shardinit.compile_plan(
        shardinit.plan(
            lambda key: jax.random.normal(key, shape),
            mesh=mesh,
            out_shardings=NamedSharding(mesh, PartitionSpec(("data", "model"))),
        )
    )
    before = device.memory_stats()["bytes_in_use"]
    made = jax.block_until_ready(compiled(0))
    peak = device.memory_stats()["peak_bytes_in_use"] - before
    shard = math.prod(made.sharding.shard_shape(shape)) * 4
    assert shard <= peak <= 1.1 * shard
