"""Completion of restored trees: what is there stays, what is not is initialised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardinit
from shardinit.core.run import compile as compiled
from shardinit.errors import ShardingError, StructureMismatchError

from .bits import differing

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


def test_what_does_not_fit_is_refused(mesh):
    def refused(change, says, **kwargs):
        there = restored(mesh)
        change(there)
        with pytest.raises(StructureMismatchError, match=says):
            shardinit.init_missing(there, model(), 1, mesh=mesh, rules=RULES, **kwargs)

    small = jnp.zeros((60, 32))
    refused(lambda t: t.update(embed=small), r"'embed'.*\(60, 32\).*grow='embed'")
    wide = jnp.zeros((64, 40))
    refused(lambda t: t.update(embed=wide), "cannot shrink", grow="**")
    half = jnp.zeros((64, 32), jnp.bfloat16)
    refused(lambda t: t.update(embed=half), "bfloat16.*never cast")
    refused(lambda t: t.update(head=small), "'head'.*not among the 5 leaves")
    refused(lambda t: t.update(embed=0.5), "'embed': got float; expected an array")


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
