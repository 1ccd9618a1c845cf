"""The bench through its command line, and what it makes of figures; never a timing."""

import json
import subprocess
import sys
from importlib.util import find_spec
from xml.etree import ElementTree

import pytest

from shardinit.bench import case as cases
from shardinit.bench import report
from shardinit.bench.case import Case, Job, Options, OutOfMemory, Row, Sample, Target
from shardinit.bench.drawing import ratios_svg
from shardinit.bench.runner import Runner, child_environment

pytestmark = pytest.mark.once


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardinit.bench", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_tiny_run_writes_figures_of_both_sides(tmp_path):
    out, page = tmp_path / "out.json", tmp_path / "out.md"
    words = ["--case", "cold,plan", "--quick", "--layers", "1", "--devices", "2"]
    words += ["--json", str(out), "--markdown", str(page)]
    done = bench(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    about = {"command", "date", "commit", "versions", "machine"}
    assert set(found) == about | {"rows", "runs"}
    assert found["command"] == " ".join(["python -m shardinit.bench", *words])
    assert {"python", "shardinit", "jax", "jaxlib"} <= set(found["versions"])
    assert found["machine"]["cores"] >= 1
    cold, floor, plan, growth, again = found["rows"]
    cases = [row["case"] for row in found["rows"]]
    assert cases == ["cold", "cold", "plan", "plan", "plan"]
    assert floor["against"] == "tracing and one warm run"
    assert floor["shardinit"] == cold["shardinit"]
    assert growth["against"].startswith("shardinit at")
    assert again["baseline"]["median"] == plan["shardinit"]["median"]
    ours, theirs = cold["shardinit"], cold["baseline"]
    assert len(ours["values"]) == len(theirs["values"]) == 1
    assert cold["value"] == pytest.approx(theirs["median"] / ours["median"])
    assert cold["must"] is None
    assert cold["met"] is None
    assert plan["baseline"] is None
    assert plan["unit"] == "s"
    sides = [run["side"] for run in found["runs"]]
    assert sides == ["shardinit", "jit", "floor", "shardinit", "shardinit"]
    assert [run["figures"]["leaves"] for run in found["runs"][:2]] == [12, 12]
    assert all(run["figures"]["peak_bytes"] > 0 for run in found["runs"])
    assert "cold init, 1 layers" in done.stdout
    assert "| measured |" in page.read_text()


def test_an_unknown_case_is_named_with_those_there_are():
    done = bench("--case", "cold,lukewarm")
    assert done.returncode == 2
    assert "'lukewarm'" in done.stderr
    assert "memory" in done.stderr


def test_every_case_says_what_it_measures_and_against_what():
    known = cases.load()
    assert {"cold", "warm", "memory", "plan"} <= set(known)
    for case in known.values():
        assert case.measures
        assert case.baseline
        assert "shardinit" in case.sides


def test_the_process_that_starts_the_children_stays_free_of_jax():
    code = (
        "import sys, shardinit.bench.__main__ as m; m.cases.load();"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("target", "value", "met", "missed_by"),
    [
        (Target(8, 15), 9.0, True, 8 / 9),
        (Target(8, 15), 4.0, False, 2.0),
        (Target(3, 2, higher=False), 3.0, True, 1.0),
        (Target(3, 2, higher=False), 4.5, False, 1.5),
    ],
)
def test_a_target_is_met_in_its_direction(target, value, met, missed_by):
    row = Row("c", "r", value, "x", Sample((1.0,)), None, "", target=target)
    assert row.met is met
    assert target.missed_by(value) == pytest.approx(missed_by)
    assert ("missed by" in "".join(report.notes([row]))) is not met


def test_sides_take_turns_and_a_repeated_question_runs_nothing(monkeypatch):
    order = []
    runner = Runner(Options((4,), 8, 2, False), lambda text: None)

    def child(case, job):
        order.append(job.side)
        return {"seconds": float(len(order))}

    monkeypatch.setattr(runner, "_child", child)
    case = Case("c", "m", "b", {}, lambda bench: iter(()))
    jobs = Job("a", {"n": 1}, 2), Job("b", {"n": 1}, 1)
    first = runner.measure(case, *jobs)
    assert order == ["a", "b", "a"]
    assert first == [[{"seconds": 1.0}, {"seconds": 3.0}], [{"seconds": 2.0}]]
    assert runner.measure(case, *jobs) == first
    assert len(order) == len(runner.log) == 3


def test_a_run_that_cannot_fit_is_not_started():
    runner = Runner(Options((4,), 8, 1, False), lambda text: None)
    case = Case("c", "m", "b", {}, lambda bench: iter(()))
    with pytest.raises(OutOfMemory, match="needs"):
        runner.measure(case, Job("a", {}, 1, needs_bytes=1 << 60))
    assert runner.log == []


def test_a_failing_child_tells_why():
    runner = Runner(Options((4,), 8, 1, False), lambda text: None)
    plan = cases.load()["plan"]
    with pytest.raises(RuntimeError, match="unexpected keyword argument 'depth'"):
        runner.measure(plan, Job("shardinit", {"depth": 1}, 1))


def test_where_jit_does_not_fit_both_sides_run_on_fewer_layers():
    warm = cases.load()["warm"]
    asked = []

    class Small:
        options = Options((4,), 8, 1, False)

        def fits(self, size):
            return size < 10e9

        def once(self, name, make):
            return make()

        def measure(self, case, *jobs):
            asked.append([(job.side, job.parameters["layers"]) for job in jobs])
            names = "seconds", "first_seconds", "peak_bytes", "total_bytes"
            return [[dict.fromkeys(names, 4e9)] for _ in jobs]

    (row,) = warm.rows(Small())
    assert asked == [[("shardinit", 8), ("jit", 8)], [("shardinit", 22)]]
    assert "in 8 layers" in row.note


def test_children_see_the_devices_asked_for(monkeypatch):
    flag = "--xla_force_host_platform_device_count"
    monkeypatch.setenv("XLA_FLAGS", f"--other=1 {flag}=3")
    flags = child_environment(5)["XLA_FLAGS"].split()
    assert flags == ["--other=1", f"{flag}=5"]


def test_the_shell_case_times_a_plan_and_the_import(tmp_path):
    out = tmp_path / "out.json"
    done = bench("--case", "shell", "--quick", "--json", str(out))
    assert done.returncode == 0, done.stderr
    planned, imported = json.loads(out.read_text())["rows"]
    assert planned["name"].startswith("shardinit plan gpt2")
    assert planned["value"] > 0
    assert 0 <= imported["value"] < planned["value"]


@pytest.mark.slow
def test_the_case_of_many_has_an_ensemble_and_a_sweep(tmp_path):
    out = tmp_path / "out.json"
    done = bench("--case", "many", "--quick", "--devices", "2", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [row["against"] for row in found["rows"]] == ["jit", "the first calls"]
    assert all(row["value"] > 0 for row in found["rows"])


@pytest.mark.slow
def test_the_case_of_front_ends_has_a_row_for_each_framework(tmp_path):
    out = tmp_path / "out.json"
    words = ["--quick", "--devices", "2", "--repeats", "1", "--json", str(out)]
    done = bench("--case", "frontends", *words)
    assert done.returncode == 0, done.stderr
    names = [row["name"].split(",")[0] for row in json.loads(out.read_text())["rows"]]
    assert names == ["linen", "nnx", "equinox", "haiku", "keras", "penzai"]


@pytest.mark.slow
def test_the_deferred_case_times_every_step_and_how_each_grows(tmp_path):
    out = tmp_path / "out.json"
    done = bench("--case", "deferred", "--quick", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [run["figures"]["parameters"] for run in found["runs"]] == [100, 400]
    assert {run["figures"]["programs"] for run in found["runs"]} == {1}
    names = [row["name"] for row in found["rows"]]
    assert [name.split(",")[0] for name in names] == [
        *(step for step in ("build", "names", "plan", "rename") for _ in range(2)),
        "all four",
    ]
    assert all(row["value"] > 0 for row in found["rows"])


def test_bars_begin_at_one_and_say_whether_a_target_is_met():
    seconds = Sample((1.0, 1.2))
    rows = [
        Row("cold", "<fast>", 12.0, "x", seconds, seconds, "jit", target=Target(8, 15)),
        Row("cold", "slow", 0.5, "x", seconds, seconds, "jit", target=Target(8, 15)),
        Row("plan", "plan", 3.0, "s", seconds, None, ""),
    ]
    picture = ElementTree.fromstring(ratios_svg(rows))
    fast, slow = picture.iterfind("{*}rect")
    assert (fast.get("class"), slow.get("class")) == ("bar yes", "bar no")
    ends = [float(slow.get("x")) + float(slow.get("width")), float(fast.get("x"))]
    (one,) = [x for x in picture.iterfind("{*}line") if x.get("class") == "one"]
    assert ends == pytest.approx([float(one.get("x1"))] * 2, abs=0.11)
    said = [text.text for text in picture.iterfind("{*}text")]
    assert {"<fast>", "12x", "0.5x"} < set(said)
    assert "plan" not in said


def test_a_platform_that_is_not_there_is_one_line():
    done = bench("--case", "cold", "--platform", "rocm")
    assert done.returncode == 2
    assert "no rocm device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_second_process_reads_what_the_first_compiled(tmp_path):
    out = tmp_path / "out.json"
    done = bench("--case", "again", "--quick", "--devices", "2", "--json", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["against"] for row in rows] == ["first process", "the program alone"]
    assert all(row["shardinit"]["median"] > 0 for row in rows)


@pytest.mark.slow
def test_every_peer_that_is_installed_initialises_as_many_bytes(tmp_path):
    out = tmp_path / "out.json"
    words = ["--case", "peers", "--quick", "--devices", "2", "--json", str(out)]
    done = bench(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    packages = {"jit": "jax", "nnx": "flax"}
    names = [*packages, "penzai", "equinox", "torch"]
    there = [name for name in names if find_spec(packages.get(name, name))]
    assert [row["against"] for row in found["rows"]] == there
    assert len({run["figures"]["bytes"] for run in found["runs"]}) == 1
