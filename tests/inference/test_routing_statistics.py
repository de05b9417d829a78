"""Routers of what training kept: against normal densities in float64, a corpus's, and pools that do not agree."""

from dataclasses import replace

import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.inference.routing import Router, _fit, _shares, fit_router, router_of_statistics
from mlx_rsgwm.models.prompt_states import depth_of, prompt_states
from mlx_rsgwm.models.prompt_statistics import PromptStatistics

TASKS = ("change", "groups", "prices")
TEMPLATE = TEMPLATES["plain"]


def clouds(seed, count=90, dims=12):
    """States around three means, with one direction far wider than the others, and whose each is."""
    rng = np.random.default_rng(seed)
    mix, means = np.random.default_rng(9).standard_normal((2, dims, dims))
    labels = np.arange(count) % 3
    states = means[labels] + rng.standard_normal((count, dims)) @ mix
    return states * np.array([200, *[1] * (dims - 1)]), labels


def statistics_of(states, labels, most_rank=None):
    return {
        task: PromptStatistics.of_states(states[labels == index], 1, "base", "template", most_rank)
        for index, task in enumerate(TASKS)
    }


def test_at_full_rank_it_is_the_discriminant_of_all_states():
    states, labels = clouds(0)
    new, _ = clouds(1)
    router = router_of_statistics(statistics_of(states, labels, most_rank=30))
    shares = _shares("distance", router.arrays, new, 3)
    full = _shares("distance", _fit("distance", states, labels, 3), new, 3)  # scikit-learn's
    np.testing.assert_allclose(shares, full, atol=1e-5)
    means = [states[labels == each].mean(0) for each in range(3)]
    shared = np.zeros((12, 12))
    for each, mean in enumerate(means):
        centred = states[labels == each] - mean
        covariance = centred.T @ centred / len(centred)
        share = statistics_of(states, labels)[TASKS[each]].shrinkage
        shared += ((1 - share) * covariance + share * np.diag(np.diag(covariance))) / 3
    inverse = np.linalg.inv(shared)
    logs = np.stack([-0.5 * np.einsum("nd,de,ne->n", new - mean, inverse, new - mean) for mean in means], axis=1)
    reference = np.exp(logs - logs.max(1, keepdims=True))
    np.testing.assert_allclose(shares, reference / reference.sum(1, keepdims=True), atol=1e-5)
    assert shares.min(axis=1).max() > 0.1  # some are near all three, so that there is something to compare


def test_at_a_low_rank_most_go_the_same_way():
    states, labels = clouds(0)
    new, expected = clouds(1, 300)
    low, full = (
        _shares("distance", router_of_statistics(statistics_of(states, labels, rank)).arrays, new, 3).argmax(axis=1)
        for rank in (4, 30)
    )
    assert (low == full).mean() > 0.9
    assert (low == expected).mean() > 0.7  # a third is chance


def asked(count, split="train"):
    return {task: [question.question for question in generate(task, count, 3, split)] for task in TASKS}


def read(base, texts):
    prompts = [TEMPLATE.draft_prompt(base.tokenizer, text) for text in texts]
    return prompt_states(base, prompts, depth_of(base))


def test_questions_go_where_a_corpus_would_send_them(base):
    """Of a base that was never trained; a third is chance."""
    questions = asked(48)
    by_corpus = fit_router(base, TEMPLATE, questions, "distance")
    pool = {
        task: PromptStatistics.of_states(read(base, texts), depth_of(base), base.fingerprint, TEMPLATE.hash)
        for task, texts in questions.items()
    }
    by_statistics = router_of_statistics(pool)
    assert by_statistics.margin == 0.9
    by_statistics.require(base, TEMPLATE)
    new = asked(40, "test")
    states = np.concatenate([read(base, texts) for texts in new.values()])
    first, second = ([route.name for route in router.routes(states)] for router in (by_corpus, by_statistics))
    expected = [task for task, texts in new.items() for _ in texts]
    assert np.mean([a == b for a, b in zip(first, second, strict=True)]) >= 0.9
    assert np.mean([a == b for a, b in zip(second, expected, strict=True)]) >= 0.8


def test_it_is_saved_like_any_other(tmp_path):
    router = router_of_statistics(statistics_of(*clouds(0)), margin=0.25)
    router.save(tmp_path / "router.safetensors")
    again = Router.load(tmp_path / "router.safetensors")
    assert again.digest() == router.digest()
    assert again.about == {
        "base": "base", "template": "template", "questions": dict.fromkeys(TASKS, 30), "source": "kept by training",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer": 2}, "groups has them of another layer than change"),
        ({"base": "b"}, "groups has them of another base than change"),
        ({"template": "t"}, "groups has them of another template than change"),
        ({"mean": np.zeros(3), "factor": np.zeros((1, 3)), "rest": np.ones(3)}, "groups has other dimensions"),
    ],
)
def test_statistics_that_do_not_agree(change, reason):
    pool = statistics_of(*clouds(0))
    with pytest.raises(RsgwmError, match=reason):
        router_of_statistics({**pool, "groups": replace(pool["groups"], **change)})


def test_what_no_router_can_be_made_of():
    pool = statistics_of(*clouds(0))
    with pytest.raises(RsgwmError, match="among two or more adapters, found 1"):
        router_of_statistics({"change": pool["change"]})
    for margin in (1.5, float("nan")):
        with pytest.raises(RsgwmError, match=r"margin must be in \[0, 1\]"):
            router_of_statistics(pool, margin)
    still = {name: replace(each, factor=0 * each.factor, rest=0 * each.rest) for name, each in pool.items()}
    with pytest.raises(RsgwmError, match="have no covariance that can be inverted"):
        router_of_statistics(still)
