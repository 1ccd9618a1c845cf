"""Inspections: statistics from windows against those of the weights themselves."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardinit
from shardinit.core.run.arguments import operand_words
from shardinit.errors import SelectError
from shardinit.models import ModelSpec, build
from shardinit.verify.inspect.gain import fan_in, unlike
from shardinit.verify.inspect.inspect import law_of as read_law
from shardinit.verify.inspect.moments import moments, sparkline
from shardinit.verify.inspect.windows import layout

pytestmark = pytest.mark.once

inits = jax.nn.initializers


def law_of(fn):
    plan = shardinit.plan(fn)
    words = operand_words([plan.cut.leaves[0].operands], np.zeros(2, np.uint32))
    return read_law(plan.cut, 0, words[0])


@pytest.mark.parametrize(
    ("draw", "family", "scale"),
    [
        (lambda k: jax.random.normal(k, (64, 64)), "normal", 1.0),
        (lambda k: 3 - 0.5 * jax.random.normal(k, (64, 64)), "normal", 0.5),
        (lambda k: jax.random.normal(k, (64, 64)) / 4, "normal", 0.25),
        (inits.normal(0.02), "normal", 0.02),
        (inits.he_uniform(), "uniform", math.sqrt(6 / 64)),
        (lambda k: jax.random.uniform(k, (64, 64), minval=2, maxval=4), "uniform", 1),
        (inits.truncated_normal(0.3), "truncated normal", 0.3),
        (inits.lecun_normal(), "truncated normal", 0.125 / 0.87962566),
        (lambda k: jnp.full((64, 64), 7.0), "constant", 0),
        (lambda k: np.full((64, 64), 7.0, np.float32), "constant", 0),
        (lambda k: jnp.exp(jax.random.normal(k, (64, 64))), "unknown", None),
        (lambda k: jnp.maximum(jax.random.normal(k, (64, 64)), 0), "unknown", None),
        (lambda k: jax.random.exponential(k, (64, 64)), "unknown", None),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.few(10)
def test_the_law_is_read_from_the_function(draw, family, scale, dtype):
    def fn(key):
        try:
            made = draw(key, (64, 64), dtype)
        except TypeError:
            made = jnp.asarray(draw(key), dtype)
        return made

    law = law_of(fn)
    assert law.family == family
    if scale is not None:
        assert law.scale == pytest.approx(scale, rel=1e-2)


def test_stacked_joined_and_transposed_draws_keep_their_law():
    def stacked(key):
        return jax.vmap(lambda k: jax.random.normal(k, (8, 64)))(
            jax.random.split(key, 3)
        )

    def joined(key):
        a, b = jax.random.split(key)
        parts = [jax.random.normal(a, (8, 64)), jax.random.normal(b, (8, 64)).T.T]
        return jnp.concatenate(parts)

    def mixed(key):
        return jnp.concatenate([jax.random.normal(key, (8, 64)), jnp.zeros((8, 64))])

    def halves(key):
        return jnp.tile(jnp.split(jax.random.normal(key, (8, 64)), 2)[1], 3)

    assert [law_of(fn).family for fn in (stacked, joined, mixed, halves)] == [
        "normal",
        "normal",
        "unknown",
        "normal",
    ]


def test_the_deviation_of_a_law_is_that_of_its_numbers():
    for init in (inits.lecun_normal(), inits.he_uniform(), inits.normal(0.1)):
        (leaf,) = shardinit.inspect(lambda key: init(key, (512, 512)), 0).leaves  # noqa: B023
        assert leaf.exact
        assert leaf.moments.std == pytest.approx(leaf.law.std, rel=0.01)


def test_sums_of_small_leaves_are_those_of_the_weights():
    def fn(key):
        return {
            "w": jax.random.normal(key, (300, 70)),
            "n": jnp.arange(5),
            "z": jnp.eye(8),
        }

    made = shardinit.inspect(fn, 3)
    params = jax.jit(fn)(jax.random.key(3))
    for leaf in made.leaves:
        values = np.asarray(params[leaf.path], np.float64)
        found = leaf.moments
        assert leaf.exact
        assert leaf.windows == 1
        assert (found.mean_error, found.std_error) == (0, 0)
        assert found.mean == pytest.approx(values.mean(), abs=1e-7)
        assert found.std == pytest.approx(values.std(), rel=1e-5)
        assert (found.min, found.max) == (values.min(), values.max())
        assert found.zeros == pytest.approx((values == 0).mean())
        assert sum(found.histogram) == values.size


def test_windows_of_a_large_leaf_estimate_its_moments_within_their_errors():
    def fn(key):  # rows grow: no window is like another
        rows = jnp.linspace(1, 3, 2048)[:, None]
        return jax.random.normal(key, (2048, 1024)) * rows + 0.5

    (leaf,) = shardinit.inspect(fn, 1).leaves
    values = np.asarray(jax.jit(fn)(jax.random.key(1)), np.float64)
    found = leaf.moments
    assert not leaf.exact
    assert leaf.windows == 64
    assert leaf.law.family == "unknown"
    assert 0 < found.std_error < 0.2
    assert abs(found.mean - values.mean()) < 5 * found.mean_error
    assert abs(found.std - values.std()) < 5 * found.std_error


def test_every_layer_and_every_end_of_a_leaf_is_in_a_stratum():
    place = layout((2048, 4096))
    assert len(place.starts) == 64
    sides = [place.starts[:, a] + place.shape[a] for a in range(2)]
    assert all(
        (side.max() > 0.85 * n) for side, n in zip(sides, (2048, 4096), strict=False)
    )
    assert (sides[0] <= 2048).all()
    assert (sides[1] <= 4096).all()
    stack = layout((100, 512, 512), depth=0)
    assert sorted(set(stack.starts[:, 0])) == list(range(100))


def test_leaves_of_one_program_are_looked_at_each_with_its_own_key():
    def fn(key):
        return [
            0.02 * jax.random.normal(k, (1024, 512)) for k in jax.random.split(key, 5)
        ]

    made = shardinit.inspect(fn, 0)
    assert len({leaf.moments.mean for leaf in made.leaves}) == 5
    for number, leaf in enumerate(made.leaves):
        window = shardinit.read(fn, 0, str(number), np.s_[:])
        assert leaf.moments.min >= window.min()
        assert leaf.moments.max <= window.max()


def test_a_loaded_program_has_the_same_moments_and_an_unknown_law():
    def fn(key):
        return {"w": jax.random.normal(key, (1024, 512)), "b": jnp.zeros(8)}

    ours = shardinit.inspect(fn, 0).leaves
    theirs = shardinit.inspect(shardinit.export_plan(fn), 0).leaves
    assert [leaf.moments for leaf in theirs] == [leaf.moments for leaf in ours]
    assert {leaf.law.family for leaf in theirs} == {"unknown"}


def layered(scale):
    def fn(key):
        keys = jax.random.split(key, 12)
        return {
            f"layers_{i}": {"kernel": scale(i) * jax.random.normal(keys[i], (64, 64))}
            for i in range(12)
        }

    return fn


def test_the_layer_unlike_its_sisters_is_named():
    made = shardinit.inspect(layered(lambda i: 0.2 if i == 7 else 0.02), 0)
    (found,) = made.findings
    assert (found.kind, found.leaves) == ("unlike-sisters", ("layers_7/kernel",))
    assert "its std is 0.19" in found.reason or "its std is 0.20" in found.reason
    ((path, extent, bars),) = made.chart()
    assert path == "layers_{0..11}/kernel"
    assert extent.startswith("0.15")
    assert bars[7] == "█"
    assert len(bars) == 12


@pytest.mark.parametrize(
    "scale",
    [
        lambda i: 0.02,
        lambda i: 0.02 / math.sqrt(2 * (i + 1)),
        lambda i: 0.02 / (i + 1),
        lambda i: 0.02 * 0.9**i,
    ],
)
@pytest.mark.parametrize("depth", [4, 12, 126, 1000])
def test_scales_that_follow_the_depth_are_no_outliers(scale, depth):
    noise = np.random.default_rng(depth).normal(1, 0.002, depth)
    values = [scale(i) * x for i, x in enumerate(noise)]
    errors = [0.002 * x for x in values]
    assert unlike(range(depth), values, errors) == []
    values[depth // 2] *= 1.5
    ((found, expected),) = unlike(range(depth), values, errors)
    assert found == depth // 2
    assert expected == pytest.approx(values[found] / 1.5, rel=0.05)


def test_a_layer_of_another_family_is_named():
    def fn(key):
        keys = jax.random.split(key, 8)
        draws = [inits.lecun_normal()] * 7 + [inits.lecun_uniform()]
        return [draw(k, (64, 64)) for draw, k in zip(draws, keys, strict=True)]

    (found,) = shardinit.inspect(fn, 0).findings
    assert found.leaves == ("7",)
    assert "uniform" in found.reason


def test_layers_of_a_stack_are_charted_and_the_odd_one_is_named():
    def fn(key):
        keys = jax.random.split(key, 8)
        scale = jnp.ones(8).at[5].set(3.0)[:, None, None]
        return {
            "kernel": jax.vmap(lambda k: jax.random.normal(k, (256, 256)))(keys) * scale
        }

    axes = {"kernel": ("layers", "embed", "mlp")}
    made = shardinit.inspect(shardinit.InitFn(fn, axes=axes), 0)
    (leaf,) = made.leaves
    assert len(leaf.layers) == 8
    assert leaf.fan_in == 256
    assert not leaf.exact
    (found,) = made.findings
    assert found.leaves == ("kernel[5]",)
    assert made.chart()[0][2][5] == "█"


def test_kernels_of_one_value_and_numbers_that_are_none_are_named():
    def fn(key):
        return {
            "dead": jnp.zeros((8, 64)),
            "ones": jnp.ones((8, 64)),
            "bias": jnp.zeros((8, 64)),
            "inf": jax.random.normal(key, (8, 64)) * jnp.inf,
        }

    found = {x.kind: x for x in shardinit.inspect(fn, 0).findings}
    assert found["not-finite"].leaves == ("inf",)
    said = [x for x in shardinit.inspect(fn, 0).findings if x.kind == "one-value"]
    assert {x.leaves: x.reason for x in said} == {
        ("dead",): "dead: every element is 0",
        ("ones",): "every element is 1",
    }


def test_leaves_that_must_be_made_whole_are_looked_at_below_the_limit_only():
    def fn(key):
        return {"q": inits.orthogonal()(key, (64, 64)), "key": jax.random.key(0)}

    made = {leaf.path: leaf for leaf in shardinit.inspect(fn, 0).leaves}
    assert made["q"].exact
    assert made["q"].moments.std == pytest.approx(1 / 8, rel=0.05)
    assert made["key"].unread == "keys are no numbers"
    few = shardinit.inspect(fn, 0, memory_limit=1 << 10)
    (unread,) = (leaf for leaf in few.leaves if leaf.path == "q")
    assert "needs the whole leaf" in unread.unread
    assert unread.windows == 0
    assert "2 not looked at" in str(few)


def test_select_looks_at_some_leaves_and_refuses_a_glob_of_none():
    fn = layered(lambda i: 1.0)
    made = shardinit.inspect(fn, 0, select="layers_3/**")
    assert [leaf.path for leaf in made.leaves] == ["layers_3/kernel"]
    with pytest.raises(SelectError):
        shardinit.inspect(fn, 0, select="layer_3/**")


def test_a_plan_on_a_mesh_is_looked_at_as_its_function_is(mesh):
    fn = layered(lambda i: 1.0)
    ours = shardinit.inspect(shardinit.plan(fn, mesh=mesh), 5)
    assert ours.leaves == shardinit.inspect(fn, 5).leaves
    assert ours.key == (0, 5)


def test_json_has_no_numbers_that_json_has_not():
    made = shardinit.inspect(lambda key: {"k": key, "w": jnp.ones(3)}, 0)

    def refuse(name):
        raise AssertionError(name)

    data = json.loads(made.to_json(), parse_constant=refuse)
    assert [leaf["path"] for leaf in data["leaves"]] == ["k", "w"]
    assert data["leaves"][0]["moments"]["mean"] is None
    assert len(repr(made)) < 200


@pytest.mark.slow
def test_gains_of_the_reference_decoder_know_their_fan_in():
    config = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    made = shardinit.inspect(build(ModelSpec("decoder", config)), 0)
    fans = {leaf.path: leaf.fan_in for leaf in made.leaves}
    assert fans["layers/0/attention/q/kernel"] == 64
    assert fans["layers/0/attention/o/kernel"] == 64
    assert fans["layers/0/mlp/down/kernel"] == 128
    assert fans["embed/embedding"] == 1
    assert fans["layers/0/mlp_norm/scale"] == 0
    assert all(leaf.law.family in ("normal", "constant") for leaf in made.leaves)


def test_fan_in_of_other_layouts():
    assert fan_in("conv/kernel", (3, 3, 16, 32), None) == 144
    assert fan_in("weight", (32, 16, 3, 3), None) == 144
    assert fan_in("w", (12, 8, 64), ("layers", "embed", "mlp")) == 8


def test_no_trend_no_outliers():
    assert unlike(range(8), [1, 9, 2, 8, 3, 7, 1, 5], [0] * 8) == []
    assert unlike(range(3), [1, 1, 9], [0] * 3) == []


def test_moments_of_nothing_and_of_what_is_not_finite():
    assert moments(np.zeros((1, 0)), exact=True).count == 0
    some = moments(np.array([[1.0, np.nan, np.inf, 3.0]]), exact=True)
    assert (some.mean, some.nonfinite, some.max) == (2.0, 0.5, 3.0)
    large = moments(np.full((1, 4), 3e38, np.float32), exact=True)
    assert (large.std, large.zeros) == (0.0, 0.0)
    bits = moments(np.array([[True, False, True, True]]), exact=True)
    assert bits.mean == 0.75
    assert sparkline([math.nan, 1.0, 1.0]) == " ▄▄"
