"""The site: all pages are in its tree, links lead somewhere, the notebook runs."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import shardinit
from tests.docs import notebook

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
INDEX = (DOCS / "index.md").read_text("utf-8")


def test_every_page_is_in_the_tree_once():
    trees = re.findall(r"^```\{toctree\}$(.*?)^```$", INDEX, flags=re.S | re.M)
    lines = [line for tree in trees for line in tree.splitlines() if line]
    listed = [
        DOCS / line.split("<")[-1].rstrip(">") for line in lines if line[0] != ":"
    ]
    pages = [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb"), *ROOT.glob("*.md")]
    pages = [
        page.with_suffix("").resolve() for page in pages if page.name != "index.md"
    ]
    pages += [page.with_suffix("") for page in ROOT.glob("benchmarks/*.md")]
    assert sorted(path.resolve() for path in listed) == sorted(pages)


def test_links_lead_to_files_that_are_there():
    files = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("benchmarks/*.md")]
    for file in files:
        text = re.sub(r"^```.*?^```", "", file.read_text("utf-8"), flags=re.S | re.M)
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "reference.md").read_text("utf-8")
    listed = set(re.findall(r"auto\w+:: (?:shardinit\.)?(\w+)", text))
    assert set(shardinit.__all__) - listed == {"verify"}  # its functions are there


@pytest.mark.slow
def test_the_notebook_prints_what_it_says():
    command = [sys.executable, "-m", "tests.docs.notebook", "--check"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = notebook.code_cells(notebook.read())
    assert sum(bool(cell["outputs"]) for cell in cells) >= 7


def test_the_picture_is_that_of_a_plan():
    picture = ElementTree.parse(DOCS / "picture.svg").getroot()
    said = [text.text for text in picture.iter() if text.text and text.text.strip()]
    leaves, programs = re.search(
        r"!\[([\d,]+) leaves, cut into (\d+) programs", (ROOT / "README.md").read_text()
    ).groups()
    assert {f"init(key): {leaves} leaves", f"{programs} programs"} <= set(said)
