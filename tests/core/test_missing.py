"""Completion of restored trees: what is there stays, what is not is initialised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardinit
from shardinit.core.run import compile as compiled
from shardinit.errors import SelectError, ShardingError, StructureMismatchError

from .bits import differing

pytestmark = pytest.mark.once

RULES = shardinit.fsdp("data", min_bytes=0)


def model(vocab=64, layers=3):
    def init(key):
        return {
            "embed": jax.random.normal(jax.random.fold_in(key, 0), (vocab, 32)),
            "layers": [
                {"w": jax.random.normal(jax.random.fold_in(key, i + 1), (32, 32))}
                for i in range(layers)
            ],
            "step": jnp.int32(0),
            "none": None,
        }

    return init


def restored(mesh, **settings):
    """Somebody else's values: what a checkpoint would hold."""
    tree = shardinit.init(model(**settings), 77, mesh=mesh, rules=RULES)
    return {**tree, "step": tree["step"] + 5}


def test_missing_leaves_are_those_of_a_full_init(mesh):
    want = shardinit.init(model(), 1, mesh=mesh, rules=RULES)
    there = restored(mesh)
    there["layers"][1] = {"w": None}
    there["layers"][2]["w"] = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    del there["embed"]
    got = shardinit.init_missing(there, model(), 1, mesh=mesh, rules=RULES)
    assert got["layers"][0]["w"] is there["layers"][0]["w"]
    assert got["step"] is there["step"]
    assert differing(got["embed"], want["embed"]) == []
    assert differing(got["layers"][1:], want["layers"][1:]) == []
    assert got["embed"].sharding == want["embed"].sharding


def test_what_lies_elsewhere_is_placed_as_planned(mesh):
    """Restored on one device and left there, it would be whole beside its sisters."""
    want = shardinit.init(model(), 77, mesh=mesh, rules=RULES)
    there = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), want)
    got = shardinit.init_missing(there, model(), 1, mesh=mesh, rules=RULES)
    assert differing(got, want) == []
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.sharding == b.sharding
    got = shardinit.init_missing(there, model(), 1)  # nothing said where
    assert got["embed"] is there["embed"]


def test_nothing_missing_compiles_nothing(mesh, monkeypatch):
    there = restored(mesh)

    def refuse(*args, **kwargs):
        raise AssertionError("a program was compiled")

    monkeypatch.setattr(compiled, "lower", refuse)
    got = shardinit.init_missing(there, model(), 1, mesh=mesh, rules=RULES)
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(there), strict=True)
    )


def test_a_deeper_model_takes_the_layers_it_lacks(mesh):
    program = shardinit.export_plan(model(layers=6))
    there = restored(mesh)
    there["layers"] += [None] * 3
    got = shardinit.init_missing(there, program, 4, mesh=mesh, rules=RULES)
    want = shardinit.init(program, 4, mesh=mesh, rules=RULES)
    assert differing(got["layers"][3:], want["layers"][3:]) == []
    assert got["layers"][2]["w"] is there["layers"][2]["w"]


@pytest.mark.parametrize("as_numpy", [False, True])
def test_a_vocabulary_grows(mesh, as_numpy):
    there = restored(mesh)
    old = np.asarray(there["embed"])
    if as_numpy:
        there = jax.tree.map(np.asarray, there)
    bigger = model(vocab=72)
    got = shardinit.init_missing(there, bigger, 1, mesh=mesh, rules=RULES, grow="embed")
    want = shardinit.init(bigger, 1, mesh=mesh, rules=RULES)
    assert differing(np.asarray(got["embed"])[:64], old) == []
    assert (
        differing(np.asarray(got["embed"])[64:], np.asarray(want["embed"])[64:]) == []
    )
    assert got["embed"].sharding == want["embed"].sharding
    assert isinstance(got["layers"][0]["w"], jax.Array)
    assert got["layers"][0]["w"].sharding == want["layers"][0]["w"].sharding


