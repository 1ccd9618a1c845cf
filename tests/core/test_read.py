"""Windows of leaves: from a function and from a loaded program, equal to the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardinit
from shardinit.core.run import lazy as reading
from shardinit.errors import SelectError, WholeLeafError

from .bits import differing, host, raw
from .random_fns import NARROW, WIDE, models
from .test_program import fn


@pytest.fixture(scope="module")
def program():
    data = shardinit.export_plan(fn).to_bytes()
    return shardinit.InitProgram.from_bytes(data)


def whole(function, key):
    """Every leaf by path, as the engine makes it; keys as their data."""
    tree = shardinit.init(function, key)
    leaves = jax.tree.leaves(tree)
    return dict(zip(shardinit.open(function, key), map(host, leaves), strict=True))


@st.composite
def indices(draw, shape):
    index = []
    for size in shape:
        low = draw(st.integers(0, size))
        high = draw(st.integers(low, size))
        kind = draw(st.sampled_from(("window", "all", "step", "back", "one")))
        if kind == "one" and size:
            index.append(draw(st.integers(-size, size - 1)))
        elif kind == "step":
            index.append(slice(low, high, draw(st.integers(1, 3))))
        elif kind == "back":
            index.append(slice(None, None, -1))
        elif kind == "all":
            index.append(slice(None))
        else:
            index.append(slice(low, high))
    return tuple(index)


@settings(max_examples=4)
@given(st.data())
def test_any_window_of_any_leaf_is_that_slice_of_the_whole(data):
    model = data.draw(models(data.draw(st.sampled_from((WIDE, NARROW)))))
    key = jax.random.key(data.draw(st.integers(0, 1000)))
    wholes = whole(model, key)
    source = model
    if data.draw(st.booleans()):
        source = shardinit.InitProgram.from_bytes(
            shardinit.export_plan(model).to_bytes()
        )
    for path, lazy in shardinit.open(source, key).items():
        want = wholes[path]
        assert (lazy.shape, lazy.nbytes) == (want.shape, want.nbytes)
        index = data.draw(indices(want.shape))
        got = lazy[index]
        assert np.asarray(got).dtype == lazy.dtype
        assert differing(got, want[index]) == []


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [False, True])
def test_every_kind_of_leaf(program, loaded):
    source = program if loaded else fn
    key = jax.random.key(4)
    wholes = whole(fn, key)
    lazy = shardinit.open(source, key)
    assert list(lazy) == list(wholes)
    assert lazy.nbytes == sum(w.nbytes for w in wholes.values())
    for path, want in wholes.items():
        assert differing(np.asarray(lazy[path]), want) == []
        for _ in range(2):
            part = tuple(slice(n // 3, n) for n in want.shape)
            got = shardinit.read(source, key, path, part)
            assert differing(got, want[part]) == []


@pytest.mark.slow
def test_shards_are_windows(program, mesh):
    key = jax.random.key(9)
    rules = shardinit.fsdp(min_bytes=0)
    params = shardinit.init(program, key, mesh=mesh, rules=rules)
    lazy = shardinit.open(program, key).as_tree()
    for array, source in zip(
        jax.tree.leaves(params), jax.tree.leaves(lazy), strict=True
    ):
        for shard in array.addressable_shards:
            assert raw(source[shard.index]) == raw(shard.data)


def test_windows_of_one_shape_share_oneexecutable():
    reading.executable.cache_clear()
    lazy = shardinit.open(
        lambda key: [jax.random.normal(k, (64, 96)) for k in jax.random.split(key, 9)],
        0,
    )
    for path in lazy:
        for row in range(0, 64, 16):
            lazy[path][row : row + 16, 32:64]
    assert reading.executable.cache_info().misses == 1


def test_a_whole_leaf_is_evaluated_once_and_within_the_limit():
    def model(key):
        return {"rotation": jax.nn.initializers.orthogonal()(key, (64, 64))}

    key = jax.random.key(1)
    lazy = shardinit.open(model, key, memory_limit=1 << 20)["rotation"]
    assert lazy.whole
    want = np.asarray(shardinit.init(model, key)["rotation"])
    for row in range(0, 64, 8):
        assert differing(lazy[row : row + 8], want[row : row + 8]) == []
    assert len(lazy._tree._held) == 1
    tight = shardinit.open(model, key, memory_limit=1000)
    with pytest.raises(WholeLeafError, match=r"'rotation'.*16,384 bytes.*1,000"):
        tight["rotation"][:1]
    between = shardinit.open(model, key, memory_limit=64 * 64 * 4)
    with pytest.raises(WholeLeafError, match="rotation"):  # temporaries count too
        between["rotation"][:1]


def test_bad_windows_are_refused_by_name():
    def model(key):
        return {"w": jax.random.normal(key, (4, 8))}

    lazy = shardinit.open(model, 0)
    with pytest.raises(SelectError, match=r"'v': none of the 1 leaves.*'w'"):
        lazy["v"]
    assert "v" not in lazy
    with pytest.raises(IndexError, match=r"'w'.*axis 1 of size 8"):
        lazy["w"][0, 8]
    with pytest.raises(IndexError, match=r"'w'.*3 indices"):
        lazy["w"][0, 0, 0]
    with pytest.raises(IndexError, match=r"inside its shape \(4, 8\)"):
        lazy["w"].read((3, 0), (2, 8))
    with pytest.raises(TypeError, match=r"'w'.*list"):
        lazy["w"][[0, 1]]
    with pytest.raises(TypeError, match="key: got str"):
        shardinit.open(model, "seed")
    assert lazy["w"][None, 1, ..., ::-3].shape == (1, 3)
    assert lazy["w"][4:].shape == (0, 8)


def test_a_plan_refuses_more_bytes_on_a_device_than_the_limit(mesh):
    def model(key):
        return {
            "w": jax.random.normal(key, (512, 512)),
            "t": jax.random.gamma(key, 2.0, (64,)),
        }

    held = 512 * 512 * 4 // 8 + 256  # the shard of w, and t in full
    assert shardinit.plan(model, mesh=mesh, memory_limit=held).whole_leaves
    with pytest.raises(
        WholeLeafError,
        match=r"'w'.*131,328 bytes.*'t' must be computed in full.*memory_limit=131,327",
    ):
        shardinit.init(model, 0, mesh=mesh, memory_limit=held - 1)
    only_t = {"select": "t", "mesh": mesh}
    assert shardinit.plan(model, memory_limit=256, **only_t).whole_leaves
    with pytest.raises(WholeLeafError, match=r"'t'.*256 bytes.*memory_limit=255"):
        shardinit.plan(model, memory_limit=255, **only_t)


def test_what_is_called_uniform_is_one_number():
    def init(key):
        square = (40, 60)
        return {
            "yes": {
                "zeros": jnp.zeros(square),
                "full": jnp.full(square, 0.3, jnp.bfloat16) * 2,
                "negative": -jnp.ones(square).T,
            },
            "no": {
                "iota": jnp.broadcast_to(jnp.arange(60.0), square),
                "drawn": jax.random.normal(key, square),
                "bits": jnp.broadcast_to(jax.random.bits(key, (60,)), square),
                "edge": jnp.pad(jnp.ones((38, 58)), 1),
                "key": jax.random.split(key, 3),
                "row": jnp.broadcast_to(jnp.asarray(np.arange(60.0)), square),
            },
        }

    weights = shardinit.open(init, 0)
    for path, leaf in weights.items():
        assert leaf.uniform == path.startswith("yes/"), path
        if leaf.uniform:
            whole = np.asarray(leaf)
            assert np.all(whole == whole.flat[0])
