"""The example runs as a script, and every block of the page runs too."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[2]


def run(*command, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=cwd,
    )


@pytest.mark.slow
def test_the_decoder_is_filled_in_three_ways_with_the_same_bits(tmp_path):
    done = run(str(ROOT / "examples/deferred_decoder.py"), str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "built: 110 parameters without a value" in lines
    assert any(re.search(r"^1\. .*P\('model', 'data'\)", line) for line in lines)
    assert any(re.search(r"^2\. .*layer_7.mlp.gate .*same bits$", x) for x in lines)
    assert any(re.search(r"^3\. .*: same bits$", line) for line in lines)
    assert lines[-1].endswith("gradients for 110 arrays")
    assert "UninitializedParameter" in done.stdout
    assert (tmp_path / "decoder.html").stat().st_size > 10_000


def test_every_block_of_the_page_runs():
    text = (ROOT / "docs/deferred.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 7
    names = {"__name__": "docs.deferred"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/deferred.md, block {number}", "exec"), names)
    assert names["grads"].parameters["table"].value.shape == (16, 64)
