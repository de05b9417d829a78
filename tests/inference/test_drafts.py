"""The loop with grafted drafts: which kind each attempt is, how many there are, and the same answers in every way."""

import itertools
import statistics
from dataclasses import replace

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.evaluation.runner import evaluate
from mlx_rsgwm.inference import loop as loop_module
from mlx_rsgwm.inference.draft import CHAINS, SAMPLED, Answer
from mlx_rsgwm.inference.grafting import KINDS, grafted_drafts
from mlx_rsgwm.inference.identity import describe_pipeline
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.policy import MODES, LoopConfig, decide
from mlx_rsgwm.inference.sampling import Sampling
from tests.inference.test_modes import QUESTIONS, ended_early

SAMPLING = Sampling(max_tokens=6, seed=3)


@pytest.fixture
def make(slots):
    def make_pipeline(drafts, attempts=2, threshold=1.0, mode="parallel", **more):
        config = LoopConfig(attempts, threshold, "mean_logprob", SAMPLING, mode, drafts=drafts, **more)
        return ended_early(DraftVerify(slots, TEMPLATES["plain"], "drafter", "verifier", config))

    return make_pipeline


def told(steps):
    """Kinds, numbers and tokens of the drafts, then what came of them."""
    *drafts, answer = steps
    written = [(draft.attempt, draft.kind, draft.tokens) for draft in drafts[::2]]
    assert [(draft.attempt, draft.kind, draft.tokens) for draft in drafts[1::2]] == written
    return written, answer.text, answer.attempts, answer.accepted, answer.kind


def between(rows):
    """Of thresholds that end questions (rows of scores) at several attempts and leave some without an accepted draft,
    the one that no score is nearer to."""
    values = sorted({score for row in rows for score in row})
    fitting = []
    for low, high in itertools.pairwise(values):
        ends = [decide(row, (low + high) / 2) for row in rows]
        several = len({end.attempts for end in ends if end.accepted}) > 1
        if several and {end.accepted for end in ends} == {True, False}:
            fitting.append((high - low, (low + high) / 2))
    return max(fitting)[1]


def test_the_names_are_those_of_the_grafts():
    assert CHAINS[1:] == tuple(KINDS)


def test_kinds_and_their_number():
    assert LoopConfig(3).kinds(5) == (SAMPLED,) * 5
    assert LoopConfig(3, drafts="grafted").kinds(8) == CHAINS
    mixed = LoopConfig(2, drafts="mixed")
    assert (mixed.samples, mixed.most) == (2, 10)
    assert mixed.kinds(10) == (SAMPLED, SAMPLED, *CHAINS)
    with pytest.raises(RsgwmError, match="11 drafts of a question: there are 10 that are mixed"):
        mixed.kinds(11)
    with pytest.raises(RsgwmError, match="there are 8 that are grafted"):
        LoopConfig(8, drafts="grafted").kinds(9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drafts": "graffed"}, "drafts must be one of sampled, grafted, mixed, found 'graffed'"),
        ({"drafts": "grafted", "attempts": 9}, "attempts must be from 1 to 8 with grafted drafts, found 9"),
        ({"layer": 1}, "layer is from 0, and of drafts that are grafted or mixed; found 1"),
        ({"drafts": "mixed", "layer": -1}, "layer is from 0"),
    ],
)
def test_what_the_loop_refuses(settings, message):
    with pytest.raises(RsgwmError, match=message):
        LoopConfig(**settings)


def test_a_layer_that_is_not_there_is_refused_before_any_draft(make):
    with pytest.raises(RsgwmError, match="layer 7 is out of range: the model has layers 0 to 1"):
        make("mixed", layer=7)


@pytest.mark.parametrize("slots", [None, 4], ids=["float32", "4-bit"], indirect=True)
def test_attempts_are_the_kinds_in_order_and_mixed_goes_on_where_sampling_ends(make):
    grafted, mixed, sampled = make("grafted", 8), make("mixed"), make("sampled")
    mixed.end_ids = sampled.end_ids = grafted.end_ids
    for question in QUESTIONS[:4]:
        written = told(grafted.steps(question))[0]
        prompt = grafted.prompt(question)
        with grafted.slots.using("drafter"):
            (chains,) = grafted_drafts(
                grafted.slots.model, grafted.parts, grafted.end_ids, [prompt], CHAINS, None, 6, SAMPLING.seed
            )
        assert written == [(chain.attempt, chain.kind, chain.tokens) for chain in chains]
        samples, *_ = told(sampled.steps(question))
        after = [(2 + number, kind, tokens) for number, kind, tokens in written]
        assert told(mixed.steps(question))[0] == samples + after  # nothing is accepted at threshold 1


