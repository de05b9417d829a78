"""What the tests of base models share: an empty cache, and a tiny base in a folder of its own."""

from __future__ import annotations

import pytest

from tests.models.tiny_bases import write_folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache of the test's own, and no Hub."""
    monkeypatch.setenv("RSGWM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def tiny(tmp_path):
    return write_folder(tmp_path / "tiny")
