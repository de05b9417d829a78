"""The page of an audit: complete in one file, with its pictures, and no name in it that runs as markup."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.audit.eligibility import Eligibility
from mlx_rsgwm.audit.page import render_page, write_page
from mlx_rsgwm.audit.pool_audit import audit
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from tests.browser import check_pictures, opened


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


def wide_pool(tmp_path, count, layers):
    """Adapters of all seven linear modules of many layers, with long and hostile names and norms far apart."""
    rng = np.random.default_rng(0)
    names = [f"adapter {index} of a $x^{index}$ <b>&amp; long name that goes on and on" for index in range(count)]
    keys = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    keys += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    folders = []
    for index, name in enumerate(names):
        weights = {}
        for layer in range(layers):
            for key in keys:
                size = 10.0 ** (index * rng.uniform(-2, 2))
                weights[f"model.layers.{layer}.{key}.lora_a"] = mx.array(rng.normal(size=(24, 8)).astype(np.float32))
                weights[f"model.layers.{layer}.{key}.lora_b"] = mx.array(
                    (size * rng.normal(size=(8, 24))).astype(np.float32)
                )
        folders.append(Adapter(LoraSpec(8, 1.0, 0.0, keys, layers), weights).save(tmp_path / name))
    return folders


@pytest.mark.parametrize(("count", "layers"), [(1, 2), (2, 40), (12, 1)])
def test_the_page_is_legible_on_every_screen(browser, tmp_path, count, layers):
    write_page(audit(wide_pool(tmp_path, count, layers)), [Eligibility()] * count, tmp_path / "audit.html")
    session, evaluate = opened(browser, tmp_path / "audit.html")
    check_pictures(browser, session, evaluate, f"audit-{count}", 5)
    assert "mathdefault" not in evaluate("document.body.innerHTML")  # no formula is drawn as its source
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(("file://", "data:")) for url in asked)
