"""What the tests of GGUF files share."""

from __future__ import annotations

import pytest

from tests.converters.gguf.tiny_llama import weights, write_gguf


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", weights())
