"""Every block of Python and of shell in the pages runs, as it is written."""

import pathlib
import re
import subprocess
import sys

import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = ["frontends", "migrate/flax", "migrate/maxtext", "migrate/levanter"]
PAGES += ["migrate/orbax", "migrate/huggingface", "aot", "deferred", "modules"]
PAGES += ["inspect", "pin", "torch"]
ON_ONE_VERSION = ["optimizer", "audit", "complete", "cut", "keys", "promises", "faq"]
COMMANDS = ["aot", "inspect", "pin", "migrate/huggingface"]
NEEDED = {
    "migrate/levanter": ["haliax"],
    "migrate/huggingface": ["torch", "transformers"],
    "torch": ["torch", "transformers"],
}

# of Haliax, and of treescope when Penzai is imported first
pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The chararray class"),
]


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(pytest.param(page, marks=pytest.mark.once) for page in ON_ONE_VERSION)],
)
@pytest.mark.few(3)
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for needed in NEEDED.get(page, ()):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    text = (DOCS / f"{page}.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert blocks
    names = {"__name__": f"docs.{page}"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/{page}.md, block {number}", "exec"), names)


@pytest.mark.once
@pytest.mark.parametrize("page", COMMANDS)
@pytest.mark.slow
def test_every_command_of_a_page_runs(page, tmp_path):
    text = (DOCS / f"{page}.md").read_text("utf-8")
    (script,) = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    command = f'shardinit() {{ "{sys.executable}" -m shardinit "$@"; }}\n{script}'
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr


def test_no_page_is_left_out():
    blocks = {}
    for file in DOCS.rglob("*.md"):
        page = file.relative_to(DOCS).with_suffix("").as_posix()
        blocks[page] = re.findall(r"^```(\w+)", file.read_text("utf-8"), flags=re.M)
    assert {page for page, found in blocks.items() if "python" in found} == {
        *PAGES,
        *ON_ONE_VERSION,
    }
    assert {page for page, found in blocks.items() if "sh" in found} == set(COMMANDS)
