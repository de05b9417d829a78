"""Files are opened in one place: held by reading the source, so that a new module cannot open one by itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError

ROOT = Path(__file__).parent.parent.parent
NAMES = {"open", "safe_open", "memmap", "fromfile", "ZipFile"}  # whatever they are called on
METHODS = {"read_text", "read_bytes", "write_text", "write_bytes", "open", "rename", "replace"}
OF_MODULES = {
    ("json", "load"), ("yaml", "load"), ("yaml", "safe_load"), ("mx", "load"), ("np", "load"), ("os", "open"),
    ("os", "rename"), ("os", "replace"), ("mx", "save_safetensors"), ("mx", "save_gguf"),
}  # fmt: skip
# What opens files itself, and why it may.
ALLOWED = {
    "mlx_rsgwm/core/files.py": "the opener",
    "cli/crashes.py": "the system's own tables of a process",
    "cli/streams.py": "the system's own null device, in place of a closed stream",
    "mlx_rsgwm/core/folders.py": "folders and their locks",
    "mlx_rsgwm/core/safetensors_io.py": "arrays, once the opener has seen the file",
    "mlx_rsgwm/core/temporary.py": "the system's own boot id",
    "mlx_rsgwm/core/machine.py": "the system's own tables of memory and processor",
    "mlx_rsgwm/core/resume.py": "appends to its own journal",
    "mlx_rsgwm/training/memory.py": "the system's own memory limit",
    "mlx_rsgwm/evaluation/latency.py": "the system's own counters of energy",
    "mlx_rsgwm/recipes/stages.py": "moves files of its own folder aside",
    "mlx_rsgwm/models/base.py": "unpacks the wheel that pip fetched, its hash checked",
    "converters/stream.py": "writes arrays piece by piece under a temporary name",
    "converters/gguf/read.py": "writes arrays piece by piece under a temporary name",
    "converters/gguf/file.py": "reads rows from what the opener opened",
    "converters/peft/raw_arrays.py": "proves the reader of arrays, with which it shares nothing but the opener",
    "converters/parity/mlx.py": "writes into a temporary folder of its own",
    "converters/untied_base.py": "writes into a temporary folder of its own",
}


def openings(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every call that opens, renames or parses a file."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in NAMES:
            yield node.lineno, called.id
        elif isinstance(called, ast.Attribute):
            owner = called.value.id if isinstance(called.value, ast.Name) else ""
            if owner == "files" or (owner == "Pool" and called.attr == "open"):
                continue  # the opener's own; a pool of adapters is no file
            on_path = called.attr in METHODS and not (called.attr == "replace" and len(node.args) != 1)
            if called.attr in NAMES - {"open"} or on_path or (owner, called.attr) in OF_MODULES:
                yield node.lineno, f"{owner}.{called.attr}"


def sources() -> list[Path]:
    return [file for folder in ("mlx_rsgwm", "converters", "cli") for file in sorted((ROOT / folder).rglob("*.py"))]


def test_only_the_opener_opens_files():
    by_file = {
        file.relative_to(ROOT).as_posix(): list(openings(file.read_text(encoding="utf-8"))) for file in sources()
    }
    assert len(by_file) > 150
    assert {name: calls for name, calls in by_file.items() if calls and name not in ALLOWED} == {}
    assert [name for name in ALLOWED if not by_file.get(name)] == []  # no reason outlives its need


@pytest.mark.parametrize(
    "source",
    ["open('a')", "Path('a').read_text()", "path.open()", "json.load(file)", "mx.load('a')", "yaml.safe_load(text)",
     "safe_open('a')", "zipfile.ZipFile('a')", "np.memmap('a')", "os.replace(a, b)", "a.replace(b)"],
)  # fmt: skip
def test_every_way_of_opening_is_seen(source):
    assert len(list(openings(source))) == 1


def test_texts_and_other_files_are_none():
    assert list(openings("files.read_text(path); json.loads(text); 'a'.replace('b', 'c'); replace(a, b=1)")) == []


def test_a_file_may_have_as_many_bytes_as_its_kind(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("12345")
    assert files.read_text(path, 5) == "12345"
    with pytest.raises(RsgwmError, match="more than such a file can have"):
        files.read_text(path, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ab\ncd\0", "not text: a NUL byte at byte 5, in line 2"),
        (b"\xff\xfea\0", "but UTF-16; save it as UTF-8"),
        (b"a\0b\0", "UTF-16 or binary"),
        (b"ab\n\xe4", "not UTF-8 text: .* at byte 3, in line 2"),
    ],
)
def test_what_is_no_text_is_said_with_its_place(tmp_path, data, message):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(RsgwmError, match=message):
        files.read_text(path)


def test_marks_and_line_ends_are_those_of_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffä\r\nb\rc\n".encode())
    assert files.read_text(path) == "ä\nb\nc\n"
