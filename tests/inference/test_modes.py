"""The loop's modes: the same drafts and the same decisions in different time; batches of questions say the same."""

import statistics
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.inference.batched_decode import BatchedDecoder
from mlx_rsgwm.inference.draft import Answer
from mlx_rsgwm.inference.generate import DraftRequest, draft
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.policy import MODES, LoopConfig
from mlx_rsgwm.inference.prefix_cache import prefill, remembering
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.slots import AdapterSlots

QUESTIONS = [f"Ada has {n} pens and gets {n * 7 % 13} more{' today' * (n % 3)}. How many?" for n in range(50)]
SAMPLING = Sampling(max_tokens=8, seed=3)


@pytest.fixture
def make_pipeline(slots):
    def make(mode, threshold=0.5, score="mean_logprob", attempts=3):
        config = LoopConfig(attempts, threshold, score, SAMPLING, mode)
        return DraftVerify(slots, TEMPLATES["plain"], "drafter", "verifier", config)

    return make


def ended_early(pipeline):
    """Let common tokens end drafts, so that they end at different steps: a random model hardly ever ends one."""
    drafts = [draft for drafts in pipeline.draft_many(QUESTIONS[:6], 3) for draft in drafts]
    common = Counter(token for draft in drafts for token in draft.tokens[1:]).most_common(3)
    pipeline.end_ids = pipeline.end_ids | {token for token, _ in common}
    return pipeline


@pytest.mark.parametrize("score", ["mean_logprob", "yesno"])
def test_modes_decide_alike(make_pipeline, score):
    reference = ended_early(make_pipeline("sequential", score=score))
    scores = [step.score for question in QUESTIONS[:10] for step in list(reference.steps(question))[1:-1:2]]
    threshold = statistics.median(scores)
    expected = {}
    for mode in ("sequential", "parallel", "adaptive"):
        pipeline = make_pipeline(mode, threshold, score)
        pipeline.end_ids = reference.end_ids
        for question in QUESTIONS:
            steps = list(pipeline.steps(question))
            told = [step.tokens for step in steps[:-1:2]] + [round(step.score, 4) for step in steps[1::2]]
            attempts = steps[-1].attempts
            assert [step.state == "drafted" for step in steps[:-1]] == [True, False] * attempts
            assert isinstance(steps[-1], Answer)
            if mode == "sequential":
                expected[question] = (told, steps[-1].text, steps[-1].accepted)
            else:
                assert (told, steps[-1].text, steps[-1].accepted) == expected[question]
    # The threshold has to leave both early acceptances and retries, or nothing was compared.
    assert {len(told) for told, _, _ in expected.values()} >= {2, 6}
    assert {accepted for _, _, accepted in expected.values()} == {True, False}


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("temperature", [0.7, 0.05])
def test_many_questions_at_once_get_the_same_answers(make_pipeline, mode, temperature):
    pipeline = ended_early(make_pipeline("parallel"))
    sampling = replace(SAMPLING, temperature=temperature)
    pipeline.config = LoopConfig(3, 0.5, "mean_logprob", sampling, mode)
    low, high = sorted({pipeline.answer(question).score for question in QUESTIONS[:12]})[4:6]
    pipeline.config = replace(pipeline.config, threshold=(low + high) / 2)  # nobody's score: round-off decides nothing
    one_by_one = [pipeline.answer(question) for question in QUESTIONS[:20]]
    together = pipeline.answer_many(QUESTIONS[:20], batch_rows=7)
    for alone, batched in zip(one_by_one, together, strict=True):
        assert batched.text == alone.text
        assert (batched.attempts, batched.accepted) == (alone.attempts, alone.accepted)
        assert batched.score == pytest.approx(alone.score, abs=1e-4)
    assert len({answer.attempts for answer in together}) > 1


def watched(monkeypatch):
    """The writers that come to be, and for every step how many drafts were wanted of each."""
    writers, wanted = [], []
    step = BatchedDecoder.step

    def watch(decoder, keys):
        if decoder not in writers:
            writers.append(decoder)
        wanted.append(len(keys))
        step(decoder, keys)

    monkeypatch.setattr(BatchedDecoder, "step", watch)
    return writers, wanted


