"""The table of a module, and its repr."""

import jax
import jax.numpy as jnp
import pytest

from shardinit import module as tx

pytestmark = pytest.mark.once

X = jax.ShapeDtypeStruct((2, 4), jnp.float32)


def row(table, path):
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("│┃").split("│")]
        if cells[0] == path:
            return cells
    raise AssertionError(path)


def net():
    return tx.Sequential(
        tx.Linear(250), tx.BatchNorm(), tx.Dropout(0.5), tx.MLP([8, 2])
    )


def test_a_table_shows_modules_shapes_bytes_and_kinds():
    table = net().tabulate(X)
    assert row(table, "layers/0") == [
        "layers/0",
        "Linear",
        "bias: float32[250]",
        "float32[2,4]",
        "float32[2,250]",
        "",
        "1,250  5.0 KB",
        "",
    ]
    assert row(table, "layers/1")[5:] == ["500  2.0 KB", "500  2.0 KB", ""]
    assert row(table, "layers/3/linear2")[4] == "float32[2,2]"
    total = next(line for line in table.splitlines() if "total" in line)
    assert "3,776  15.1 KB" in total
    for title in ("BatchStat", "Parameter", "Rng", "inputs", "outputs"):
        assert title in table


def test_a_table_of_an_initialised_module_is_the_same():
    assert net().init(1, X).tabulate(X) == net().tabulate(X)


def test_a_table_without_inputs_shows_what_is_there():
    table = net().tabulate()
    assert "Initializer" in table
    assert "inputs" not in table
    assert "5.0 KB" in net().init(1, X).tabulate()


def test_depth_hides_rows_and_counts_all():
    flat = net().tabulate(X, depth=0)
    assert "layers/0" not in flat
    assert row(flat, "")[1] == "Sequential"
    assert "3,776  15.1 KB" in flat


def test_repr_shows_small_arrays_and_the_shapes_of_large_ones():
    made = tx.Linear(2).init(1, X)
    assert "bias=array([0., 0.])" in repr(made)
    assert "kernel=float32[4,2]" in repr(made)
    assert "key<fry>[]" in repr(tx.Dropout(0.5).init(1))
    assert "rng=Initializer" in repr(tx.Dropout(0.5))
