"""The package list of pyproject.toml is written by hand; a folder missing there would be missing from the wheel."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import mlx_rsgwm

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def listed_packages() -> set[str]:
    """``packages`` of ``[tool.setuptools]`` (tomllib comes with Python 3.11, and 3.10 must run this too)."""
    block = re.search(r"^packages = \[(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)
    assert block is not None
    return set(re.findall(r'"([^"]+)"', block[1]))


MAPPED = {"mlx_rsgwm": "mlx_rsgwm"} | {f"mlx_rsgwm.{name}": name for name in ("converters", "cli", "bench")}


def folders_on_disk() -> set[str]:
    """Full names of the folders that hold Python files, mapped as the wheel maps them."""
    found = set()
    for name, top in MAPPED.items():
        for file in (ROOT / top).rglob("*.py"):
            found.add(".".join([name, *file.parent.relative_to(ROOT / top).parts]))
    return found


def test_the_mapping_is_the_one_in_pyproject():
    block = PYPROJECT.split("[tool.setuptools.package-dir]")[1].split("\n[")[0]
    assert dict(re.findall(r'^"?([\w.]+)"? = "(\w+)"', block, re.MULTILINE)) == MAPPED


def test_every_folder_is_listed():
    assert listed_packages() == folders_on_disk()


def test_every_listed_folder_is_a_regular_package():
    """``import`` would also accept a folder without ``__init__.py``, but then the editable install differs."""
    for package in listed_packages():
        assert importlib.import_module(package).__file__ is not None, package


def test_no_generic_name_reaches_site_packages():
    assert {package.split(".")[0] for package in listed_packages()} == {"mlx_rsgwm"}


def test_every_data_file_is_shipped():
    """Whatever lies in the package beside Python files is named under package-data."""
    extra = {file for file in (ROOT / "mlx_rsgwm").rglob("*") if file.is_file() and file.suffix not in {".py", ".pyc"}}
    recipes = set((ROOT / "mlx_rsgwm" / "recipes").glob("*.yaml"))
    page = ROOT / "mlx_rsgwm" / "serving" / "page.html"
    predictors = set((ROOT / "mlx_rsgwm" / "probe" / "predictors").glob("*/*.json"))
    assert extra - recipes - predictors <= {ROOT / "mlx_rsgwm" / "py.typed", page}
    assert '"mlx_rsgwm.probe" = ["predictors/*/*.json"]' in PYPROJECT
    assert '"mlx_rsgwm.serving" = ["page.html"]' in PYPROJECT
    assert '"mlx_rsgwm.recipes" = ["*.yaml"]' in PYPROJECT
    assert 'mlx_rsgwm = ["py.typed"]' in PYPROJECT


def test_the_version_is_in_the_changelog_or_unreleased():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog or f"## [{mlx_rsgwm.__version__}]" in changelog


def test_the_workflow_runs_what_the_project_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    steps = [step.get("run") for step in workflow["jobs"]["check"]["steps"]]
    assert ".ci/run" in steps
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8")


TOP = {
    ".ci", ".github", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile",
    "README.md", "SECURITY.md", "bench", "cli", "converters", "docs", "examples", "mlx_rsgwm", "pyproject.toml",
    "tests",
}  # fmt: skip


def test_nothing_else_is_kept_at_the_top():
    """Commands tried in the working folder write there, and what they write is easily committed with the rest."""
    if not (ROOT / ".git").exists():
        pytest.skip("no repository")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    assert {name.split(b"/")[0].decode() for name in listed.split(b"\0") if name} == TOP