@pytest.mark.parametrize("rows", [1, 7, 30])
@pytest.mark.parametrize("split", [False, True], ids=["all layers adapted", "upper layer adapted"])
def test_drafts_of_many_are_those_of_each(request, make_pipeline, monkeypatch, rows, split):
    """Questions come in while others are under way, at other lengths, and one of them twice."""
    pipeline = ended_early(make_pipeline("parallel"))
    if split:
        own = pipeline.end_ids
        slots = request.getfixturevalue("upper_slots")
        pipeline = DraftVerify(slots, TEMPLATES["plain"], "drafter", "verifier", pipeline.config)
        pipeline.end_ids = own
    questions = [*QUESTIONS[:15], QUESTIONS[0]]
    writers, wanted = watched(monkeypatch)
    found = pipeline.draft_many(questions, 2, rows)
    for question, drafts in zip(questions, found, strict=True):
        prompt = pipeline.prompt(question)
        requests = [DraftRequest(prompt, question, attempt) for attempt in (1, 2)]
        assert [drafted.tokens for drafted in drafts] == [drafted.tokens for drafted in pipeline._draft(requests)]
    (decoder,) = writers
    assert max(wanted) in range(max(rows - 1, 2), max(rows, 2) + 1)
    assert not any((decoder.ended, decoder.prefixes, decoder._streams, decoder._parked, decoder._prompts))
    if rows == 7:  # the batch stays full while questions wait: at most a quarter of its rows, and an odd one, are free
        assert min(wanted[: len(wanted) * 2 // 3]) > 7 * 3 / 4 - 2


def test_others_come_in_before_all_of_a_batch_have_ended(make_pipeline, monkeypatch):
    pipeline = ended_early(make_pipeline("parallel"))
    prefilled, real = [], BatchedDecoder.add

    def add(decoder, read, *more):
        prefilled.append(
            (len(read.prompts), [len(row.tokens) for row in decoder._batch.rows] if decoder._batch else [])
        )
        return real(decoder, read, *more)

    monkeypatch.setattr(BatchedDecoder, "add", add)
    pipeline.answer_many(QUESTIONS[:20], 9)
    assert prefilled[0] == (3, [])
    assert any(lengths and min(lengths) > 0 for _, lengths in prefilled)


@pytest.mark.parametrize("mode", MODES)
def test_answers_to_many_leave_nothing_and_repeat_to_the_last_bit(make_pipeline, monkeypatch, mode):
    writers, _ = watched(monkeypatch)
    found = []
    for _ in range(2):
        pipeline = make_pipeline(mode, threshold=0.02)
        pipeline.end_ids = ended_early(make_pipeline(mode)).end_ids
        found.append(pipeline.answer_many(QUESTIONS[:12], 6))
    assert found[0] == found[1]
    decoder = writers[-1]
    assert not any((decoder.ended, decoder.prefixes, decoder._streams, decoder._parked, decoder._prompts))


def test_a_draft_that_says_the_same_again_is_not_read_again(make_pipeline):
    pipeline = make_pipeline("parallel", threshold=1.0)
    pipeline.config = LoopConfig(3, 1.0, "mean_logprob", Sampling(temperature=0.0, max_tokens=5))
    real, read = pipeline.reader.signals, []
    pipeline.reader.signals = lambda questions, *more, **named: (
        read.append(len(questions)) or real(questions, *more, **named)
    )
    answers = pipeline.answer_many(QUESTIONS[:4], 12)
    assert [answer.attempts for answer in answers] == [3] * 4
    assert sum(read) == 4


ORDERS = ([(1, 2, 3, 4)], [(1,), (2,), (3,), (4,)], [(1,), (2, 3, 4)], [(4, 2), (1, 3)])


@pytest.mark.parametrize("slots", [None, 4], ids=["float32", "4-bit"], indirect=True)
@pytest.mark.parametrize("temperature", [0.7, 0.03, 0.0], ids=["apart", "alike", "greedy"])
def test_drafts_are_the_plain_ones_in_whatever_order_they_are_asked_for(make_pipeline, temperature):
    pipeline = ended_early(make_pipeline("parallel"))
    sampling = Sampling(temperature=temperature, max_tokens=10, seed=3)
    lengths, ways = set(), set()
    for question in QUESTIONS[:4]:
        prompt = tuple(pipeline.template.draft_prompt(pipeline.tokenizer, question))
        requests = [DraftRequest(prompt, question, attempt) for attempt in (1, 2, 3, 4)]
        with pipeline.slots.using("drafter"):
            plain = [
                draft(pipeline.slots.model, pipeline.parts, pipeline.end_ids, [request], sampling)[0]
                for request in requests
            ]
            prefilled = prefill(pipeline.slots.model, pipeline.parts[0], [prompt])
            for order in ORDERS:  # all from the same caches of the prompt
                decoder = BatchedDecoder(pipeline.slots.model, pipeline.parts, pipeline.end_ids, sampling)
                decoder.add(prefilled, [question], (1, 2, 3, 4))
                for wanted in order:
                    keys = {(0, attempt) for attempt in wanted}
                    while not decoder.ended.keys() >= keys:
                        decoder.step(keys)
                assert [decoder.ended[0, attempt] for attempt in (1, 2, 3, 4)] == plain
        lengths |= {len(item.tokens) for item in plain}
        ways.add(len({item.content for item in plain}))
    assert len(lengths) > 1 or temperature < 0.7
    assert {0.7: max(ways) > 2, 0.03: {1, 2} & ways and max(ways) > 1, 0.0: ways == {1}}[temperature]


@pytest.fixture
def upper_slots(base, make_adapter):
    """Two adapters of the upper layer only: the lower one reads a text as the base does."""
    slots = AdapterSlots(base)
    for seed, name in enumerate(("drafter", "verifier")):
        adapter = make_adapter(seed)
        keep = {key: value for key, value in adapter.weights.items() if ".layers.1." in key}
        slots.load(name, Adapter(replace(adapter.spec, num_layers=1), keep))
    return slots


@pytest.mark.parametrize("score", ["mean_logprob", "yesno"])
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_verifier_reads_on_where_the_lower_layers_have_read(upper_slots, monkeypatch, score, template):
    def pipeline():
        config = LoopConfig(3, 1.0, score, Sampling(max_tokens=6, seed=3, temperature=0.05))
        return ended_early(DraftVerify(upper_slots, TEMPLATES[template], "drafter", "verifier", config))

    found = pipeline()
    assert upper_slots.first_changed(("drafter", "verifier")) == 1
    split = found._split()
    assert split is not None
    read = []
    lower = split.lower
    found._splits[1] = replace(split, lower=lambda ids, cache=None: read.append(ids.shape) or lower(ids, cache=cache))
    steps = [list(found.steps(question)) for question in QUESTIONS[:6]]
    # The prompt once, every token of a row once; a verdict's question is new to both.
    if score == "mean_logprob" or template == "plain":
        prompts = [shape for shape in read if shape[1] > 12]
        assert len(prompts) == 6
    together = found.answer_many(QUESTIONS[:6], batch_rows=9)
    monkeypatch.setattr(AdapterSlots, "first_changed", lambda slots, names: 0)
    plain = pipeline()
    plain.end_ids = found.end_ids
    assert plain._split() is None
    for before, after in zip([list(plain.steps(question)) for question in QUESTIONS[:6]], steps, strict=True):
        assert after[:-1:2] == before[:-1:2]
        scores = [[step.score for step in one[1:-1:2]] for one in (before, after)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    for answer, (*_, alone) in zip(together, steps, strict=True):
        assert (answer.text, answer.attempts) == (alone.text, alone.attempts)
        assert answer.score == pytest.approx(alone.score, abs=1e-5)


def test_what_attempts_have_in_common_is_computed_once(make_pipeline):
    pipeline = make_pipeline("sequential", threshold=1.0)
    pipeline.config = LoopConfig(3, 1.0, "mean_logprob", Sampling(temperature=0.0, max_tokens=8), "sequential")
    hidden, head = pipeline.parts
    rows = []
    pipeline.parts = pipeline.reader.parts = (
        lambda ids, cache=None: rows.append(ids.shape) or hidden(ids, cache=cache),
        head,
    )
    *_, answer = pipeline.steps(QUESTIONS[0])
    assert answer.attempts == 3
    # The prompt, seven tokens to have eight, and one reading by the verifier: greedy drafts are all alike.
    assert [shape for shape in rows if shape[1] == 1] == [(1, 1)] * 7
    assert len(rows) == 9


@pytest.mark.parametrize("slots", [None, 4], ids=["float32", "4-bit"], indirect=True)
def test_reading_after_a_remembered_prompt_equals_reading_whole(make_pipeline):
    pipeline = make_pipeline("parallel")
    hidden, _ = pipeline.parts
    prompt = pipeline.template.draft_prompt(pipeline.tokenizer, QUESTIONS[3])
    after = remembering(pipeline.slots.model, hidden, prompt)
    rows = {
        "first": [[*prompt, 5, 6, 7]],
        "two, longer": [[*prompt, 9, 9, 8, 1], [*prompt, 4, 0, 0, 0]],
        "the prompt alone": [list(prompt)],
        "another prompt": [[*prompt[:-1], 3, 5, 6]],
        "shorter": [list(prompt)[:-2]],
    }
    with pipeline.slots.using("verifier"):
        for ids in rows.values():
            expected = hidden(mx.array(ids))
            assert mx.allclose(after(mx.array(ids)), expected, rtol=1e-4, atol=1e-4).item()


def test_adaptive_goes_alone_while_first_drafts_are_accepted(make_pipeline, monkeypatch):
    from mlx_rsgwm.inference import loop

    widths, step = [], BatchedDecoder.step

    def watched(decoder, wanted):
        widths.append(len(wanted))
        step(decoder, wanted)

    monkeypatch.setattr(loop.BatchedDecoder, "step", watched)
    pipeline = make_pipeline("adaptive", threshold=0.0)
    for question in QUESTIONS[:12]:
        pipeline.answer(question)
    assert widths[0] == 3
    assert widths[-1] == 1
    pipeline.config = LoopConfig(3, 1.0, "mean_logprob", SAMPLING, "adaptive")
    widths.clear()
    pipeline.answer(QUESTIONS[0])
    assert list(dict.fromkeys(widths)) == [1, 3]  # alone, then what is left side by side
    for question in QUESTIONS[:6]:
        pipeline.answer(question)
    assert widths[-1] == 3


def test_a_draft_is_written_no_further_than_it_is_asked_for(make_pipeline, monkeypatch):
    pipeline = ended_early(make_pipeline("parallel", threshold=0.0))
    steps, step = [], BatchedDecoder.step
    monkeypatch.setattr(BatchedDecoder, "step", lambda decoder, wanted: steps.append(1) or step(decoder, wanted))
    for question in QUESTIONS[:8]:
        steps.clear()
        first = next(iter(pipeline.steps(question)))
        pipeline.answer(question)
        # Once for `first` and once for the answer, each as long as the first draft and the token that ends it.
        assert len(steps) == 2 * (len(first.tokens) + first.finished)


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_question_leaves_the_pipeline_usable(make_pipeline, mode):
    pipeline = make_pipeline(mode)
    expected = pipeline.answer(QUESTIONS[1])
    steps = pipeline.steps(QUESTIONS[0])
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt())
    assert pipeline.slots.active is None
    assert pipeline.answer(QUESTIONS[1]).text == expected.text


def test_what_is_refused(make_pipeline, slots):
    with pytest.raises(RsgwmError, match="mode must be one of adaptive, parallel, sequential"):
        make_pipeline("telepathic")
    limit = slots.base.config["max_position_embeddings"]
    pipeline = make_pipeline("parallel")
    with pytest.raises(RsgwmError, match=f"beyond the model's context of {limit}"):
        pipeline.answer("word " * limit)
    with pytest.raises(RsgwmError, match="the question is empty"):
        pipeline.answer_many(["fine?", " "])
