"""Folders: what is said of a disk without room."""

import re
import shutil
from types import SimpleNamespace

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import require_space


@pytest.mark.parametrize(
    ("needed", "free", "told"),
    [
        (5_000_000, 2_400_000, "5 MB needed, 2 MB free"),
        (1_200_000, 900_000, "1200 KB needed, 900 KB free"),
        (700_001, 700_000, "700001 bytes needed, 700000 bytes free"),
    ],
)
def test_room_that_is_needed_and_room_that_is_there_look_different(tmp_path, monkeypatch, needed, free, told):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    require_space(tmp_path / "new", free)
    with pytest.raises(RsgwmError, match=re.escape(told)):
        require_space(tmp_path / "new", needed)
