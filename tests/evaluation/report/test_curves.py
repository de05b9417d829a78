"""Curves: what is read from a manifest, the window mean, and adapters that have no history."""

import json

import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation.report.curves import plot_curves, read_history, smoothed


@pytest.fixture
def trained(tmp_path):
    folder = tmp_path / "addition"
    folder.mkdir()
    history = [[1, "draft", 2.0, 9], [2, "verify", 1.0, 3], [3, "draft", 1.0, 9]]
    held_out = {"before": {"draft": 2.5}, "after": {"draft": 0.5}}
    manifest = {"kind": "trained", "history": history, "held_out_loss": held_out, "validation": [[2, 1.5, {}]]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_history_by_role(trained):
    found = read_history(trained)
    assert found["train"] == {"draft": ([1, 3], [2.0, 1.0]), "verify": ([2], [1.0])}
    assert found["held_out"] == ([2], [1.5])


def test_window_mean():
    values = [3.0, 1.0, 2.0, 6.0]
    assert smoothed(values, 2).tolist() == pytest.approx([3.0, 2.0, 1.5, 4.0])
    assert smoothed(values, 10).tolist() == pytest.approx([np.mean(values[: n + 1]) for n in range(4)])


def test_a_picture_is_written(trained, tmp_path):
    for name, start in (("curves.png", b"\x89PNG"), ("curves.svg", b"<?xml")):
        plot_curves([trained], tmp_path / "new" / name)
        assert (tmp_path / "new" / name).read_bytes().startswith(start)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["curves.png", "curves.svg"]
    with pytest.raises(RsgwmError, match=r"as \.png or \.svg"):
        plot_curves([trained], tmp_path / "curves.pdf")


def test_adapters_without_history_are_refused(tmp_path):
    with pytest.raises(RsgwmError, match=r"holds no manifest\.json"):
        read_history(tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "merged"}')
    with pytest.raises(RsgwmError, match="its kind is merged"):
        read_history(tmp_path)
