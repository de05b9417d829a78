"""Settings of rows against a float64 reference that sorts the whole vocabulary."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.serving.row_sampling import RowSampling, pick

READ, WRITTEN = [3, 4, 4], [7, 7, 2]


def distribution(logits, setting):
    """The probability of every token after penalties, biases, temperature, min_p, top_k and top_p, in this order."""
    values = logits.astype(np.float64).copy()
    for token in {*READ, *WRITTEN}:
        values[token] *= 1 / setting.repetition_penalty if values[token] > 0 else setting.repetition_penalty
    for token in set(WRITTEN):
        values[token] -= setting.presence_penalty + WRITTEN.count(token) * setting.frequency_penalty
    for token, bias in setting.logit_bias.items():
        values[token] += bias
    values /= setting.temperature
    shares = np.exp(values - values.max())
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    if setting.min_p:
        order = [token for token in order if shares[token] >= setting.min_p]
    if setting.top_k:
        order = order[: setting.top_k]
    left = np.zeros_like(shares)
    left[order] = shares[order]
    left /= left.sum()
    nucleus, mass = np.zeros_like(left), 0.0
    for token in order:
        if mass >= setting.top_p:
            break
        nucleus[token] = left[token]
        mass += left[token]
    return nucleus / nucleus.sum()


def expected(logits, setting, uniform):
    shares = distribution(logits, setting)
    walked = 0.0
    for token in sorted(range(len(shares)), key=lambda token: (-shares[token], token)):
        walked += shares[token]
        if walked > uniform:
            return token
    return int(shares.argmax())


SETTINGS = [
    RowSampling(),
    RowSampling(temperature=0.7, top_p=0.9),
    RowSampling(top_k=3),
    RowSampling(temperature=1.5, min_p=0.2),
    RowSampling(temperature=0.8, top_k=5, top_p=0.7, min_p=0.01),
    RowSampling(presence_penalty=1.5, frequency_penalty=0.5),
    RowSampling(repetition_penalty=3.0, top_k=4),
    RowSampling(logit_bias={1: 100.0}),
    RowSampling(logit_bias={1: 3.0, 7: -100.0}, top_p=0.8),
]


def test_every_row_is_drawn_by_its_settings_alone_and_among_others():
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(20):
        logits = (rng.standard_normal((len(SETTINGS), 40)) * 2).astype(np.float32)
        uniforms = rng.random(len(SETTINGS), dtype=np.float32).tolist()
        context = [READ] * len(SETTINGS), [WRITTEN] * len(SETTINGS)
        together = [item.token for item in pick(mx.array(logits), SETTINGS, uniforms, *context, [None] * len(SETTINGS))]
        for place, setting in enumerate(SETTINGS):
            row = mx.array(logits[place : place + 1])
            (item,) = pick(row, [setting], [uniforms[place]], [READ], [WRITTEN], [None])
            assert item.token == together[place]
            wrong += item.token != expected(logits[place], setting, uniforms[place])
    assert wrong <= 1  # a float32 sum may step over a boundary


def test_greedy_rows_keep_penalties_and_biases():
    logits = mx.array([[0.0, 3.0, 1.0, 0.5]] * 4)
    settings = [
        RowSampling(temperature=0),
        RowSampling(temperature=0, logit_bias={2: 5.0}),
        RowSampling(temperature=0, presence_penalty=2.0, frequency_penalty=1.0),
        RowSampling(temperature=0, logit_bias={1: -100.0}, top_k=1),
    ]
    picks = pick(logits, settings, [0.5] * 4, [[0]] * 4, [[1, 1]] * 4, [None] * 4)
    assert [item.token for item in picks] == [1, 2, 2, 2]


def test_log_probabilities_are_the_models_own():
    logits = np.random.default_rng(1).standard_normal((2, 30)).astype(np.float32)
    settings = [RowSampling(temperature=0.5, logit_bias={4: 100.0}, logprobs=3), RowSampling(logprobs=None)]
    asked, silent = pick(mx.array(logits), settings, [0.3, 0.3], [[], []], [[], []], [None, None])
    wide = logits[0].astype(np.float64)
    reference = wide - np.log(np.exp(wide).sum())
    assert asked.token == 4
    assert asked.logprob == pytest.approx(reference[4], abs=1e-9)
    assert [token for token, _ in asked.top] == np.argsort(-reference)[:3].tolist()
    assert [value for _, value in asked.top] == pytest.approx(np.sort(reference)[::-1][:3].tolist())
    assert (silent.logprob, silent.top) == (None, ())


def test_what_is_not_allowed_is_not_drawn():
    logits = mx.array([[0.0, 3.0, 1.0, 2.0]] * 3)
    masks = [np.array([True, False, True]), None, np.array([True, False, False, True])]  # one says nothing of the last
    settings = [RowSampling(temperature=0), RowSampling(temperature=0), RowSampling(temperature=0, top_k=1)]
    picks = pick(logits, settings, [0.5] * 3, [[]] * 3, [[]] * 3, masks)
    assert [item.token for item in picks] == [2, 1, 3]
    hot = RowSampling(temperature=2.0)
    draws = {pick(logits[:1], [hot], [u / 40], [[]], [[]], masks[:1])[0].token for u in range(40)}
    assert draws == {0, 2}


@pytest.mark.parametrize(
    "setting",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": -1}, {"min_p": 1.1},
     {"presence_penalty": 3}, {"repetition_penalty": 0}, {"logit_bias": {1: 101}}, {"logprobs": 21}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(RsgwmError, match=next(iter(setting))):
        RowSampling(**setting)
