"""What a new file may take the place of: of a file, and of nothing else."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


OTHERS = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_takes_the_place_of_files_alone(tmp_path, monkeypatch, kind):
    """Root's rename would put a file where /dev/null was, for every program of the machine."""
    monkeypatch.chdir(tmp_path)
    place = Path("place")
    OTHERS[kind](place)
    before = place.lstat()
    with pytest.raises(RsgwmError, match=f"cannot write place: it is {kind}, not a file"):
        files.write_json(place, {})
    assert os.path.samestat(place.lstat(), before)
    assert os.listdir() == ["place"]


def test_a_link_to_a_file_is_replaced(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    files.write_text(tmp_path / "link", "new")
    assert [(tmp_path / name).read_text() for name in ("file", "link")] == ["old", "new"]
