"""Measures on data: gradients against dense ones of the fused weights, states against a pass row by row."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_rsgwm.data.batching import TokenRow, make_batch
from mlx_rsgwm.models.fit_check import find_module
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.probe.data_measures import linear_cka, measure_on_data, shared_of
from mlx_rsgwm.probe.measure import measure_pairs
from mlx_rsgwm.probe.measures import DATA, SIGNALS, WEIGHTS, columns
from mlx_rsgwm.probe.passes import adapted_places, block_states, gradient_sketches, projected_update, projection
from mlx_rsgwm.training.losses import batch_nats


def token_rows(seed, count=9):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 14, count)
    return [TokenRow("draft", tuple(rng.integers(1, 60, n).tolist()), 3) for n in lengths]


def dense_gradients(base, adapter, rows):
    """By module (in, out), of the mean loss over trained tokens, with the update worked into the weights; and of the
    embedding apart from the head."""
    model = base.model
    before = {}
    for name, a, b in adapter.factors():
        module = find_module(model, name)
        before[name] = module.weight
        module.weight = module.weight + adapter.spec.scale * (a @ b).T
    hidden, head = split_head(model)
    model.freeze()
    for name in before:
        find_module(model, name).unfreeze(keys=["weight"])
    total = sum(row.trained_tokens for row in rows)
    batch = make_batch(rows)
    _, gradients = nn.value_and_grad(model, lambda _: batch_nats(hidden, head, batch) / total)(model)
    flat = dict(tree_flatten(gradients))
    table = model.model.embed_tokens.weight

    def through_inputs(weight):
        states = model.model(batch.inputs, input_embeddings=weight[batch.inputs])
        from mlx_rsgwm.models.linux_cpu import cross_entropy

        picked = states.reshape(-1, states.shape[-1])[batch.positions]
        return (cross_entropy(head(picked), batch.targets) * batch.weights).sum() / total

    embedding = mx.grad(through_inputs)(table)
    result = {name: np.array(flat[f"{name}.weight"]).T for name in before}
    embedding = np.array(embedding)
    for name, weight in before.items():
        find_module(model, name).weight = weight
    model.freeze()
    return result, embedding


def cosine(a, b):
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def test_gradients_are_those_of_the_dense_weights(base, make_adapter):
    adapters = [make_adapter(0, size=0.3), make_adapter(1, size=0.3)]
    own, shared = [token_rows(1), token_rows(2)], token_rows(3)
    dense = [dense_gradients(base, adapter, rows) for adapter, rows in zip(adapters, own, strict=True)]
    on_shared = [dense_gradients(base, adapter, shared)[0] for adapter in adapters]
    measured = measure_on_data(base, adapters, own, shared, ["x"], width=1000)
    for passes, (expected, embedding), shared_expected in zip(measured.passes, dense, on_shared, strict=True):
        for name, gradient in expected.items():
            assert np.allclose(passes.on_task[name], gradient, rtol=1e-3, atol=1e-5), name
            assert np.allclose(passes.shared[name], shared_expected[name], rtol=1e-3, atol=1e-5)
        assert np.allclose(passes.embedding, embedding, rtol=1e-3, atol=1e-5)
    row = measured.of(0, 1)
    flat = [np.concatenate([each[name].ravel() for name in dense[0][0]]) for each, _ in dense]
    assert row["gradient_cosine"] == pytest.approx(cosine(*flat), rel=1e-3)
    assert row["gradient_l2"] == pytest.approx(np.linalg.norm(flat[0] - flat[1]), rel=1e-3)
    assert row["gradient_dot"] == pytest.approx(flat[0] @ flat[1], rel=1e-3)
    assert row["input_gradient_cosine"] == pytest.approx(cosine(dense[0][1], dense[1][1]), rel=1e-3)
    cosines = [cosine(on_shared[0][name], on_shared[1][name]) for name in on_shared[0]]
    assert row["shared_gradient_cosine.min"] == pytest.approx(min(cosines), rel=1e-3)
    updates = [{name: np.array(a @ b) * adapter.spec.scale for name, a, b in adapter.factors()} for adapter in adapters]
    ways = [[-cosine(updates[i][name], dense[1 - i][0][name]) for name in updates[0]] for i in (0, 1)]
    assert row["cross_gradient.max"] == pytest.approx(np.mean(ways, axis=0).max(), rel=1e-3)
    flat_updates = [np.concatenate([each[name].ravel() for name in updates[0]]) for each in updates]
    worst = min(-cosine(flat_updates[0], flat[1]), -cosine(flat_updates[1], flat[0]))
    assert row["cross_gradient_worst"] == pytest.approx(worst, rel=1e-3)


def test_a_step_against_the_gradient_has_cross_gradient_one(base, make_adapter):
    """Sign: an update that is −g of the other's task helps it."""
    adapter, rows = make_adapter(0), token_rows(1)
    slots = AdapterSlots(base)
    slots.load("a", adapter)
    with slots.using("a"):
        gradient = gradient_sketches(slots, rows, adapted_places([adapter]), 1000)
    weights = {}
    for name, (u, s, vt) in ((name, np.linalg.svd(g, full_matrices=False)) for name, g in gradient.items()):
        weights[f"{name}.lora_a"] = mx.array((-u * s).astype(np.float32))
        weights[f"{name}.lora_b"] = mx.array(vt.astype(np.float32))
    step = replace(adapter, weights=weights, label="step")
    measured = measure_on_data(base, [step, adapter], [token_rows(2), rows], token_rows(3), ["x"], width=1000)
    first, second = measured.passes
    ways = [-cosine(first.update[name], second.on_task[name]) for name in first.update]
    assert ways == pytest.approx([1] * len(ways), abs=1e-4)


