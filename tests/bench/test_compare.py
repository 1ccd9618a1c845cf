"""Two results of the bench: what is called noise, and what a change."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardinit.bench.__main__ import main
from shardinit.bench.compare import changes, pair, read

pytestmark = pytest.mark.once

RUNS = st.lists(st.floats(0.5, 2.0), min_size=3, max_size=5)


def row(ours, theirs=None, *, higher=True, name="cold init", against=""):
    def side(values):
        middle = sorted(values)[len(values) // 2]
        return {"median": middle, "spread": 0.0, "values": list(values)}

    mine, other = side(ours), None if theirs is None else side(theirs)
    value = mine["median"] if other is None else other["median"] / mine["median"]
    return {
        "case": "cold",
        "name": name,
        "against": against,
        "unit": "s" if other is None else "x",
        "value": value,
        "shardinit": mine,
        "baseline": other,
        "higher_is_better": higher,
    }


def result(*rows, command="python -m shardinit.bench", cpu="a"):
    machine = {"cpu": cpu, "cores": 2}
    about = {"command": command, "date": "2026-01-01", "commit": None}
    return {**about, "machine": machine, "rows": list(rows)}


def verdict(before, after):
    (change,) = changes(result(before), result(after))
    return change.verdict


@given(RUNS, RUNS)
def test_a_result_differs_from_itself_by_noise(ours, theirs):
    assert verdict(row(ours, theirs), row(ours, theirs)) == "noise"


@given(RUNS, RUNS)
def test_what_no_run_explains_is_a_change(ours, theirs):
    before, after = row(ours, theirs), row([x * 1000 for x in ours], theirs)
    assert verdict(before, after) == "worse"
    assert verdict(after, before) == "better"
    before["higher_is_better"] = after["higher_is_better"] = False
    assert verdict(before, after) == "better"
    before["higher_is_better"] = after["higher_is_better"] = None
    assert verdict(before, after) == "changed"


def test_few_runs_decide_nothing():
    assert verdict(row([1.0, 1.0]), row([9.0, 9.0, 9.0])) == "too few runs"
    assert verdict(row([1.0] * 3, [1.0]), row([9.0] * 3, [1.0])) == "too few runs"


def test_rows_that_one_result_lacks_are_told():
    one, two = row([1.0] * 3, name="one"), row([1.0] * 3, name="two")
    found = changes(result(one), result(two))
    assert [(x.name, x.verdict) for x in found] == [("two", "new"), ("one", "gone")]


def test_one_thing_may_be_held_against_several():
    def both(jit):
        ours = [1.0] * 3
        return result(
            row(ours, [2.0] * 3, against="torch"), row(ours, [jit] * 3, against="jit")
        )

    found = changes(both(5.0), both(4.0))
    assert [x.verdict for x in found] == ["noise", "worse"]
    assert found[1].name == "cold init, against jit"


def test_a_history_gives_its_last_two_of_one_command_and_processor(tmp_path):
    file = tmp_path / "history.jsonl"
    like = result(row([1.0] * 3)), result(row([2.0] * 3))
    others = result(command="another"), result(cpu="b")
    order = (like[0], *others, like[1])
    file.write_text("".join(json.dumps(x) + "\n" for x in order))
    assert pair([file]) == like
    file.write_text("".join(json.dumps(x) + "\n" for x in (*others, like[1])))
    with pytest.raises(ValueError, match="no earlier result of"):
        pair([file])


@pytest.mark.parametrize("text", ["", "no json", "[1]", '{"rows": 3}', '{"a": 1}'])
def test_a_file_that_holds_no_result_is_named(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json.*expected what --json"):
        read(file)


def test_the_command_ends_with_1_where_a_row_is_worse(tmp_path, capsys):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, seconds in zip(files, (1.0, 3.0), strict=True):
        file.write_text(json.dumps(result(row([seconds] * 3, higher=False))))
    assert main(["compare", *map(str, files)]) == 1
    assert "+200.0%" in capsys.readouterr().out
    assert main(["compare", *map(str, reversed(files))]) == 0
    with pytest.raises(SystemExit) as end:
        main(["compare", str(tmp_path / "none.json")])
    assert end.value.code == 2
