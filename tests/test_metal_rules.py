"""The guards of conftest.py do bite: a suite that only seems guarded is worse than one that is not."""

import ast
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [file for top in ("mlx_rsgwm", "converters", "cli", "bench") for file in sorted((ROOT / top).rglob("*.py"))]
ANYWHERE = {"norm", "cross"}  # of mx.linalg, these are made of operations that Metal has
ABSENT = {"quantile", "median", "percentile", "unique", "searchsorted", "bincount", "histogram"}


def test_linalg_needs_the_cpu_stream():
    matrix = mx.array(np.eye(3, dtype=np.float32))
    with pytest.raises(AssertionError, match=r"mx\.linalg\.svd needs stream=mx\.cpu"):
        mx.linalg.svd(matrix)
    values = mx.linalg.svd(matrix, stream=mx.cpu)[1]
    assert values.tolist() == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.parametrize("name", ["zeros", "ones"])
def test_float64_is_refused(name):
    with pytest.raises(AssertionError, match="float64 does not exist on Metal"):
        getattr(mx, name)((2,), dtype=mx.float64)
    assert getattr(mx, name)((2,)).dtype == mx.float32


def dotted(node):
    """``mx.linalg.svd`` of the expression that says so, else an empty text."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *parts[::-1]]) if isinstance(node, ast.Name) else ""


def metal_problems(node, on_cpu=False):
    """Calls that MLX's Metal back end refuses, found in the source: also on paths that no test takes."""
    name = dotted(node)
    if name == "mx.float64" and not on_cpu:
        yield f"line {node.lineno}: float64 does not exist on Metal"
    if isinstance(node, ast.With):
        streams = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
        on_cpu |= any(dotted(one.func) == "mx.stream" and dotted(one.args[0]) == "mx.cpu" for one in streams)
    if isinstance(node, ast.Call):
        called = dotted(node.func)
        on_cpu |= any(word.arg == "stream" and dotted(word.value) == "mx.cpu" for word in node.keywords)
        leaf = called.rpartition(".")[2]
        if called.startswith("mx.linalg.") and leaf not in ANYWHERE and not on_cpu:
            yield f"line {node.lineno}: {called} needs stream=mx.cpu"
        if called == f"mx.{leaf}" and leaf in ABSENT and not hasattr(mx, leaf):
            yield f"line {node.lineno}: {called} does not exist"
    for child in ast.iter_child_nodes(node):
        yield from metal_problems(child, on_cpu)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_asks_metal_for_what_it_has_not(file):
    assert list(metal_problems(ast.parse(file.read_text(encoding="utf-8")))) == []


def test_the_rule_finds_what_it_looks_for():
    bad = "mx.linalg.svd(a)\nmx.linalg.qr(a, stream=mx.gpu)\nmx.zeros(2, dtype=mx.float64)\nmx.quantile(a, 0.5)\n"
    assert [text.partition(":")[0] for text in metal_problems(ast.parse(bad))] == [
        "line 1",
        "line 2",
        "line 3",
        "line 4",
    ]
    good = "mx.linalg.svd(a, stream=mx.cpu)\nmx.linalg.norm(a)\nwith mx.stream(mx.cpu):\n    b = a.astype(mx.float64)\n"
    assert list(metal_problems(ast.parse(good))) == []
