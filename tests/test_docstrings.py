"""Every public name says what it is, and functions of arrays where numerics are done say the arrays' shapes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("mlx_rsgwm", "converters", "cli", "bench")
NUMERICS = ("mlx_rsgwm/linalg", "mlx_rsgwm/merging/steps", "mlx_rsgwm/evaluation/stats")
# click documents the method that its parameter types replace; a bench's main is what its module's docstring describes.
ELSEWHERE = {"convert", "main"}
ARRAY = re.compile(r"mx\.array|np\.ndarray")
SHAPE = re.compile(r"\([^()]*,[^()]*\)|scalar|shape|elementwise")  # (n,), (in, rank), or in words

Public = tuple[str, ast.FunctionDef | ast.ClassDef]


def public_names(nodes: list[ast.stmt], inside: str = "") -> Iterator[Public]:
    """Public classes, functions and methods by their dotted name; not what a protocol only declares."""
    for node in nodes:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield f"{inside}{node.name}", node
            yield from public_names(node.body, f"{inside}{node.name}.")
        elif ast.unparse(node.body[-1]) != "..." and node.name not in ELSEWHERE:
            yield f"{inside}{node.name}", node


def modules(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def undocumented(tree: ast.Module) -> list[str]:
    return [name for name, node in public_names(tree.body) if not ast.get_docstring(node)]


def without_shapes(tree: ast.Module) -> list[str]:
    """Public functions that take or return arrays and whose docstrings name no shape."""
    return [
        name
        for name, node in public_names(tree.body)
        if isinstance(node, ast.FunctionDef)
        and ARRAY.search(f"{ast.unparse(node.args)} {ast.unparse(node.returns) if node.returns else ''}")
        and not SHAPE.search(ast.get_docstring(node) or "")
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_and_public_name_is_documented(folder):
    assert [file for file, tree in modules(folder) if tree.body and not ast.get_docstring(tree)] == []
    assert {file: names for file, tree in modules(folder) if (names := undocumented(tree))} == {}


def test_functions_of_arrays_say_their_shapes():
    assert {file: names for file, tree in modules(*NUMERICS) if (names := without_shapes(tree))} == {}


def test_what_lacks_a_docstring_or_a_shape_is_seen():
    tree = ast.parse('def f(x: mx.array):\n    """A sum."""\nclass C:\n    """It."""\n    def g(self): return 1\n')
    assert undocumented(tree) == ["C.g"]
    assert without_shapes(tree) == ["f"]
    assert without_shapes(ast.parse('def f(x: mx.array):\n    """A sum over (rows, n)."""\n')) == []
