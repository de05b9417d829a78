"""What the verifier says of drafts: one pass for everything, against the slow and obvious way."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.inference.verifier import EMPTY, VerifierInput, read, signals_of, verdict_ids, verifier_input
from mlx_rsgwm.models.split import split_head

PLAIN = TEMPLATES["plain"]
QUESTIONS = ["What is 2 + 2?", "A much longer question, with several more words in it, is here?", "1?"]
ANSWERS = ["4\n#### 4", "2 * 3 = 6\n#### 6", "7"]


class Words:
    """A tokenizer of whole known words, which spells out the rest."""

    eos_token_id = 0

    def __init__(self, *words):
        self.ids = {word: index for index, word in enumerate(words, start=1000)}

    def encode(self, text, add_special_tokens=True):
        return [self.ids[text]] if text in self.ids else [ord(letter) for letter in text]


def test_every_spelling_that_is_one_token_counts():
    tokenizer = Words(" Yes", "Yes", " yes", "YES", " No", "no", " Yeah")
    yes, no = verdict_ids(PLAIN, tokenizer)
    assert set(yes) == {tokenizer.ids[word] for word in (" Yes", "Yes", " yes", "YES")}
    assert set(no) == {tokenizer.ids[word] for word in (" No", "no")}


def test_a_verdict_of_several_tokens_counts_by_its_first():
    template = replace(PLAIN, yes="Right", no="Wrong")
    assert verdict_ids(template, Words()) == ((ord("R"),), (ord("W"),))


def test_a_token_that_begins_both_belongs_to_neither():
    tokenizer = Words()
    tokenizer.ids = {" Yes": 1, " No": 2, "yes": 3, "no": 3, "Yes": 2}
    assert verdict_ids(PLAIN, tokenizer) == ((1,), (2,))


@pytest.fixture
def model(base, make_adapter):
    from mlx_rsgwm.models.slots import AdapterSlots

    slots = AdapterSlots(base)
    slots.load("v", make_adapter(3))
    slots.use("v")
    return slots.model


def logprobs_of(model, ids):
    """log softmax of the logits after every token, float64."""
    logits = np.array(model(mx.array([ids]))[0]).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def slow_logprobs(model, prompt, completion):
    ids = [*prompt, *completion]
    table = logprobs_of(model, ids)
    return [table[at - 1, ids[at]] for at in range(len(prompt), len(ids))]


def readings_of(tokenizer, template, **parts):
    end = (tokenizer.eos_token_id,)
    return [
        verifier_input(
            template,
            tokenizer,
            question,
            answer,
            (*tokenizer.encode(template.answer_prefix + answer, add_special_tokens=False), *end),
            **parts,
        )
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_one_pass_gives_what_separate_ones_do(base, model, name):
    template = TEMPLATES[name]
    verdicts = verdict_ids(template, base.tokenizer)
    readings = readings_of(base.tokenizer, template)
    shared = [one.verdict_prompt[: len(one.prompt)] == one.prompt for one in readings]
    assert all(shared) == (name == "plain"), "the plain template reads both parts in one row, the chat one cannot"
    found = read(split_head(model), readings, verdicts)
    assert len(verdicts[0]) > 1 or name == "plain"
    for reading, signals in zip(readings, found, strict=True):
        expected = slow_logprobs(model, reading.prompt, reading.completion)
        assert signals.mean == pytest.approx(np.mean(expected), rel=1e-4)
        assert signals.minimum == pytest.approx(min(expected), rel=1e-4)
        assert signals.tokens == len(expected)
        said = np.exp(logprobs_of(model, reading.verdict_prompt)[-1])
        yes, no = (sum(said[token] for token in ids) for ids in verdicts)
        assert signals.yesno == pytest.approx(yes / (yes + no), rel=1e-4)
        assert signals.mean_logprob == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)


def test_only_what_is_asked_for_is_computed(base, model):
    verdicts = verdict_ids(PLAIN, base.tokenizer)
    both = read(split_head(model), readings_of(base.tokenizer, PLAIN), verdicts)
    judged = read(split_head(model), readings_of(base.tokenizer, PLAIN, logprobs=False), verdicts)
    likely = read(split_head(model), readings_of(base.tokenizer, PLAIN, verdict=False), verdicts)
    for one, verdict, logprob in zip(both, judged, likely, strict=True):
        assert verdict.yesno == pytest.approx(one.yesno, rel=1e-5)
        assert (verdict.mean, verdict.minimum, verdict.mean_logprob) == (None, None, None)
        assert logprob.yesno is None
        assert logprob.mean == pytest.approx(one.mean, rel=1e-4)
        assert logprob.minimum == pytest.approx(one.minimum, rel=1e-4)


def test_a_draft_without_tokens_scores_nothing(base, model):
    prompt = tuple(base.tokenizer.encode("Q"))
    found = read(
        split_head(model), [VerifierInput(prompt, (), None), VerifierInput(prompt, (5, 6), None)], ((1,), (2,))
    )
    assert (found[0].mean, found[0].mean_logprob, found[0].tokens) == (EMPTY, 0.0, 0)
    assert found[1].mean == pytest.approx(np.mean(slow_logprobs(model, prompt, (5, 6))), rel=1e-4)
    assert read(split_head(model), [], ((1,), (2,))) == []


def test_signals_from_a_verifier_that_read_along():
    found = signals_of([-1.0, -3.0], None)
    assert (found.yesno, found.mean, found.minimum, found.tokens) == (None, -2.0, -3.0, 2)
    assert signals_of(None, 0.25).mean is None


@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True)], ids=["both", "verdict", "logprobs"])
@pytest.mark.parametrize("name", ["plain", "chat"])
def test_a_prompt_of_several_drafts_is_read_once(base, model, name, parts):
    """Drafts of two questions, one of them empty: the same signals as one by one, from fewer tokens."""
    template, tokenizer = TEMPLATES[name], base.tokenizer
    verdict, logprobs = parts
    readings = [
        verifier_input(template, tokenizer, question, text, tokenizer.encode(text), verdict, logprobs)
        for question in QUESTIONS[:2]
        for text in ("4\n#### 4", "2 * 3 = 6 and so on\n#### 6", "", "7")
    ]
    hidden, head = split_head(model)
    read_here = []

    def watched(ids, cache=None):
        read_here.append(ids.size)
        return hidden(ids, cache=cache)

    verdicts = verdict_ids(template, tokenizer)
    apart = [read((hidden, head), [reading], verdicts)[0] for reading in readings]
    plain = read((watched, head), readings, verdicts)
    count = len(read_here)
    together = read((watched, head), readings, verdicts, copies=[1] * len(model.layers))
    for found in (plain, together):
        for one, other in zip(found, apart, strict=True):
            assert one.tokens == other.tokens
            for part in ("yesno", "mean", "minimum"):
                left, right = getattr(one, part), getattr(other, part)
                assert (left is None) == (right is None)
                assert left is None or left == pytest.approx(right, abs=1e-5)
    before, after = sum(read_here[:count]), sum(read_here[count:])
    if name == "plain" or not verdict:
        assert after < 0.75 * before
    else:  # a chat's verifying prompt begins otherwise
        assert after == before


def test_prompts_of_one_draft_each_are_read_whole(base, model):
    tokenizer = base.tokenizer
    readings = [verifier_input(PLAIN, tokenizer, question, "7", tokenizer.encode("7")) for question in QUESTIONS]
    hidden, head = split_head(model)
    calls = []
    watched = lambda ids, cache=None: calls.append(ids.shape) or hidden(ids, cache=cache)  # noqa: E731
    read((watched, head), readings, verdict_ids(PLAIN, tokenizer), copies=[1] * len(model.layers))
    assert len(calls) == 1
