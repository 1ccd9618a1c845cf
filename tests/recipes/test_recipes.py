"""The recipes of CONTRIBUTING.md, written into a copy of the checkout and run."""

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
PYTEST = "python -m pytest "
CHAPTER = (ROOT / "CONTRIBUTING.md").read_text().split("\n## Recipes\n")[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPES = {
    title: BLOCK.findall(text)
    for title, text in (part.split("\n", 1) for part in CHAPTER.split("\n### ")[1:])
}


def test_there_is_a_recipe_for_each_kind_of_addition():
    assert list(RECIPES) == [
        "Add a primitive",
        "Add a front end",
        "Add a model family",
        "Add a command",
        "Add an RPC",
    ]


def test_recipes_work_as_they_are_written(tmp_path):
    # All in one copy: what costs is a process that imports JAX, not what it tests.
    require_grpc_tools()
    copy_checkout(tmp_path)
    tests, python = [], set()
    for title, blocks in RECIPES.items():
        written = {write(tmp_path, *block) for block in blocks if block[0] != "sh"}
        assert len([name for name in written if "tests" not in name]) <= MOST_FILES
        python |= {name for name in written if name.endswith(".py")}
        asked = [text for kind, text in blocks if kind == "sh"]
        commands = [line for text in asked for line in text.splitlines()]
        mine = [line for line in commands if line.startswith(PYTEST)]
        assert mine, f"{title} tests nothing"
        tests += [line.removeprefix(PYTEST) for line in mine]
        for command in commands:
            if command not in mine:
                run(tmp_path, command)
    run(tmp_path, PYTEST + " ".join(tests))
    if shutil.which("ruff", path=Path(sys.executable).parent):
        names = " ".join(sorted(python))
        run(tmp_path, f"python -m ruff check {names}")
        run(tmp_path, f"python -m ruff format --check {names}")


def copy_checkout(folder):
    skipped = shutil.ignore_patterns("__pycache__", "node_modules")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skipped)
        else:
            shutil.copy(ROOT / name, folder / name)


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
