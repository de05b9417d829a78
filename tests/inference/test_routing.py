"""Routers: states against the model's own layers, rules written out in float64, files, and the loop over a pool."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.inference.calibration import Calibration
from mlx_rsgwm.inference.draft import Answer
from mlx_rsgwm.inference.identity import pipeline_identity
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import open_pipeline
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.routed import ROUTER_FILE, RoutedDraftVerify, RoutedPool, load_routed
from mlx_rsgwm.inference.routing import RULES, Router, _shares, fit_router
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.models.hooks import outputs_changed
from mlx_rsgwm.models.prompt_states import prompt_states
from mlx_rsgwm.models.slots import AdapterSlots

TASKS = ("change", "groups", "prices")
TEMPLATE = TEMPLATES["plain"]


def asked(count=8, split="train", tasks=TASKS):
    return {task: [question.question for question in generate(task, count, 3, split)] for task in tasks}


@pytest.fixture
def slots(base, make_adapter):
    slots = AdapterSlots(base)
    for seed, name in enumerate(("drafter", "verifier", *TASKS)):
        slots.load(name, make_adapter(seed))
    return slots


def config(**settings):
    return LoopConfig(2, 0.5, "mean_logprob", Sampling(max_tokens=5, seed=3), **settings)


# --- states -------------------------------------------------------------------------------------------------------


def test_states_are_the_means_of_a_layers_outputs(base):
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
    found = prompt_states(base, prompts, 1)
    for prompt, state in zip(prompts, found, strict=True):
        seen = []

        def keep(name, x, y, seen=seen):
            seen.append(y)
            return y

        with outputs_changed(base.model, ["model.layers.0"], keep):
            mx.eval(base.model(mx.array([prompt])))
        np.testing.assert_allclose(state, np.array(seen[0][0]).astype(np.float64).mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("layer", [0, 3, -1])
def test_a_layer_that_is_not_there(base, layer):
    with pytest.raises(RsgwmError, match=rf"layer must be in \[1, 2\], found {layer}"):
        prompt_states(base, [[1, 2]], layer)


# --- rules --------------------------------------------------------------------------------------------------------


def clouds(rng, count=60, dims=12):
    """States around three means that lie in one direction, with much wider spread in another."""
    spread = np.ones(dims)
    spread[1] = 30.0
    means = np.zeros((3, dims))
    means[:, 0] = (-4.0, 0.0, 4.0)
    labels = np.arange(count) % 3
    return means[labels] + rng.standard_normal((count, dims)) * spread, labels


def test_distance_is_that_in_the_metric_of_the_covariance():
    """Log-posteriors of normal densities of one covariance: Ledoit and Wolf's estimate of it, by scikit-learn."""
    from sklearn.covariance import ledoit_wolf

    from mlx_rsgwm.inference.routing import _fit

    states, labels = clouds(np.random.default_rng(0))
    new, expected = clouds(np.random.default_rng(1))
    shares = _shares("distance", _fit("distance", states, labels, 3), new, 3)
    scaled, scale, centre = (states - states.mean(0)) / states.std(0), states.std(0), states.mean(0)
    means = np.stack([scaled[labels == each].mean(0) for each in range(3)])
    covariance = np.zeros((12, 12))
    for each in range(3):
        own = scaled[labels == each]
        sizes = own.std(0)
        covariance += ledoit_wolf((own - own.mean(0)) / sizes)[0] * np.outer(sizes, sizes) / 3
    inverse = np.linalg.inv(covariance)
    away = (new - centre) / scale
    logs = np.stack([-0.5 * np.einsum("nd,de,ne->n", away - mean, inverse, away - mean) for mean in means], axis=1)
    reference = np.exp(logs - logs.max(1, keepdims=True))
    np.testing.assert_allclose(shares, reference / reference.sum(1, keepdims=True), atol=1e-6)
    assert (shares.argmax(1) == expected).mean() > 0.9


