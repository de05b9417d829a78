"""What SECURITY.md says and no other test holds: nothing that runs code, no link followed, nothing sent unasked."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import mlx.core as mx
import pytest
import yaml

from mlx_rsgwm.core import files
from mlx_rsgwm.core.config import Loader, read_yaml
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.safetensors_io import PICKLE_SUFFIXES, read_safetensors, write_safetensors

ROOT = Path(__file__).parent.parent
SOURCES = [file for top in ("mlx_rsgwm", "converters", "cli", "bench") for file in sorted((ROOT / top).rglob("*.py"))]
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
NEVER_IMPORTED = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "requests", "urllib", "socket"}
SETTINGS = ROOT / "mlx_rsgwm" / "core" / "config.py"  # its loader is a safe one: the test below
UNSAFE = {("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("torch", "load"), ("os", "system")}


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node


def test_the_loader_of_yaml_makes_no_objects():
    assert issubclass(Loader, yaml.SafeLoader)
    makers = {name for name in Loader.yaml_constructors if name and not name.startswith("tag:yaml.org,2002:")}
    assert not makers
    assert not Loader.yaml_multi_constructors


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in calls(tree):
        target = node.func
        if isinstance(target, ast.Name):
            assert target.id not in RUNS_CODE, f"line {node.lineno}: {target.id}()"
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
            called = (target.value.id, target.attr)
            assert called not in UNSAFE or (called == ("yaml", "load") and file == SETTINGS), f"line {node.lineno}"
        for keyword in node.keywords:
            constant = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            assert not (keyword.arg in ("trust_remote_code", "shell", "allow_pickle") and constant is True)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {name.partition(".")[0] for name in names} & NEVER_IMPORTED, f"line {node.lineno}"


@pytest.mark.parametrize("suffix", sorted(PICKLE_SUFFIXES))
def test_pickles_are_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"adapter{suffix}"
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(RsgwmError, match="pickle file, which can run code"):
        read_safetensors(path)


def test_a_link_in_an_output_folder_is_replaced_and_its_target_stays(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.json", "b.safetensors", ".b.safetensors"):
        os.symlink(outside, out / name)
    files.write_json(out / "a.json", {})
    write_safetensors(out / "b.safetensors", {"x": mx.zeros(2)})
    assert outside.read_text() == "mine"
    assert not (out / "a.json").is_symlink()
    assert not (out / "b.safetensors").is_symlink()


def test_yaml_makes_no_objects(tmp_path):
    mark = tmp_path / "ran"
    with pytest.raises(RsgwmError, match="not valid YAML"):
        read_yaml(f"a: !!python/object/apply:os.system ['touch {mark}']", "recipe")
    assert not mark.exists()


def test_aliases_that_unfold_without_end_are_refused_at_once():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    for text in (bomb, "a: &a [*a]", "a: &a {b: *a}"):
        with pytest.raises(RsgwmError, match="unfolds to more than"):
            read_yaml(text, "recipe")
    assert read_yaml("a: &x [1, 2]\nb: *x", "recipe") == {"a": [1, 2], "b": [1, 2]}


def test_telemetry_is_off_unless_the_user_wants_it():
    from mlx_rsgwm.cli.main import set_environment

    environment: dict[str, str] = {}
    set_environment(environment)
    assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"


def promises() -> dict[str, list[tuple[str, str]]]:
    """Every row of the page's table: its promise, and the files and functions that hold it."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", text, re.M)
    return {rule: re.findall(r"`(tests/[\w/.]+)::(\w+)`", held) for rule, held in rows if rule != "rule"}


def test_every_promise_names_its_tests_and_they_exist():
    named = promises()
    assert len(named) >= 14
    assert [rule for rule, tests in named.items() if not tests] == []
    for file, test in {each for tests in named.values() for each in tests}:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert test.startswith("test_"), test
        assert test in functions, f"{file}::{test}"


def test_workflows_ask_for_no_more_than_reading():
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}, file.name
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    assert "pip-audit" in (ROOT / ".github" / "workflows" / "audit.yml").read_text(encoding="utf-8")
