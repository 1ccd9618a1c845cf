"""Something sensible gets an answer, or a sentence with the line to write."""

import builtins
import subprocess
import sys

import equinox
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import shardinit
from shardinit.core.plan.options import PlanOptions
from shardinit.errors import (
    InitFnError,
    InvalidKeyError,
    ReceiptFormatError,
    SelectError,
    ShardingError,
    ShardinitError,
)
from shardinit.verify.compare.taking import snapshot

pytestmark = pytest.mark.once


def fn(key):
    return {
        "layers": [
            {"up": {"kernel": jax.random.normal(jax.random.fold_in(key, i), (8, 64))}}
            for i in range(20)
        ],
        "head": {"kernel": jax.random.normal(jax.random.fold_in(key, 99), (4, 64))},
    }


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("layers/3/upp/kernel", "'layers/3/up/kernel'"),
        ("layers.3.up.kernel", "'layers/3/up/kernel'"),
        ("layers/11/up/kernal", "'layers/11/up/kernel'"),
        ("head", "'head/kernel'"),
        ("quite/something/else", "'head/kernel'"),
    ],
)
def test_a_path_that_is_none_is_answered_with_the_nearest(wrong, right):
    weights = shardinit.open(fn, 0)
    with pytest.raises(SelectError, match="a path such as " + right):
        weights[wrong]
    with pytest.raises(SelectError, match=right):
        shardinit.read(fn, 0, wrong)
    with pytest.raises(SelectError, match=right):
        shardinit.plan(fn, select=wrong)


@pytest.mark.parametrize(
    "key",
    [
        nnx.Rngs(0),
        1.5,
        np.float32(1),
        "0",
        None,
        True,
        {"w": 0},
        1 << 64,
        jax.random.split(jax.random.key(0), 2),
        np.zeros(4, np.uint32),
        np.zeros(3, np.uint32),
        np.zeros(2, np.int32),
    ],
    ids=lambda key: type(key).__name__,
)
def test_what_is_no_key_is_refused(key):
    for use in (shardinit.init, shardinit.open):
        with pytest.raises(InvalidKeyError, match=r"^key: got .*expected"):
            use(fn, key)


@pytest.mark.parametrize("rules", [("embed", "data"), [("embed", "data", "model")], 3])
def test_what_are_no_rules_is_answered_with_rules(rules):
    with pytest.raises(ShardingError, match=r"AxisRules: got .*AxisRules\(\["):
        shardinit.AxisRules(rules)


def test_a_function_where_a_plan_is_meant(tmp_path):
    params = shardinit.init(fn, 0)
    for use in (
        shardinit.compile_plan,
        lambda fn: shardinit.audit(fn, topology="cpu:8"),
        lambda fn: shardinit.receipt(fn, 0, params),
        lambda fn: shardinit.save_executables(fn, tmp_path / "code"),
    ):
        with pytest.raises(InitFnError, match=r"got function.*shardinit\.plan\(fn"):
            use(fn)
    with pytest.raises(InitFnError, match="got dict; expected a callable"):
        shardinit.plan(params)


def test_what_is_saved_again_is_left_and_something_else_is_refused(tmp_path):
    other = lambda key: {"w": jax.random.normal(key, (8, 64))}  # noqa: E731
    saved = {}
    for number, each in enumerate((fn, other)):
        plan = shardinit.plan(each)
        receipt = shardinit.receipt(plan, 0, shardinit.compile_plan(plan)(0))
        pin = snapshot(plan, 0)
        saved[number] = [shardinit.export_plan(plan), receipt, pin]
    for first, second in zip(saved[0], saved[1], strict=True):
        path = tmp_path / type(first).__name__
        first.save(path)
        before = path.read_bytes()
        first.save(path)
        with pytest.raises(ShardinitError, match=r"it is not this.*remove it"):
            second.save(path)
        assert path.read_bytes() == before
        second.save(path, replace=True)
        assert path.read_bytes() != before


def test_a_receipt_is_read_from_its_file(tmp_path):
    plan = shardinit.plan(fn)
    params = shardinit.compile_plan(plan)(0)
    made = shardinit.receipt(plan, 0, params)
    made.save(tmp_path / "r.json")
    assert shardinit.verify_receipt(tmp_path / "r.json", params).root == made.root
    assert shardinit.verify_receipt(str(tmp_path / "r.json"), params).root == made.root
    with pytest.raises(ReceiptFormatError, match="got dict; expected a Receipt"):
        shardinit.verify_receipt({"w": 0}, params)


def test_a_device_may_be_a_platform():
    window = shardinit.read(fn, 0, "head/kernel", np.s_[:2], device="cpu")
    assert window.shape == (2, 64)
    for wrong in ("nothing", 0):
        with pytest.raises(ShardingError, match=r"device: got .*that is here \(cpu\)"):
            shardinit.open(fn, 0, device=wrong)


def many(key):
    return {f"{i}_{'long' * 40}": jax.random.normal(key, (8, 64)) for i in range(60)}


