"""Rules to shardings, and every way in which they do not fit."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardinit
from shardinit.errors import SelectError, ShardingError


def fn(key):
    return {
        "embed": jnp.zeros((64, 16)),
        "layers": [{"w": jnp.zeros((16, 48)), "b": jnp.zeros((48,))}],
        "odd": jnp.zeros((7, 5)),
    }


AXES = {
    "embed": ("vocab", "embed"),
    "layers": [{"w": ("embed", "mlp"), "b": ("mlp",)}],
    "odd": None,
}
NAMED = shardinit.InitFn(fn, axes=AXES)


def specs(plan):
    return {leaf.path: leaf.sharding.spec for leaf in plan.leaves}


def test_axis_rules(mesh):
    rules = shardinit.AxisRules(
        [("vocab", "data"), ("embed", "data"), ("embed", "model"), ("mlp", ["model"])]
    )
    got = specs(shardinit.plan(NAMED, mesh=mesh, rules=rules))
    assert got["embed"] == P("data", "model")  # data is taken: the next rule
    assert got["layers/0/w"] == P("data", ("model",))
    assert got["layers/0/b"] == P(("model",))
    assert got["odd"] == P()


def test_path_rules(mesh):
    rules = shardinit.PathRules([("/w$", P(None, "model")), ("^embed", P("data"))])
    got = specs(shardinit.plan(fn, mesh=mesh, rules=rules))
    assert got["layers/0/w"] == P(None, "model")
    assert got["embed"] == P("data")
    assert got["layers/0/b"] == P()


def test_fsdp_takes_the_largest_axis_that_divides(mesh):
    got = specs(shardinit.plan(fn, mesh=mesh, rules=shardinit.fsdp(min_bytes=0)))
    assert got["embed"] == P(("data", "model"))
    assert got["layers/0/w"] == P(None, ("data", "model"))
    assert got["odd"] == P()
    small = specs(shardinit.plan(fn, mesh=mesh, rules=shardinit.fsdp("data")))
    assert small["embed"] == P()


def test_names_that_are_mesh_axes_count_without_rules(mesh):
    named = shardinit.InitFn(lambda k: jnp.zeros((8, 16)), axes=("data", None))
    assert specs(shardinit.plan(named, mesh=mesh))[""] == P("data", None)


def test_out_shardings_prefix(mesh):
    tree = {"embed": P("data"), "layers": P(), "odd": None}
    got = specs(shardinit.plan(fn, mesh=mesh, out_shardings=tree))
    assert got["embed"] == P("data")
    assert got["layers/0/w"] == P()
    one = NamedSharding(mesh, P())
    assert shardinit.plan(fn, out_shardings=one).mesh is mesh


def test_axis_that_does_not_divide(mesh):
    rules = shardinit.AxisRules([("odd_axis", "data")])
    named = shardinit.InitFn(
        lambda k: {"w": jnp.zeros((7, 4))}, axes={"w": ("odd_axis", None)}
    )
    with pytest.raises(ShardingError) as caught:
        shardinit.plan(named, mesh=mesh, rules=rules)
    text = str(caught.value)
    for part in (
        "leaf 'w'",
        "axis 0 ('odd_axis')",
        "size 7",
        "data=2",
        "Pad the axis to 8",
    ):
        assert part in text


def test_rules_with_an_unknown_mesh_axis(mesh):
    with pytest.raises(ShardingError, match=r"'fsdp'.*'data', 'model'"):
        shardinit.plan(fn, mesh=mesh, rules=shardinit.AxisRules([("embed", "fsdp")]))
    with pytest.raises(ShardingError, match="'tensor'"):
        shardinit.plan(fn, mesh=mesh, rules=shardinit.PathRules([("w", P("tensor"))]))


def test_out_shardings_that_do_not_match(mesh):
    with pytest.raises(ShardingError, match="structure differs"):
        shardinit.plan(fn, mesh=mesh, out_shardings={"embed": P()})
    with pytest.raises(ShardingError, match="at most 2"):
        shardinit.plan(
            fn,
            mesh=mesh,
            out_shardings={"embed": P(None, None, "data"), "layers": P(), "odd": P()},
        )
    with pytest.raises(ShardingError, match="pass mesh="):
        shardinit.plan(fn, out_shardings=P("data"))
    with pytest.raises(ShardingError, match="both"):
        shardinit.plan(fn, mesh=mesh, rules=shardinit.fsdp(), out_shardings=P())


def test_rules_without_a_mesh():
    with pytest.raises(ShardingError, match="mesh"):
        shardinit.plan(fn, rules=shardinit.fsdp())


def test_rules_that_are_none():
    with pytest.raises(ShardingError, match="AxisRules"):
        shardinit.plan(fn, mesh=jax.make_mesh((8,), ("x",)), rules=[("embed", "x")])
    with pytest.raises(ShardingError, match="regular expression"):
        shardinit.PathRules([("(", P())])


def test_axes_that_do_not_fit(mesh):
    bad = shardinit.InitFn(lambda k: {"w": jnp.zeros((8, 4))}, axes={"w": ("a",)})
    with pytest.raises(ShardingError, match=r"leaf 'w'.*one name"):
        shardinit.plan(bad, mesh=mesh)
    short = shardinit.InitFn(fn, axes={"embed": None})
    with pytest.raises(ShardingError, match=r"InitFn.axes.*structure differs"):
        shardinit.plan(short, mesh=mesh)


def test_abstract_mesh_plans_but_needs_devices_to_compile(mesh):
    abstract = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
    plan = shardinit.plan(fn, mesh=abstract)
    with pytest.raises(ShardingError, match="abstract"):
        shardinit.compile_plan(plan)
    other = jax.make_mesh((8,), ("x",))
    with pytest.raises(ShardingError, match="planned for"):
        shardinit.compile_plan(plan, mesh=other)
    got = shardinit.compile_plan(plan, mesh=mesh)(0)
    assert got["embed"].sharding == NamedSharding(mesh, P())


def test_select(mesh):
    got = shardinit.init(fn, 0, mesh=mesh, select="layers/**")
    assert isinstance(got["embed"], jax.ShapeDtypeStruct)
    assert got["embed"].sharding.mesh == mesh
    assert isinstance(got["layers"][0]["w"], jax.Array)
    both = shardinit.plan(fn, select=["*", "**/b"])
    assert [x.path for x in both.leaves if x.selected] == ["embed", "layers/0/b", "odd"]
    assert both.total_bytes == 4 * (64 * 16 + 48 + 35)
    with pytest.raises(SelectError, match="matches no leaf"):
        shardinit.plan(fn, select="decoder/**")
    chosen = shardinit.plan(fn, select=lambda path: path.endswith("w"))
    assert [x.path for x in chosen.leaves if x.selected] == ["layers/0/w"]


def test_paths_escape_separators():
    tree = shardinit.plan(
        lambda k: (
            {"a/b": {"c~d": jnp.zeros(1)}, 3: [jnp.zeros(1)]}
            if False
            else {"a/b": {"c~d": jnp.zeros(1)}}
        )
    )
    assert tree.leaves[0].path == "a~1b/c~0d"


def test_plan_is_readable(mesh):
    plan = shardinit.plan(fn, mesh=mesh)
    text = str(plan)
    assert "4 leaves" in text
    assert "layers/0/w" in text
    page = plan._repr_html_()
    assert page.count("<tr>") == 1 + len(plan.rows())
    assert (
        "<script"
        not in shardinit.plan(lambda k: {"<script>": jnp.zeros(1)})._repr_html_()
    )


@pytest.mark.parametrize(
    ("axes", "says"), [(("data", "data"), "twice"), (("rows",), "'rows'")]
)
def test_a_spec_that_no_mesh_takes_is_named_by_its_leaf(axes, says, mesh):
    places = {"embed": P(*axes), "layers": None, "odd": None}
    with pytest.raises(ShardingError, match=f"leaf 'embed'.*{says}.*'model'"):
        shardinit.plan(fn, mesh=mesh, out_shardings=places)


def test_a_rule_that_names_a_mesh_axis_twice(mesh):
    rules = shardinit.PathRules([("embed", P("data", "data"))])
    with pytest.raises(ShardingError, match=r"leaf 'embed'.*'data' twice"):
        shardinit.plan(fn, mesh=mesh, rules=rules)


def test_what_is_no_mesh():
    with pytest.raises(ShardingError, match=r"mesh: got int.*jax\.make_mesh"):
        shardinit.plan(fn, mesh=8)


def test_globs_are_named_by_their_argument(mesh):
    with pytest.raises(SelectError, match="select=3: got int"):
        shardinit.plan(fn, select=cast("Any", 3))
    with pytest.raises(SelectError, match=r"grow='head'.*matches no leaf"):
        shardinit.init_missing({}, fn, 0, mesh=mesh, grow="head")
