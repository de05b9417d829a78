"""Holds the import rules of the design by reading the source: who may import whom, and where heavy packages may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A folder may import those on the lines above its own, and itself; not its neighbours on the line. Deferred imports
# inside functions count too. `bench` stands left of `cli`, which has a command that runs it.
ORDER = (
    ("core", "linalg"),
    ("models",),
    ("data",),
    ("training", "inference", "converters"),
    ("merging", "evaluation", "serving"),
    ("audit",),
    ("probe",),
    ("studies", "recipes"),
    ("bench",),
    ("cli",),
)
LEVEL = {folder: level for level, folders in enumerate(ORDER) for folder in folders}
# (file, module) that may break the order. To stay empty.
EXCEPTIONS: frozenset[tuple[str, str]] = frozenset()
ONLY_IN = {
    "click": ("cli/", "bench/", "tests/"),
    "torch": ("converters/parity/", "bench/", "tests/"),
    **dict.fromkeys(("starlette", "uvicorn", "prometheus_client", "llguidance"), ("mlx_rsgwm/serving/", "tests/")),
}
GRAB_BAGS = {"utils", "util", "common", "helpers", "misc"}
MOST_FOLDERS = 16
# Slow to import, and needed by some commands only: never at the top of a file, so that whoever uses one pays for it.
LATE = [
    *("torch", "transformers", "datasets", "matplotlib", "sklearn", "scipy", "peft", "math_verify", "sympy", "rich"),
    *("lm_eval", "gguf", "huggingface_hub", "prompt_toolkit"),
]
SERVING = ("starlette", "uvicorn", "prometheus_client", "llguidance")  # an extra: `serving` and nothing else needs them


def sources() -> dict[str, str]:
    """Every Python file of the project by its path below the root."""
    folders = ("mlx_rsgwm", "converters", "cli", "bench", "tests")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of all that a source imports anywhere; a relative import begins with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from mlx_rsgwm import models` names a folder only with what is imported.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imported_at_load(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of what a source imports as it is loaded: not in a function, and not for types alone."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported(ast.unparse(node))
        waiting += ast.iter_child_nodes(node)


def folder_of(path: str) -> str:
    """The folder a file belongs to in :data:`ORDER`; empty for the package's own ``__init__`` and ``__main__``."""
    pieces = path.split("/")
    if pieces[0] != "mlx_rsgwm":
        return pieces[0]
    return pieces[1] if len(pieces) > 2 else ""


def forbidden(path: str, name: str) -> str | None:
    """Why the file ``path`` may not import ``name``, or None."""
    if name.startswith("."):
        return "relative import"
    pieces = name.split(".")
    if pieces[0] in ONLY_IN and not path.startswith(ONLY_IN[pieces[0]]):
        return f"{pieces[0]} only in {', '.join(ONLY_IN[pieces[0]])}"
    here = folder_of(path)
    if pieces[0] != "mlx_rsgwm" or len(pieces) == 1 or here in ("tests", ""):
        return None
    there = pieces[1]
    if there == "api":
        return None if here == "cli" else "the library's face stands above all folders but cli"
    if there not in LEVEL or there == here or LEVEL[there] < LEVEL[here] or (path, name) in EXCEPTIONS:
        return None
    return f"{here} may not import {there}"


def violations(path: str, source: str) -> list[str]:
    """Every broken rule of one file, each with its line."""
    problems = [f"{path}:{line}: {name}: {why}" for line, name in imported(source) if (why := forbidden(path, name))]
    if Path(path).stem in GRAB_BAGS:
        problems.append(f"{path}: name says nothing of its content")
    return problems


def test_every_file_keeps_the_rules():
    assert [problem for path, source in sources().items() for problem in violations(path, source)] == []


def test_no_exception_is_left():
    assert not EXCEPTIONS


