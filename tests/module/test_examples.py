"""The example runs as a script, and every block of the page runs too."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_the_example_runs_as_a_script(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples/module_net.py")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for line in ("MLP: 6 leaves", "ConvNet: 14 leaves", "Transformer: 24 leaves"):
        assert line in done.stdout
    assert re.search(
        r"blocks/1/attention +│ Attention +│ out: float32\[8,8,64\]", done.stdout
    )


@pytest.mark.slow
def test_every_block_of_the_page_runs():
    text = (ROOT / "docs/modules.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 6
    names = {"__name__": "docs.modules"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/modules.md, block {number}", "exec"), names)
    net, parameters = names["net"], names["parameters"]
    assert not net.training
    assert len(jax.tree.leaves(parameters)) == 8
    assert np.any(jax.device_get(net.layers[1].mean))
