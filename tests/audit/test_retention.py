"""Retention: shares against the formula, what has nothing to keep, flags, and a merge measured from end to end."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_rsgwm.audit.eligibility import Measured
from mlx_rsgwm.audit.retention import Behaviour, Retention, retention
from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.data.corpus import make_rows, save_corpus
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.loop import train


def measured(base, alone, tokens):
    return Measured("change", (None,) * len(tokens), base, alone, tokens)


def test_kept_is_the_quotient_of_what_is_gained_and_its_interval_that_of_a_delta_method():
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 30, 400)
    base = tokens * rng.normal(2.0, 0.3, 400)
    alone = tokens * rng.normal(0.5, 0.1, 400)
    merged = alone + 0.1 * (base - alone) + tokens * rng.normal(0.0, 0.2, 400)
    kept = retention(measured(base, alone, tokens), merged, 0)
    expected = (base.sum() - merged.sum()) / (base.sum() - alone.sum())
    assert kept.share == pytest.approx(expected)
    residuals = (base - merged) - expected * (base - alone)
    error = np.sqrt(np.square(residuals).sum()) / (base - alone).sum()
    assert kept.high - kept.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert (kept.base_nll, kept.tokens) == (pytest.approx(base.sum() / tokens.sum()), tokens.sum())


def test_a_source_that_is_not_clearly_better_than_the_base_has_nothing_to_keep():
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, 30, 50)
    base = tokens * rng.normal(2.0, 0.5, 50)
    alone = tokens * rng.normal(2.0, 0.5, 50)
    kept = retention(measured(base, alone, tokens), base, 0)
    assert (kept.share, kept.low, kept.high) == (None, None, None)
    assert kept.merged_nll == kept.base_nll


@pytest.mark.parametrize(
    ("kept", "quality", "dominance", "flags"),
    [
        ((1.0, 0.96), 0.96, 0.04 / 1.96, []),
        ((1.0, 0.94), 0.94, 0.06 / 1.94, ["q_min"]),
        ((1.5, 0.96), 0.96, 0.54 / 2.46, ["dominance"]),
        ((1.0, -0.5), -0.5, 1.0, ["q_min", "dominance"]),
        ((1.0, None), 1.0, None, []),
        ((None, None), None, None, []),
    ],
)
def test_flags(kept, quality, dominance, flags):
    behaviour = Behaviour(tuple(Retention("x", 2.0, 1.0, 1.0, each, each, each, 9, 9) for each in kept))
    assert behaviour.quality == quality
    assert behaviour.dominance == (None if dominance is None else pytest.approx(dominance))
    assert behaviour.flags == flags


def test_a_merge_that_is_its_source_keeps_all_and_one_that_is_nothing_none(base, tiny_base, make_adapter, tmp_path):
    rows = make_rows(generate("change", 24, 1, "train"), 24, 0, 1)
    corpus = save_corpus(tmp_path / "rows", rows, TEMPLATES["plain"], {"seed": 1})
    trained = train(base, corpus, TrainConfig(rank=4, epochs=6, batch_size=4, learning_rate=1e-2, directions=0))
    nothing = {name: 1e-6 * value if name.endswith("lora_b") else value for name, value in trained.weights.items()}
    folders = {"trained": trained, "random": make_adapter(5, size=2.0), "nothing": replace(trained, weights=nothing)}
    places = {name: str(adapter.save(tmp_path / name)) for name, adapter in folders.items()}

    def audited(merged):
        told = ("--data", "change", "--data-rows", "12", "--base", str(tiny_base), "--quiet", "--json")
        arguments = ("audit", "--merged", places[merged], "--sources", places["trained"], places["random"], *told)
        made = CliRunner().invoke(rsgwm, arguments)
        assert made.exit_code == 0, made.output
        return made.output, json.loads(made.stdout.splitlines()[-1])["merged"]["retention"]

    text, kept = audited("trained")
    first, second = kept["sources"]
    assert (first["share"], first["low"], first["high"]) == (1.0, 1.0, 1.0)
    assert second["share"] is None  # the random one is worse than the base
    assert (kept["q_min"], kept["dominance"], kept["flags"]) == (1.0, None, [])
    assert "1.000 [1.000, 1.000]" in text
    text, kept = audited("nothing")
    assert kept["sources"][0]["share"] == pytest.approx(0.0, abs=1e-3)
    assert kept["flags"] == ["q_min"]
    assert "of trained it keeps" in text


def test_the_study_counts_pairs_by_verdict_where_both_have_something_to_keep():
    pytest.importorskip("scipy")
    from mlx_rsgwm.bench.audit_retention import verdict_counts

    def pair(word, *shares):
        sources = [{"share": share} for share in shares]
        told = {"sources": sources, "q_min": min((share for share in shares if share is not None), default=None)}
        return {"word": word, "merges": {"naive": told, "default": told}}

    pairs = [pair("safe", 1.0, 0.95), pair("safe", 1.0, 0.94), pair("safe", 1.0, None), pair("do not merge", 0.1, 0.2)]
    counts = {(row["merge"], row["word"]): row for row in verdict_counts([{"pairs": pairs[:2]}, {"pairs": pairs[2:]}])}
    safe = counts["naive", "safe"]
    assert (safe["pairs"], safe["judged"], safe["kept"], safe["share"]["value"]) == (3, 2, 1, 0.5)
    assert counts["default", "do not merge"]["kept"] == 0
    assert counts["default", "merge with care"]["share"] is None