def test_every_folder_has_its_place():
    folders = {folder_of(path) for path in sources()} - {"tests", ""}
    assert folders <= set(LEVEL)
    assert len(LEVEL) <= MOST_FOLDERS
    loose = [path for path in sources() if path.startswith("mlx_rsgwm/") and path.count("/") == 1]
    assert set(loose) <= {"mlx_rsgwm/__init__.py", "mlx_rsgwm/__main__.py", "mlx_rsgwm/api.py"}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mlx_rsgwm/core/files.py", "from mlx_rsgwm.models.adapter import Adapter"),
        ("mlx_rsgwm/linalg/lowrank.py", "from mlx_rsgwm.core import errors"),
        ("mlx_rsgwm/models/adapter.py", "from mlx_rsgwm.data.questions import Question"),
        ("mlx_rsgwm/models/base.py", "def f():\n    from mlx_rsgwm.converters import gguf"),
        ("mlx_rsgwm/data/corpus.py", "from mlx_rsgwm.training.loop import train"),
        ("mlx_rsgwm/training/loop.py", "def f():\n    from mlx_rsgwm import inference"),
        ("mlx_rsgwm/merging/steps/masks.py", "import mlx_rsgwm.evaluation.metrics"),
        ("mlx_rsgwm/merging/steps/masks.py", "from . import sparsify"),
        ("mlx_rsgwm/evaluation/runner.py", "from mlx_rsgwm.merging.merge import merge"),
        ("mlx_rsgwm/studies/merge_sweep.py", "from mlx_rsgwm.recipes.run import run"),
        ("mlx_rsgwm/recipes/run.py", "from mlx_rsgwm.cli.console import Console"),
        ("mlx_rsgwm/recipes/run.py", "import click"),
        ("converters/peft/convert.py", "import torch.nn"),
        ("converters/peft/convert.py", "from mlx_rsgwm.merging.pool import Pool"),
        ("bench/latency.py", "from mlx_rsgwm.cli.main import rsgwm"),
        ("cli/bench.py", "import torch"),
        ("mlx_rsgwm/data/utils.py", ""),
        ("mlx_rsgwm/studies/controls.py", "from mlx_rsgwm.api import merge"),
    ],
)
def test_a_broken_rule_is_found(path, source):
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mlx_rsgwm/inference/generate.py", "from mlx_rsgwm.data import template\nimport mlx_rsgwm.models.base"),
        ("mlx_rsgwm/merging/merge.py", "from mlx_rsgwm.merging.steps import masks"),
        ("mlx_rsgwm/recipes/run.py", "from mlx_rsgwm.converters.parity.check import check_parity"),
        ("mlx_rsgwm/evaluation/report/folder.py", "from mlx_rsgwm import __version__"),
        ("mlx_rsgwm/__init__.py", "from mlx_rsgwm.merging.merge import merge"),
        ("converters/parity/torch.py", "import torch"),
        ("cli/run.py", "import click\nfrom mlx_rsgwm.recipes.run import run"),
        ("cli/bench.py", "from mlx_rsgwm.bench.latency import measure_latency"),
    ],
)
def test_an_allowed_import_passes(path, source):
    assert violations(path, source) == []


def modules_after(statement: str) -> set[str]:
    """Top-level packages loaded in a fresh interpreter that ran ``statement``."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(output.splitlines()[-1].split())


def test_heavy_packages_are_imported_where_they_are_used():
    early = {
        f"{path}: {name}"
        for path, source in sources().items()
        if not path.startswith(("tests/", "bench/"))
        for _, name in imported_at_load(source)
        if name.split(".")[0] in LATE
    }
    assert early == set()


@pytest.mark.parametrize(
    "source",
    ["import torch", "try:\n    import torch\nexcept ImportError:\n    pass", "class A:\n    from torch import nn"],
)
def test_an_early_import_is_found(source):
    assert [name.split(".")[0] for _, name in imported_at_load(source)] == ["torch"]
    later = "def f():\n    import torch\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"
    assert [name for _, name in imported_at_load(later)] == ["typing.TYPE_CHECKING"]


def test_help_of_every_command_loads_nothing_heavy():
    """mlx is loaded: defaults and choices of options are the library's own, written once."""
    statement = (
        "from mlx_rsgwm.cli.main import rsgwm\nfrom mlx_rsgwm.cli.commands import COMMANDS\n"
        "for name in COMMANDS:\n    try:\n        rsgwm.main([*name.split(), '--help'])\n"
        "    except SystemExit as stop:\n        assert stop.code == 0, name"
    )
    assert modules_after(statement).isdisjoint([*LATE, *SERVING, "mlx_lm"])


def test_importing_the_package_loads_nothing_heavy():
    loaded = modules_after("import mlx_rsgwm")
    assert "mlx_rsgwm" in loaded
    assert loaded.isdisjoint([*LATE, *SERVING])


def test_help_loads_neither_mlx_nor_anything_heavy():
    statement = "from mlx_rsgwm.cli.main import rsgwm\ntry:\n    rsgwm.main(['--help'])\nexcept SystemExit:\n    pass"
    assert modules_after(statement).isdisjoint([*LATE, *SERVING, "mlx", "numpy", "rich"])
