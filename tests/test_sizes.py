"""Holds the sizes that keep the code readable, and the names that say nothing out of it."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("mlx_rsgwm", "converters", "cli", "bench")
BESIDE = ("tests", "examples", "docs")  # beside what is installed: held to MOST_LINES alone
MOST_LINES, FEWEST_LINES = 400, 40
MEDIAN_FUNCTION, NINETIETH_FUNCTION = 10, 28
LONGEST_BODY = 58  # lines of a function's body, without its docstring
FILLERS = {"one", "found", "kept", "theirs", "whole", "ours", "own"}

# Files below FEWEST_LINES. A package's __init__.py need hold no more than its sentence.
SHORT = {
    "mlx_rsgwm/__main__.py": "python -m mlx_rsgwm",
    "bench/results.py": "the one ending of all benchmarks",
    "bench/public_tasks.py": "two studies train on public data sets",
    "bench/shapes.py": "data: a model's shapes, for all benchmarks",
    "bench/architecture_configs.py": "the one table that joins two files of data",
    "cli/plot.py": "a thin command",
    "converters/mlx_lm.py": "a converter of its own among converters, and short",
    "mlx_rsgwm/core/random_streams.py": "all folders draw from it",
    "mlx_rsgwm/core/versions.py": "all manifests tell versions by it",
    "mlx_rsgwm/merging/steps/elementwise.py": "a step of its own, which several families take",
    "mlx_rsgwm/merging/weights.py": "read by several families, and by options that must not import them",
    "mlx_rsgwm/models/adapter_keys.py": "the names of an adapter's arrays, left of training and converters",
    "mlx_rsgwm/models/token_layers.py": "which layers hold a row a token; models and converters ask it",
    "mlx_rsgwm/training/history.py": "what a run tells of its course, apart from the state that resumes it",
}
# (file, name): why it stays.
STAY = {
    ("mlx_rsgwm/models/adapter.py", "kept"): "a field of the library's Adapter",
    ("converters/peft/read.py", "kept"): "that field, assigned",
    ("converters/peft/uniform.py", "kept"): "a key of the layout file on disk",
    ("mlx_rsgwm/studies/rounding_remedies.py", "kept"): "a key of the result",
    ("mlx_rsgwm/studies/lm_eval.py", "ours"): "a key of the results on disk",
    ("mlx_rsgwm/studies/lm_eval.py", "theirs"): "a key of the results on disk",
}


def sources(folders: Iterable[str]) -> dict[str, str]:
    """Every Python file of some folders by its path below the root."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


SOURCES = sources(FOLDERS)


def function_lengths(source: str) -> list[int]:
    """Lines of every function of a source, nested ones too, from ``def`` to its last line."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]


def body_lengths(source: str) -> Iterator[tuple[str, int]]:
    """Every function's name and the lines of its body, from the first statement that is no docstring to the last."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield node.name, (statements[-1].end_lineno or 0) - statements[0].lineno + 1 if statements else 0


def bound_names(source: str) -> Iterator[str]:
    """Names that a source gives to variables, parameters, attributes, functions, classes, imports and exceptions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def test_no_file_is_too_long():
    everything = SOURCES | sources(BESIDE)
    assert {file: lines for file, text in everything.items() if (lines := len(text.splitlines())) > MOST_LINES} == {}


def test_short_files_have_a_reason():
    short = {file for file, text in SOURCES.items() if len(text.splitlines()) < FEWEST_LINES}
    assert {file for file in short if not file.endswith("__init__.py")} == set(SHORT)


def test_functions_are_short():
    lengths = sorted(length for text in SOURCES.values() for length in function_lengths(text))
    assert statistics.median(lengths) <= MEDIAN_FUNCTION
    assert lengths[int(0.9 * len(lengths))] <= NINETIETH_FUNCTION


@pytest.mark.parametrize("folder", FOLDERS)
def test_bodies_are_short_in_every_folder(folder):
    bodies = [(file, *body) for file, text in sources([folder]).items() for body in body_lengths(text)]
    assert [body for body in bodies if body[2] > LONGEST_BODY] == []
    lengths = sorted(lines for _, _, lines in bodies)
    assert statistics.median(lengths) <= MEDIAN_FUNCTION
    assert lengths[int(0.9 * len(lengths))] <= NINETIETH_FUNCTION


def test_names_say_what_they_hold():
    fillers = {(file, name) for file, text in SOURCES.items() for name in bound_names(text) if name in FILLERS}
    assert fillers == set(STAY), "names that say nothing, or exceptions that are no longer needed"


@pytest.mark.parametrize(
    "source",
    [
        "one = 1",
        "def f(one): ...",
        "[one for one in x]",
        "x.one = 1",
        "lambda one: 1",
        "def one(): ...",
        "import a as one",
    ],
)
def test_every_way_to_bind_a_name_counts(source):
    assert "one" in bound_names(source)


def test_nested_functions_are_measured():
    assert sorted(function_lengths("def f():\n    def g():\n        pass\n    return g\n")) == [2, 4]


def test_a_docstring_is_no_part_of_a_body():
    assert list(body_lengths('def f(\n    a,\n):\n    """Says\n    much."""\n    a()\n    return a\n')) == [("f", 2)]
    assert list(body_lengths('def f():\n    """Nothing else."""\n')) == [("f", 0)]
