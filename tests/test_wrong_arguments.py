"""Ten plausible wrong arguments for each public function: an error that says what next.

Each error of ours says where, and what would have been right; a file that is not there
is Python's own error, with its name.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import shardinit
from shardinit.errors import ReceiptMismatchError, ShardinitError, SpecError

pytestmark = pytest.mark.once

JUNK = (None, 3, 1.5, "gpt2", b"x", [1], {"a": 1}, object(), np.zeros(3), lambda: 0)


def fn(key):
    return {"w": jax.random.normal(key, (16, 64)), "b": jnp.zeros(64)}


@functools.cache
def made():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    plan = shardinit.plan(fn, mesh=mesh)
    params = shardinit.compile_plan(plan)(0)
    return mesh, plan, params, shardinit.receipt(plan, 0, params)


def wrong_plans(folder):
    mesh, _, params, _ = made()
    no_functions = (*JUNK, nnx.Linear, nn.Dense(3), lambda a, b: 0, lambda key: "x")
    yield from ((x,) for x in (*no_functions, params))
    for mesh_ in (8, "data=8", (2, 4), jax.devices(), {"data": 8}):
        yield fn, {"mesh": mesh_}
    axis = shardinit.PathRules([("w", P("dta"))])
    rules = (3, "data", {"w": "data"}, [("w", "data")], P("data"), axis)
    for rule in (*rules, shardinit.fsdp("dta")):
        yield fn, {"mesh": mesh, "rules": rule}
    for name, values in {
        "select": (3, "nope", ["w", 3]),
        "out_shardings": (3, {"w": P("data")}),
        "key": ("0", 1.5),
        "indivisible": ("nxt",),
        "prng": ("rbg",),
        "draw_dtype": ("int32", "float33"),
        "strict": ("replicatd", {"replicatd"}, 3),
        "memory_limit": ("1KB", -1, 1.5, "much"),
    }.items():
        yield from ((fn, {name: value}) for value in values)


def wrong_inits(folder):
    keys = (None, 1.5, "0", [0], {"w": 0}, nnx.Rngs(0), True, 1 << 64, np.zeros(3))
    yield from ((x, 0) for x in JUNK)
    yield from ((fn, key) for key in keys)


def wrong_opens(folder):
    yield from wrong_inits(folder)
    for device in ("gpux", 3, jax.devices):
        yield fn, 0, {"device": device}
    for limit in ("1KB", -1, 1.5):
        yield fn, 0, {"memory_limit": limit}


def wrong_reads(folder):
    twice = (slice(0, 2),) * 3
    for window in ("0:2", 1.5, (99,), twice, np.ones(1), [0, 1], slice("a"), {"a": 1}):
        yield fn, 0, "w", window
    yield from ((fn, 0, path) for path in (None, 3, "W", "w/", ("w",), ""))


def wrong_digests(folder):
    _, plan, _, _ = made()
    shape = jax.ShapeDtypeStruct((2,), "float32")
    yield from ((x,) for x in ("w", {"w": "x"}, object(), [object()], {"w": shape}))
    yield from ((x,) for x in (fn, plan, shardinit.export_plan(plan), lambda: 0))
    yield ({"w": lambda key: key},)


def wrong_receipts(folder):
    _, plan, params, _ = made()
    yield from ((x, 0, params) for x in (*JUNK, fn))
    yield from ((plan, key, params) for key in (None, 1.5, "0", 1))
    for tree in (None, 3, "w", {"w": params["w"]}, {"w": 3, "b": 3}, fn, plan):
        yield plan, 0, tree


def wrong_verifications(folder):
    _, _, params, receipt = made()
    files = (folder, folder / "none", folder / "text", folder / "json")
    yield from ((x, params) for x in (*JUNK, *files))
    yield from ((receipt, x) for x in (None, 3, {"w": params["w"]}, fn))


def wrong_audits(folder):
    _, plan, params, _ = made()
    yield from ((x, "cpu:8") for x in (*JUNK, fn, params))
    for chips in (None, 8, "cpu", "cpu:4", "cpu:x", "gpu", "tpu:v5:2x2", ("cpu", 8)):
        yield plan, chips
    yield from ((plan, "cpu:8", {"replicated_bytes": x}) for x in ("1MB", -1, 1.5))


def wrong_inspections(folder):
    _, plan, params, _ = made()
    yield from ((x, 0) for x in (*JUNK, params))
    yield from ((plan, key) for key in (None, "0", 1.5))
    for options in ({"select": "nope"}, {"device": "gpux"}, {"memory_limit": "x"}):
        yield plan, 0, options


def wrong_differences(folder):
    _, plan, _, _ = made()
    junk = [x for x in JUNK if not isinstance(x, np.ndarray)]
    yield from ((x, plan) for x in (*junk, folder / "none", folder / "text"))
    yield plan, 3
    yield plan, plan, {"key": "0"}


def wrong_program_files(folder):
    files = (folder, folder / "none", folder / "text", folder / "json", "gpt2")
    yield from ((x,) for x in (None, 1.5, [1], object(), fn, *files))


def wrong_saves(folder):
    _, plan, params, _ = made()
    yield from ((x, folder / "code") for x in (*JUNK, fn, params))
    yield from ((plan, path) for path in (None, 3, folder, folder / "no" / "such"))


def wrong_loads(folder):
    _, plan, _, _ = made()
    digest = {"sha256": "0" * 64}
    for path in (None, 3, folder, folder / "none", folder / "text", fn):
        yield path, plan, digest
    yield from ((folder / "text", x, digest) for x in (None, fn, 3, "x"))
    yield from ((folder / "text", plan, {"sha256": x}) for x in (None, 3, "x"))


def wrong_completions(folder):
    _, plan, params, _ = made()
    there = (3, "w", {"w": "x"}, object(), plan, fn, {"w": np.zeros((3, 3))})
    yield from ((x, fn) for x in (*there, {"q": params["w"]}))
    yield from (({}, x) for x in (None, 3, "x"))
    for options in (
        {"missing": "nope"},
        {"missing": 3},
        {"grow": {"w": "men"}},
        {"grow": "mean"},
        {"grow": {"nope": "mean"}},
        {"shrink": 3},
        {"cast": 3},
        {"pad": {"w": "x"}},
        {"pad": {"w": 0}},
        {"paths": {"a": 3}},
        {"paths": folder / "none"},
    ):
        yield {}, fn, options


def wrong_fillings(folder):
    _, plan, _, _ = made()
    yield from ((x, fn, 0) for x in (3, "w", object(), plan, fn))
    yield from (({}, x, 0) for x in (None, 3, "x"))
    yield from (({}, fn, key) for key in (None, "0", 1.5))


def wrong_axis_rules(folder):
    yield from ((x,) for x in (None, 3, "embed=data", ("embed", "data"), object()))
    yield from (([x],) for x in (("embed",), ("embed", 3), (3, "data"), 3, "embed"))


def wrong_path_rules(folder):
    yield from ((x,) for x in (None, 3, "w", ("w", P()), object(), {"w": 3}))
    yield from (([x],) for x in (("w",), ("(", P()), ("w", 3), 3))


def wrong_fsdp(folder):
    yield from ((x,) for x in (3, None, 1.5, ["data"], ("data",), {"a": 1}))
    yield from (("data", {"min_bytes": x}) for x in ("1KB", "x", -1, 1.5, None))


def wrong_init_fns(folder):
    yield from ((x,) for x in JUNK[:-1])
    yield from ((fn, {"rebuild": x}) for x in (3, None, "x"))


def wrong_specs(folder):
    yield from ((name, {}) for name in (None, 3, "", 1.5))
    for config in (None, 3, "gpt2", [1], {3: 4}, {"vocab_size": object()}):
        yield "decoder", config


def wrong_targets(folder):
    http = ("http://localhost:50051", "https://localhost:50051/")
    portless = ("localhost", "10.0.0.1", "[::1]", "dns:host", "dns:///host.example")
    yield from ((x,) for x in (None, 3, "", ["a"], *http, *portless))
    yield from (("localhost:1", {"timeout": x}) for x in ("x", -1, 0))
    yield "localhost:1", {"ca": 3}


def wrong_paddings(folder):
    yield from ((x, {"w": 8}) for x in (None, 3, "w", [1], np.zeros(3), made()[1]))
    for pad in (3, None, {"w": "x"}, {"w": 0}, {"w": -8}, {"w": 1.5}, {3: 8}):
        yield fn, pad


WRONG = {
    "AxisRules": wrong_axis_rules,
    "InitFn": wrong_init_fns,
    "ModelSpec": wrong_specs,
    "PathRules": wrong_path_rules,
    "audit": wrong_audits,
    "compile_plan": lambda folder: ((x,) for x in (*JUNK[:-1], fn, made()[2])),
    "connect": wrong_targets,
    "diff": wrong_differences,
    "digest": wrong_digests,
    "export_plan": lambda folder: ((x,) for x in (*JUNK, made()[2])),
    "fsdp": wrong_fsdp,
    "init": wrong_inits,
    "init_missing": wrong_fillings,
    "inspect": wrong_inspections,
    "load_executables": wrong_loads,
    "load_program": wrong_program_files,
    "open": wrong_opens,
    "padded": wrong_paddings,
    "plan": wrong_plans,
    "plan_missing": wrong_completions,
    "read": wrong_reads,
    "receipt": wrong_receipts,
    "save_executables": wrong_saves,
    "verify_receipt": wrong_verifications,
}
TOLD = (ReceiptMismatchError, SpecError)  # each of their lines says what is wrong
MADE_BY_OTHERS = {"CompiledPlan", "InitProgram", "Placement", "Plan"}


def test_each_public_function_is_here():
    names = {*shardinit.__all__, "open"}
    public = {x for x in names if not inspect.ismodule(getattr(shardinit, x))}
    assert public - set(WRONG) == MADE_BY_OTHERS


@pytest.mark.parametrize("name", sorted(WRONG))
def test_what_is_wrong_is_said(name, tmp_path):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "json").write_text("{}")
    calls = list(WRONG[name](tmp_path))
    assert len(calls) >= 10
    for call in calls:
        last = call[-1]
        named = isinstance(last, dict) and last and set(last) <= _parameters(name)
        args, options = (call[:-1], last) if named and len(call) > 1 else (call, {})
        error = _raised(name, args, options)
        what = f"{name}{call}: {type(error).__name__}: {error}"
        if isinstance(error, jaxtyping.TypeCheckError):
            continue  # conftest's own, in some rooms of the core
        if isinstance(error, OSError) and not isinstance(error, ShardinitError):
            assert error.filename is not None, what
            continue
        assert isinstance(error, ShardinitError), what
        assert error.where, what
        assert error.expected or error.remedy or isinstance(error, TOLD), what


def _raised(name, args, options):
    try:
        getattr(shardinit, name)(*args, **options)
    except Exception as error:
        return error
    return None


def _parameters(name):
    return set(inspect.signature(getattr(shardinit, name)).parameters)
