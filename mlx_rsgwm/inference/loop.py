"""The draft–verify loop: draft, score, accept at a threshold or draft again, at last return the best-scored draft.

One resident base, two adapters in slots. The loop is a generator of steps, so that command line, tests and evaluation
see the same loop; ``draft_many``, ``score_many`` and ``answer_many`` do the same work for many questions in batches.
Every attempt has its own random stream, so the modes differ in time and not in what they decide:

- ``sequential``: draft, verify, maybe draft again.
- ``parallel``: all K drafts side by side; the verifier reads the first when it ends, and the first accepted in order
  ends it all.
- ``adaptive``: parallel, but the first draft goes alone while first drafts have mostly been accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlx_lm.models.cache import make_prompt_cache

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.inference.batched_decode import BatchedDecoder
from mlx_rsgwm.inference.calibration import Calibration, load_calibration
from mlx_rsgwm.inference.generate import DraftRequest, DraftTokens, draft
from mlx_rsgwm.inference.policy import Answer, Drafted, LoopConfig, Scored, Step, decide
from mlx_rsgwm.inference.prefix_cache import CachedPrefixes, LowerLayerCache, can_batch, prefill, remembering
from mlx_rsgwm.inference.scheduler import BatchScheduler
from mlx_rsgwm.inference.scores import Scorer
from mlx_rsgwm.inference.verifier import SCORES, Signals, make_reading, read, verdict_ids
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.models.split import LayerSplit, Parts, split_head, split_layers

# Two more rows in a batch cost a step about a tenth; another batch costs a draft. Alone is worth it from here on.
ALONE_FROM = 0.85


@dataclass
class _Case:
    """A question under way: the attempts it was to make so far, its drafts, their scores, and the scores of what they
    say."""

    asked_for: int
    drafts: list[Drafted] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    known: dict[DraftTokens, float] = field(default_factory=dict)

    @property
    def last(self) -> DraftTokens:
        return DraftTokens(self.drafts[-1].tokens, self.drafts[-1].finished)


class DraftVerify:
    """Drafter and verifier by slot name (None: the bare base) over one base, with one template.

    ``verify_template``: other words for the verifier's question, to measure what misaligned prompts cost; the drafter
    keeps ``template``. ``on_mismatch``: an adapter that was trained with another template than it is used with is an
    error (refuse), or ``warnings`` says so (warn). ``calibration``: what makes the combined score and says what scores
    mean; ``stored`` takes what is kept beside the verifier.
    """

    def __init__(
        self,
        slots: AdapterSlots,
        template: Template,
        drafter: str | None,
        verifier: str | None,
        config: LoopConfig,
        verify_template: Template | None = None,
        on_mismatch: str = "refuse",
        calibration: Calibration | Literal["stored"] | None = "stored",
    ) -> None:
        if on_mismatch not in ("refuse", "warn"):
            raise RsgwmError(f"on_mismatch must be refuse or warn, found {on_mismatch!r}")
        self.slots = slots
        self.template = template
        self.verify_template = template if verify_template is None else verify_template
        self.drafter = drafter
        self.verifier = verifier
        self.config = config
        self.warnings: list[str] = []
        for role, name, used in (("drafter", drafter, template), ("verifier", verifier, self.verify_template)):
            trained_with = slots.adapter(name).template_hash if name is not None else None
            if trained_with is not None and trained_with != used.hash:
                found = (
                    f"the {role} was trained with another prompt template than {used.name!r} "
                    f"({trained_with[:12]} against {used.hash[:12]})"
                )
                if on_mismatch == "refuse":
                    raise RsgwmError(f"{found}; use the template in its manifest, or --template-mismatch warn")
                self.warnings.append(found)
        self.tokenizer = slots.base.tokenizer
        self.parts = split_head(slots.model)
        own = {*self.tokenizer.eos_token_ids, self.tokenizer.eos_token_id} - {None}
        self.end_ids = frozenset(own) | template.stop_ids(self.tokenizer)
        if not self.end_ids:
            self.warnings.append("the base's tokenizer has no end-of-text token: every draft runs to --max-tokens")
        self.verdict_ids = verdict_ids(self.verify_template, self.tokenizer)
        if calibration == "stored":
            folder = slots.adapter(verifier).path if verifier is not None else None
            calibration = load_calibration(folder) if folder is not None else None
        self.calibration = calibration
        self.scorer(config.score)  # combined is refused here, not at the first draft
        self.batches = can_batch(slots.model)
        self._caches = len(make_prompt_cache(slots.model)) if self.batches else None
        self._splits: dict[int, LayerSplit | None] = {}
        # First drafts accepted, of all; one of two to begin with.
        self._accepted_first, self._asked = 1, 2

    def steps(self, question: str) -> Iterator[Step]:
        """One question, step by step; the last step is the :class:`Answer`."""
        prompt = self._prompt(question)
        hidden, head = self.parts
        reader, lower_cache = self.parts, None
        if self.batches:
            reading_prompt = self._read_as(question)
            reader = (remembering(self.slots.model, hidden, reading_prompt), head)
            lower_cache = self._lower_cache(prompt=reading_prompt)
        drafts: list[Drafted] = []
        scores: list[float] = []
        known: dict[DraftTokens, float] = {}
        for drafted in self._attempts(question, prompt, lower_cache):
            drafts.append(drafted)
            yield drafted
            what = DraftTokens(drafted.tokens, drafted.finished)
            if what not in known:
                (known[what],) = self.score([question], [drafted], self.config.score, reader, lower_cache)
            scores.append(known[what])
            accepted = scores[-1] >= self.config.threshold
            if len(scores) == 1:
                self._asked, self._accepted_first = self._asked + 1, self._accepted_first + accepted
            yield Scored(len(scores), scores[-1], accepted)
            if accepted:
                break
        yield self._answer(drafts, scores)

    def _split(self) -> LayerSplit | None:
        """The layers that neither adapter changes, apart from the rest; None where there are none."""
        count = self.slots.first_changed(name for name in (self.drafter, self.verifier) if name is not None)
        if count not in self._splits:
            self._splits[count] = split_layers(self.slots.model, count)
        return self._splits[count]

    def _lower_cache(
        self, prefixes: CachedPrefixes | None = None, prompt: Sequence[int] = ()
    ) -> LowerLayerCache | None:
        split = self._split()
        return LowerLayerCache(self.slots.model, split, prefixes, prompt) if split is not None else None

    def _attempts(
        self, question: str, prompt: tuple[int, ...], lower_cache: LowerLayerCache | None
    ) -> Iterator[Drafted]:
        """Attempts in order, written no further than they are asked for; ``lower_cache`` sees how they were read."""
        numbers = range(1, self.config.attempts + 1)
        if not self.batches:
            for attempt in numbers:
                yield self._draft([DraftRequest(prompt, question, attempt)])[0]
            return
        decoder = self._decoder([question], [prompt], numbers)
        if lower_cache is not None:
            lower_cache.prefixes = decoder.prefixes
        alone = self._goes_alone()
        for attempt in numbers:
            one = self.config.mode == "sequential" or (alone and attempt == 1)
            yield self._written(decoder, 0, attempt, [attempt] if one else numbers)

    def _goes_alone(self) -> bool:
        return self.config.mode == "adaptive" and self._accepted_first >= ALONE_FROM * self._asked

    def _decoder(
        self, questions: Sequence[str], prompts: Sequence[tuple[int, ...]], attempts: Sequence[int]
    ) -> BatchedDecoder:
        split = self._split()
        with self.slots.using(self.drafter):
            prefilled = prefill(self.slots.model, self.parts[0], prompts, split)
        return BatchedDecoder(self.parts, prefilled, questions, attempts, self.end_ids, self.config.sampling, split)

    def _written(self, decoder: BatchedDecoder, place: int, attempt: int, beside: Sequence[int]) -> Drafted:
        """One draft to its end; the attempts ``beside`` it are written as far as that takes."""
        with self.slots.using(self.drafter):
            while (place, attempt) not in decoder.ended:
                decoder.step([(place, other) for other in beside])
        return self._drafted(attempt, decoder.ended[place, attempt])

    def _read_as(self, question: str) -> list[int]:
        return self.verify_template.draft_prompt(self.tokenizer, question)

    def _prompt(self, question: str) -> tuple[int, ...]:
        if not question.strip():
            raise RsgwmError("the question is empty")
        prompt = tuple(self.template.draft_prompt(self.tokenizer, question))
        limit = self.slots.base.config.get("max_position_embeddings")
        if limit and len(prompt) + self.config.sampling.max_tokens > limit:
            raise RsgwmError(
                f"the question takes {len(prompt)} tokens, and with {self.config.sampling.max_tokens} for an answer it "
                f"is beyond the model's context of {limit}; shorten it or lower max_tokens"
            )
        return prompt

    def answer(self, question: str) -> Answer:
        """The last step of :meth:`steps`."""
        *_, last = self.steps(question)
        assert isinstance(last, Answer)
        return last

    def draft_many(
        self, questions: Sequence[str], attempts: int, batch_rows: int = 32, progress: Progress = SILENT
    ) -> list[list[Drafted]]:
        """``attempts`` drafts for every question, about ``batch_rows`` at a time; as some end, others come in.

        Attempt k of a question draws from the same random stream as in :meth:`steps`.
        """
        drafts: dict[int, list[Drafted]] = {}
        prompts = [self._prompt(question) for question in questions]
        numbers = range(1, attempts + 1)
        with progress.task("draft", len(questions)) as advance:
            if not self.batches:
                for index, (prompt, text) in enumerate(zip(prompts, questions, strict=True)):
                    drafts[index] = self._draft([DraftRequest(prompt, text, attempt) for attempt in numbers])
                    advance(1, "")
                return [drafts[index] for index in range(len(questions))]
            scheduler = self._schedule(questions, prompts, batch_rows, lambda: numbers)
            while not scheduler.over:
                self._write_on(scheduler)
                for index in scheduler.under_way:
                    found = [one for one in (scheduler.ended(index, attempt) for attempt in numbers) if one is not None]
                    if len(found) == attempts:
                        drafts[index] = [self._drafted(k, one) for k, one in zip(numbers, found, strict=True)]
                        scheduler.done(index)
                        advance(1, "")
        return [drafts[index] for index in range(len(questions))]

    def _write_on(self, scheduler: BatchScheduler) -> bool:
        scheduler.fill()
        with self.slots.using(self.drafter):
            return scheduler.write()

    def _schedule(
        self,
        questions: Sequence[str],
        prompts: Sequence[tuple[int, ...]],
        batch_rows: int,
        first: Callable[[], Sequence[int]],
    ) -> BatchScheduler:
        def enter(
            decoder: BatchedDecoder | None,
            texts: Sequence[str],
            chosen: Sequence[tuple[int, ...]],
            attempts: Sequence[int],
        ) -> tuple[BatchedDecoder, range]:
            if decoder is None:
                return self._decoder(texts, chosen, attempts), range(len(texts))
            with self.slots.using(self.drafter):
                read = prefill(self.slots.model, self.parts[0], chosen, self._split())
                return decoder, decoder.add(read, texts, attempts)

        return BatchScheduler(questions, prompts, batch_rows, first, enter)

    def answer_many(self, questions: Sequence[str], batch_rows: int = 32, progress: Progress = SILENT) -> list[Answer]:
        """What :meth:`answer` says to each question, about ``batch_rows`` drafts or verdicts at a time.

        As the drafts of some questions end, others come in. In mode ``sequential``, and in ``adaptive`` while first
        drafts have mostly been accepted, a question comes in with its first attempt alone; else with all of them. What
        the attempts at a question have in common is written once either way.
        """
        answers: dict[int, Answer] = {}
        prompts = [self._prompt(question) for question in questions]
        with progress.task("answer", len(questions)) as advance:
            if not self.batches:
                for index, question in enumerate(questions):
                    answers[index] = self.answer(question)
                    advance(1, "")
                return [answers[index] for index in range(len(questions))]
            scheduler = self._schedule(questions, prompts, batch_rows, self._first_attempts)
            cases: dict[int, _Case] = {}
            while not scheduler.over:
                writing = self._write_on(scheduler)
                ready = self._ready(scheduler, cases)
                if writing and len(ready) < max(1, batch_rows // 4):
                    continue
                self._score_cases([questions[index] for index in ready], [*ready.values()], batch_rows, scheduler)
                for index, case in ready.items():
                    used = len(case.scores)
                    if case.scores[-1] >= self.config.threshold or used == self.config.attempts:
                        answers[index] = self._answer(case.drafts, case.scores)
                        del cases[index]
                        scheduler.done(index)
                        advance(1, "")
                    elif used == case.asked_for:
                        case.asked_for = used + 1 if self.config.mode == "sequential" else self.config.attempts
                        scheduler.want(index, range(used + 1, case.asked_for + 1))
        return [answers[index] for index in range(len(questions))]

    def _first_attempts(self) -> Sequence[int]:
        alone = self.config.mode == "sequential" or self._goes_alone()
        return range(1, 2 if alone else self.config.attempts + 1)

    def _ready(self, scheduler: BatchScheduler, cases: dict[int, _Case]) -> dict[int, _Case]:
        """Of all questions under way, which get their cases here, those with a draft that was not scored."""
        for index in scheduler.under_way:
            case = cases.setdefault(index, _Case(scheduler.attempts(index)))
            if len(case.drafts) == len(case.scores):
                attempt = len(case.drafts) + 1
                ended = scheduler.ended(index, attempt)
                case.drafts += [] if ended is None else [self._drafted(attempt, ended)]
        return {index: case for index, case in cases.items() if len(case.drafts) > len(case.scores)}

    def _score_cases(
        self, questions: Sequence[str], cases: Sequence[_Case], batch_rows: int, scheduler: BatchScheduler
    ) -> None:
        """Score the last draft of every case, unless an earlier one said the same."""
        new = [index for index, case in enumerate(cases) if case.last not in case.known]
        texts, drafts = [questions[index] for index in new], [cases[index].drafts[-1] for index in new]
        lower_cache = self._lower_cache(scheduler.prefixes)
        found = self.score_many(texts, drafts, self.config.score, batch_rows, lower_cache=lower_cache)
        for index, score in zip(new, found, strict=True):
            cases[index].known[cases[index].last] = score
        for case in cases:
            case.scores.append(case.known[case.last])
            if len(case.scores) == 1:
                self._asked += 1
                self._accepted_first += case.scores[0] >= self.config.threshold

    def _answer(self, drafts: Sequence[Drafted], scores: Sequence[float]) -> Answer:
        decision = decide(scores, self.config.threshold)
        text = None if self.config.abstain and not decision.accepted else drafts[decision.chosen].text
        return Answer(text, scores[decision.chosen], decision.accepted, decision.attempts)

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that this verifier can give: ``combined`` only with a calibration."""
        plain = tuple(name for name in SCORES if name != "combined")
        return plain if self.calibration is None else self.calibration.scores

    def scorer(self, score: str) -> Scorer:
        """What turns the verifier's signals into a score."""
        return Scorer(score) if self.calibration is None else self.calibration.scorer(score)

    def score_many(
        self,
        questions: Sequence[str],
        drafts: Sequence[Drafted],
        score: str,
        batch_rows: int = 32,
        progress: Progress = SILENT,
        lower_cache: LowerLayerCache | None = None,
    ) -> list[float]:
        """Scores of (question, draft) pairs in batches, as :meth:`score` gives them."""
        scorer = self.scorer(score)
        needs = (scorer.needs_verdict, scorer.needs_logprobs)
        found: list[float] = scorer.values(
            self.signals_many(questions, drafts, *needs, batch_rows, progress, lower_cache)
        ).tolist()
        return found

    def signals_many(
        self,
        questions: Sequence[str],
        drafts: Sequence[Drafted],
        verdict: bool = True,
        logprobs: bool = True,
        batch_rows: int = 32,
        progress: Progress = SILENT,
        lower_cache: LowerLayerCache | None = None,
    ) -> list[Signals]:
        """:meth:`signals` in batches of like questions; equal pairs are read once, and so are prompts of a batch."""
        pairs = list(zip(questions, drafts, strict=True))
        first = {
            (question, item.tokens, item.finished): index for index, (question, item) in reversed([*enumerate(pairs)])
        }
        owner = [first[question, item.tokens, item.finished] for question, item in pairs]
        order = sorted(
            set(owner), key=lambda index: (len(questions[index]), questions[index], len(drafts[index].tokens))
        )
        found: dict[int, Signals] = {}
        with progress.task("verify", len(order)) as advance:
            for start in range(0, len(order), batch_rows):
                chunk = order[start : start + batch_rows]
                texts, items = [questions[index] for index in chunk], [drafts[index] for index in chunk]
                found.update(
                    zip(chunk, self.signals(texts, items, verdict, logprobs, lower_cache=lower_cache), strict=True)
                )
                advance(len(chunk), "")
        return [found[index] for index in owner]

    def score(
        self,
        questions: Sequence[str],
        drafts: Sequence[Drafted],
        score: str,
        parts: Parts | None = None,
        lower_cache: LowerLayerCache | None = None,
    ) -> list[float]:
        """Scores of (question, draft) pairs by the verifier, in one forward pass.

        ``parts`` if not the model's; what ``lower_cache`` knows is not read again.
        """
        scorer = self.scorer(score)
        needs = (scorer.needs_verdict, scorer.needs_logprobs)
        found: list[float] = scorer.values(self.signals(questions, drafts, *needs, parts, lower_cache)).tolist()
        return found

    def signals(
        self,
        questions: Sequence[str],
        drafts: Sequence[Drafted],
        verdict: bool = True,
        logprobs: bool = True,
        parts: Parts | None = None,
        lower_cache: LowerLayerCache | None = None,
    ) -> list[Signals]:
        """What the verifier says of (question, draft) pairs, all scores' parts in one forward pass."""
        # A draft that ended by itself also chose to end; one that was cut off did not.
        end = () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)
        asked, tokenizer = self.verify_template, self.tokenizer
        readings = [
            make_reading(
                asked, tokenizer, question, item.text, item.tokens + (end if item.finished else ()), verdict, logprobs
            )
            for question, item in zip(questions, drafts, strict=True)
        ]
        with self.slots.using(self.verifier):
            if parts is not None:
                return read(parts, readings, self.verdict_ids, lower_cache)
            return read(self.parts, readings, self.verdict_ids, lower_cache, self._caches)

    def as_draft(self, answer: str) -> Drafted:
        """A given answer text in the form of a draft, so that it can be scored."""
        return Drafted(0, answer, tuple(self.template.completion(self.tokenizer, answer)[:-1]), True)

    def _draft(self, requests: Sequence[DraftRequest]) -> list[Drafted]:
        with self.slots.using(self.drafter):
            found: list[DraftTokens] = draft(self.slots.model, self.parts, self.end_ids, requests, self.config.sampling)
        return [self._drafted(request.attempt, item) for request, item in zip(requests, found, strict=True)]

    def _drafted(self, attempt: int, found: DraftTokens) -> Drafted:
        return Drafted(attempt, self.tokenizer.decode(list(found.tokens)), found.tokens, found.finished)
