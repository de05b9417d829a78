"""What the study of averaged checkpoints compares, beside sums made by hand."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from mlx_rsgwm.bench.average_study import BEST, LAST, UNIFORM, VARIANTS, compared, corpora, variants
from mlx_rsgwm.training.run_checkpoints import RunCheckpoint


def test_seeds_are_averaged_within_a_row_before_rows_are_resampled():
    rng = np.random.default_rng(0)
    losses = {name: rng.random((2, 30)) for name in VARIANTS}  # seeds, rows
    right = {name: rng.random((2, 12)) < 0.5 for name in VARIANTS}
    runs = [{name: {"loss": losses[name][seed], "right": right[name][seed]} for name in VARIANTS} for seed in range(2)]
    told = compared(runs)
    for name in VARIANTS:
        gaps = losses[name].mean(axis=0) - losses[LAST].mean(axis=0)
        assert told[name]["loss"] == pytest.approx(losses[name].mean())
        assert told[name]["by_seed"] == pytest.approx(losses[name].mean(axis=1))
        assert told[name]["against_last"]["value"] == pytest.approx(gaps.mean())
        assert told[name]["accuracy"]["value"] == pytest.approx(right[name].mean())
        assert told[name]["accuracy"]["n"] == 12
        if name != LAST:
            spread = 1.96 * gaps.std() / np.sqrt(30)  # of rows, not of rows times seeds
            width = told[name]["against_last"]["high"] - told[name]["against_last"]["low"]
            assert width == pytest.approx(2 * spread, rel=0.1)


def test_what_nobody_answers_has_no_accuracy():
    runs = [{name: {"loss": [1.0, 2.0], "right": []} for name in VARIANTS}]
    assert all(row["accuracy"] is None for row in compared(runs).values())


def test_variants_average_what_they_say():
    checkpoints = [
        RunCheckpoint(f"step-{step}", step, Path(f"step-{step}"), "run", None, loss, load=lambda: None)
        for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0))
    ]
    made = variants(checkpoints)
    steps = {
        name: [(each.step, weight) for each, weight in zip(made[name].checkpoints, made[name].weights, strict=True)]
        for name in made
    }
    assert steps[LAST] == [(30, 1)]
    assert steps[BEST] == [(20, 1)]
    assert steps[UNIFORM] == [(10, pytest.approx(1 / 3)), (20, pytest.approx(1 / 3)), (30, pytest.approx(1 / 3))]
    weight = dict(steps["loss-0.5"])
    assert weight[20] > weight[30] > weight[10]
    later = dict(steps["steps-0.5"])
    assert later[30] > later[20] > later[10]


def test_seeds_share_their_test_rows_and_no_others(tmp_path):
    options = Namespace(rows=6, validation=4, items=5, questions=None)
    rows = []
    for seed in (0, 1):
        made, asked = corpora("change", tmp_path / str(seed), seed, options)
        rows.append({name: [row.question for row in corpus.rows] for name, corpus in made.items()})
        assert [question.question for question in asked] == rows[-1]["test"]
        assert not set(rows[-1]["train"]) & set(rows[-1]["validation"])
    assert rows[0]["test"] == rows[1]["test"]
    assert rows[0]["train"] != rows[1]["train"]
