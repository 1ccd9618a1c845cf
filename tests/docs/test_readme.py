"""The README runs as it is written: every block and every command, in order."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shardinit.service.server.config import Config
from shardinit.service.server.server import Server

pytestmark = [pytest.mark.once, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    lines = [
        shlex.split(line, comments=True) for line in "".join(blocks("sh")).split("\n")
    ]
    return [words for words in lines if words]


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    found = blocks("python")
    assert len(found) == 3
    with Server(Config(listen="127.0.0.1:0")) as server:
        for number, block in enumerate(found, 1):
            block = block.replace("localhost:50051", server.address)
            exec(compile(block, f"README.md, block {number}", "exec"), names)
    assert "blocks/{0..15}/up/kernel" in capsys.readouterr().out


def test_the_commands_run(tmp_path):
    ran = [words for words in commands() if words[0] == "shardinit"]
    assert len(ran) >= 8
    for words in ran:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, (
            f"{shlex.join(words)}: {done.stderr or done.stdout}"
        )


def test_what_is_installed_is_there_to_install():
    asked = [words for words in commands() if words[0] != "shardinit"]
    assert [words[:2] for words in asked] == [["pip", "install"]] * len(asked)
    for words in asked:
        for extra in re.findall(r"\[(.*)\]", words[2]):
            assert extra in PROJECT["optional-dependencies"]


def test_what_is_made_is_there_to_make():
    targets = re.findall(r"^    make (\w+)", README, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert all(f"\n{target}:" in makefile for target in targets)


def test_it_links_to_pages_that_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_it_fits_two_screens():
    before_promises = README.split("## Promises")[0].splitlines()
    assert len(before_promises) <= 145
    assert max(map(len, README.splitlines())) <= 95
