"""The page of an audit: complete in one file, with its pictures, and no name in it that runs as markup."""

from __future__ import annotations

import re

import pytest

from mlx_rsgwm.audit.eligibility import Eligibility
from mlx_rsgwm.audit.page import render_page
from mlx_rsgwm.audit.pool_audit import audit


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_page_stands_alone(unlike, tmp_path, count):
    names = ["<b>one", "two $x$", "three"][:count]
    folders = [adapter.save(tmp_path / name) for name, adapter in zip(names, unlike, strict=False)]
    text = render_page(audit(folders), [Eligibility()] * count)
    assert "<b>one" not in text
    assert "&lt;b&gt;one" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert text.count("<svg") == (1 if count == 1 else 5)
    assert ("Next:" in text) == (count > 1)
