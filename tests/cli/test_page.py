"""``plan --html``: the page as text, and as a browser shows it."""

import html.parser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import shardinit
from shardinit import cli
from shardinit.cli.page.layouts import layout_svg
from shardinit.cli.page.page import page
from tests.cli import browser

pytestmark = pytest.mark.once

MESH = AbstractMesh((2, 4), ("data", "model"))
TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
EVIL = "<script>alert(1)</script>&\"'"


def decoder(layers):
    def fn(key):
        tree = {"embed": jax.random.normal(key, (1024, 64))}
        for i in range(layers):
            k = jax.random.fold_in(key, i)
            tree[f"layers_{i}"] = {
                "up": jax.random.normal(k, (64, 256)).astype(jnp.bfloat16),
                "down": 0.1 * jax.random.normal(k, (256, 64)),
                "scale": jnp.ones(64),
            }
        return tree

    return fn


def plan_of(layers=4):
    rules = shardinit.fsdp("data", min_bytes=0)
    return shardinit.plan(decoder(layers), mesh=MESH, rules=rules)


class Reader(html.parser.HTMLParser):
    """What a page has: its text, its tags that are open, what it would fetch."""

    def __init__(self):
        super().__init__()
        self.text, self.open, self.fetched, self.scripts = "", [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "input", "wbr"):
            self.open.append(tag)
        self.scripts += tag == "script"
        self.fetched += [v for k, v in attrs if k in ("src", "href", "srcset")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def test_the_page_has_every_leaf_and_fetches_nothing():
    plan = plan_of()
    text = page(plan)
    seen = read(text)
    assert seen.fetched == []
    assert not re.search(r"url\(|@import|https?://", text)
    for leaf in plan.leaves:
        assert leaf.path in seen.text
    for found in plan.findings:
        assert found.remedy in seen.text
    assert seen.scripts == 1


def test_all_text_is_escaped():
    def fn(key):
        return {EVIL: jax.random.normal(key, (255, 257))}

    made = shardinit.plan(
        shardinit.InitFn(fn, name=EVIL), mesh=MESH, rules=shardinit.fsdp("data")
    )
    assert made.findings
    text = page(made, shardinit.inspect(made, 0))
    seen = read(text)
    assert EVIL in seen.text
    assert EVIL not in text
    assert seen.scripts == 1


def test_statistics_are_shown_where_they_are_asked_for():
    plan = plan_of()
    text = page(plan, shardinit.inspect(plan, 0))
    assert "Gain by depth" in text
    assert text.count('class="spark"') > 3
    assert "Gain by depth" not in page(plan)


def colours(spec, mesh, rank=2):
    """Colours of the devices of the mesh, in order."""
    cells = re.findall(
        r'<rect class="cell" x="([\d.]+)".*?fill="(.*?)"', layout_svg(mesh, spec, rank)
    )
    return [fill for x, fill in cells if float(x) >= 220]


def test_devices_of_one_colour_hold_the_same():
    mesh = {"data": 2, "model": 4}
    assert len(set(colours((None, None), mesh))) == 1
    rows = colours(("data", None), mesh)
    assert len(set(rows[:4])) == len(set(rows[4:])) == 1 != len(set(rows))
    assert len(set(colours(("data", "model"), mesh))) == 8
    assert len(set(colours((("data", "model"),), mesh, 1))) == 8
    assert len(set(colours((None, "c"), {"a": 2, "b": 2, "c": 4}))) == 4


def test_the_command_writes_the_page_and_refuses_what_makes_none(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["shardinit", "plan", "tiny.json", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0, capsys.readouterr()

    assert run("--mesh", "data=8", "--html", "p.html", "--statistics")[0] == 0
    assert "layers/{0,1}/mlp" in read((tmp_path / "p.html").read_text()).text
    code, said = run("--html", "no/p.html")
    assert code == 1
    assert "mkdir -p" in said.err
    assert run("--statistics")[0] == 2


# ---- in a browser --------------------------------------------------------------------

DEEP = """
import jax, jax.numpy as jnp

def init(key):
    layer = {"up": jnp.ones((8, 8), "bfloat16"), "down": jax.random.normal(key, (8, 8))}
    return {f"layers_{i}": layer for i in range(1000)}
"""
SHOWN = "[...document.querySelectorAll('tr.group, tr.leaf')].filter(r => !r.hidden)"
PATHS = f"{SHOWN}.map(r => r.querySelector('td.path').innerText.trim())"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.BINARY is None:
        pytest.skip("no chromium is installed")
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def written(plan, tmp_path):
    """The page in a file; where it is."""
    statistics = shardinit.inspect(plan, 0) if len(plan.leaves) < 20 else None
    (tmp_path / "page.html").write_text(page(plan, statistics))
    return (tmp_path / "page.html").as_uri()


def count(shown):
    return shown.see("document.querySelector('#count').innerText")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_no_wider_than_a_screen_or_a_phone(chromium, tmp_path, width):
    shown = chromium.open(written(plan_of(), tmp_path), width)
    root = "document.documentElement"
    assert shown.see(f"{root}.scrollWidth") <= shown.see(f"{root}.clientWidth") == width


def test_names_of_leaves_have_room_on_a_phone(chromium, tmp_path):
    def fn(key):
        return {
            f"layers_{i}": {"up": jax.random.normal(key, (8, 8))} for i in range(99)
        }

    made = shardinit.plan(fn)
    (tmp_path / "page.html").write_text(page(made, shardinit.inspect(made, 0)))
    shown = chromium.open((tmp_path / "page.html").as_uri(), 390)
    names = "[...document.querySelectorAll('.charts td.path')]"
    assert shown.see(f"Math.max(...{names}.map(x => x.clientHeight))") < 50


def test_a_click_unfolds_a_group_of_leaves_and_another_folds_it(chromium, tmp_path):
    shown = chromium.open(written(plan_of(), tmp_path), 1280)
    folded = shown.see(PATHS)
    assert not any("layers_2" in path for path in folded)
    shown.click("tr.group button.fold")
    opened = shown.see(PATHS)
    assert [path for path in opened if "layers_2" in path]
    assert shown.see("document.querySelector('button.fold').ariaExpanded") == "true"
    shown.click("tr.group button.fold")
    assert shown.see(PATHS) == folded


def test_typing_searches_and_a_choice_filters(chromium, tmp_path):
    url = written(plan_of(), tmp_path)
    shown = chromium.open(url, 1280)
    assert count(shown) == "13 leaves"
    shown.click("#search")
    shown.type("layers_2 down")
    assert count(shown) == "1 leaf"
    assert any("layers_2" in path for path in shown.see(PATHS))
    assert shown.see("location.hash") == "#q=layers_2+down"
    again = chromium.open(url + "#q=layers_2+down", 1280)  # a view can be linked
    assert again.see(PATHS) == shown.see(PATHS)
    chosen = chromium.open(url, 1280)
    chosen.see("document.querySelector('select[name=dtype]').focus()")
    while (
        chosen.see("document.querySelector('select[name=dtype]').value") != "bfloat16"
    ):
        chosen.press("ArrowDown")
    assert count(chosen) == "4 leaves"
    assert chosen.see("location.hash") == "#dtype=bfloat16"


def test_search_and_filters_find_leaves_among_two_thousand(chromium, tmp_path):
    (tmp_path / "deep.py").write_text(DEEP)
    words = "plan deep:init --mesh data=8 --html page.html".split()
    command = [sys.executable, "-m", "shardinit", *words]
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, cwd=tmp_path, env=os.environ | path, check=True)
    url = (tmp_path / "page.html").as_uri()
    asked = {"": "2,000", "#q=layers_66/+up": "1", "#q=up&dtype=float32": "0"}
    for anchor, leaves in asked.items():
        shown = chromium.open(url + anchor, 1280)
        assert count(shown).split()[0] == leaves
    shown = chromium.open(url, 390)
    shown.click("#search")
    shown.type("layers_66/")
    assert count(shown) == "2 leaves"


def test_the_pages_own_policy_lets_its_script_run_and_no_other(chromium, tmp_path):
    file = tmp_path / "page.html"
    text = page(plan_of())
    file.write_text(text.replace("<h1>", "<script>document.title='ran'</script><h1>"))
    shown = chromium.open(file.as_uri(), 1280)
    assert shown.see("document.title") != "ran"
    assert count(shown) == "13 leaves"
