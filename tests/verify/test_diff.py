"""What changed between two initialisations, and how it is told."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import shardinit
from shardinit.errors import ReceiptFormatError
from shardinit.verify.compare.diff import compare
from shardinit.verify.compare.snapshot import Snapshot
from shardinit.verify.compare.taking import of_arrays, snapshot
from shardinit.verify.receipt_format import seal_of

pytestmark = pytest.mark.once


def model(name="mlp", scale=0.02, shape=(16, 64), dtype="float32", extra=False):
    """Keys come from the names of modules, as Linen derives them."""

    def fn(key):
        tree = {}
        for layer in range(3):
            inner = jax.random.fold_in(key, sum(map(ord, name)) + layer)
            kernel = (scale * jax.random.normal(inner, shape)).astype(dtype)
            tree[f"layers_{layer}"] = {name: {"kernel": kernel}}
        if extra:
            tree["head"] = jnp.zeros(8)
        return tree

    return fn


def told(a, b, **options):
    found = shardinit.diff(a, b, **options)
    return {change.kind: change for change in found.changes}, found


@pytest.mark.slow
def test_a_function_is_the_same_as_itself_as_plan_program_and_snapshot():
    plan = shardinit.plan(model())
    program = shardinit.export_plan(plan)
    for other in (model(), plan, program, snapshot(program, 0)):
        found = shardinit.diff(model(), other, values=True)
        assert found.same, found
        assert found.other_values == ()
        assert str(found).startswith("the same: 3 leaves")


@pytest.mark.parametrize(
    ("kind", "changes", "before", "after"),
    [
        ("distribution", {"scale": 0.5}, "normal 0.02", "normal 0.5"),
        ("shape", {"shape": (16, 32)}, "16x64", "16x32"),
        ("dtype", {"dtype": "bfloat16"}, "float32", "bfloat16"),
    ],
)
def test_what_is_otherwise_is_named_with_what_it_was(kind, changes, before, after):
    found, all_of_it = told(model(), model(**changes))
    assert (found[kind].before, found[kind].after) == (before, after)
    assert len(found[kind].leaves) == 3
    assert len(all_of_it.other_values) == 3


def test_leaves_that_come_and_go():
    found, whole = told(model(), model(extra=True))
    assert list(found) == ["added"]
    assert found["added"].leaves == ("head",)
    assert whole.other_values == ("head",)
    back, _ = told(model(extra=True), model())
    assert list(back) == ["removed"]


def test_a_renamed_module_that_changes_every_value_is_told_as_such():
    found, whole = told(model("mlp"), model("ffn"))
    assert list(found) == ["renamed"]
    assert found["renamed"].before == "mlp"
    assert found["renamed"].after.startswith("ffn; with the name their keys")
    assert len(found["renamed"].leaves) == len(whole.other_values) == 3


def test_a_renamed_module_that_keeps_its_keys_keeps_its_values():
    def rename(key):
        return {k: {"ffn": v["mlp"]} for k, v in model()(key).items()}

    def wrap(key):
        return {"model": model()(key)}

    found, whole = told(model(), rename)
    assert "keys and values are as before" in found["renamed"].after
    assert whole.other_values == ()
    found, whole = told(model(), wrap)
    assert (found["renamed"].before, whole.other_values) == ("(no level)", ())


def test_other_keys_are_told_with_how_they_are_derived():
    def shifted(key):
        return model()(jax.random.fold_in(key, 1))

    found, whole = told(model(), shifted)
    assert list(found) == ["keys"]
    assert found["keys"].before.startswith("root.fold_in")
    assert found["keys"].after.startswith("root.fold_in(#).fold_in")
    assert len(whole.other_values) == 3


def test_another_function_of_the_same_values_is_a_note():
    def written_otherwise(key):
        return jax.tree.map(lambda x: x.reshape(-1).reshape(x.shape), model()(key))

    found = shardinit.diff(model(), written_otherwise, values=True)
    assert found.same
    assert {change.kind for change in found.changes} <= {"note"}


def test_shardings_are_compared_where_both_have_them(mesh):
    plans = [
        shardinit.plan(model(), mesh=mesh, rules=shardinit.PathRules([(".*", spec)]))
        for spec in (PartitionSpec("data"), PartitionSpec(None, "model"))
    ]
    found, whole = told(*plans)
    assert list(found) == ["sharding"]
    assert whole.other_values == ()
    assert shardinit.diff(plans[0], model()).same
    host = shardinit.Placement(PartitionSpec("data"), memory_kind="pinned_host")
    elsewhere = shardinit.PathRules([(".*", host)])
    found, _ = told(plans[0], shardinit.plan(model(), mesh=mesh, rules=elsewhere))
    assert "in pinned_host" in str(found["sharding"])


def test_other_seeds_are_told_once():
    found = compare(snapshot(model(), 0), snapshot(model(), 1))
    assert [change.kind for change in found.changes] == ["seed"]
    assert len(found.other_values) == 3


def test_arrays_are_held_against_the_function_that_made_them():
    params = shardinit.init(model(), 7)
    assert shardinit.diff(model(), params, key=7).same
    params["layers_1"]["mlp"]["kernel"] = params["layers_1"]["mlp"]["kernel"] + 1
    found, _ = told(model(), params, key=7)
    assert list(found) == ["values"]
    assert found["values"].leaves == ("layers_1/mlp/kernel",)


def test_windows_of_large_leaves_and_of_constants_are_those_of_the_arrays():
    def fn(key):
        return {
            "w": jax.random.normal(key, (1024, 512)),
            "z": jnp.ones((2048, 256)),
            "c": jnp.asarray(jnp.arange(1 << 19).reshape(1024, 512)),
        }

    made = snapshot(fn, 0)
    arrays = of_arrays(jax.jit(fn)(jax.random.key(0)))
    assert {x.path: x.values for x in made.leaves} == {
        x.path: x.values for x in arrays.leaves
    }


def test_receipts_are_compared_by_their_digests():
    plans = [shardinit.plan(model(scale=scale)) for scale in (0.02, 0.5)]
    made = [shardinit.receipt(p, 0, shardinit.compile_plan(p)(0)) for p in plans]
    assert shardinit.diff(made[0], made[0]).same
    found, _ = told(*made)
    assert len(found["values"].leaves) == 3


def sealed(data):
    return json.dumps({**data, "seal": seal_of(data)})


def test_any_byte_of_a_pin_may_be_changed():
    text = snapshot(lambda key: jax.random.normal(key, (2, 4)), 0).to_json().encode()
    unnoticed = []
    for place in range(len(text)):
        for mask in (1, 0x20, 0x80, 0xFF):
            damaged = bytearray(text)
            damaged[place] ^= mask
            try:
                read = Snapshot.from_json(bytes(damaged))
            except ReceiptFormatError:
                continue
            if read != Snapshot.from_json(text):
                unnoticed.append((place, mask))
    assert not unnoticed


def test_values_of_another_machine_are_not_compared():
    ours = snapshot(model(), 0)
    text = ours.to_json().replace(f'"jax": "{jax.__version__}"', '"jax": "0.0.1"')
    text = text.replace(ours.leaves[0].values["windows"], "0" * 32)
    text = text.replace(str(ours.leaves[0].function), "1" * 32)
    data = json.loads(text)
    with pytest.raises(ReceiptFormatError, match="its seal"):
        Snapshot.from_json(text)
    found = compare(Snapshot.from_json(sealed(data)), ours)
    assert found.same
    assert "values are not compared" in found.changes[0].after


def test_a_pin_comes_back_and_a_damaged_one_is_refused(tmp_path):
    made = snapshot(model(), 3)
    made.save(tmp_path / "pin.json")
    text = (tmp_path / "pin.json").read_text()
    assert Snapshot.from_json(text) == made
    data = json.loads(text)
    for wrong in ("{", "[]", "{}", json.dumps({**data, "format": "x"})):
        with pytest.raises(ReceiptFormatError, match="pin"):
            Snapshot.from_json(wrong)
    for change in ({"leaves": [{}]}, {"leaves": 3}, {"more": 1}):
        with pytest.raises(ReceiptFormatError, match="pin"):
            Snapshot.from_json(sealed({**data, **change}))
