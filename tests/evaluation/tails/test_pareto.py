"""Generalised Pareto fits against SciPy's, sampling, distances against their definitions, and the power formula."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.stats import anderson, cramervonmises, genpareto

from mlx_rsgwm.evaluation.tails.pareto import (
    ParetoFits,
    distances,
    distribution,
    draw,
    fit,
    goodness_of_fit,
    needed,
    standard_error,
)


@pytest.fixture
def random():
    return np.random.default_rng(7)


@pytest.mark.parametrize("shape", [-0.4, -0.1, 0.0, 0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1e-3, 1.7, 4e5])
def test_a_fit_is_scipys_or_likelier(random, shape, scale):
    excesses = draw(shape, scale, (2, 400), random)
    fits = fit(excesses)
    for index, sample in enumerate(excesses):
        theirs, _, their_scale = genpareto.fit(sample / sample.mean(), floc=0)
        ours = genpareto.logpdf(sample / sample.mean(), fits.shapes[index], 0, fits.scales[index] / sample.mean()).sum()
        assert ours >= genpareto.logpdf(sample / sample.mean(), theirs, 0, their_scale).sum() - 1e-3
        assert fits.shapes[index] == pytest.approx(theirs, abs=2e-3)


@pytest.mark.parametrize("shape", [-0.2, 0.1, 0.4])
def test_a_fit_above_a_threshold_is_pyextremes(random, shape):
    import pandas
    from pyextremes import EVA

    scores = np.concatenate([random.uniform(-5, 1, 1600), 1 + draw(shape, 0.7, (400,), random)])
    random.shuffle(scores)
    analysis = EVA(pandas.Series(scores, index=pandas.date_range("2000-01-01", periods=len(scores), freq="h")))
    analysis.get_extremes("POT", threshold=1.0, r="1min")  # an hour apart, none is taken for its neighbour's echo
    analysis.fit_model("MLE", distribution="genpareto")
    peer = analysis.model.fit_parameters
    fits = fit((scores[scores > 1.0] - 1.0)[None])
    assert fits.shapes[0] == pytest.approx(peer["c"], abs=2e-3)
    assert fits.scales[0] == pytest.approx(peer["scale"], rel=2e-3)


def test_fits_do_not_depend_on_their_company_nor_on_scale(random):
    excesses = draw(0.2, 1.0, (4, 300), random)
    together = fit(excesses)
    for index in range(4):
        alone = fit(excesses[index : index + 1] * 1000.0)
        assert alone.shapes[0] == pytest.approx(together.shapes[index], abs=1e-5)
        assert alone.scales[0] == pytest.approx(1000.0 * together.scales[index], rel=1e-5)


def test_a_sample_without_spread_has_no_fit():
    fits = fit(np.zeros((1, 50)))
    assert np.isnan(fits.shapes[0])
    assert np.isnan(fits.scales[0])


def test_draws_have_the_distribution_and_fits_their_error(random):
    for shape in (-0.3, 0.0, 0.4):
        drawn = draw(shape, 2.0, (400, 500), random)
        quantiles = np.quantile(drawn, [0.5, 0.9, 0.99])
        np.testing.assert_allclose(quantiles, genpareto.ppf([0.5, 0.9, 0.99], shape, 0, 2.0), rtol=0.03)
        fits = fit(drawn)
        assert fits.shapes.mean() == pytest.approx(shape, abs=0.02)
        assert fits.shapes.std() == pytest.approx(standard_error(shape, 500), rel=0.3)


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.3])
def test_distribution_and_distances_are_scipys(random, shape):
    excesses = draw(shape, 1.5, (1, 200), random)
    fits = ParetoFits(np.array([shape]), np.array([1.5]))
    chances = distribution(excesses, fits.shapes, fits.scales)
    np.testing.assert_allclose(chances[0], genpareto.cdf(excesses[0], shape, 0, 1.5), rtol=1e-9, atol=1e-12)
    darling, mises = distances(excesses, fits)
    assert mises[0] == pytest.approx(cramervonmises(excesses[0], genpareto(shape, 0, 1.5).cdf).statistic)
    ordered = np.sort(chances[0])
    ranks = 2 * np.arange(1, 201) - 1
    expected = -200 - (ranks * (np.log(ordered) + np.log(1 - ordered[::-1]))).sum() / 200
    assert darling[0] == pytest.approx(expected)


def test_anderson_darling_is_scipys_for_the_exponential(random):
    excesses = random.exponential(size=(1, 300))
    fits = ParetoFits(np.zeros(1), excesses.mean(axis=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy announces another form of its result
        assert distances(excesses, fits)[0][0] == pytest.approx(anderson(excesses[0], "expon").statistic, rel=1e-6)


def test_goodness_of_fit_has_its_level_and_finds_what_is_no_tail(random):
    right = [goodness_of_fit(draw(0.2, 1.0, (250,), random), seed, 99).anderson_darling for seed in range(60)]
    assert np.mean(np.array(right) < 0.05) <= 0.15
    assert np.quantile(right, 0.5) == pytest.approx(0.5, abs=0.2)
    far = goodness_of_fit(np.abs(random.normal(3, 0.5, size=250)), 0, 99)
    assert max(far.anderson_darling, far.cramer_von_mises) <= 0.02


def test_the_power_formula_gives_the_published_count():
    assert needed(0.10) == 1570
    assert needed(0.20) == pytest.approx(1570 / 4, abs=1)
    assert needed(0.10, shape=0.2) == pytest.approx(1570 * 1.44, abs=1)
