"""Holds the import rules of the design by reading the source: who may import whom, and where heavy packages may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ["data", "training", "merging", "pipeline", "evaluation", "recipes", "recipe"]
FOUNDATIONS = {
    "errors",
    "settings",
    "files",
    "json_lines",
    "progress",
    "adapter_keys",
    "spec",
    "adapter",
    "model_folder",
    "model_config",
    "foreign_quantisation",
    "stored_head",
    "token_layers",
    "rope",
    "tokenizer",
    "tokenizer_hash",
    "base",
    "slots",
    "logits",
    "cpu",
    "doctor",
    "processes",
}
# An import of a module on the right is allowed in the one on the left, beyond the general rules.
EXCEPTIONS = {("base", "mlx_rsgwm.converters.gguf"), ("recipe", "mlx_rsgwm.converters")}
ONLY_IN = {"click": ("cli/", "bench/", "tests/"), "torch": ("converters/parity.py", "bench/", "tests/")}
GRAB_BAGS = {"utils", "util", "common", "helpers", "misc"}
LATE = ["torch", "transformers", "datasets", "matplotlib", "sklearn", "peft"]


def sources() -> dict[str, str]:
    """Every Python file of the project by its path below the root."""
    folders = ("mlx_rsgwm", "converters", "cli", "bench", "tests")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}


def imported(source: str) -> set[str]:
    """Full names of the modules a source imports anywhere; a relative import shows as a leading dot."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from mlx_rsgwm import base` names a module, `from mlx_rsgwm.base import Base` does not: keep both.
            names.update({module} | {f"{module}.{alias.name}" for alias in node.names})
    return names


def part_of(path: str) -> str:
    """The stage, foundation or edge a file belongs to; an empty string for the package's own ``__init__``."""
    pieces = Path(path).with_suffix("").parts
    if pieces[0] == "mlx_rsgwm":
        return "" if pieces[1] == "__init__" else pieces[1]
    return pieces[0]


def forbidden(path: str, name: str) -> str | None:
    """Why ``path`` may not import the module ``name``, or ``None``."""
    if name.startswith("."):
        return "relative import"
    pieces = name.split(".")
    if pieces[0] in ONLY_IN and not path.startswith(ONLY_IN[pieces[0]]):
        return f"{pieces[0]} only in {', '.join(ONLY_IN[pieces[0]])}"
    here = part_of(path)
    if pieces[0] != "mlx_rsgwm" or len(pieces) == 1 or here in {"tests", "bench", "cli"}:
        return None
    there = pieces[1]
    if there in {"cli", "bench"}:
        return f"nothing imports {there}"
    allowed = {"__version__"} | FOUNDATIONS
    if here == "":
        allowed |= {*STAGES, "converters"}
    elif here in STAGES:
        allowed |= set(STAGES[: STAGES.index(here) + 1])
    elif here == "converters":
        allowed |= {"converters"}
    if there in allowed:
        return None
    for left, right in EXCEPTIONS:
        # `from mlx_rsgwm.converters import gguf` shows as both names, and the shorter one says nothing yet
        if here == left and (f"{name}.".startswith(f"{right}.") or name == "mlx_rsgwm.converters"):
            return None
    return f"{here or 'mlx_rsgwm'} may not import {there}"


def violations(path: str, source: str) -> list[str]:
    """Every broken rule of one file."""
    found = [f"{path}: {name}: {why}" for name in sorted(imported(source)) if (why := forbidden(path, name))]
    if Path(path).stem in GRAB_BAGS:
        found.append(f"{path}: name says nothing of its content")
    return found


def test_every_file_keeps_the_rules():
    assert [problem for path, source in sources().items() for problem in violations(path, source)] == []


def test_every_part_of_the_package_is_known():
    parts = {part_of(path) for path in sources() if path.startswith("mlx_rsgwm/")}
    assert parts <= {"", *STAGES, *FOUNDATIONS}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mlx_rsgwm/data/corpus.py", "from mlx_rsgwm.training.loop import train"),
        ("mlx_rsgwm/training/loop.py", "def f():\n    from mlx_rsgwm import pipeline"),
        ("mlx_rsgwm/evaluation/report.py", "import mlx_rsgwm.recipe"),
        ("mlx_rsgwm/adapter.py", "from mlx_rsgwm.data.sources import Question"),
        ("mlx_rsgwm/base.py", "from mlx_rsgwm.converters.peft import to_peft"),
        ("mlx_rsgwm/base.py", "from mlx_rsgwm.converters import peft"),
        ("mlx_rsgwm/recipe.py", "from mlx_rsgwm.cli.console import Console"),
        ("mlx_rsgwm/__init__.py", "from mlx_rsgwm.cli import main"),
        ("mlx_rsgwm/merging/masks.py", "from mlx_rsgwm.converters.peft import to_peft"),
        ("mlx_rsgwm/merging/masks.py", "from . import linear"),
        ("mlx_rsgwm/recipe.py", "from mlx_rsgwm.bench.latency import measure"),
        ("mlx_rsgwm/recipe.py", "import click"),
        ("converters/peft.py", "import torch.nn"),
        ("converters/peft.py", "from mlx_rsgwm.recipe import run"),
        ("cli/bench.py", "import torch"),
        ("mlx_rsgwm/data/utils.py", ""),
    ],
)
def test_a_broken_rule_is_found(path, source):
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mlx_rsgwm/pipeline/drafting.py", "from mlx_rsgwm.training.config import Config\nimport mlx_rsgwm.base"),
        ("mlx_rsgwm/base.py", "from mlx_rsgwm.converters.gguf import read"),
        ("mlx_rsgwm/base.py", "def f():\n    from mlx_rsgwm.converters import gguf"),
        ("mlx_rsgwm/recipe.py", "from mlx_rsgwm.converters.parity import check_parity"),
        ("mlx_rsgwm/evaluation/report.py", "from mlx_rsgwm import __version__"),
        ("converters/parity.py", "import torch"),
        ("cli/run.py", "import click\nfrom mlx_rsgwm.recipe import run"),
    ],
)
def test_an_allowed_import_passes(path, source):
    assert violations(path, source) == []


def modules_after(statement: str) -> set[str]:
    """Top-level packages loaded in a fresh interpreter that ran ``statement``."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(output.splitlines()[-1].split())


def test_importing_the_package_loads_nothing_heavy():
    loaded = modules_after("import mlx_rsgwm")
    assert "mlx_rsgwm" in loaded
    assert loaded.isdisjoint(LATE)


def test_help_loads_neither_mlx_nor_anything_heavy():
    statement = "from mlx_rsgwm.cli.main import rsgwm\ntry:\n    rsgwm.main(['--help'])\nexcept SystemExit:\n    pass"
    assert modules_after(statement).isdisjoint([*LATE, "mlx", "numpy", "rich"])
