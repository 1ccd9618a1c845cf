"""What a plan says of itself: kinds, weights, and what strict and limits refuse."""

import random
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shardinit
from shardinit.core.plan.findings import KINDS
from shardinit.errors import FindingsError, FindingsWarning, WholeLeafError

pytestmark = pytest.mark.once

MESH = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
AXIS = shardinit.AxisRules


def kernel(key, shape=(256, 512)):
    return {"kernel": jax.random.normal(key, shape)}


def named(names, shape=(256, 512)):
    return shardinit.InitFn(lambda key: kernel(key, shape), axes={"kernel": names})


def findings(fn, rules=None, mesh=MESH, **options):
    return shardinit.plan(fn, mesh=mesh, rules=rules, **options).findings


def others(found):
    """Without what is said of all models that are as small as those of a test."""
    return [x for x in found if x.kind not in ("nothing-sharded", "no-mesh")]


def only(fn, kind, rules=None, **options):
    """The one finding, which is of that kind; its text says kind, leaves, remedy."""
    found = findings(fn, rules, **options)
    if kind not in ("nothing-sharded", "no-mesh"):
        found = others(found)
    assert [x.kind for x in found] == [kind], found
    text = str(found[0])
    assert kind in text
    assert found[0].remedy in text
    assert all(path in text for path in found[0].leaves[:3])
    return found[0]


def test_a_plan_that_is_as_it_should_be_says_nothing():
    rules = AXIS([("embed", "data"), ("mlp", "model")])
    assert findings(named(("embed", "mlp")), rules) == ()
    assert findings(kernel, shardinit.fsdp()) == ()
    assert findings(kernel) == ()
    whole = shardinit.PathRules([(".*", P())])  # plain data parallelism
    assert findings(kernel, whole) == ()
    assert shardinit.plan(kernel, mesh=MESH, out_shardings=P()).findings == ()
    one = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))
    assert findings(kernel, mesh=one) == ()


@pytest.mark.parametrize(
    ("fn", "rules", "reason"),
    [
        (kernel, shardinit.PathRules([("^up$", P("data"))]), "no path rule matches"),
        (named(("em", "ml")), AXIS([("embed", "data")]), "names 'em', 'ml'"),
        (named(("embed", "ml"), (255, 512)), AXIS([("embed", "data")]), "size 255"),
        (lambda key: kernel(key, (255, 257)), shardinit.fsdp(), "no axis of"),
    ],
)
def test_a_large_leaf_that_lies_whole_is_a_warning(fn, rules, reason):
    found = [
        x
        for x in findings(fn, rules, indivisible="next")
        if x.kind == "replicated" and reason in x.reason
    ]
    assert [(x.severity, x.leaves) for x in found] == [("warning", ("kernel",))]
    assert "whole on every device" in found[0].reason


def test_a_leaf_that_is_whole_by_its_rule_is_as_it_should_be():
    assert findings(named(("norm", None)), AXIS([("norm", None)])) == ()
    assert findings(kernel, shardinit.PathRules([("", P())])) == ()


def test_small_leaves_and_single_axes_are_notes():
    rules = AXIS([("embed", "data")])
    one = only(named(("embed", "mpl")), "replicated", rules)
    assert one.severity == "note"
    assert "'mpl'" in one.reason
    assert "('mpl', 'model')" in one.remedy
    path = shardinit.PathRules([("up", P("data"))])

    def fn(key):
        return {"up": jax.random.normal(key, (8, 8)), "down": jnp.zeros((8, 8))}

    assert only(fn, "replicated", path).severity == "note"


def test_small_leaves_that_are_a_hundredth_of_the_model_are_not_said():
    def fn(key, size):
        return {**kernel(key), "bias": jnp.zeros(size)}

    rules = shardinit.PathRules([("kernel", P("data", "model"))])
    assert findings(lambda key: fn(key, 512), rules) == ()
    assert only(lambda key: fn(key, 4096), "replicated", rules).severity == "note"


def test_an_unnamed_function_under_axis_rules():
    found = only(kernel, "unnamed", AXIS([("embed", "data")]))
    assert found.severity == "warning"
    assert "shardinit.fsdp()" in found.remedy


def test_rules_that_match_nothing_where_a_name_has_no_rule():
    rules = AXIS([("embed", "data"), ("mpl", "model"), ("norm", None)])
    [_, found] = findings(named(("embed", "mlp")), rules)
    assert (found.kind, found.severity) == ("unmatched-rule", "note")
    assert found.rules == (("mpl", "model"),)
    assert "'mpl', and no rule is for 'mlp'" in found.reason
    odd = AXIS([("embed", "data"), ("mlp", "model"), ("hedas", "model")])
    found = only(named(("embed", "mlp")), "unmatched-rule", odd)
    assert "no axis of the model is called 'hedas'" in found.reason
    never = shardinit.PathRules([("kern", P("data")), ("kernel", P()), ("bias", P())])
    late, none = findings(kernel, never)
    assert (late.kind, late.leaves) == ("unmatched-rule", ("kernel",))
    assert "never wins" in late.reason
    assert "matches no path" in none.reason


