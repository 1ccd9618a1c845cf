"""Runs the tutorial, and keeps what it prints: ``python -m tests.docs.notebook``.

With ``--check`` nothing is kept: the exit code is 1 where a cell prints something else.
As Jupyter would, less its kernel: what a cell prints, and what its last line is worth.
Cells that begin with ``%`` are for Jupyter alone.
"""

import ast
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"


def read():
    return json.loads(NOTEBOOK.read_text("utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _lines(text):
    return text.splitlines(keepends=True)


def _run(source, names, count):
    """The outputs of a cell."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    said, value = io.StringIO(), None
    with contextlib.redirect_stdout(said):
        exec(compile(tree, f"cell {count}", "exec"), names)
        if last is not None:
            value = eval(
                compile(ast.Expression(last.value), f"cell {count}", "eval"), names
            )
    outputs = []
    if said.getvalue():
        text = _lines(said.getvalue())
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    if value is not None:
        data = {"text/plain": _lines(repr(value))}
        outputs.append(
            {
                "data": data,
                "execution_count": count,
                "metadata": {},
                "output_type": "execute_result",
            }
        )
    return outputs


def run(notebook):
    """The outputs of every code cell, in order."""
    names, found = {"__name__": "tutorial"}, []
    for count, cell in enumerate(code_cells(notebook), 1):
        source = "".join(cell["source"])
        found.append([] if source.startswith("%") else _run(source, names, count))
    return found


def main():
    notebook = read()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        outputs = run(notebook)
    cells = code_cells(notebook)
    for count, (cell, found) in enumerate(zip(cells, outputs, strict=True), 1):
        if "--check" in sys.argv and cell["outputs"] != found:
            return f"cell {count} prints {json.dumps(found, indent=1)}"
        cell["outputs"], cell["execution_count"] = found, count
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
