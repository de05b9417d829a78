"""What the study of merges beyond RegMean computes, against dense algebra and finite differences."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.bench.beyond_regmean import (
    by_curvature,
    compensated,
    conjugate_gradients,
    cut,
    in_pairs,
    losses,
    output_moments,
    update,
)
from mlx_rsgwm.bench.output_errors import draft_rows, with_whole
from mlx_rsgwm.data.batching import make_batch
from mlx_rsgwm.data.corpus import make_rows, save_corpus
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.fit_check import fitting_modules
from mlx_rsgwm.models.hooks import outputs_changed
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.studies.merge_sweep import Measured, Outcome
from mlx_rsgwm.training.layers import adapted
from mlx_rsgwm.training.losses import batch_nats

KEYS = ("self_attn.q_proj", "self_attn.o_proj")


@pytest.fixture
def random():
    return np.random.default_rng(0)


def definite(random, size):
    columns = random.normal(size=(size, 2 * size))
    return columns @ columns.T / size


@pytest.fixture
def rows(base, tmp_path):
    """Draft rows of two tasks."""
    tasks = []
    for task in ("change", "compare"):
        save_corpus(tmp_path / task, make_rows(generate(task, 4, 1, "train"), 4, 0, 1), TEMPLATES["plain"], {})
        tasks.append(draft_rows(tmp_path / task, base))
    return tasks


def test_conjugate_gradients_solve_a_sum_of_kronecker_products(random):
    pairs = [(definite(random, 6), definite(random, 4)) for _ in range(3)]
    right = random.normal(size=(6, 4))
    matrix = sum(np.kron(gram, moment) for gram, moment in pairs)
    inverses = np.linalg.inv(sum(gram for gram, _ in pairs)), np.linalg.inv(sum(moment for _, moment in pairs))
    solved = conjugate_gradients(
        lambda x: sum(gram @ x @ moment for gram, moment in pairs),
        lambda x: inverses[0] @ x @ inverses[1],
        right,
        np.zeros((6, 4)),
    )
    np.testing.assert_allclose(solved, np.linalg.solve(matrix, right.reshape(-1)).reshape(6, 4), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("with_outputs", [False, True])
def test_a_cut_is_the_nearest_in_its_metric(random, with_outputs):
    target, inputs = random.normal(size=(6, 5)), definite(random, 6)
    outputs = definite(random, 5) if with_outputs else None
    a, b = cut(target, inputs, outputs, 2)
    moment = np.eye(5) if outputs is None else outputs
    left, right = np.linalg.cholesky(inputs), np.linalg.cholesky(moment)
    sizes = np.linalg.svd(left.T @ target @ right, compute_uv=False)
    error = np.trace((target - a @ b).T @ inputs @ (target - a @ b) @ moment)
    assert error == pytest.approx((sizes[2:] ** 2).sum())


def test_gradients_at_outputs_are_those_of_finite_differences(base, make_adapter, rows):
    adapter, row = make_adapter(1, keys=KEYS, size=0.5), rows[0].rows[0]
    name = adapter.modules()[0]
    batch = make_batch([row])
    hidden, head = split_head(base.model)
    weights = {key: value.astype(mx.float32) for key, value in adapter.weights.items()}
    width = next(b.shape[1] for module, _, b in adapter.factors() if module == name)
    gradients = np.zeros((batch.inputs.size, 3))  # of its first outputs
    step = 1e-2
    with adapted(base.model, fitting_modules(base, adapter), adapter.spec, weights):
        base.model.eval()
        for place in np.ndindex(*gradients.shape):
            probe = np.zeros((*batch.inputs.shape, width), np.float32)
            probe.reshape(-1, width)[place] = step
            sides = []
            for sign in (1, -1):
                moved = mx.array(sign * probe)
                with outputs_changed(base.model, [name], lambda _, x, y, moved=moved: y + moved):
                    sides.append(batch_nats(hidden, head, batch).item())
            gradients[place] = (sides[0] - sides[1]) / (2 * step)
    alone = type(rows[0])([row], rows[0].template, rows[0].hash)
    moments = output_moments(base, adapter, alone)[name][:3, :3]
    expected = gradients.T @ gradients
    np.testing.assert_allclose(moments, expected, atol=0.02 * np.abs(expected).max())


def test_a_pool_of_one_adapter_twice_is_that_adapter(base, make_adapter, rows):
    adapter = make_adapter(3, keys=KEYS, size=0.5)
    pool = [adapter, adapter]
    counted = [with_whole(base, *pair) for pair in zip(pool, rows, strict=True)]
    plain = merge(counted, MergeOptions("regmean", role="draft"))
    for merged in (compensated(base, pool, rows, plain), by_curvature(base, counted, rows, plain)):
        for name in adapter.modules():
            np.testing.assert_allclose(update(merged, name), update(adapter, name), atol=2e-3)


def test_a_target_of_its_own_run_is_another_where_layers_below_were_merged(base, make_adapter, rows):
    pool = [make_adapter(seed, keys=KEYS, size=1.0) for seed in (1, 2)]
    counted = [with_whole(base, *pair) for pair in zip(pool, rows, strict=True)]
    plain = merge(counted, MergeOptions("regmean", role="draft"))
    merged = compensated(base, pool, rows, plain)
    below, above = (
        [np.abs(update(merged, name) - update(plain, name)).max() for name in plain.modules() if f"layers.{n}." in name]
        for n in (0, 1)
    )
    assert max(below) < 1e-3 < min(above)


def test_losses_in_pairs():
    questions = tuple(Question(f"q{n}", ("a", "b")[n % 2], "", "", "1") for n in range(40))
    nats = np.random.default_rng(1).uniform(1, 2, 40)
    outcomes = [
        Outcome(name, "merge", gold=tuple((value * factor, 4) for value in nats))
        for name, factor in (("x", 1), ("y", 2))
    ]
    runs = [Measured(questions, (), tuple(outcomes))] * 2
    estimates = losses(runs, ("x", "y"))
    assert estimates["x"].value == pytest.approx(np.mean([nats[0::2].sum() / 80, nats[1::2].sum() / 80]))
    gap = estimates["y"].minus(estimates["x"])
    assert gap["difference"] == pytest.approx(estimates["x"].value)  # twice as much
    np.testing.assert_allclose([gap["low"], gap["high"]], estimates["x"].interval())
    assert in_pairs(runs, ("x", "y")).startswith(f"x minus y: {-estimates['x'].value:+.4f} [-0.")
