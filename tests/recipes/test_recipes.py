"""The recipes of CONTRIBUTING.md, each written into a copy of the checkout and run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.grpc_tools import require_grpc_tools

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("shardinit", "protos", "tests", "pyproject.toml")
MOST_FILES = 3  # besides the test
CHAPTER = (ROOT / "CONTRIBUTING.md").read_text().split("\n## Recipes\n")[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPES = {
    title: BLOCK.findall(text)
    for title, text in (part.split("\n", 1) for part in CHAPTER.split("\n### ")[1:])
}


@pytest.fixture
def checkout(tmp_path):
    for name in COPIED:
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "node_modules")
            shutil.copytree(ROOT / name, tmp_path / name, ignore=skipped)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_there_is_a_recipe_for_each_kind_of_addition():
    assert list(RECIPES) == [
        "Add a primitive",
        "Add a front end",
        "Add a model family",
        "Add a command",
        "Add an RPC",
    ]


@pytest.mark.parametrize("title", RECIPES)
@pytest.mark.few(2)
def test_a_recipe_works_as_it_is_written(checkout, title):
    if "generate.py" in str(RECIPES[title]):
        require_grpc_tools()
    written = {write(checkout, *block) for block in RECIPES[title] if block[0] != "sh"}
    assert len([name for name in written if "tests" not in name]) <= MOST_FILES
    commands = "".join(text for kind, text in RECIPES[title] if kind == "sh")
    assert "pytest" in commands
    for command in commands.splitlines():
        run(checkout, command)
    if shutil.which("ruff", path=Path(sys.executable).parent):
        python = " ".join(name for name in sorted(written) if name.endswith(".py"))
        run(checkout, f"python -m ruff check {python}")
        run(checkout, f"python -m ruff format --check {python}")


def write(checkout, kind, text):
    """Writes one block; returns the name of its file."""
    head, _, body = text.partition("\n")
    mark, name = head.split(maxsplit=1)
    path = checkout / name
    assert (kind, mark) in {("python", "#"), ("diff", "---")}
    if kind == "python":
        assert not path.exists(), f"{name} is there already"
        path.write_text(body)
        return name
    lines = body.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    there = path.read_text()
    assert there.count(old) == 1, f"{name} should have these lines once:\n{old}"
    path.write_text(there.replace(old, new))
    return name


def run(checkout, command):
    """Runs a command of a recipe with this interpreter."""
    python, *rest = shlex.split(command)
    assert python == "python"
    done = subprocess.run(
        [sys.executable, *rest],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
