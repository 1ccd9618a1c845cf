"""Layers: what they compute, against Flax Linen given the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from shardinit import module as tx
from tests.core.bits import differing

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 4)), jnp.float32)
KEY = jax.random.key(42)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("mine", "flax"),
    [
        (tx.Linear(32), nn.Dense(32)),
        (tx.Linear(32, use_bias=False), nn.Dense(32, use_bias=False)),
        (tx.Conv(32, (3, 3)), nn.Conv(32, (3, 3))),
        (
            tx.Conv(32, (3, 3), strides=2, padding="VALID", feature_group_count=2),
            nn.Conv(32, (3, 3), strides=2, padding="VALID", feature_group_count=2),
        ),
        (
            tx.Conv(32, (3, 3), kernel_dilation=2, padding=[(1, 2), (0, 1)]),
            nn.Conv(32, (3, 3), kernel_dilation=2, padding=[(1, 2), (0, 1)]),
        ),
        (tx.ConvTranspose(32, (3, 3)), nn.ConvTranspose(32, (3, 3))),
        (
            tx.ConvTranspose(32, (3, 2), strides=2, padding="VALID", use_bias=False),
            nn.ConvTranspose(
                32, (3, 2), strides=(2, 2), padding="VALID", use_bias=False
            ),
        ),
        (tx.GroupNorm(2), nn.GroupNorm(2)),
        (tx.GroupNorm(None, 1, use_bias=False), nn.GroupNorm(None, 1, use_bias=False)),
        (
            tx.GroupNorm(4, reduction_axes=(2, -1)),
            nn.GroupNorm(4, reduction_axes=(2, -1)),
        ),
        (tx.LayerNorm(), nn.LayerNorm(epsilon=1e-5)),
        (tx.LayerNorm(use_scale=False), nn.LayerNorm(epsilon=1e-5, use_scale=False)),
        (tx.RMSNorm(), nn.RMSNorm(epsilon=1e-5)),
        (tx.BatchNorm(), nn.BatchNorm(use_running_average=False)),
        (tx.BatchNorm(axis=1), nn.BatchNorm(use_running_average=False, axis=1)),
    ],
)
@pytest.mark.few(5)
def test_layers_are_those_of_flax(mine, flax):
    made = mine.init(KEY, X)
    first = jax.random.split(KEY)[0]
    variables = jax.jit(flax.init)(first, X)
    parameters = {name: getattr(made, name) for name in variables.get("params", {})}
    assert differing(parameters, dict(variables.get("params", {}))) == []
    missing = {"kernel", "bias", "scale"} - set(parameters)
    assert all(getattr(made, name, None) is None for name in missing)
    expected, state = flax.apply(variables, X, mutable=["batch_stats"])
    close(made(X), expected)
    for name, value in state.get("batch_stats", {}).items():
        close(getattr(made, name), value)


def test_embed_is_that_of_flax():
    ids = jnp.asarray([[1, 2], [3, 0]])
    made = tx.Embed(16, 32).init(KEY, ids)
    variables = jax.jit(nn.Embed(16, 32).init)(jax.random.split(KEY)[0], ids)
    assert differing(made.embedding, variables["params"]["embedding"]) == []
    assert np.array_equal(made(ids), made.embedding[ids])
    with pytest.raises(TypeError, match="expected integers"):
        made(jnp.ones(2))


def test_dtypes():
    made = tx.Linear(4, dtype=jnp.bfloat16).init(KEY, X)
    assert made.kernel.dtype == jnp.float32
    assert made(X).dtype == jnp.bfloat16
    made = tx.Linear(4, param_dtype=jnp.bfloat16).init(KEY, X)
    assert made.kernel.dtype == jnp.bfloat16
    assert tx.LayerNorm(dtype=jnp.bfloat16).init(KEY, X)(X).dtype == jnp.bfloat16


def test_batch_norm_learns_in_training_only():
    made = tx.BatchNorm(momentum=0.5).init(KEY, X)
    assert not made.mean.any()
    evaluated = made.eval()
    close(evaluated(X), X / np.sqrt(1 + 1e-5))
    assert not evaluated.mean.any()
    frozen = made.freeze()
    frozen(X)
    assert not frozen.mean.any()
    made(X)
    close(made.mean, X.mean((0, 1, 2)) / 2)
    made(X, use_running_average=True)
    close(made.mean, X.mean((0, 1, 2)) / 2)


def test_batch_norm_over_a_mapped_axis():
    made = tx.BatchNorm(axis_name="i").init(KEY, X)
    plain = tx.BatchNorm().init(KEY, X)
    close(jax.vmap(lambda x: made(x), axis_name="i")(X), plain(X))


def test_dropout():
    made = tx.Dropout(0.25).init(KEY)
    x = jnp.ones((64, 64))
    before = made.rng
    y = made(x)
    assert made.rng != before
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(float((y == 0).mean()) - 0.25) < 0.03
    assert not np.array_equal(made(x), y)
    assert np.array_equal(made(x, rng=KEY), made(x, rng=KEY))
    for off in (made.eval(), made.freeze()):
        assert off(x) is x
    assert made(x, deterministic=True) is x
    rows = tx.Dropout(0.5, broadcast_dims=(1,)).init(KEY)(x)
    assert np.array_equal(rows, jnp.broadcast_to(rows[:, :1], rows.shape))
    assert not tx.Dropout(1.0).init(KEY)(x).any()
    assert np.array_equal(tx.Dropout(0.0).init(KEY)(x), x)
    with pytest.raises(RuntimeError, match="before it was initialised"):
        tx.Dropout(0.5)(x)


def test_sequential_mlp_and_lambda():
    net = tx.Sequential(tx.Linear(5), jnp.tanh, tx.MLP([6, 3], jnp.sin))
    made = net.init(KEY, X)
    mlp = made.layers[2]
    y = jnp.tanh(X @ made.layers[0].kernel)
    y = jnp.sin(y @ mlp.linear.kernel) @ mlp.linear2.kernel
    close(made(X), y)
    assert isinstance(made.layers[1], tx.Lambda)
    assert tx.Lambda(lambda x, y=0: x + y)(2, y=3) == 5
    with pytest.raises(ValueError, match="features is empty"):
        tx.MLP([])


@pytest.mark.parametrize(
    "options", [{"num_groups": 3}, {"num_groups": None, "group_size": 3}]
)
def test_groups_that_do_not_divide_the_features_are_refused(options):
    with pytest.raises(ValueError, match="GroupNorm: got 4 features"):
        tx.GroupNorm(**options).init(KEY, X)
    with pytest.raises(ValueError, match="expected one of them"):
        tx.GroupNorm(**options | {"num_groups": 4, "group_size": 1})


@pytest.mark.slow
def test_a_gru_is_that_of_flax():
    x = X[:, 0]
    made = tx.GRU(32, return_sequences=True, return_state=True).init(KEY, x)
    # the layer's own key comes first, then that of its parameters
    second = jax.random.split(jax.random.split(KEY)[1])[0]
    cell = nn.GRUCell(32)
    start = jnp.zeros((2, 32))
    variables = jax.jit(cell.init)(second, start, x[:, 0])
    assert differing(made.params, dict(variables["params"])) == []
    states, last = made(x)
    want, state = [], start
    for time in range(x.shape[1]):
        state, out = cell.apply(variables, state, x[:, time])
        want.append(out)
    close(states, jnp.stack(want, 1))
    close(last, want[-1])
    back = tx.GRU(32, go_backwards=True).init(KEY, x)
    close(back(x[:, ::-1]), last)
    close(back(x[:, ::-1], initial_state=start), last)


@pytest.mark.slow
def test_a_stateful_gru_goes_on_where_it_ended():
    x = X[:, 0]
    made = tx.GRU(32, stateful=True).init(KEY, x)
    assert made.last_state is None
    made(x[:, :3])
    close(made(x[:, 3:]), tx.GRU(32).init(KEY, x)(x))
    assert made.filter(tx.Cache).last_state.shape == (2, 32)


def test_along_a_mapped_axis_each_index_draws_its_own_parameters():
    def kernels(axis_name):
        def init(x):
            return tx.Linear(32, axis_name=axis_name).init(KEY, x).kernel

        return jax.vmap(init, axis_name="batch")(X[:, 0])

    first, second = kernels("batch")
    key = jax.random.fold_in(jax.random.split(KEY)[0], 1)
    variables = jax.jit(nn.Dense(32).init)(key, X[0, 0])
    close(second, variables["params"]["kernel"])
    assert not np.array_equal(first, second)
    same, again = kernels(None)
    np.testing.assert_array_equal(same, again)