def test_rules_that_are_for_activations_and_a_last_resort_are_left_over_in_silence():
    shared = [("embed", "data"), ("mlp", "model"), ("activation_batch", "data")]
    assert findings(named(("embed", "mlp")), AXIS(shared)) == ()
    assert findings(named(("three", "mlp"), (3, 1 << 15)), AXIS(shared)) == ()

    def fn(key):
        return {**kernel(key), "embed": jax.random.normal(key, (256, 256))}

    rules = [("kernel", P("data")), ("^embed", P("data"))]
    for last in (".*", "^[ek].*"):
        assert findings(fn, shardinit.PathRules([*rules, (last, P())])) == ()


def test_a_name_without_a_rule_is_said_where_a_rule_could_cut_the_leaf_further():
    rules = AXIS([("mlp", "model")])
    conv = named(("conv", "mlp"), (3, 1 << 15))  # nothing divides 3
    assert findings(conv, rules) == ()

    def with_scales(key):
        return {**kernel(key, (512, 512)), "scale": jax.numpy.ones((4, 512))}

    axes = {"kernel": ("conv", "mlp"), "scale": ("layers", "mlp")}
    rules_of_both = AXIS([("mlp", "model"), ("conv", None)])
    small_part = shardinit.InitFn(with_scales, axes=axes)  # a hundredth of the model
    assert findings(small_part, rules_of_both) == ()
    both = AXIS([("embed", "data"), ("mlp", "model")])
    assert findings(named(("layers", "embed", "mlp"), (4, 256, 512)), both) == ()
    found = only(named(("layers", "embed", "mlp"), (4, 256, 512)), "replicated", rules)
    assert "'layers', 'embed'" in found.reason
    assert "('embed', 'data')" in found.remedy


def small(key):
    return {"up": {"kernel": jax.random.normal(key, (8, 64))}}


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (None, "no rules were given"),
        (shardinit.fsdp("data", min_bytes=1 << 40), "min_bytes=1,099,511,627,776"),
    ],
)
def test_a_plan_that_shards_nothing(rules, reason):
    found = only(small, "nothing-sharded", rules)
    assert found.severity == "note"
    assert "no leaf is sharded: each of 8 devices holds them all" in found.reason
    assert reason in found.reason
    remedy = found.remedy.removeprefix("rules=")
    assert findings(small, eval(remedy, {"shardinit": shardinit})) == ()


def test_a_large_plan_that_shards_nothing_is_a_warning():
    def many(key):
        keys = jax.random.split(key, 64)
        return [jax.random.normal(k, (60, 100)) for k in keys]

    assert findings(lambda key: many(key)[:1])[0].severity == "note"
    with pytest.warns(FindingsWarning, match="no leaf is sharded"):
        (found,) = findings(many, shardinit.fsdp())
    assert found.severity == "warning"


