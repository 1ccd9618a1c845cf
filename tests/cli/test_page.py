"""``plan --html``: the page as text, and as a browser shows it."""

import html
import html.parser
import json
import os
import re
import shutil
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
    assert run("--statistics")[0] == 1


# ---- in a browser --------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")


def dom(file, width, anchor=""):
    """The page's DOM after its script ran, in a window of that width."""
    words = "--headless=new --no-sandbox --disable-gpu --virtual-time-budget=3000"
    size, page = f"--window-size={width},900", f"{file.as_uri()}{anchor}"
    command = [BROWSER, *words.split(), size, "--dump-dom", page]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def probed(plan, tmp_path, width):
    """Whether the page is wider than a frame of that width, told by its title."""
    text = page(plan, shardinit.inspect(plan, 0) if len(plan.leaves) < 20 else None)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?">', "", text)
    file = tmp_path / "page.html"
    file.write_text(text)
    outer = tmp_path / "frame.html"
    outer.write_text(
        f'<iframe id=f style="width:{width}px;height:900px" '
        f'srcdoc="{html.escape(text)}"></iframe>'
        "<script>onload = () => { const d = f.contentDocument.documentElement;"
        "document.title = `${d.scrollWidth} of ${d.clientWidth}` }</script>"
    )
    wide, held = re.search(r"<title>(\d+) of (\d+)</title>", dom(outer, 1400)).groups()
    return int(wide), int(held)


@browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_no_wider_than_a_screen_or_a_phone(tmp_path, width):
    wide, held = probed(plan_of(), tmp_path, width)
    assert wide <= held


@browser
def test_search_and_filters_find_leaves_among_two_thousand(tmp_path):
    (tmp_path / "deep.json").write_text(json.dumps({**TINY, "num_hidden_layers": 220}))
    words = "plan deep.json --mesh data=8 --html page.html".split()
    command = [sys.executable, "-m", "shardinit", *words]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)

    def count(anchor):
        shown = dom(tmp_path / "page.html", 1280, anchor)
        return re.search(r'id="count"[^>]*>([\d,]+) leaves', shown)[1]

    assert count("") == "1,983"
    assert count("#q=layers/66/+kernel") == "7"
    assert count("#q=up&program=0") == "0"


@browser
def test_the_pages_own_policy_lets_its_script_run_and_no_other(tmp_path):
    file = tmp_path / "page.html"
    text = page(plan_of())
    file.write_text(text.replace("<h1>", "<script>document.title='ran'</script><h1>"))
    shown = dom(file, 1280)
    assert "<title>ran" not in shown
    assert re.search(r'id="count"[^>]*>13 leaves', shown)
