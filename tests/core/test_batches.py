"""What one call of an executable makes: constants many at once, draws alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import shardinit
from shardinit.core.run.batches import batches
from shardinit.frontends.optax import with_optimizer


def layers(count):
    def init(key):
        keys = jax.random.split(key, count)
        return {
            f"layers_{i}": {
                "kernel": jax.random.normal(keys[i], (8, 16)),
                "bias": jnp.zeros(16),
                "scale": jnp.full(8, 0.5 / (i + 1)),
                "half": jnp.ones((4, 8), jnp.bfloat16),
            }
            for i in range(count)
        }

    return init


def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, -1), ("data", "model"))


def assert_each_selected_leaf_is_made_once(plan):
    made = [i for b in batches(plan) for call in b.calls for i in call.leaves]
    assert sorted(made) == [i for i, leaf in enumerate(plan.leaves) if leaf.selected]


def assert_equal(got, expected):
    for path, leaf in jax.tree.leaves_with_path(expected):
        mine = got
        for part in path:
            mine = mine[part.key]
        assert mine.dtype == leaf.dtype, path
        assert np.asarray(mine).tobytes() == np.asarray(leaf).tobytes(), path


@pytest.mark.parametrize("count", [1, 3, 40])
def test_constants_are_made_together_with_the_values_of_jit(count):
    init = layers(count)
    plan = shardinit.plan(init, mesh=mesh(), rules=shardinit.fsdp("model"))
    compiled = shardinit.compile_plan(plan)
    assert_each_selected_leaf_is_made_once(plan)
    assert len(compiled.executables) < len(plan.programs) + 1
    assert max(len(b.programs) for b in compiled.batches) <= 64
    got = compiled(3)
    assert_equal(got, jax.jit(init)(jax.random.key(3)))
    for i, leaf in enumerate(jax.tree.leaves(got)):
        assert leaf.sharding == plan.leaves[i].sharding


def test_moments_cost_next_to_no_executables():
    alone = shardinit.compile_plan(shardinit.plan(layers(20), mesh=mesh()))
    state = with_optimizer(layers(20), optax.adam(1e-3))
    with_adam = shardinit.compile_plan(shardinit.plan(state, mesh=mesh()))
    calls = [len(b.calls) for b in with_adam.batches if len(b.programs) > 1]
    assert len(with_adam.executables) <= len(alone.executables) + 2
    assert sum(calls) <= 8  # for 60 constants and 160 moments


def test_a_hundred_kinds_of_constants_take_few_executables():
    def init(key):
        return [jnp.full((i + 1,), i, jnp.float32) for i in range(100)]

    plan = shardinit.plan(init)
    assert_each_selected_leaf_is_made_once(plan)
    assert [len(b.programs) for b in batches(plan)] == [64, 36]
    for i, leaf in enumerate(shardinit.init(init, 0)):
        assert np.array_equal(leaf, np.full(i + 1, i, np.float32))


def test_leaves_that_are_left_out_are_in_no_batch():
    plan = shardinit.plan(layers(3), select=["**/bias"])
    assert_each_selected_leaf_is_made_once(plan)
    made = shardinit.compile_plan(plan)(0)
    assert isinstance(made["layers_0"]["kernel"], jax.ShapeDtypeStruct)
    assert isinstance(made["layers_2"]["bias"], jax.Array)


def test_one_shard_at_a_time_is_on_its_way_to_the_host():
    on = mesh()
    pinned = NamedSharding(on, PartitionSpec(), memory_kind="pinned_host")
    device = NamedSharding(on, PartitionSpec("model"))

    def init(key):
        return {name: jnp.zeros(8 * (name > "d") + 8) for name in "abcdef"}

    places = {name: pinned if name in "abcd" else device for name in "abcdef"}
    plan = shardinit.plan(init, mesh=on, out_shardings=places)
    assert_each_selected_leaf_is_made_once(plan)
    found = {len(b.programs): len(b.calls) for b in batches(plan)}
    assert found == {1: 4, 2: 1}


def test_what_is_drawn_or_counted_is_no_fill():
    def init(key):
        return {
            "drawn": jax.random.normal(key, (8, 8)),
            "counted": jnp.arange(64.0).reshape(8, 8),
            "masked": jnp.tri(8) * jax.random.uniform(key, (8, 8)),
        }

    assert all(len(b.programs) == 1 for b in batches(shardinit.plan(init)))


def test_progress_counts_leaves():
    seen = []
    plan = shardinit.plan(layers(5))
    shardinit.compile_plan(plan)(
        0, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (20, 20)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