@pytest.mark.parametrize("slots", [None, 4], ids=["float32", "4-bit"], indirect=True)
@pytest.mark.parametrize("drafts", ["grafted", "mixed"])
def test_modes_and_batches_say_the_same(make, drafts):
    attempts = 8 if drafts == "grafted" else 2
    reference = make(drafts, attempts)
    scores = [[step.score for step in list(reference.steps(question))[1:-1:2]] for question in QUESTIONS[:12]]
    threshold = between(scores)
    expected = None
    for mode in MODES:
        pipeline = reference.with_config(replace(reference.config, threshold=threshold, mode=mode))
        alone = [told(pipeline.steps(question)) for question in QUESTIONS[:12]]
        assert expected is None or alone == expected
        expected = alone
        for rows in (1, 20):
            steps = {index: [] for index in range(12)}
            for index, step in pipeline.steps_many(QUESTIONS[:12], rows):
                steps[index].append(step)
            assert [told(steps[index]) for index in range(12)] == alone
    ends = [decide(row, threshold) for row in scores]
    assert [(end.attempts, end.accepted) for end in ends] == [(row[2], row[3]) for row in expected]
    assert {row[4] for row in expected} - {SAMPLED, "greedy"}  # or nothing was compared


def test_chains_of_several_questions_are_written_side_by_side(make, monkeypatch):
    pipeline, blocks = make("mixed"), []
    real = loop_module.graft_many
    monkeypatch.setattr(
        loop_module, "graft_many", lambda *given: blocks.append((len(given[1]), len(given[2]))) or real(*given)
    )
    answers = pipeline.answer_many(QUESTIONS[:6], 32)
    assert blocks == [(4, 8), (2, 8)]
    assert [answer.attempts for answer in answers] == [10] * 6  # the bound: attempts and the eight chains


def test_sampling_is_as_it_was(make, monkeypatch):
    monkeypatch.setattr(loop_module, "graft_many", lambda *_: pytest.fail("grafted"))
    monkeypatch.setattr(loop_module, "grafted_layer", lambda *_: pytest.fail("looked for a layer"))
    default = LoopConfig(2, 1.0, "mean_logprob", SAMPLING, "parallel")
    pipeline = make("sampled")
    assert pipeline.config == default
    assert not {"drafts", "layer"} & describe_pipeline(pipeline)["loop"].keys()  # unfinished runs go on
    assert {step.kind for step in pipeline.steps(QUESTIONS[0])} == {SAMPLED}
    assert all(answer.attempts == 2 for answer in pipeline.answer_many(QUESTIONS[:3]))


def test_records_say_the_kind_and_are_the_loops_own_decisions(make):
    from mlx_rsgwm.data.synthetic import generate
    from mlx_rsgwm.evaluation.records import ItemRecord

    questions = generate("change", 5, 0, "test")
    pipeline = make("mixed")
    records = evaluate(pipeline, questions, 0)
    scores = [[draft.scores["mean_logprob"] for draft in record.drafts] for record in records]
    pipeline.config = replace(pipeline.config, threshold=between(scores))
    for record, question in zip(evaluate(pipeline, questions, 0), questions, strict=True):
        assert tuple(draft.kind for draft in record.drafts) == pipeline.config.kinds(10)
        row = record.to_dict()
        assert [draft["kind"] for draft in row["drafts"]] == [SAMPLED, SAMPLED, *CHAINS]
        assert ItemRecord.from_dict(row) == record
        answer = pipeline.answer(question.question)
        assert isinstance(answer, Answer)
        assert (answer.attempts, answer.accepted, answer.text) == (
            record.attempts, record.accepted, record.returned.text,
        )  # fmt: skip
    sampled = make("sampled")
    (record,) = evaluate(sampled, questions[:1], 0)
    assert all("kind" not in draft for draft in record.to_dict()["drafts"])
    with pytest.raises(RsgwmError, match="12 drafts of a question: there are 10 that are mixed"):
        evaluate(pipeline, questions[:1], 0, drafts=12)


def test_scores_are_the_verifiers_of_the_plain_text(make):
    pipeline = make("grafted", 8)
    steps = list(pipeline.steps(QUESTIONS[1]))
    drafts = steps[1:-1:2]
    plain = pipeline.score_many([QUESTIONS[1]] * 8, drafts, "mean_logprob")
    assert [draft.score for draft in drafts] == pytest.approx(plain, abs=1e-5)
    assert statistics.pstdev(plain) > 0
