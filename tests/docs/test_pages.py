"""Every block of the pages on front ends and on migration runs, as it is written."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = ["frontends", "migrate/flax", "migrate/maxtext", "migrate/levanter"]
PAGES += ["migrate/orbax"]

# of Haliax, and of treescope when Penzai is imported first
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The chararray class"),
]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(page):
    if page.endswith("levanter"):
        pytest.importorskip("haliax")
    text = (DOCS / f"{page}.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) >= 3
    names = {"__name__": f"docs.{page}"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/{page}.md, block {number}", "exec"), names)


def test_no_page_is_left_out():
    found = {p.relative_to(DOCS).with_suffix("").as_posix() for p in DOCS.rglob("*.md")}
    assert {p for p in found if p.startswith("migrate/")} | {"frontends"} == set(PAGES)