@pytest.mark.slow
def test_what_does_not_fit_is_refused(mesh):
    def refused(change, says, **kwargs):
        there = restored(mesh)
        change(there)
        with pytest.raises(StructureMismatchError, match=says):
            shardinit.init_missing(there, model(), 1, mesh=mesh, rules=RULES, **kwargs)

    small = jnp.zeros((60, 32))
    refused(lambda t: t.update(embed=small), r"'embed'.*\(60, 32\).*grow='embed'")
    wide = jnp.zeros((64, 40))
    refused(lambda t: t.update(embed=wide), "Pass shrink='embed'", grow="**")
    flat = jnp.zeros(64)
    refused(lambda t: t.update(embed=flat), "number of axes", grow="**", shrink="**")
    half = jnp.zeros((64, 32), jnp.bfloat16)
    refused(lambda t: t.update(embed=half), "bfloat16.*never cast")
    refused(lambda t: t.update(head=small), "'head'.*not among the 5 leaves")
    refused(lambda t: t.update(embed=0.5), "'embed': got float; expected an array")


def test_the_account_says_what_will_become_of_each_leaf(mesh):
    there = restored(mesh)
    del there["layers"][2]["w"]
    there["layers"][0]["w"] = there["layers"][0]["w"].astype(jnp.bfloat16)
    there["layers"][1]["w"] = np.ones((40, 32), np.float32)
    there["ema"] = {"embed": np.zeros((64, 32), np.float32)}
    plan = shardinit.plan_missing(
        there,
        model(vocab=72),
        mesh=mesh,
        rules=RULES,
        grow={"embed": "mean", "**": "zeros"},
        shrink="layers/*/w",
        cast="**",
        unexpected="ema/**",
    )
    account = plan.account
    assert {kind: row["paths"] for kind, row in account.as_data().items()} == {
        "kept": ["step"],
        "mapped": [],
        "cast": ["layers/0/w"],
        "grown": ["embed"],
        "shrunk": ["layers/1/w"],
        "filled": ["layers/2/w"],
        "unexpected": ["ema/embed"],
    }
    assert account.as_data()["filled"]["bytes"] == 32 * 32 * 4
    said = str(plan)
    assert "embed (64, 32) -> (72, 32) by mean" in said
    assert "layers/0/w bfloat16 -> float32" in said
    got = plan(1)
    embed, old = np.asarray(got["embed"]), np.asarray(there["embed"])
    np.testing.assert_allclose(embed[64:], np.tile(old.mean(0), (8, 1)), rtol=1e-5)
    assert differing(embed[:64], old) == []
    assert differing(got["layers"][1]["w"], np.ones((32, 32), np.float32)) == []
    want = shardinit.init(model(vocab=72), 1, mesh=mesh, rules=RULES)
    assert differing(got["layers"][2], want["layers"][2]) == []
    assert got["layers"][0]["w"].dtype == jnp.float32


@pytest.mark.parametrize("policy", ["zeros", "copy", "mean", "mean_cov", "init"])
@pytest.mark.few(2)
def test_what_is_new_follows_the_policy_of_its_glob(mesh, policy):
    there, bigger = restored(mesh), model(vocab=72)
    options = {"mesh": mesh, "rules": RULES, "grow": {"embed": policy}}
    got = shardinit.init_missing(there, bigger, 1, **options)["embed"]
    old, new = np.asarray(there["embed"]), np.asarray(got)[64:]
    assert differing(np.asarray(got)[:64], old) == []
    assert (
        got.sharding
        == shardinit.init(bigger, 1, mesh=mesh, rules=RULES)["embed"].sharding
    )
    full = shardinit.init(bigger, 1)
    exact = {"zeros": np.zeros_like(new), "copy": old[:8], "init": full["embed"][64:]}
    if policy in exact:
        assert differing(new, np.asarray(exact[policy])) == []
        return
    np.testing.assert_allclose(new, np.tile(old.mean(0), (8, 1)), atol=1e-3)
    assert (np.ptp(new, axis=0) > 0).all() == (policy == "mean_cov")
    again = shardinit.init_missing(there, bigger, 1, **options)["embed"]
    assert differing(again, got) == []