def test_nearest_are_votes_of_the_nearest():
    rng = np.random.default_rng(2)
    states, labels = rng.standard_normal((20, 4)), np.arange(20) % 3
    from mlx_rsgwm.inference.routing import _fit

    new = rng.standard_normal((7, 4))
    shares = _shares("nearest", _fit("nearest", states, labels, 3), new, 3)
    for row, share in zip(new, shares, strict=True):
        cosines = [row @ state / np.linalg.norm(row) / np.linalg.norm(state) for state in states]
        votes = np.zeros(3)
        for index in sorted(range(20), key=lambda each: -cosines[each])[:5]:
            votes[labels[index]] += max(cosines[index], 1e-9)
        np.testing.assert_allclose(share, votes / votes.sum(), atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_router_knows_its_tasks_again(base, rule):
    router = fit_router(base, TEMPLATE, asked(24), rule)
    new = asked(16, "test")
    prompts = [TEMPLATE.draft_prompt(base.tokenizer, text) for texts in new.values() for text in texts]
    routes = router.routes(prompt_states(base, prompts, router.layer))
    expected = [name for name, texts in new.items() for _ in texts]
    right = sum(route.name == name for route, name in zip(routes, expected, strict=True))
    assert right >= 0.75 * len(routes)  # of a base that was never trained; a third is chance
    assert all(0 <= route.margin <= 1 and sum(route.probabilities) == pytest.approx(1) for route in routes)
    assert router.about["accuracy"].keys() == set(RULES)


def test_two_tasks(base):
    """Of questions that it was fitted on, so that a base that knows nothing suffices; linear rules fit two as one."""
    for rule in ("distance", "classifier"):
        asked_of = asked(12, tasks=TASKS[:2])
        router = fit_router(base, TEMPLATE, asked_of, rule)
        for name, texts in asked_of.items():
            prompts = [TEMPLATE.draft_prompt(base.tokenizer, text) for text in texts]
            routes = router.routes(prompt_states(base, prompts, router.layer))
            assert [route.name for route in routes].count(name) >= 9, rule


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"questions": asked(8, tasks=TASKS[:1])}, "among two or more adapters, found 1"),
        ({"questions": {**asked(8), "few": ["What?"] * 4}}, "few: a router takes at least 5 questions of each task"),
        ({"rule": "likelihood"}, "rule must be auto or one of distance, nearest, classifier, found 'likelihood'"),
        ({"margin": 1.5}, r"margin must be in \[0, 1\], found 1.5"),
        ({"margin": float("nan")}, r"margin must be in \[0, 1\], found nan"),
        ({"layer": 9}, r"layer must be in \[1, 2\], found 9"),
    ],
)  # fmt: skip
def test_what_no_router_can_be_fitted_to(base, change, reason):
    with pytest.raises(RsgwmError, match=reason):
        fit_router(base, TEMPLATE, **{"questions": asked(8), **change})


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_router_comes_back_to_the_same_bits(base, tmp_path, rule):
    router = fit_router(base, TEMPLATE, asked(8), rule, margin=0.25)
    router.save(tmp_path / "router.safetensors")
    again = Router.load(tmp_path / "router.safetensors")
    assert (again.names, again.rule, again.layer, again.margin) == (TASKS, rule, 1, 0.25)
    assert again.about == router.about
    for name, array in router.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
    assert again.digest() == router.digest()


@pytest.mark.parametrize(
    "arrays",
    [
        {"weight": np.zeros((2, 4)), "bias": np.zeros(3)},
        {"weight": np.full((3, 4), np.nan), "bias": np.zeros(3)},
        {"weight": np.zeros((3, 4))},
        {"states": np.zeros((3, 4)), "labels": np.zeros(3)},
    ],
)
def test_a_router_that_cannot_choose_is_refused(tmp_path, arrays):
    Router(TASKS, "classifier", 1, arrays).save(tmp_path / "router.safetensors")
    with pytest.raises(RsgwmError, match="is no sound router"):
        Router.load(tmp_path / "router.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"names": ("change", "change", "prices")},
        {"names": ("change", "groups", 3)},
        {"layer": 1.5},
        {"layer": True},
        {"layer": "1"},
        {"layer": 0},
        {"margin": True},
        {"margin": "0.5"},
        {"margin": 1.5},
        {"about": {"adapters": []}},
    ],
)
def test_settings_that_are_not_what_they_look_like(tmp_path, change):
    router = Router(TASKS, "classifier", 1, {"weight": np.zeros((3, 4)), "bias": np.zeros(3)})
    router.check(tmp_path)
    replace(router, **change).save(tmp_path / "router.safetensors")
    with pytest.raises(RsgwmError, match="is no sound router"):
        Router.load(tmp_path / "router.safetensors")


def test_another_file_is_no_router(tmp_path, make_adapter):
    make_adapter(0).save(tmp_path / "adapter")
    with pytest.raises(RsgwmError, match="is no router; rsgwm pool route makes one"):
        Router.load(tmp_path / "adapter/adapters.safetensors")


# --- the loop -----------------------------------------------------------------------------------------------------


def routed(slots, merged="drafter", margin=0.0, **settings):
    router = fit_router(slots.base, TEMPLATE, asked(16), margin=margin)
    fresh = AdapterSlots(slots.base)  # fitting takes the slots off the model
    for name in slots.names():
        fresh.load(name, slots.adapter(name))
    return RoutedDraftVerify(fresh, TEMPLATE, router, merged, "verifier", config(**settings))


def test_every_question_is_drafted_by_its_adapter(slots):
    pipeline = routed(slots)
    questions = [text for texts in zip(*asked(3, "test").values(), strict=True) for text in texts]
    drafters = pipeline.drafters_of(questions)
    assert set(drafters) == set(TASKS)
    expected = []
    for text, name in zip(questions, drafters, strict=True):
        alone = DraftVerify(pipeline.slots, TEMPLATE, name, "verifier", config())
        expected.append(alone.answer(text))
    for found in ([pipeline.answer(text) for text in questions], pipeline.answer_many(questions, batch_rows=8)):
        assert [(each.text, each.accepted, each.attempts) for each in found] == [
            (each.text, each.accepted, each.attempts) for each in expected
        ]
        np.testing.assert_allclose([each.score for each in found], [each.score for each in expected], atol=2e-5)
    ends = dict(pipeline.drafts_as_they_end(questions, 2, 8))
    assert sorted(ends) == list(range(len(questions)))
    for index, name in enumerate(drafters):
        alone = DraftVerify(pipeline.slots, TEMPLATE, name, "verifier", config())
        assert [draft.tokens for draft in ends[index]] == [
            draft.tokens for draft in alone.draft_many([questions[index]], 2)[0]
        ]


