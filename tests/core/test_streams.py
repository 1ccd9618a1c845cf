"""A key for each of several streams: the values, files and receipts of plain jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardinit
from shardinit.core.prng import derivation
from shardinit.errors import InvalidKeyError
from shardinit.verify.receipt import Receipt
from tests.core.bits import raw

KEYS = {"params": 3, "dropout": jax.random.key(1), "noise": np.int64(-7)}
REAL = {
    "params": jax.random.key(3),
    "dropout": jax.random.key(1),
    "noise": jax.random.key(-7),
}


def fn(keys):
    together = jnp.stack([keys["dropout"], keys["noise"]])
    folded = jax.vmap(jax.random.fold_in)(together, jnp.arange(2))
    return {
        "w": jax.random.normal(keys["params"], (64, 128)),
        "stacked": jax.vmap(lambda key: jax.random.uniform(key, (8, 64)))(folded),
        "stream": jax.random.split(keys["dropout"], 2),
        "key": keys["noise"],
    }


def small(keys):
    return {name: jax.random.bits(key, (8,)) for name, key in keys.items()}


def test_values_of_streams_are_those_of_jit_in_process_by_window_and_by_file(mesh):
    want = jax.tree.map(raw, jax.jit(fn)(REAL))
    plan = shardinit.plan(fn, key=KEYS, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    made = shardinit.compile_plan(plan)(KEYS)
    assert jax.tree.map(raw, made) == want
    program = shardinit.InitProgram.from_bytes(shardinit.export_plan(plan).to_bytes())
    assert program.fingerprint == plan.fingerprint
    assert jax.tree.map(raw, shardinit.init(program, KEYS)) == want
    window = shardinit.read(program, KEYS, "stacked", np.s_[1, 2:5])
    assert np.array_equal(window, np.asarray(made["stacked"])[1, 2:5])
    assert not {f.kind for f in plan.findings} & {"unused-key", "same-key"}


def test_a_receipt_says_which_streams_there_were(tmp_path):
    plan = shardinit.plan(small, key=KEYS)
    params = shardinit.compile_plan(plan)(KEYS)
    made = shardinit.receipt(plan, KEYS, params)
    made.save(tmp_path / "receipt.json")
    there = Receipt.load(tmp_path / "receipt.json")
    assert there == made
    assert there.streams == ("dropout", "noise", "params")
    assert there.key == tuple(
        int(word) for name in there.streams for word in jax.random.key_data(REAL[name])
    )
    shardinit.verify_receipt(there, params)


@settings(max_examples=8)
@given(st.sets(st.sampled_from("abcd"), min_size=1), st.sets(st.sampled_from("abcd")))
def test_a_stream_that_reaches_no_leaf_is_named(given_, read):
    def draws(keys):
        return [jax.random.normal(keys[name], (8,)) for name in sorted(given_ & read)]

    plan = shardinit.plan(
        lambda keys: [*draws(keys), 1.0], key=dict.fromkeys(given_, 0)
    )
    said = [f.reason for f in plan.findings if f.kind == "unused-key"]
    assert len(said) == len(given_ - read)
    assert all(any(repr(name) in text for text in said) for name in given_ - read)


def test_words_that_are_taken_together_come_from_each_stream():
    root = derivation.root("threefry2x32", 3)
    words = derivation.constant(np.arange(2), root.impl)
    both = derivation.take([root], np.array([1, 4]))
    other = derivation.take([words, root], np.array([0, 5]))
    folded = derivation.fold_in(root, np.arange(3))
    assert derivation.streams_read([both]) == {0, 2}
    assert derivation.streams_read([other]) == {1}
    assert derivation.streams_read([folded]) == {0, 1, 2}
    assert derivation.streams_read([root]) == {0, 1, 2}


@pytest.mark.parametrize(
    "key",
    [
        {},
        {1: 0},
        {"a": 0, "b": jax.random.PRNGKey(0)},
        {"a": 0, "b": jax.random.key(0, impl="rbg")},
        {"a": {"b": 0}},
        {"a": None},
    ],
    ids=str,
)
def test_what_are_no_streams_is_refused(key):
    with pytest.raises(InvalidKeyError, match=r"^key.*expected"):
        shardinit.init(fn, key)


def test_other_streams_than_were_planned_for_are_refused():
    compiled = shardinit.compile_plan(shardinit.plan(small, key=KEYS))
    for key in (0, {"params": 0}, {**KEYS, "more": 0}):
        with pytest.raises(TypeError, match="the names dropout, noise, params"):
            compiled(key)
    with pytest.raises(TypeError, match="the plan was made for one key"):
        shardinit.open(shardinit.plan(jax.random.normal), KEYS)