def test_mean_cov_draws_with_the_covariance_of_the_old_rows(mesh):
    def init(rows):
        return lambda key: {"w": jax.random.normal(key, (rows, 2))}

    drawn = np.random.default_rng(0).standard_normal((512, 2))
    old = (drawn @ [[3.0, 1.0], [0.0, 0.5]]).astype(np.float32)
    got = shardinit.init_missing({"w": old}, init(8704), 0, grow={"w": "mean_cov"})["w"]
    new = np.asarray(got)[512:].astype(np.float64)
    want = np.cov(old.T) * 1e-9  # as transformers scales it
    np.testing.assert_allclose(np.cov(new.T), want, rtol=0.1)


@pytest.mark.slow
def test_what_may_be_missing_or_unexpected_is_said_by_globs(mesh):
    there = restored(mesh)
    del there["layers"][2]["w"], there["embed"]
    options = {"mesh": mesh, "rules": RULES}
    with pytest.raises(StructureMismatchError, match="'embed': it is missing;"):
        shardinit.init_missing(there, model(), 1, missing="layers/**", **options)
    shardinit.init_missing(there, model(), 1, missing=["layers/**", "embed"], **options)
    there = {**restored(mesh), "head": np.ones(3), "tail": np.ones(2)}
    with pytest.raises(StructureMismatchError, match="unexpected='tail'"):
        shardinit.init_missing(there, model(), 1, unexpected="head", **options)
    with pytest.raises(SelectError, match="no such policy"):
        shardinit.plan_missing({}, model(), grow={"embed": "median"}, **options)


def test_leaves_that_lie_too_high_are_told_where_they_would_lie():
    def training(key):
        return {"params": {"w": jax.random.normal(key, (8, 32))}, "step": jnp.int32(0)}

    with pytest.raises(StructureMismatchError, match=r"paths='\*\* -> params/\*\*'"):
        shardinit.plan_missing({"w": jnp.ones((8, 32))}, training)


def test_a_plan_says_itself_where_its_leaves_lie(mesh):
    plan = shardinit.plan(model(), mesh=mesh, rules=RULES)
    got = shardinit.init_missing({"embed": ...}, plan, 1)
    want = shardinit.compile_plan(plan)(1)
    assert differing(got, want) == []
    assert got["embed"].sharding == want["embed"].sharding


def test_an_error_leaves_nothing_allocated(mesh):
    """Refusals come before the first array: nothing half-made stays behind."""

    def indivisible(key):
        return [jax.random.normal(key, (64, 64)), jax.random.normal(key, (7, 64))]

    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    before = {id(x) for x in jax.live_arrays()}
    with pytest.raises(ShardingError, match="'1'"):
        shardinit.init(indivisible, 0, out_shardings=spec)
    there = {"embed": jnp.zeros((3, 3))}
    with pytest.raises(StructureMismatchError):
        shardinit.init_missing(there, model(), 0, mesh=mesh, rules=RULES)
    held = {id(x) for x in jax.live_arrays()} - before - {id(there["embed"])}
    assert held == set()


@pytest.mark.parametrize("policy", ["init", "mean"])
def test_a_leaf_in_the_memory_of_the_host_grows(mesh, policy):
    host = shardinit.Placement(jax.P("data"), memory_kind="pinned_host")
    rules = shardinit.PathRules([("embed", host), ("", jax.P())])
    there = restored(mesh)
    got = shardinit.init_missing(
        there, model(vocab=128), 1, mesh=mesh, rules=rules, grow={"embed": policy}
    )["embed"]
    assert got.sharding.memory_kind == "pinned_host"
    assert differing(np.asarray(got)[:64], there["embed"]) == []