def test_below_the_margin_the_merged_adapter_answers(slots):
    pipeline = routed(slots, margin=1.0)
    questions = asked(2, "test")["change"]
    assert pipeline.drafters_of(questions) == ["drafter", "drafter"]
    alone = DraftVerify(pipeline.slots, TEMPLATE, "drafter", "verifier", config())
    assert [pipeline.answer(text).text for text in questions] == [alone.answer(text).text for text in questions]
    without = routed(slots, merged=None, margin=1.0)
    assert set(without.drafters_of(questions)) <= set(TASKS)


def test_other_settings_reach_every_drafter(slots):
    pipeline = routed(slots)
    (question,) = asked(1, "test")["groups"]
    other = pipeline.with_config(LoopConfig(1, 0.0, "mean_logprob", Sampling(max_tokens=2, seed=1)))
    drafts = [step for step in other.steps(question) if not isinstance(step, Answer)]
    assert max(draft.attempt for draft in drafts) == 1
    assert all(len(draft.tokens) <= 2 for draft in drafts)


def test_a_calibration_is_for_the_router_too(slots):
    pipeline = routed(slots)
    drafters = pipeline_identity(pipeline)["drafter"]
    assert drafters.keys() == {*TASKS, "drafter", "router"}
    assert pipeline_identity(routed(slots, margin=0.5))["drafter"]["router"] != drafters["router"]


def test_what_a_calibration_settles_reaches_every_drafter(base, make_adapter, tmp_path):
    for seed, name in enumerate((*TASKS, "v")):
        make_adapter(seed).save(tmp_path / name)
    fit_router(base, TEMPLATE, asked(8)).save(tmp_path / ROUTER_FILE)
    calibration = Calibration("yesno", 0.0, None, {}, {}, {}, {}, 6, 12, 5)
    pipeline = open_pipeline(
        None, tmp_path / "v", base, router=tmp_path, template="plain", max_tokens=4, calibrate=lambda _: calibration
    )
    question = asked(1, "test")["change"][0]
    assert (pipeline.config.score, pipeline.config.threshold) == ("yesno", 0.0)
    assert pipeline.of_question(question).config == pipeline.config
    assert pipeline.of_question(question).calibration == calibration
    assert pipeline.answer(question).accepted  # by that threshold; by the usual one it is not


def test_a_router_of_another_base_template_or_pool(slots):
    router = fit_router(slots.base, TEMPLATE, asked(8))
    with pytest.raises(RsgwmError, match="fitted with another template"):
        RoutedDraftVerify(slots, TEMPLATES["chat"], router, None, "verifier", config())
    more = Router((*TASKS, "compare"), router.rule, router.layer, router.arrays, about=router.about)
    with pytest.raises(RsgwmError, match="adapters that are not in the pool: compare"):
        RoutedDraftVerify(slots, TEMPLATE, more, None, "verifier", config())


def test_a_pool_with_a_router_opens(base, make_adapter, tmp_path):
    for seed, name in enumerate((*TASKS, "v")):
        make_adapter(seed).save(tmp_path / "pool" / name)
    with pytest.raises(RsgwmError, match="has no router; make one: rsgwm pool route"):
        load_routed(tmp_path / "pool", None)
    fit_router(base, TEMPLATE, asked(8)).save(tmp_path / "pool" / ROUTER_FILE)
    pipeline = open_pipeline(
        None, tmp_path / "pool/v", base, router=tmp_path / "pool", template="plain", score="mean_logprob",
        threshold=0.5, max_tokens=4,
    )  # fmt: skip
    assert isinstance(pipeline, RoutedDraftVerify)
    assert pipeline.answer(asked(1, "test")["change"][0]).attempts >= 1
    (tmp_path / "pool/groups").rename(tmp_path / "pool/gone")
    with pytest.raises(RsgwmError, match="adapters that are not there: groups"):
        load_routed(tmp_path / "pool", None)


def test_adapters_of_one_name(make_adapter):
    pool = RoutedPool(Router(TASKS, "nearest", 1, {}), {"change": make_adapter(1), "groups": make_adapter(2)})
    assert pool.beside({"change": make_adapter(1)}).keys() == {"change", "groups"}
    with pytest.raises(RsgwmError, match="different adapters named change"):
        pool.beside({"change": make_adapter(3)})
    with pytest.raises(RsgwmError, match="cannot be called drafter"):
        RoutedPool(pool.router, {"drafter": make_adapter(1)}).beside({})