def test_sketches_keep_inner_products_on_average():
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((300, 4)) @ rng.standard_normal((4, 200)) for _ in range(2))
    y += 0.5 * x
    for width, error in ((60, 0.25), (150, 0.08)):
        assert projection("in", 300, width).shape == (300, width)
        left, right = projection("in", 300, width), projection("out", 200, width)
        sketched = [left.T @ each @ right for each in (x, y)]
        assert cosine(*sketched) == pytest.approx(cosine(x, y), abs=error)
        assert np.linalg.norm(sketched[0]) == pytest.approx(np.linalg.norm(x), rel=3 * error)
    a, b = rng.standard_normal((300, 4)), rng.standard_normal((4, 200))
    assert np.allclose(projected_update(a, b, 60), projection("in", 300, 60).T @ a @ b @ projection("out", 200, 60))
    assert np.array_equal(projection("in", 20, 60), np.eye(20))


def test_states_are_means_over_each_rows_tokens(base, make_adapter):
    slots = AdapterSlots(base)
    slots.load("a", make_adapter(0, size=0.5))
    rows = token_rows(4)
    with slots.using("a"):
        states = block_states(slots, rows)
        for place, row in enumerate(rows):
            x = slots.model.model.embed_tokens(mx.array([row.tokens[:-1]]))
            for block, expected in zip(slots.model.layers, states[:, place], strict=True):
                x = block(x, "causal", None)
                assert np.allclose(np.array(x[0].mean(axis=0)), expected, rtol=1e-3, atol=1e-4)


def test_activations_by_hand(base, make_adapter):
    adapters = [make_adapter(0, size=0.5), make_adapter(1, size=1.0)]
    rows = token_rows(5)
    measured = measure_on_data(base, adapters, [rows, rows], rows, ["x"])
    row = measured.of(0, 1)
    states = [passes.states.astype(np.float64) for passes in measured.passes]
    mean = [each[-1].mean(axis=0) for each in states]
    assert row["activation_cosine"] == pytest.approx(cosine(*mean))
    assert row["activation_l2"] == pytest.approx(np.linalg.norm(mean[0] - mean[1]))
    norms = sorted(map(np.linalg.norm, mean))
    assert row["activation_norm_ratio"] == pytest.approx(norms[0] / norms[1])
    base_states = measured.base_states.astype(np.float64)
    moved = [each - base_states for each in states]
    by_block = [cosine(a, b) for a, b in zip(*moved, strict=True)]
    assert row["shift_cosine.min"] == pytest.approx(min(by_block))
    shifts = [
        np.mean([np.linalg.norm(m) / np.linalg.norm(h) for m, h in zip(each, base_states, strict=True)])
        for each in moved
    ]
    assert row["activation_shift"] == pytest.approx(np.mean(shifts))
    assert row["activation_shift_gap"] == pytest.approx(abs(np.log(shifts[0] / shifts[1])))


def test_cka_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 5)), rng.standard_normal((12, 7))
    centred = [each - each.mean(axis=0) for each in (x, y)]
    norm = np.linalg.norm
    expected = norm(centred[0].T @ centred[1]) ** 2 / norm(centred[0].T @ centred[0]) / norm(centred[1].T @ centred[1])
    assert linear_cka(x, y) == pytest.approx(expected)
    rotation, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)


def test_every_column_is_measured_with_data(base, make_adapter):
    adapters = [make_adapter(0), make_adapter(1)]
    rows = token_rows(6)
    data = measure_on_data(base, adapters, [rows, rows], rows, ["x"])
    (row,) = next(measure_pairs(adapters, data=data)).values()
    assert set(row.measures) == set(columns(WEIGHTS, SIGNALS, DATA)) - {"training_gradient_cosine"}


def test_shared_rows_are_taken_in_turns_and_once():
    first, second = token_rows(1, 4), token_rows(2, 4)
    assert shared_of([first, second], 4) == [first[0], second[0], first[1], second[1]]
    assert shared_of([first, first], 100) == first
