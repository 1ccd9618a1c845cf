"""Tables of plans: layers folded, one screen, and as narrow as a terminal."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import shardinit
from shardinit.core.plan import tables
from shardinit.core.plan.folded import folded
from shardinit.core.plan.text_table import fitted, wrapped

pytestmark = pytest.mark.once

MESH = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def deep(key, layers=126):
    keys = jax.random.split(key, layers)
    return {
        "embed": jnp.zeros((4096, 1024)),
        "layers": [
            {"up": {"kernel": jax.random.normal(k, (1024, 4096))}} for k in keys
        ],
    }


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        (["w"], "w"),
        (["layers_0/w", "layers_1/w", "layers_2/w"], "layers_{0..2}/w"),
        (["9/w", "10/w", "11/w", "13/w"], "{9..11,13}/w"),
        (["0/w", "1/w"], "{0,1}/w"),
        (["0/e_0", "0/e_1", "0/e_2", "1/e_0", "1/e_1", "1/e_2"], "{0,1}/e_{0..2}"),
        (["0/e_0", "1/e_1"], "0/e_0 …"),
        (["b2/0/w", "b2/1/w", "b2/2/w"], "b2/{0..2}/w"),
    ],
)
def test_paths_are_folded_where_that_says_neither_more_nor_less(paths, shown):
    assert folded(paths) == shown


def test_layers_are_one_row_and_table_has_every_leaf():
    plan = shardinit.plan(deep, mesh=MESH)
    assert [row[1:3] for row in plan.rows()] == [
        ("1", "embed"),
        ("126", "layers/{0..125}/up/kernel"),
    ]
    assert len(str(plan).splitlines()) <= 5
    assert f"{126 * 1024 * 4096 // 8 * 4:,}" in str(plan)
    lines = plan.table().splitlines()
    assert len(lines) == 1 + 127
    assert "layers/125/up/kernel" in lines[-1]
    assert "<td>layers/{0..125}/up/kernel</td>" in plan._repr_html_()


def test_rows_of_other_placement_are_rows_of_their_own():
    rules = shardinit.PathRules([("/3/", P("model")), (".*", P("data"))])
    rows = shardinit.plan(deep, mesh=MESH, rules=rules).rows()
    paths = [row[2] for row in rows]
    assert paths[1:] == ["layers/{0..2,4..125}/up/kernel", "layers/3/up/kernel"]


def test_a_plan_of_many_rows_is_one_screen():
    def wide(key):
        names = [a + b for a in "abcdefgh" for b in "abcdefgh"]
        return {name: jnp.zeros((8, i + 1)) for i, name in enumerate(names)}

    plan = shardinit.plan(wide, mesh=MESH)
    lines = str(plan).splitlines()
    assert len(lines) <= 40
    assert (
        "… and 34 smaller rows: plan.table() and plan --json have every leaf" in lines
    )
    assert any(" hh " in line for line in lines)  # the largest stays
    assert not any(" aa " in line for line in lines)
    assert len(plan.rows()) == 64


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_a_narrow_table_breaks_no_number(width):
    plan = shardinit.plan(deep, mesh=MESH)
    text = fitted(tables.HEADER, plan.rows(), width, tables.PATH)
    text += "\n" + wrapped(plan.summary(), width)
    assert max(map(len, text.splitlines())) <= width
    for number in re.findall(r"\d[\d,]*", str(plan)):
        assert number in text
    assert "layers/{0..125}/up/kernel" in text


def test_what_is_longer_than_a_line_is_broken_between_its_parts():
    path = "/".join(f"layer_number_{i}" for i in range(12)) + "/54,962,159,616"
    lines = wrapped(path, 40).splitlines()
    assert max(map(len, lines)) <= 40
    assert "".join(map(str.strip, lines)) == path
    assert "54,962,159,616" in wrapped(path, 40)


def test_cells_that_stand_below_no_name_say_it_themselves():
    header, row = ("shard", "path", "moved"), ("16,384", "0/kernel", "2,048")
    assert fitted(header, [row], 80, 1).splitlines()[0].split() == list(header)
    narrow = fitted(header, [row], 14, 1)
    assert narrow.split() == ["0/kernel", "shard", "16,384", "moved", "2,048"]