def test_rules_for_mesh_axes_of_one_device_shard_nothing():
    mesh = AbstractMesh((8, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    fn, rules = named(("embed", "mlp")), AXIS([("embed", None), ("mlp", "model")])
    found = only(fn, "nothing-sharded", rules, mesh=mesh)
    assert "have size 1" in found.reason


def test_several_devices_and_no_mesh():
    found = only(kernel, "no-mesh", mesh=None)
    assert found.severity == "note"
    mesh = eval(found.remedy.removeprefix("mesh="), {"jax": jax})
    assert findings(kernel, mesh=mesh) == ()


def test_leaves_that_every_device_computes_in_full():
    found = only(lambda key: jax.random.gamma(key, 2.0, (64,)), "computed-in-full")
    assert found.severity == "warning"


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_rbg_keys_and_the_switch_to_threefry(impl):
    key = jax.random.key(7, impl=impl)
    assert "rbg" in {x.kind for x in findings(kernel, key=key)}
    plan = shardinit.plan(kernel, key=key, mesh=MESH, prng="threefry")
    assert plan.findings == ()
    want = jax.jit(kernel)(jax.random.key(7, impl="threefry2x32"))["kernel"]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    got = shardinit.init(kernel, key, mesh=mesh, prng="threefry")["kernel"]
    np.testing.assert_array_equal(got, want)
    lazy = shardinit.open(plan, key)["kernel"]
    np.testing.assert_array_equal(lazy[3:5], want[3:5])


def test_the_switch_reaches_keys_that_the_function_makes():
    with jax.default_prng_impl("unsafe_rbg"):

        def fn(key):
            return jax.random.normal(
                jax.random.key(3), (8, 64)
            ) * 2 + jax.random.normal(key, (8, 64))

        plan = shardinit.plan(fn, prng="threefry")
        assert plan.whole_leaves == ()
        got = shardinit.compile_plan(plan)(jax.random.key(5))
    np.testing.assert_array_equal(got, jax.jit(fn)(jax.random.key(5)))
    with pytest.raises(ValueError, match="None or 'threefry'"):
        shardinit.plan(kernel, prng="philox")


def test_one_key_that_draws_two_leaves():
    def fn(key):
        return {
            "a": jax.random.normal(key, (8, 64)),
            "b": jax.random.normal(jax.random.fold_in(key, 1), (8, 64)),
            "c": jax.random.normal(key, (8, 64)),
            "other": jax.random.normal(key, (8, 32)),
        }

    found = only(fn, "same-key")
    assert found.leaves == ("a", "c")
    assert found.severity == "warning"


def test_leaves_that_share_a_draw_on_purpose_are_no_finding():
    def fn(key):
        params = {"w": jax.random.normal(key, (8, 64)), "b": jnp.zeros(64)}
        return {
            "params": params,
            "ema": jax.tree.map(jnp.array, params),
            "tied": params,
        }

    assert others(findings(fn)) == []


def test_a_key_that_reaches_no_leaf():
    assert only(lambda key: {"w": jnp.ones(64)}, "unused-key").severity == "warning"


def test_numpys_and_pythons_random_state():
    def fn(key):
        return {
            "numpy": jnp.asarray(np.random.normal(size=(8, 8))),
            "python": jnp.full((8,), random.random()),
            "jax": jax.random.normal(key, (8, 64)),
            "zeros": jnp.zeros(8),
        }

    for _ in range(2):  # JAX keeps the trace, and a plan what it took of the host
        found = only(fn, "host-random")
        assert found.leaves == ("numpy", "python")
        assert found.severity == "warning"


def test_the_page_of_findings_has_every_kind_with_its_severity():
    page = Path(__file__).parents[2] / "docs" / "findings.md"
    rows = re.findall(r"^\| `([a-z-]+)` \| (warning|note) \|", page.read_text(), re.M)
    assert dict(rows) == KINDS
    assert len(rows) == len(KINDS)


def test_what_depends_on_the_process():
    def fn(key):
        mine = jax.random.fold_in(key, jax.process_index())
        if jax.process_index() == 0:
            np.zeros(3)  # what the first process alone does, and no leaf has of it
        return {
            "own": jax.random.normal(mine, (8, 64)),
            "random": jnp.full((8,), random.random()),
            "all": jax.random.normal(key, (8, 64)),
        }

    plan = shardinit.plan(fn)
    found = {f.kind: f for f in plan.findings}
    assert found["by-process"].leaves == ("own",)
    assert found["by-process"].severity == "warning"
    assert found["host-random"].leaves == ("random",)

    def asks(key):
        assert jax.process_index() >= 0
        return {"w": jax.random.normal(key, (8, 64))}

    before = jax.process_index
    assert others(shardinit.plan(asks).findings) == []
    assert jax.process_index is before


def test_draws_in_bfloat16_are_a_note():
    def fn(key):
        one, two = jax.random.split(key)
        return {
            "narrow": jax.random.normal(one, (64, 64), jnp.bfloat16),
            "cast": jax.random.normal(two, (64, 64)).astype(jnp.bfloat16),
            "widened": jax.random.uniform(two, (64, 8), jnp.bfloat16) * jnp.float32(3),
            "counted": jax.random.bits(two, (64, 16), jnp.uint8).astype(jnp.bfloat16),
        }

    found = only(fn, "narrow-draw")
    assert found.leaves == ("narrow", "widened")
    assert found.severity == "note"


def test_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    found = only(kernel, "explicit-mesh", mesh=mesh)
    assert found.severity == "note"
    scope = {"jax": jax}
    exec(found.remedy, scope)  # the line can be pasted
    assert findings(kernel, mesh=scope["mesh"]) == ()


def test_a_placement_that_the_function_states():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    stated = NamedSharding(mesh, P(None, "data"))

    def fn(key):
        w = jax.random.normal(key, (64, 64))
        return {"w": jax.lax.with_sharding_constraint(w, stated)}

    for options in ({}, {"mesh": mesh}):
        assert shardinit.init(fn, 0, **options)["w"].sharding == stated
    found = only(fn, "overruled", shardinit.PathRules([("w", P("data"))]), mesh=mesh)
    assert found.severity == "warning"
    assert found.leaves == ("w",)
    assert findings(fn, shardinit.PathRules([("w", P(None, "data"))]), mesh=mesh) == ()


def test_strict_refuses_all_warnings_in_one_error():
    def fn(key):
        return {
            "full": jax.random.gamma(key, 2.0, (64,)),
            "a": jax.random.normal(key, (64, 64)),
            "b": jax.random.normal(key, (64, 64)),
        }

    with pytest.raises(FindingsError, match=r"(?s)full.*same-key.*a, b") as caught:
        shardinit.plan(fn, strict=True)
    assert {x.kind for x in caught.value.findings} == {"computed-in-full", "same-key"}
    with pytest.raises(WholeLeafError, match="full"):
        shardinit.init(fn, 0, strict={"computed-in-full"})
    assert shardinit.plan(fn, strict={"rbg", "host-random"}).findings
    notes = shardinit.plan(named((None, None), (8, 8)), mesh=MESH, rules=AXIS([]))
    assert {x.severity for x in notes.findings} == {"note"}
    shardinit.plan(named((None, None), (8, 8)), mesh=MESH, rules=AXIS([]), strict=True)
    for wrong in ("rbg", {"loud"}):
        with pytest.raises(ValueError, match="kinds of findings"):
            shardinit.plan(fn, strict=wrong)


def test_large_warnings_are_one_python_warning():
    def fn(key):
        one, two = jax.random.split(key)
        return {
            "up": jax.random.normal(one, (1023, 1025)),
            "full": jax.random.gamma(two, 2.0, (64,)),
        }

    with pytest.warns(FindingsWarning, match="replicated") as caught:
        shardinit.plan(fn, mesh=MESH, rules=shardinit.fsdp())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "full" not in str(caught[0].message)  # 256 bytes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shardinit.open(fn, 0)


def test_memory_limit_counts_every_byte():
    rules = shardinit.PathRules([("", P("data"))])
    shardinit.plan(kernel, mesh=MESH, rules=rules, memory_limit=1 << 18)
    with pytest.raises(WholeLeafError, match=r"'kernel'.*262,144 bytes"):
        shardinit.plan(kernel, mesh=MESH, rules=rules, memory_limit=(1 << 18) - 1)


def test_findings_are_shown():
    plan = shardinit.plan(kernel, mesh=MESH, rules=AXIS([("<embed>", "data")]))
    (found,) = plan.findings
    assert str(found) in str(plan)
    assert "<li>warning" in plan._repr_html_()
    assert "<embed>" not in plan._repr_html_()
    assert found.as_data()["leaves"] == ["kernel"]


def test_a_placement_stated_inside_a_jitted_function():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    stated = NamedSharding(mesh, P("model"))

    @jax.jit
    def layer(key):
        w = jax.lax.with_sharding_constraint(jax.random.normal(key, (64, 64)), stated)
        return w.astype(jnp.bfloat16), jnp.zeros(64)

    w, b = shardinit.init(layer, 0, mesh=mesh)
    assert w.sharding == stated
    assert b.sharding == NamedSharding(mesh, P())


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
def test_placements_stated_by_other_means_than_a_constraint(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    stated = NamedSharding(mesh, P("model"), memory_kind=kind)
    free = NamedSharding(mesh, P("model", P.UNCONSTRAINED))

    def draw(key):
        return jax.random.normal(key, (512, 512))

    def fn(key):
        one, two, three = jax.random.split(key, 3)
        return {
            "put": jax.device_put(draw(one), stated),
            "jit": jax.jit(draw, out_shardings=stated)(two),
            "free": jax.lax.with_sharding_constraint(draw(three), free),
        }

    places = {x.path: x.sharding for x in shardinit.plan(fn, mesh=mesh).leaves}
    assert places.pop("free").is_equivalent_to(NamedSharding(mesh, P("model")), 2)
    assert set(places.values()) == {stated}
    rules = shardinit.PathRules([("", P("data"))])
    overruled = findings(fn, rules, mesh=mesh)
    assert {x.kind for x in overruled} == {"overruled"}
    assert {path for x in overruled for path in x.leaves} == {"free", "jit", "put"}


def test_constants_of_one_value_are_no_repeated_draw():
    def fn(key):
        return {
            "norm": jnp.ones((512, 512)),
            "scale": jnp.ones((512, 512)),
            "w": jax.random.normal(key, (512, 512)),
        }

    assert "same-key" not in {found.kind for found in shardinit.plan(fn).findings}
