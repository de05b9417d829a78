"""The library's face: what is exported, that it is documented and lazy, and that the example does the whole job."""

import ast
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest

import mlx_rsgwm as rs
from tests.conftest import make_base

ROOT = Path(__file__).parent.parent
FUNCTIONS = [name for name in rs.__all__ if inspect.isfunction(getattr(rs, name))]


@pytest.fixture(scope="module")
def answering_base(tmp_path_factory):
    """A tiny base that answers every question with a number, now and then the right one."""
    from mlx.utils import tree_flatten

    from mlx_rsgwm.models.base import load_base

    folder = make_base(tmp_path_factory.mktemp("answering") / "tiny")
    base = load_base(str(folder), dtype="float32")
    base.model.unfreeze()
    optimizer, rng = optimizers.Adam(5e-3), np.random.default_rng(0)
    answers = [[*base.tokenizer.encode(f"?\nA: #### {number}"), 0] for number in (16, 25, 30, 33, 40)]

    def loss(model, tokens):
        return nn.losses.cross_entropy(model(tokens[:, :-1])[:, -9:], tokens[:, -9:], reduction="mean")

    step = nn.value_and_grad(base.model, loss)
    for _ in range(150):
        rows = [[*rng.integers(60, 100, 12).tolist(), *answers[number]] for number in rng.integers(0, 5, 8)]
        _, gradients = step(base.model, mx.array(rows))
        optimizer.update(base.model, gradients)
        mx.eval(base.model.parameters(), optimizer.state)
    weights = dict(tree_flatten(base.model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return folder


def test_the_names_of_all_are_there_and_nowhere_else_given_otherwise():
    assert rs.__all__ == sorted(rs.__all__)
    assert set(rs.__all__) <= set(dir(rs))
    # What type checkers see is what Python gives.
    tree = ast.parse((ROOT / "mlx_rsgwm" / "__init__.py").read_text())
    typed = {
        alias.name: node.module
        for branch in tree.body if isinstance(branch, ast.If)
        for node in branch.body if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip
    assert typed == rs._MODULE_OF
    assert set(typed) == set(rs.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'mrege'"):
        rs.mrege  # noqa: B018


def test_the_import_loads_neither_mlx_nor_numpy():
    code = "import sys, mlx_rsgwm; print(sorted({'mlx', 'numpy', 'yaml', 'mlx_lm', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_typed_and_documented(name):
    function = getattr(rs, name)
    text = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
        assert f"{parameter.name}" in text, parameter.name
        if "Path" in str(parameter.annotation):
            assert "str" in str(parameter.annotation) or "Source" in str(parameter.annotation), parameter
    assert "Raises:" in text
    example = text.partition("Example::")[2]
    assert f"rs.{name}(" in example
    ast.parse(inspect.cleandoc(example))


def test_the_page_is_what_the_docstrings_say():
    spec = importlib.util.spec_from_file_location("generate_api", ROOT / "docs" / "generate_api.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert set(generator.FUNCTIONS) == set(FUNCTIONS)
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), "run: python docs/generate_api.py"


def test_readme_shows_five_lines_that_are_python_and_ours():
    """Names and arguments are those of the library; the example is as short as the README says."""
    assert len([line for line in (ROOT / "examples" / "demo.py").read_text().splitlines() if line.strip()]) <= 24
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## From Python\n")[1].split("\n##")[0]
    shown = [line[4:] for line in section.splitlines() if line.startswith("    ")]
    assert len(shown) <= 5
    tree = ast.parse("\n".join(shown))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    ours = {call.func.attr: call for call in calls if getattr(call.func.value, "id", None) == "rs"}
    assert set(ours) == {"merge", "open_pipeline"}
    for name, call in ours.items():
        inspect.signature(getattr(rs, name)).bind(*call.args, **{word.arg: word.value for word in call.keywords})


def test_the_example_does_the_whole_job(answering_base, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), str(out), str(answering_base)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "right before and after checking" in done.stdout
    report = json.loads((out / "report" / "report.json").read_text())
    assert report["draft_verify"]["accuracy"]["n"] == 96
    assert (out / "verifier" / "calibration.json").is_file()
    assert (out / "drafter-peft" / "adapter_model.safetensors").is_file()


def test_a_stopped_training_resumes_and_a_finished_one_is_not_overwritten(answering_base, tmp_path):
    corpus = rs.build_corpus("change", tmp_path / "corpus", draft_rows=16, verify_rows=4)
    first = rs.train(corpus, tmp_path / "a", base=str(answering_base), epochs=1)
    in_memory = rs.train(str(tmp_path / "corpus"), base=rs.load_base(str(answering_base)), epochs=1)
    assert all(mx.array_equal(value, in_memory.weights[name]).item() for name, value in first.weights.items())
    with pytest.raises(rs.RsgwmError, match="already holds a finished adapter"):
        rs.train(corpus, tmp_path / "a", base=str(answering_base))
    with pytest.raises(rs.RsgwmError, match=r"learning_rte.*learning_rate"):
        rs.train(corpus, base=str(answering_base), learning_rte=1e-3)


def test_defaults_are_those_of_the_command_line(pool, tmp_path):
    """The same merge by the command and by the library has the same bits, method by method with random parts."""
    from click.testing import CliRunner

    from mlx_rsgwm.cli.main import rsgwm

    for method in ("dare_linear", "rsgwm"):
        merged = rs.merge(pool, tmp_path / method, method=method)
        done = CliRunner().invoke(
            rsgwm, ["merge", *map(str, pool), "--method", method, "--out", str(tmp_path / f"{method}-cli")]
        )
        assert done.exit_code == 0, done.output
        other = rs.merge(pool, method=method)
        by_library, by_command = (
            (tmp_path / name / "adapters.safetensors").read_bytes() for name in (method, f"{method}-cli")
        )
        assert by_library == by_command
        assert all(mx.array_equal(value, other.weights[name]).item() for name, value in merged.weights.items())


def test_what_reads_back_otherwise_is_told(pool, tmp_path, monkeypatch):
    from mlx_rsgwm.converters import convert as module

    def changed(source, *rest, **more):
        adapter = rs.load_adapter(source, *rest, **more)
        if Path(source).name == "out":
            name = next(iter(adapter.weights))
            adapter.weights[name] = adapter.weights[name] + 1e-3
        return adapter

    rs.convert(pool[0], tmp_path / "right", to="mlx")
    monkeypatch.setattr(module, "load_adapter", changed)
    with pytest.raises(rs.CheckFailed, match="reads back otherwise"):
        rs.convert(pool[0], tmp_path / "out", to="mlx")


def test_a_pool_is_audited_and_merged_by_the_plan(make_adapter, tmp_path):
    folders = [make_adapter(seed, size=size).save(tmp_path / str(seed)) for seed, size in ((0, 0.1), (1, 4.0))]
    audited = rs.audit_adapters(folders, plan=tmp_path / "plan.yaml", page=tmp_path / "audit.html")
    (pair,) = audited.pairs
    assert pair.verdict == "imbalanced"
    assert "<svg" in (tmp_path / "audit.html").read_text(encoding="utf-8")
    merged = rs.merge(plan=tmp_path / "plan.yaml", out=tmp_path / "merged")
    assert merged.manifest["merge"]["outcome"]["truncated"]["dominance"] < 0.2
    assert rs.load_adapter(tmp_path / "merged").weights.keys() == merged.weights.keys()
    with pytest.raises(rs.RsgwmError, match="a plan says method"):
        rs.merge(plan=tmp_path / "plan.yaml", method="ties")
    with pytest.raises(rs.RsgwmError, match="did you mean 'post'"):
        rs.audit_adapters(folders, preset="pots")


def test_questions_that_were_seen_are_refused(answering_base, tmp_path):
    from mlx_rsgwm.data.row_hashes import RowRecord

    corpus = rs.build_corpus("change", tmp_path / "corpus", draft_rows=8, verify_rows=0)
    rs.train(corpus, tmp_path / "a", base=answering_base, steps=1)
    pipeline = rs.open_pipeline(tmp_path / "a", base=answering_base, max_tokens=4)
    trained = rs.load_questions("change", split="train", limit=4)
    for ask in (rs.calibrate, rs.evaluate):
        with pytest.raises(rs.RsgwmError, match=r"4 of 4 .* were trained"):
            ask(pipeline, trained)
    tested = rs.load_questions("change", limit=3)
    seen = RowRecord.of(question.question for question in tested).describe()
    pipeline.calibration = SimpleNamespace(row_hashes=seen)  # one that is kept nowhere
    with pytest.raises(rs.RsgwmError, match=r"3 of 3 .*calibrated on"):
        rs.evaluate(pipeline, tested)


def test_unknown_conversions_are_refused(tmp_path):
    with pytest.raises(rs.RsgwmError, match="to peft, mlx, gguf, not"):
        rs.convert(tmp_path, tmp_path / "out", to="onnx")
