"""No function is more than a reader can hold in mind."""

import ast
from pathlib import Path

import pytest

import shardinit

pytestmark = pytest.mark.once

MOST = 12
BRANCHES = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.IfExp,
    ast.Assert,
    ast.comprehension,
    ast.match_case,
)


def complexity(function):
    """McCabe's number, of which ruff leaves out operators and comprehensions."""
    inside = list(ast.walk(function))
    branches = sum(isinstance(node, BRANCHES) for node in inside)
    filters = sum(len(x.ifs) for x in inside if isinstance(x, ast.comprehension))
    either = sum(len(x.values) - 1 for x in inside if isinstance(x, ast.BoolOp))
    return 1 + branches + filters + either


def functions():
    root = Path(shardinit.__file__).parent
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file.relative_to(root)}: {node.name}", complexity(node)


def test_no_function_branches_more_than_can_be_followed():
    code = "def f(x):\n    return [a or b for a, b in x if a] if x else 0"
    assert complexity(ast.parse(code).body[0]) == 5
    counted = dict(functions())
    assert len(counted) > 2000
    assert {name: count for name, count in counted.items() if count > MOST} == {}
