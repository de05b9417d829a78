"""Eligibility: losses of rows against one row at a time, the verdict's margins, and rows that are not new."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_rsgwm.audit.eligibility import (
    ELIGIBLE,
    UNCERTAIN,
    WEAK,
    held_out_rows,
    measure,
    token_weighted,
    verdict_of,
)
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.corpus import make_rows, save_corpus
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.inference.open import slots_of
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.loop import train
from mlx_rsgwm.training.losses import held_out_nats, row_nats


@pytest.fixture
def corpus(tmp_path):
    rows = make_rows(generate("change", 24, 1, "train"), 24, 0, 1)
    return save_corpus(tmp_path / "change", rows, TEMPLATES["plain"], {"seed": 1})


def test_losses_of_rows_are_those_of_one_row_at_a_time(base, corpus):
    rows, _ = corpus.token_rows(base.tokenizer, 1024, "drop")
    nats, tokens = row_nats(base.model, rows, 5)
    for index, row in enumerate(rows):
        ((expected, count),) = held_out_nats(base.model, [row], 1).values()
        assert nats[index] == pytest.approx(expected, rel=1e-4)
        assert tokens[index] == count


def test_a_trained_adapter_is_eligible_and_a_random_one_is_weak(base, corpus, make_adapter, tmp_path):
    trained = train(base, corpus, TrainConfig(rank=8, epochs=6, batch_size=4, learning_rate=1e-2, directions=0))
    random = make_adapter(5, size=2.0)
    slots = slots_of(base, {"trained": trained, "random": random})
    rows, seen = held_out_rows("change", random, base, 24, 0)
    assert (len(rows), seen) == (24, 0)
    good, bad = (measure(slots, name, rows, "change").eligibility() for name in ("trained", "random"))
    assert good.verdict == ELIGIBLE
    assert good.low < good.gain < good.high
    assert good.gain == pytest.approx(good.base_nll - good.adapter_nll)
    assert bad.verdict == WEAK
    assert bad.gain < 0


def test_rows_that_it_was_trained_on_do_not_count(base, corpus, tmp_path):
    trained = train(base, corpus, TrainConfig(rank=2, epochs=1, batch_size=8, directions=0))
    with pytest.raises(RsgwmError, match="24 were left out, since it was trained on them"):
        held_out_rows(str(tmp_path / "change"), trained, base, 64, 0)
    both = make_rows([*generate("change", 24, 1, "train"), *generate("change", 12, 1, "test")], 36, 0, 1)
    save_corpus(tmp_path / "both", both, TEMPLATES["plain"], {"seed": 1})
    rows, seen = held_out_rows(str(tmp_path / "both"), trained, base, 12, 0)
    assert len(rows) == 12  # however many known ones come first
    assert 0 < seen <= 24


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (0.31, (ELIGIBLE, "high")),
        (0.11, (ELIGIBLE, "medium")),
        (0.10, (UNCERTAIN, "medium")),
        (-0.10, (UNCERTAIN, "medium")),
        (-0.11, (WEAK, "medium")),
        (-0.31, (WEAK, "high")),
    ],
)
def test_the_margin_decides(gain, expected):
    assert verdict_of(gain, 0.1) == expected


def test_the_gain_is_weighted_by_tokens_and_its_error_is_the_bootstraps():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 40, 200)
    differences = tokens * rng.normal(0.1, 0.5, 200)
    gain, low, high, error = token_weighted(differences, tokens, 0)
    assert gain == pytest.approx(differences.sum() / tokens.sum())
    residuals = differences - gain * tokens
    expected = np.sqrt(np.square(residuals).sum()) / tokens.sum()  # linearised
    assert error == pytest.approx(expected, rel=0.1)
    assert high - low == pytest.approx(2 * 1.96 * expected, rel=0.15)
