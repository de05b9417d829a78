"""Formats of files: what is read, and what is refused, in one line that says what to do."""

import json

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.versions import format_problem
from mlx_rsgwm.data.corpus import load_corpus
from mlx_rsgwm.evaluation.report.folder import read_report
from mlx_rsgwm.models.adapter import Adapter


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ({"format": "x", "format_version": 2}, ""),
        ({"format": "x", "format_version": 1}, ""),
        ({"format": "x"}, ""),
        ({"format": "y", "format_version": 9}, "format is 'y', not 'x'"),
        ({"format": "x", "format_version": "2"}, "format_version must be a whole number, found '2'"),
        ({"format": "x", "format_version": None}, "format_version must be a whole number, found None"),
        (
            {"format": "x", "format_version": 3},
            "it is of a newer mlx-rsgwm (format 3; this one reads 2); update mlx-rsgwm",
        ),
    ],
)
def test_what_a_file_says_of_itself(told, problem):
    assert format_problem(told, "x", 2) == problem


@pytest.mark.parametrize(
    ("read", "kind", "name"),
    [
        (Adapter.load, "adapter", "manifest.json"),
        (load_corpus, "corpus", "manifest.json"),
        (read_report, "report", "report.json"),
    ],
)
def test_files_of_a_newer_version_are_refused(make_adapter, tmp_path, read, kind, name):
    folder = make_adapter(0).save(tmp_path / "folder")
    (folder / name).write_text(json.dumps({"format": f"mlx-rsgwm/{kind}", "format_version": 99}))
    with pytest.raises(RsgwmError, match=r"of a newer mlx-rsgwm .*; update mlx-rsgwm"):
        read(folder)
