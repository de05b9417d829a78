"""A pool that verifies: one batch for all its adapters, against one adapter at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.inference.draft import Draft, Signals
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.pool import RULES, together
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.inference.scores import Combination, Scorer, fit_combination, pool_features
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.slots import AdapterSlots

QUESTIONS = ["What is 2 + 2?", "Name a number.", "A much longer question, with several more words in it, is here?"]
POOL = ("change", "groups", "prices")


def upper_half(adapter):
    """The adapter without its lower layer, so that the lower one is everybody's."""
    weights = {name: value for name, value in adapter.weights.items() if ".layers.1." in name}
    return Adapter(replace(adapter.spec, num_layers=1), weights, manifest=adapter.manifest)


@pytest.fixture
def slots(request, base, make_adapter):
    part = getattr(request, "param", lambda adapter: adapter)
    slots = AdapterSlots(base)
    for seed, name in enumerate(("drafter", *POOL)):
        slots.load(name, part(make_adapter(seed)))
    return slots


def loop(slots, verifier=POOL, combine="max", template="plain", threshold=0.5, **settings):
    config = LoopConfig(3, threshold, settings.pop("score", "mean_logprob"), Sampling(max_tokens=6, seed=3), "parallel")
    return DraftVerify(
        slots, TEMPLATES[template], "drafter", verifier, config, combine=combine, on_mismatch="warn", **settings
    )


def drafts_of(pipeline):
    """Drafts of several questions, several of one among them, one empty."""
    texts = ["4\n#### 4", "2 * 3 = 6, and so on\n#### 6", "7", "4\n#### 5", "x"]
    questions = [QUESTIONS[0], QUESTIONS[2], QUESTIONS[1], QUESTIONS[0], QUESTIONS[0]]
    return [*questions, QUESTIONS[1]], [*map(pipeline.as_draft, texts), Draft(1, (), False)]


def assert_alike(left: Signals, right: Signals) -> None:
    assert left.tokens == right.tokens
    for part in ("yesno", "mean", "minimum"):
        one, other = getattr(left, part), getattr(right, part)
        assert (one is None) == (other is None)
        assert one is None or one == pytest.approx(other, abs=2e-5)


@pytest.mark.parametrize("slots", [lambda adapter: adapter, upper_half], ids=["all layers", "upper"], indirect=True)
@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=["both", "verdict", "logprobs"])
def test_one_batch_gives_what_each_adapter_alone_does(slots, template, needs):
    pipeline = loop(slots, template=template)
    questions, drafts = drafts_of(pipeline)
    alone = {
        name: [
            loop(slots, name, template=template).reader.signals([question], [draft], needs)[0]
            for question, draft in zip(questions, drafts, strict=True)
        ]
        for name in POOL
    }
    values = np.array([[signal.mean or 0.0, signal.yesno or 0.0] for said in alone.values() for signal in said])
    assert len(np.unique(values.round(6), axis=0)) > len(drafts), "the adapters must differ, or nothing is compared"
    for batch_rows in (32, 4, 1):
        for index, signal in enumerate(pipeline.reader.signals_many(questions, drafts, needs, batch_rows)):
            assert len(signal.each) == len(POOL)
            for name, said in zip(pipeline.verifiers, signal.each, strict=True):
                assert_alike(said, alone[name][index])
    assert slots.active is None


@pytest.mark.parametrize("slots", [lambda adapter: adapter, upper_half], ids=["all layers", "upper"], indirect=True)
@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("score", ["mean_logprob", "yesno"])
def test_question_by_question_and_in_batches_the_scores_are_those_of_a_slow_reference(slots, template, score):
    pipeline = loop(slots, template=template, score=score, threshold=1.0)
    singles = [loop(slots, name, template=template) for name in POOL]
    together_answers = pipeline.answer_many(QUESTIONS, batch_rows=5)
    for question, batched in zip(QUESTIONS, together_answers, strict=True):
        steps = list(pipeline.steps(question))
        judged = steps[1:-1:2]
        assert len(judged) == 3
        for draft in judged:
            expected = max(single.score_many([question], [draft], score)[0] for single in singles)
            assert draft.score == pytest.approx(expected, abs=2e-5)
        assert batched.text == steps[-1].text
        assert batched.score == pytest.approx(steps[-1].score, abs=2e-5)
        assert batched.score == pytest.approx(max(draft.score for draft in judged), abs=2e-5)