def test_what_a_prompt_shows_is_short(mesh):
    axes = [f"axis_{i}" for i in range(60)]
    rules = shardinit.AxisRules([(name, "data") for name in axes])
    plan = shardinit.plan(fn, mesh=mesh)
    compiled = shardinit.compile_plan(plan)
    params = compiled(0)
    audited = shardinit.audit(shardinit.plan(many, mesh=mesh), topology="cpu:8")
    for shown in (
        shardinit.InitFn(fn),
        plan,
        plan.leaves[0],
        plan.programs[0],
        compiled,
        shardinit.export_plan(plan),
        shardinit.digest(params),
        shardinit.receipt(plan, 0, params),
        audited,
        *audited.rows,
        shardinit.open(plan, 0),
        *shardinit.plan(many, mesh=mesh, rules=rules).findings,
        rules,
        PlanOptions(mesh=mesh, rules=rules),
        shardinit.PathRules([(name, jax.P("data")) for name in axes]),
        shardinit.plan_missing({}, many).account,
        *shardinit.diff(fn, many).changes,
        shardinit.inspect(many, 0).leaves[0],
        shardinit.ModelSpec("decoder", dict.fromkeys(axes, 1)),
    ):
        assert type(shown).__name__ in repr(shown)
        assert len(repr(shown)) <= 500


def test_a_star_import_leaves_pythons_own_names_alone():
    names = {}
    exec("from shardinit import *", names)
    taken = {name for name in names if hasattr(builtins, name)} - {"__builtins__"}
    assert not taken
    assert callable(names["init"])
    assert callable(shardinit.open)


def test_rooms_are_there_after_a_bare_import():
    rooms = "errors frontends initializers models storage deferred module verify"
    code = f"import shardinit\nfor name in '{rooms}'.split(): getattr(shardinit, name)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_front_ends_are_there_after_a_bare_import():
    assert {"nnx", "optax", "torch"} <= set(dir(shardinit.frontends))
    code = "import shardinit\nprint(shardinit.frontends.nnx.init_fn.__module__)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True
    )
    assert done.stdout.split() == [b"shardinit.frontends.nnx"]
    with pytest.raises(AttributeError, match="no attribute 'flax'"):
        _ = shardinit.frontends.flax


def test_a_rule_with_a_slip_is_answered_with_the_axis(mesh):
    names = {
        "layers": [{"up": {"kernel": ("embed", "mlp")}}] * 20,
        "head": {"kernel": ("embed", "vocab")},
    }
    rules = shardinit.AxisRules([("embd", "data"), ("mlp", "model")])
    plan = shardinit.plan(shardinit.InitFn(fn, axes=names), mesh=mesh, rules=rules)
    (found,) = [x for x in plan.findings if x.kind == "unmatched-rule"]
    assert found.remedy.startswith("'embed' may be meant.")


def test_none_stands_for_a_subtree_without_names(mesh):
    def state(key):
        params = {"w": jax.random.normal(key, (16, 16))}
        state = optax.adam(1e-3).init(params)
        return {"params": params, "opt_state": state, "none": None}

    names = {"params": {"w": ("embed", "mlp")}, "opt_state": None, "none": None}
    rules = shardinit.AxisRules([("embed", "data"), ("mlp", "model")])
    plan = shardinit.plan(shardinit.InitFn(state, axes=names), mesh=mesh, rules=rules)
    placed = {leaf.path: leaf.sharding.spec for leaf in plan.leaves}
    assert placed["params/w"] == jax.sharding.PartitionSpec("data", "model")
    wrong = {"params": {"v": ("embed", "mlp")}, "opt_state": None, "none": None}
    with pytest.raises(ShardinitError, match=r"InitFn\.axes: its structure differs"):
        shardinit.plan(shardinit.InitFn(state, axes=wrong), mesh=mesh, rules=rules)


class _Net(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(8, 8, rngs=rngs)


class _Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(x)


@pytest.mark.parametrize(
    ("model", "front_end"),
    [
        (_Net, "nnx"),
        (_Dense, "linen"),
        (equinox.nn.MLP, "equinox"),
        (equinox.nn.MLP(4, 4, 4, 2, key=jax.random.key(0)), "equinox"),
    ],
)
def test_a_model_for_an_init_function_is_answered_with_its_front_end(model, front_end):
    with pytest.raises(InitFnError, match=rf"frontends\.{front_end}\.init_fn"):
        shardinit.plan(model)


def test_a_module_that_is_a_function_of_a_key_is_an_init_function():
    class Init(equinox.Module):
        width: int

        def __call__(self, key):
            return jax.random.normal(key, (self.width,))

    assert shardinit.plan(Init(64)).leaves[0].shape == (64,)


def test_what_stands_for_a_model_or_weights_is_answered_with_the_call():
    for given in ("gpt2", shardinit.ModelSpec("decoder", {})):
        with pytest.raises(InitFnError, match=r"models\.build\(spec\)"):
            shardinit.plan(given)
    with pytest.raises(ShardinitError, match=r"storage\.orbax\.restore\(folder\)"):
        shardinit.digest("checkpoint")
