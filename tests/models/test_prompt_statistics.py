"""What is kept of prompt states: against float64, of how many questions, and files that are damaged."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.prompt_statistics import PromptStatistics, ledoit_wolf, statistics_of_pool


def states_of(seed, count=40, dims=12):
    """Correlated, with one dimension far wider than the others and one that never varies."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((count, dims)) @ rng.standard_normal((dims, dims)) + 3 * rng.standard_normal(dims)
    states[:, 2] *= 300
    states[:, 5] = 1.25
    return states


def of(states, most_rank=None):
    return PromptStatistics.of_states(states, 1, "base", "template", most_rank)


@pytest.mark.parametrize("count", [40, 8])
def test_mean_and_covariance_at_full_rank(count):
    from sklearn.covariance import ledoit_wolf_shrinkage

    states = states_of(0, count)
    statistics = of(states, most_rank=count)
    centred = states - states.mean(axis=0)
    covariance = centred.T @ centred / count
    share = ledoit_wolf_shrinkage(centred / np.where(np.diag(covariance) > 0, np.diag(covariance), 1) ** 0.5)
    expected = (1 - share) * covariance + share * np.diag(np.diag(covariance))
    sizes = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance))) + 1e-30
    np.testing.assert_allclose(statistics.mean, states.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance() / sizes, expected / sizes, atol=1e-10)
    assert statistics.shrinkage == pytest.approx(share, rel=1e-9)
    assert 0 < share < 1


def test_the_leading_part_is_the_best_of_its_rank_and_variances_stay():
    states = states_of(1)
    statistics = of(states, most_rank=3)
    scales = states.std(axis=0)
    alive = scales > 0
    standard = ((states - states.mean(axis=0))[:, alive]) / scales[alive]
    values, vectors = np.linalg.eigh(standard.T @ standard / len(states))
    best = (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T
    factor = statistics.factor[:, alive] / scales[alive]
    np.testing.assert_allclose(factor.T @ factor, best, atol=1e-10)
    np.testing.assert_allclose(np.diag(statistics.covariance()), scales**2, atol=1e-9)
    assert statistics.factor.shape == (3, 12)


@pytest.mark.parametrize(("count", "rank"), [(5, 2), (20, 10), (64, 32), (200, 32)])
def test_the_rank_leaves_the_states_unknown(count, rank):
    """From all n directions of n states they could be had back, but for a rotation."""
    assert of(states_of(2, count, 250)).factor.shape == (rank, 250)


def test_the_shrinkage_of_states_that_vary_like_noise():
    from sklearn.covariance import ledoit_wolf_shrinkage

    for shape in ((6, 50), (50, 6), (300, 300)):
        noise = np.random.default_rng(3).standard_normal(shape)
        noise -= noise.mean(axis=0)
        assert ledoit_wolf(noise) == pytest.approx(ledoit_wolf_shrinkage(noise, assume_centered=True), rel=1e-9)
    assert ledoit_wolf(np.zeros((6, 4))) == 0


def test_too_few_questions_and_states_that_are_not_finite():
    with pytest.raises(RsgwmError, match="of at least 5 questions, found 4"):
        of(states_of(0, 4))
    states = states_of(0)
    states[3, 3] = np.inf
    with pytest.raises(RsgwmError, match="the states of these prompts are not finite"):
        of(states)


# --- files --------------------------------------------------------------------------------------------------------


def saved(make_adapter, folder, arrays=None, metadata=None):
    """An adapter with statistics, ``arrays`` and ``metadata`` laid over them, in a folder."""
    adapter = make_adapter(0)
    statistics = PromptStatistics.of_states(states_of(4), 1, adapter.base_fingerprint or "base", "template")
    adapter.prompt_states = {**statistics.arrays(), **(arrays or {})}
    adapter.prompt_states_metadata = {**statistics.metadata(), **(metadata or {})}
    adapter.save(folder)
    return statistics


def test_they_come_back_in_float32(make_adapter, tmp_path):
    statistics = saved(make_adapter, tmp_path / "a")
    assert "prompt_states.safetensors" in Adapter.load(tmp_path / "a").manifest["files"]
    for lazy in (False, True):
        (read,) = statistics_of_pool([Adapter.load(tmp_path / "a", lazy=lazy)]).values()
        for name in ("mean", "factor", "rest"):
            np.testing.assert_array_equal(getattr(read, name), getattr(statistics, name).astype(np.float32))
        assert (read.shrinkage, read.questions, read.layer) == (statistics.shrinkage, 40, 1)
        assert (read.base, read.template) == (statistics.base, "template")
    Adapter.load(tmp_path / "a").save(tmp_path / "b")
    first, again = ((tmp_path / name / "prompt_states.safetensors").read_bytes() for name in "ab")
    assert first == again


def test_an_adapter_without_them_loads(make_adapter, tmp_path):
    make_adapter(0).save(tmp_path / "old")
    adapter = Adapter.load(tmp_path / "old")
    assert not adapter.prompt_states
    with pytest.raises(RsgwmError, match="no prompt states beside old; training on a corpus keeps them now"):
        statistics_of_pool([adapter])


@pytest.mark.parametrize(
    ("arrays", "metadata"),
    [
        ({"mean": mx.zeros(11)}, {}),
        ({"factor": mx.zeros((3, 11))}, {}),
        ({"rest": mx.zeros((12, 1))}, {}),
        ({"mean": mx.full(12, float("nan"))}, {}),
        ({"factor": mx.full((3, 12), float("inf"))}, {}),
        ({"rest": mx.full(12, -1.0)}, {}),
        ({"mean": mx.zeros(12, mx.bfloat16)}, {}),
        ({"mean": mx.zeros(0), "factor": mx.zeros((3, 0)), "rest": mx.zeros(0)}, {}),
        ({"states": mx.zeros((4, 12))}, {}),
        ({}, {"shrinkage": "1.5"}),
        ({}, {"shrinkage": "nan"}),
        ({}, {"questions": "many"}),
        ({}, {"questions": "1"}),
        ({}, {"layer": "0"}),
        ({}, {"kind": "another"}),
    ],
)  # fmt: skip
def test_damaged_ones_are_named(make_adapter, tmp_path, arrays, metadata):
    saved(make_adapter, tmp_path / "a", arrays, metadata)
    with pytest.raises(RsgwmError, match=r"a: its prompt_states.safetensors is damaged"):
        statistics_of_pool([Adapter.load(tmp_path / "a")])


def test_those_of_another_base_than_the_adapters(make_adapter, tmp_path):
    saved(make_adapter, tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    adapter.manifest["base"] = {"fingerprint": "f" * 64}
    with pytest.raises(RsgwmError, match=r"its prompt_states.safetensors is of another base than the adapter's"):
        statistics_of_pool([adapter])


def test_a_file_that_was_changed_after_training(make_adapter, tmp_path):
    saved(make_adapter, tmp_path / "a")
    path = tmp_path / "a/prompt_states.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(RsgwmError, match=r"prompt_states.safetensors was changed or damaged"):
        Adapter.load(tmp_path / "a")
