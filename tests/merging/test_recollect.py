"""Directions collected while merging: against runs of the whole model, the layers below merged, one row at a time."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.corpus import make_rows, save_corpus
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.merging.recollect import Recollection
from mlx_rsgwm.models.fit_check import fitting_modules
from mlx_rsgwm.models.hooks import inputs_seen
from mlx_rsgwm.models.split import split_blocks, split_head
from mlx_rsgwm.training.layers import adapted

KEYS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
OPTIONS = MergeOptions("regmean", rank=8)


@pytest.fixture
def corpora(tmp_path):
    """Draft and verify rows of two tasks."""
    return [
        save_corpus(tmp_path / task, make_rows(generate(task, 9, 1, "train"), 9, 4, 1), TEMPLATES["plain"], {"seed": 1})
        for task in ("change", "compare")
    ]


@pytest.fixture
def adapters(make_adapter):
    return [make_adapter(seed, keys=KEYS, size=0.3 + 0.3 * seed) for seed in range(2)]


def product(adapter, name):
    a, b = (np.array(adapter.weights[f"{name}.{leaf}"]).astype(np.float64) for leaf in ("lora_a", "lora_b"))
    return adapter.spec.scale * a @ b


def moment(base, lower, upper, rows, name):
    """XᵀX / n of a module's inputs with layer 0 of the adapter ``lower`` and layer 1 of ``upper``, row by row."""
    seen = []
    both = replace(
        upper,
        weights={
            key: (
                lower.weights[key] * lower.spec.scale / upper.spec.scale
                if key.endswith("lora_b")
                else lower.weights[key]
            )
            if ".layers.0." in key
            else value
            for key, value in upper.weights.items()
        },
    )
    spec = replace(
        both.spec, rank=max(value.shape[-1] for key, value in both.weights.items() if key.endswith("lora_a"))
    )
    with (
        adapted(base.model, fitting_modules(base, both), spec, both.weights),
        inputs_seen(base.model, [name], lambda _, x: seen.append(np.array(x)[0].astype(np.float64))),
    ):
        base.model.eval()
        for row in rows:
            mx.eval(base.model(mx.array([row.tokens[:-1]])))
    x = np.concatenate(seen)
    return x.T @ x / len(x)


def reference(grams, updates, rank=None, ridge=1e-3):
    """The least-squares solution, or the nearest of a rank."""
    regular = [gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)) for gram in grams]
    left = sum(regular)
    right = sum(gram @ update for gram, update in zip(regular, updates, strict=True))
    lower = np.linalg.cholesky(left)
    u, sigma, vt = np.linalg.svd(np.linalg.solve(lower, right))
    return np.linalg.solve(lower.T, (u[:, : len(sigma)] * sigma)[:, :rank] @ vt[: len(sigma)][:rank])


@pytest.mark.parametrize("role", ["draft", "verify"])
def test_each_layer_sees_the_merged_layers_below(base, adapters, corpora, role):
    before = np.array(base.model(mx.arange(6)[None]))
    merged = merge(adapters, replace(OPTIONS, role=role), recollection=Recollection(base, corpora, batch_rows=4))
    rows = [
        [row for row in corpus.token_rows(base.tokenizer, 1024, "drop")[0] if row.role == role] for corpus in corpora
    ]
    for name in merged.modules():
        # Inside a block the adapter's own layers come first, as in RegMean++.
        lower = adapters if ".layers.0." in name else [merged, merged]
        grams = [moment(base, *pair, own, name) for *pair, own in zip(lower, adapters, rows, strict=True)]
        expected = reference(grams, [product(adapter, name) for adapter in adapters])
        difference = np.linalg.norm(product(merged, name) - expected)
        assert difference <= 2e-3 * np.linalg.norm(expected), name
    told = merged.manifest["merge"]["recollected"]
    assert [each["rows"] for each in told] == [{role: len(own)} for own in rows]
    np.testing.assert_array_equal(np.array(base.model(mx.arange(6)[None])), before)


def test_what_a_layer_loses_to_the_rank_is_seen_above(base, adapters, corpora):
    """Layer 1 at rank 1 is the best there is for inputs that come from layer 0 at rank 1."""
    merged = merge(adapters, MergeOptions("regmean", rank=1), recollection=Recollection(base, corpora))
    rows = [
        [row for row in corpus.token_rows(base.tokenizer, 1024, "drop")[0] if row.role == "draft"] for corpus in corpora
    ]
    for name in (f"model.layers.1.{key}" for key in KEYS):
        grams = [moment(base, merged, adapter, own, name) for adapter, own in zip(adapters, rows, strict=True)]
        expected = reference(grams, [product(adapter, name) for adapter in adapters], rank=1)
        assert np.linalg.norm(product(merged, name) - expected) <= 5e-3 * np.linalg.norm(expected), name


def test_refusals(base, adapters, corpora, make_adapter, tmp_path):
    def refused(reason, options=OPTIONS, pool=adapters, data=corpora):
        with pytest.raises(RsgwmError, match=reason):
            merge(pool, options, recollection=Recollection(base, data))

    refused("one corpus for each in their order: 2 adapters, 1 corpora", data=corpora[:1])
    refused("ties does not look at directions; recollect them for regmean", MergeOptions("ties"))
    refused("adapt different modules", pool=[adapters[0], make_adapter(1, keys=KEYS[:2])])
    rows = make_rows(generate("change", 3, 1, "train"), 3, 0, 1)
    drafts = save_corpus(tmp_path / "drafts", rows, TEMPLATES["plain"], {})
    refused("none of the role verify", replace(OPTIONS, role="verify"), data=[corpora[0], drafts])


def test_a_method_left_open_is_the_one_that_looks_at_directions(base, adapters, corpora):
    merged = merge(adapters, MergeOptions(rank=8), recollection=Recollection(base, corpora))
    assert merged.manifest["merge"]["method"] == "regmean"


def test_blocks_one_by_one_are_the_model(base):
    ids = mx.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    blocks = split_blocks(base.model)
    states = ids
    for block in blocks:
        states = block(states)
    hidden, _ = split_head(base.model)
    np.testing.assert_allclose(np.array(base.model.model.norm(states)), np.array(hidden(ids)), atol=1e-5)
    assert len(blocks) == len(base.model.layers)
