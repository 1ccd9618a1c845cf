"""Completion: what a shell offers while a command is typed, asked as shells ask."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

BIN = Path(sys.executable).parent
LLAMAS = ["llama-3.1-405b", "llama-3.1-70b", "llama-3.1-8b"]


def shell(*command, **variables):
    """What a command prints, with the environment's programs in reach."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        env=os.environ | {"PATH": path} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BASH = """
eval "$(_SHARDINIT_COMPLETE=source_bash shardinit)"
COMP_WORDS=({words}) COMP_CWORD={at}
_shardinit_completion shardinit
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("shardinit insp", ["inspect"]),
        ("shardinit plan --mem", ["--memory-limit"]),
        ("shardinit plan llama", LLAMAS),
        ("shardinit diff gpt2 llama", LLAMAS),
        ("shardinit client desc", ["describe"]),
        ("shardinit client describe llama", LLAMAS),
        ("shardinit plan no-such", [""]),  # bash then completes files
    ],
)
def test_bash(words, offered):
    script = BASH.format(words=words, at=len(words.split()) - 1)
    assert shell("bash", "-c", script).splitlines() == offered


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish():
    script = "_SHARDINIT_COMPLETE=source_fish shardinit | source; complete -C'{}'"
    said = shell("fish", "-c", script.format("shardinit plan llama"))
    assert sorted(said.splitlines()) == LLAMAS  # in the order of its own


def test_zsh():
    """The lines that its completion function evaluates; zsh itself needs a terminal."""
    script = shell("shardinit", _SHARDINIT_COMPLETE="source_zsh")
    assert "_SHARDINIT_COMPLETE=complete_zsh" in script
    asked = {"_SHARDINIT_COMPLETE": "complete_zsh"}
    said = shell("shardinit", **asked, _TYPER_COMPLETE_ARGS="shardinit plan llama")
    assert said.split('"')[1::2] == LLAMAS
