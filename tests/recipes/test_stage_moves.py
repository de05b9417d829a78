"""A finished stage's files are set aside on another file system, too."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from mlx_rsgwm.recipes import stages


def test_moved_across_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, place = tmp_path / "a", tmp_path / "b"
    file.write_bytes(b"weights")

    def rename(self: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "rename", rename)
    stages._move(file, place)
    assert place.read_bytes() == b"weights"
    assert not file.exists()


def test_other_errors_of_a_move_are_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        stages._move(tmp_path / "a", tmp_path / "b")
