"""What a rule may say: memory kinds, axes that do not divide, and wrong forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import shardinit
from shardinit.errors import ShardingError

HOST = "pinned_host"


def fn(key):
    return {
        "w": jax.random.normal(key, (16, 48)),
        "keys": jax.random.split(key, 8),
        "table": jnp.arange(48.0),
    }


NAMED = shardinit.InitFn(
    fn, axes={"w": ("embed", "mlp"), "keys": ("layers",), "table": ("mlp",)}
)


def test_rules_name_a_kind_of_memory_for_arrays_tables_and_keys(mesh):
    rules = shardinit.AxisRules(
        [
            ("embed", "data"),
            ("mlp", shardinit.Placement("model", memory_kind=HOST)),
            ("layers", shardinit.Placement("data", memory_kind=HOST)),
        ]
    )
    plan = shardinit.plan(NAMED, mesh=mesh, rules=rules)
    assert {leaf.sharding.memory_kind for leaf in plan.leaves if leaf.sharding} == {
        HOST
    }
    got, plain = shardinit.compile_plan(plan)(0), fn(jax.random.key(0))
    assert got["w"].sharding == NamedSharding(
        mesh, P("data", "model"), memory_kind=HOST
    )
    for array in got.values():
        assert array.sharding.memory_kind == HOST
    np.testing.assert_array_equal(np.asarray(got["table"]), plain["table"])
    assert jnp.array_equal(
        jax.random.key_data(jax.device_put(got["keys"], NamedSharding(mesh, P()))),
        jax.random.key_data(plain["keys"]),
    )


def test_path_rules_name_a_kind_of_memory(mesh):
    host = shardinit.Placement(P("data"), memory_kind=HOST)
    got = shardinit.init(NAMED, 0, mesh=mesh, rules=shardinit.PathRules([("w", host)]))
    assert got["w"].sharding == NamedSharding(mesh, P("data"), memory_kind=HOST)
    assert got["table"].sharding == NamedSharding(mesh, P())


def test_memories_that_do_not_agree_or_do_not_exist(mesh):
    two = [
        ("embed", shardinit.Placement(None, memory_kind=HOST)),
        ("mlp", shardinit.Placement(None, memory_kind="device")),
    ]
    with pytest.raises(ShardingError, match=r"leaf 'w'.*several memories"):
        shardinit.plan(NAMED, mesh=mesh, rules=shardinit.AxisRules(two))
    none = shardinit.PathRules([("w", shardinit.Placement(P(), memory_kind="tape"))])
    with pytest.raises(ShardingError, match=r"leaf 'w'.*tape"):
        shardinit.plan(NAMED, mesh=mesh, rules=none)


ODD = shardinit.InitFn(
    lambda key: {"w": jax.random.normal(key, (6, 14))}, axes={"w": ("kv", "embed")}
)


def odd(rules):
    mesh = AbstractMesh((2, 4), ("data", "model"))
    plan = shardinit.plan(ODD, mesh=mesh, rules=rules, indivisible="next")
    (leaf,) = plan.leaves
    assert leaf.sharding is not None
    return leaf.sharding.spec


def test_an_axis_that_does_not_divide_goes_to_the_next_rule():
    rules = [("kv", "model"), ("kv", "data"), ("embed", "model")]
    with pytest.raises(ShardingError, match="does not divide"):
        shardinit.plan(
            ODD,
            mesh=AbstractMesh((2, 4), ("data", "model")),
            rules=shardinit.AxisRules(rules),
        )
    assert odd(shardinit.AxisRules(rules)) == P("data", None)
    assert odd(shardinit.PathRules([("w", P("model")), ("w", P("data"))])) == P("data")
    first = shardinit.PathRules([("w", P("model", "data"))])
    assert odd(first) == P(None, "data")


def test_indivisible_is_one_of_two_words(mesh):
    with pytest.raises(ValueError, match="'error' or 'next'"):
        shardinit.plan(fn, mesh=mesh, indivisible="pad")


@pytest.mark.parametrize(
    "make",
    [
        lambda: shardinit.AxisRules([("embed", "data", "model")]),  # pyright: ignore
        lambda: shardinit.AxisRules([("embed", 3)]),  # pyright: ignore
        lambda: shardinit.AxisRules([("embed", P("data"))]),  # pyright: ignore
        lambda: shardinit.AxisRules([("embed", P.UNCONSTRAINED)]),  # pyright: ignore
        lambda: shardinit.AxisRules([("embed", ("data", None))]),  # pyright: ignore
        lambda: shardinit.PathRules(["kernel"]),  # pyright: ignore
        lambda: shardinit.PathRules([("kernel", "data")]),  # pyright: ignore
        lambda: shardinit.PathRules([("kernel", P(P.UNCONSTRAINED))]),
    ],
)
def test_rules_of_a_wrong_form_are_refused_in_words(make):
    with pytest.raises(ShardingError, match=r"Rules: got .*expected pairs of"):
        make()


def test_a_mapping_is_rules_and_none_is_whole(mesh):
    assert shardinit.AxisRules({"embed": "data"}).rules == (("embed", "data"),)
    assert shardinit.PathRules([("w", None)]).rules == (("w", P()),)