@pytest.mark.parametrize("slots", [upper_half], ids=["upper"], indirect=True)
def test_layers_below_the_pool_are_computed_once(slots, monkeypatch):
    pipeline = loop(slots)
    questions, drafts = drafts_of(pipeline)
    split = pipeline._split()
    rows = {"lower": [], "upper": []}

    def counted(name):
        layers = getattr(split, name)
        return lambda states, cache=None: rows[name].append(states.shape[0]) or layers(states, cache=cache)

    pipeline._splits[1] = replace(split, lower=counted("lower"), upper=counted("upper"))
    pipeline.reader.signals(questions, drafts)
    assert rows["upper"] == [len(POOL) * count for count in rows["lower"]]
    assert len(rows["lower"]) == 2  # the prompts, then the drafts


def test_how_a_pool_is_given_changes_nothing(slots):
    questions, drafts = drafts_of(loop(slots))
    first, second = (loop(slots, names) for names in (POOL, POOL[::-1]))
    assert first.verifiers == second.verifiers
    assert first.reader.signals_many(questions, drafts) == second.reader.signals_many(questions, drafts)


def test_a_pool_of_one_is_that_verifier_to_the_bit(slots):
    questions, drafts = drafts_of(loop(slots))
    single, pool = loop(slots, "groups"), loop(slots, ("groups",))
    assert single.reader.signals_many(questions, drafts) == pool.reader.signals_many(questions, drafts)
    assert all(not signal.each for signal in pool.reader.signals_many(questions, drafts))
    assert [single.answer(question) for question in QUESTIONS] == [pool.answer(question) for question in QUESTIONS]


EACH = [Signals(0.2, -2.0, -9.0, 5), Signals(0.9, -0.5, -7.0, 5), Signals(0.4, -1.0, -3.0, 5)]


def test_rules():
    most = together(EACH, "max")
    assert (most.yesno, most.mean, most.minimum, most.tokens, most.each) == (0.9, -0.5, -3.0, 5, tuple(EACH))
    assert together(EACH, "learned") == most
    mean = together(EACH, "mean")
    assert mean.yesno == pytest.approx(0.5)
    assert mean.mean_logprob == pytest.approx(np.mean([signal.mean_logprob for signal in EACH]))
    assert mean.minimum == pytest.approx(math.log(np.mean(np.exp([-9.0, -7.0, -3.0]))))
    for rule in RULES:
        assert together(EACH[:1], rule) == EACH[0]
        empty = together([Signals(None, -1000.0, -1000.0, 0)] * 2, rule)
        assert (empty.yesno, empty.mean_logprob) == (None, 0.0)
        asked = together([Signals(0.5, None, None, 0)] * 2, rule)
        assert (asked.yesno, asked.mean, asked.minimum) == (0.5, None, None)


def test_the_combined_score_is_fitted_to_what_the_pool_says_together():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2 == 0
    drafts = [
        together([Signals(float(y), float(-m), float(-3 * m), 4) for y, m in rng.random((3, 2)) / (1 + right)], "max")
        for right in labels
    ]
    plain = [replace(signal, each=()) for signal in drafts]
    assert fit_combination(drafts, labels) == fit_combination(plain, labels)
    scorer = Scorer("combined", fit_combination(drafts, labels))
    assert scorer.values(drafts).tolist() == scorer.values(plain).tolist()


def test_what_the_learned_rule_weighs():
    drafts = [together(EACH, "learned"), together(EACH[::-1], "learned")]
    assert pool_features("mean_logprob", drafts).tolist() == [[-2.0, -0.5, -1.0], [-1.0, -0.5, -2.0]]
    assert pool_features("yesno", drafts).shape == (2, 3)
    assert pool_features("yesno", drafts)[0] == pytest.approx([math.log(p / (1 - p)) for p in (0.2, 0.9, 0.4)])
    combined = pool_features("combined", drafts)
    assert combined.shape == (2, 10)
    assert combined[:, -1].tolist() == [5.0, 5.0]
    only_verdicts = together([replace(signal, mean=None, minimum=None) for signal in EACH], "learned")
    assert pool_features("yesno", [only_verdicts]).shape == (1, 3)


def test_what_is_refused(slots):
    with pytest.raises(RsgwmError, match="combine must be one of max, mean, learned, found 'sum'"):
        loop(slots, combine="sum")
    with pytest.raises(RsgwmError, match="combine mean takes a verifier of several adapters, and this one has 1"):
        loop(slots, "groups", combine="mean")
    pipeline = loop(slots, combine="learned", calibration=None)
    with pytest.raises(RsgwmError, match="rsgwm calibrate --combine learned"):
        pipeline.answer(QUESTIONS[0])
    with pytest.raises(RsgwmError, match="no adapter named 'x' is loaded"):
        loop(slots, ("groups", "x"))
    assert isinstance(Combination((0.0,) * 4, (1.0,) * 4, (1.0,) * 4, 0.0), Combination)
