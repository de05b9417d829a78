"""Sampling, drafting, verifying and the loop, each against the slow and obvious way."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.inference.draft import Answer, Draft
from mlx_rsgwm.inference.generate import DraftRequest, draft
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.policy import LoopConfig, decide
from mlx_rsgwm.inference.sampling import CANDIDATES, TAIL_KEY, Sampling, choose, choose_exact, uniforms
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.models.split import split_head

QUESTIONS = ["What is 2 + 2?", "Name a number.", "A much longer question, with several more words in it, is here?"]


def reference_choice(logits, uniform, temperature, top_p):
    """Sort the whole vocabulary, cut the nucleus, walk the cumulative sum; beyond the 128 best, log p + noise."""
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    nucleus, mass = [], 0.0
    for token in order:
        if mass >= top_p:
            break
        nucleus.append(token)
        mass += probabilities[token]
    walked = 0.0
    for token in nucleus[:CANDIDATES]:
        walked += probabilities[token]
        if walked > uniform * mass:
            return token
    if len(nucleus) <= CANDIDATES:
        return nucleus[-1]
    key = mx.array([int(np.float32(uniform).view(np.uint32)), TAIL_KEY], dtype=mx.uint32)
    noise = np.array(mx.random.gumbel((len(scaled),), key=key)).astype(np.float64)
    return max(nucleus[CANDIDATES:], key=lambda token: np.log(probabilities[token]) + noise[token])


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_choice_is_inverse_transform_sampling(spread, top_p):
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((40, 500)) * spread).astype(np.float32)
    uniform = rng.random(40, dtype=np.float32)
    tokens, certain = choose(mx.array(logits), mx.array(uniform), 0.7, top_p)
    exact = choose_exact(mx.array(logits), mx.array(uniform), 0.7, top_p).tolist()
    expected = [reference_choice(row, u, 0.7, top_p) for row, u in zip(logits, uniform, strict=True)]
    # float32 sums may step over a boundary in rare rows
    assert sum(a != b for a, b in zip(exact, expected, strict=True)) <= 1
    for token, sure, row in zip(tokens.tolist(), certain.tolist(), exact, strict=True):
        if sure:
            assert token == row
    assert spread < 6.0 or top_p == 1.0 or all(certain.tolist())
    assert spread > 0.01 or not any(certain.tolist()) or top_p == 0.3


def test_greedy_is_the_argmax():
    logits = mx.array(np.random.default_rng(0).standard_normal((5, 50)).astype(np.float32))
    assert choose(logits, mx.zeros(5), 0.0, 0.9)[0].tolist() == mx.argmax(logits, axis=-1).tolist()


def test_streams_differ_by_seed_question_and_attempt():
    base = uniforms(1, "q", 1, 8)
    assert (uniforms(1, "q", 1, 4) == base[:4]).all()
    for other in (uniforms(2, "q", 1, 8), uniforms(1, "r", 1, 8), uniforms(1, "q", 2, 8)):
        assert (other != base).all()
    assert base.min() >= 0
    assert base.max() < 1


def plain_draft(model, end, request, sampling):
    """One row, no cache, the whole sequence anew for every token."""
    ids, written = list(request.prompt), []
    stream = uniforms(sampling.seed, request.question, request.attempt, sampling.max_tokens)
    for step in range(sampling.max_tokens):
        logits = np.array(model(mx.array([ids]))[0, -1])
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            token = reference_choice(logits, stream[step], sampling.temperature, sampling.top_p)
        if token in end:
            return tuple(written), True
        ids.append(token)
        written.append(token)
    return tuple(written), False


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_batched_drafts_equal_the_uncached_unbatched_path(base, make_adapter, temperature):
    slots = AdapterSlots(base)
    slots.load("d", make_adapter(1))
    slots.use("d")
    sampling = Sampling(temperature=temperature, max_tokens=12, seed=5)
    requests = [
        DraftRequest(tuple(base.tokenizer.encode(question)), question, attempt)
        for question in QUESTIONS
        for attempt in (1, 2, 3)
    ]
    likely = plain_draft(slots.model, frozenset(), requests[0], sampling)[0]
    end = frozenset({0, likely[4]})  # a token that is really drawn, so that rows leave the batch at different times
    found = draft(slots.model, split_head(slots.model), end, requests, sampling)
    assert len({len(item.tokens) for item in found}) > 1
    for request, item in zip(requests, found, strict=True):
        assert (item.tokens, item.finished) == plain_draft(slots.model, end, request, sampling)


@pytest.fixture
def pipeline(make_loop):
    return make_loop(3, 10)


def test_mean_logprob_is_the_verifiers_own(pipeline):
    drafts = [
        pipeline.as_draft("4\n#### 4"),
        pipeline.as_draft("a rather long answer\n#### 12"),
        Draft(1, (), False),
    ]
    found = pipeline.score_many(QUESTIONS, drafts, "mean_logprob")
    with pipeline.slots.using("verifier"):
        for question, item, score in zip(QUESTIONS, drafts, found, strict=True):
            if not item.tokens:
                assert score == 0.0
                continue
            prompt = pipeline.template.draft_prompt(pipeline.tokenizer, question)
            ids = [*prompt, *item.tokens, pipeline.tokenizer.eos_token_id]
            logits = np.array(pipeline.slots.model(mx.array([ids]))[0]).astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            values = [logprobs[at - 1, ids[at]] for at in range(len(prompt), len(ids))]
            assert score == pytest.approx(np.exp(np.mean(values)), rel=1e-4)


def test_yesno_is_the_share_of_yes(pipeline):
    drafts = [pipeline.as_draft("4\n#### 4"), pipeline.as_draft("longer\n#### 12"), pipeline.as_draft("x")]
    found = pipeline.score_many(QUESTIONS, drafts, "yesno")
    yes, no = pipeline.reader.verdict_ids
    with pipeline.slots.using("verifier"):
        for question, item, score in zip(QUESTIONS, drafts, found, strict=True):
            ids = pipeline.template.verify_prompt(pipeline.tokenizer, question, item.text)
            logits = np.array(pipeline.slots.model(mx.array([ids]))[0, -1]).astype(np.float64)
            assert score == pytest.approx(np.exp(logits[yes]) / (np.exp(logits[yes]) + np.exp(logits[no])), rel=1e-4)


def test_decisions():
    assert decide([0.2, 0.8, 0.9], 0.7).chosen == 1
    assert decide([0.2, 0.8, 0.9], 0.7).attempts == 2
    best = decide([0.2, 0.6, 0.6], 0.7)
    assert (best.chosen, best.attempts, best.accepted) == (1, 3, False)
    assert decide([0.7], 0.7).accepted


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_steps_say_who_spoke_and_agree_with_the_batched_path(pipeline, threshold):
    pipeline.config = LoopConfig(3, threshold, "yesno", pipeline.config.sampling)
    drafted = pipeline.draft_many(QUESTIONS, 3, batch_rows=4)
    for question, drafts in zip(QUESTIONS, drafted, strict=True):
        scores = pipeline.score_many([question] * 3, drafts, "yesno")
        decision = decide(scores, threshold)
        steps = list(pipeline.steps(question))
        said = ["drafted", "rejected"] * decision.attempts
        if decision.accepted:
            said[-1] = "accepted"
        assert [step.state for step in steps[:-1]] == said
        assert isinstance(steps[-1], Answer)
        assert steps[:-1:2] == drafts[: decision.attempts]
        assert [step.content for step in steps[1:-1:2]] == [item.content for item in drafts[: decision.attempts]]
        answer = steps[-1]
        assert answer.text == drafts[decision.chosen].text
        assert answer.score == pytest.approx(scores[decision.chosen], abs=1e-5)
        assert answer == pipeline.answer(question)
    assert pipeline.slots.active is None


def test_what_the_loop_refuses(pipeline, base, make_adapter):
    with pytest.raises(RsgwmError, match="the question is empty"):
        next(pipeline.steps("  "))
    for values, message in (
        ({"attempts": 0}, "attempts"),
        ({"threshold": 1.2}, "threshold"),
        ({"score": "vibes"}, "score"),
    ):
        with pytest.raises(RsgwmError, match=message):
            LoopConfig(**values)
    with pytest.raises(RsgwmError, match="another prompt template"):
        DraftVerify(pipeline.slots, TEMPLATES["chat"], "drafter", "verifier", pipeline.config)
    for values in ({"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}):
        with pytest.raises(RsgwmError, match=next(iter(values))):
            Sampling(**values)
