"""The draft–verify loop: draft, score, accept at a threshold or draft again, at last return the best-scored draft.

One resident base, two adapters in slots. The loop is a generator of steps, so that command line, tests and evaluation
see the same loop; for many questions ``steps_many`` takes the same steps in batches, and ``answer_many`` their ends.
Every attempt has its own random stream, so the modes differ in time and not in what they decide:

- ``sequential``: draft, verify, maybe draft again.
- ``parallel``: all K drafts side by side; the verifier reads the first when it ends, and the first accepted in order
  ends it all.
- ``adaptive``: parallel, but the first draft goes alone while first drafts have mostly been accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Literal

from mlx_lm.models.cache import make_prompt_cache

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.inference.batched_decode import BatchedDecoder
from mlx_rsgwm.inference.calibration import Calibration, learned_scorer, stored_calibration
from mlx_rsgwm.inference.draft import SAMPLED, Answer, Draft, Signals, Step
from mlx_rsgwm.inference.generate import DraftRequest, draft
from mlx_rsgwm.inference.grafting import graft_many, grafted_layer
from mlx_rsgwm.inference.pair import template_mismatches
from mlx_rsgwm.inference.policy import LoopConfig, Pacing
from mlx_rsgwm.inference.pool import check_rule, scores_of_each
from mlx_rsgwm.inference.pool_reader import in_order, reader_of
from mlx_rsgwm.inference.prefix_cache import CachedPrefixes, LowerLayerCache
from mlx_rsgwm.inference.scheduler import BatchScheduler, Prompt
from mlx_rsgwm.inference.scores import SCORES, Scorer
from mlx_rsgwm.inference.trial import Reads, Trial, judge
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.row_batches import can_batch
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.models.split import LayerSplit, split_head, split_layers

Watch = Callable[[int, Sequence[int]], None]


class DraftVerify:
    """Drafter and verifier by slot name (None: the bare base) over one base, with one template.

    A verifier may be several adapters; ``combine`` is the rule of :mod:`mlx_rsgwm.inference.pool`. ``verifiers``: their
    slots, in an order that is theirs however they are given; empty for the bare base.
    ``verify_template``: other words for the verifier's question, to measure what misaligned prompts cost; the drafter
    keeps ``template``. ``on_mismatch``: an adapter that was trained with another template than it is used with is an
    error (refuse), or ``warnings`` says so (warn). ``calibration``: what makes the combined score and says what scores
    mean; ``stored`` takes what is kept beside the verifier. ``reader``: the verifier at work.
    """

    def __init__(
        self,
        slots: AdapterSlots,
        template: Template,
        drafter: str | None,
        verifier: str | Sequence[str] | None,
        config: LoopConfig,
        verify_template: Template | None = None,
        on_mismatch: str = "refuse",
        calibration: Calibration | Literal["stored"] | None = "stored",
        combine: str = "max",
    ) -> None:
        if on_mismatch not in ("refuse", "warn"):
            raise RsgwmError(f"on_mismatch must be refuse or warn, found {on_mismatch!r}")
        self.slots = slots
        self.template = template
        self.verify_template = template if verify_template is None else verify_template
        self.drafter = drafter
        self.verifiers = in_order(slots, [verifier] if isinstance(verifier, str) else verifier or ())
        check_rule(combine, len(self.verifiers))
        self.combine = combine
        self.config = config
        self.warnings = template_mismatches(slots, drafter, self.verifiers, template, self.verify_template)
        if self.warnings and on_mismatch == "refuse":
            raise RsgwmError(f"{self.warnings[0]}; use the template in its manifest, or --template-mismatch warn")
        self.tokenizer = slots.base.tokenizer
        self.parts = split_head(slots.model)
        eos_ids = {*self.tokenizer.eos_token_ids, self.tokenizer.eos_token_id} - {None}
        self.end_ids = frozenset(eos_ids) | template.stop_ids(self.tokenizer)
        if not self.end_ids:
            self.warnings.append("the base's tokenizer has no end-of-text token: every draft runs to --max-tokens")
        if config.drafts != SAMPLED:
            grafted_layer(slots.model, config.layer)
        self.batches = can_batch(slots.model)
        caches = len(make_prompt_cache(slots.model)) if self.batches else None
        self._splits: dict[int, LayerSplit | None] = {}
        self.reader = reader_of(slots, self.verifiers, self.verify_template, self.parts, caches, self._split, combine)
        if calibration == "stored":
            calibration = stored_calibration([slots.adapter(name) for name in self.verifiers], combine)
        self.calibration = calibration
        if combine != "learned" or calibration is not None:
            self.scorer(config.score)  # combined is refused here, not at the first draft
        self.pacing = Pacing()  # what with_config returns counts on

    def with_config(self, config: LoopConfig) -> DraftVerify:
        """The same adapters on the same base with other settings."""
        other = copy(self)
        other.config = config
        return other

    def drafter_hashes(self, hash_of: Callable[[Adapter], str]) -> str | dict[str, str] | None:
        """What drafts, by its hash; None for the bare base."""
        return hash_of(self.slots.adapter(self.drafter)) if self.drafter else None

    @property
    def drafters(self) -> tuple[str | None, ...]:
        """The slots that may draft."""
        return (self.drafter,)

    def of_question(self, question: str) -> DraftVerify:
        """What answers a question: this pipeline, where no router chooses among several."""
        return self

    def answer(self, question: str) -> Answer:
        """The last step of :meth:`steps`."""
        *_, last = self.steps(question)
        assert isinstance(last, Answer)
        return last

    def steps(self, question: str, watch: Watch | None = None) -> Iterator[Step]:
        """One question, step by step: each draft as the drafter wrote it, then as the verifier judged it; the last step
        is the :class:`Answer`. ``watch`` is told the number of the draft that comes next and its tokens so far."""
        prompt = self.prompt(question)
        parts, lower_cache = self.parts, None
        if self.batches:
            reading_prompt, parts = self.reader.remembering(question)
            lower_cache = self._lower_cache(prompt=reading_prompt)
        reads = partial(
            self.reader.signals, needs=self.scorer(self.config.score).needs, parts=parts, lower_cache=lower_cache
        )
        trial = Trial(self.config)
        for drafted in self._attempts(question, prompt, lower_cache, watch):
            trial.drafts.append(drafted)
            yield drafted
            self.score_last([(question, trial)], reads)
            yield trial.drafts[-1]
            if trial.over:
                break
        yield trial.answer()

    def _attempts(
        self, question: str, prompt: Prompt, lower_cache: LowerLayerCache | None, watch: Watch | None
    ) -> Iterator[Draft]:
        """Attempts in order, written no further than they are asked for; ``lower_cache`` sees how they were read."""
        if self.config.samples:
            yield from self._sampled(question, prompt, lower_cache, watch)
        made = self.config.samples
        while kinds := self.pacing.next_kinds(self.config, made):
            yield from self._grafted([question], kinds, made, len(kinds))[0]
            made += len(kinds)

    def _sampled(
        self, question: str, prompt: Prompt, lower_cache: LowerLayerCache | None, watch: Watch | None
    ) -> Iterator[Draft]:
        numbers = range(1, self.config.samples + 1)
        if not self.batches:
            for attempt in numbers:
                yield self._draft([DraftRequest(prompt, question, attempt)])[0]
            return
        decoder = self._decoder()
        with self.slots.using(self.drafter):
            decoder.read([prompt], [question], numbers)
        if lower_cache is not None:
            lower_cache.prefixes = decoder.prefixes
        for attempt in numbers:
            beside = [attempt] if self.pacing.goes_alone(self.config.mode, attempt) else numbers
            with self.slots.using(self.drafter):
                while (0, attempt) not in decoder.ended:
                    decoder.step([(0, other) for other in beside])
                    if watch is not None:
                        watch(attempt, decoder.written((0, attempt)))
            yield self._with_text(decoder.ended[0, attempt])

    def _grafted(
        self, questions: Sequence[str], kinds: Sequence[str], made: int, batch_rows: int, progress: Progress = SILENT
    ) -> list[list[Draft]]:
        """Of each question the grafted drafts of ``kinds``, numbered on from the drafts ``made``."""
        chains = graft_many(self, questions, kinds, self.config.layer, batch_rows, progress)
        return [[replace(chain, attempt=made + chain.attempt) for chain in row] for row in chains]

    def score_last(self, trials: Sequence[tuple[str, Trial]], reads: Reads) -> None:
        """Check, then score the last draft of every (question, trial); what an earlier one said is not read again."""
        judge(trials, reads, self.scorer(self.config.score))
        for drafted in (trial.drafts[-1] for _, trial in trials):
            if drafted.attempt == 1:
                self.pacing.first_judged(bool(drafted.accepted))

    def answer_many(self, questions: Sequence[str], batch_rows: int = 32, progress: Progress = SILENT) -> list[Answer]:
        """What :meth:`answer` says to each question, about ``batch_rows`` drafts or verdicts at a time."""
        answers: dict[int, Answer] = {}
        with progress.task("answer", len(questions)) as advance:
            for index, step in self.steps_many(questions, batch_rows):
                if isinstance(step, Answer):
                    answers[index] = step
                    advance(1, "")
        return [answers[index] for index in range(len(questions))]

    def steps_many(self, questions: Sequence[str], batch_rows: int = 32) -> Iterator[tuple[int, Step]]:
        """The steps of many questions, each with its question's index; those of one question come in their order.

        As the drafts of some questions end, others come in. In mode ``sequential``, and in ``adaptive`` while first
        drafts have mostly been accepted, a question comes in with its first attempt alone; else with all of them. What
        the attempts at a question have in common is written once either way. Grafted drafts of several questions are
        written side by side, once all sampled ones are judged.
        """
        prompts = [self.prompt(question) for question in questions]
        if not self.batches:
            for index, question in enumerate(questions):
                for step in self.steps(question):
                    yield index, step
            return
        trials: dict[int, Trial] = {}
        if self.config.samples:
            yield from self._sampled_many(questions, prompts, trials, batch_rows)
        else:
            trials = {index: Trial(self.config) for index in range(len(questions))}
        yield from self._grafted_many(questions, prompts, trials, batch_rows)

    def _sampled_many(
        self, questions: Sequence[str], prompts: Sequence[Prompt], trials: dict[int, Trial], batch_rows: int
    ) -> Iterator[tuple[int, Step]]:
        """The steps of the sampled drafts; of ``trials`` those are left that grafted drafts are to go on with."""
        scheduler = BatchScheduler(self._decoder(), questions, prompts, batch_rows)
        while not scheduler.over:
            writing = self._write(scheduler, self._attempts_after(0))
            yield from self._drafted(scheduler, trials)
            ready = {index: trial for index, trial in trials.items() if trial.waiting}
            if writing and len(ready) < max(1, batch_rows // 4):
                continue
            asked = [(questions[index], trial) for index, trial in ready.items()]
            self._score_many(asked, batch_rows, scheduler.prefixes)
            for index, trial in ready.items():
                yield index, trial.drafts[-1]
                if trial.over:
                    yield index, trials.pop(index).answer()
                if trial.over or trial.sampled_out:
                    scheduler.done(index)
                elif len(trial.drafts) == scheduler.attempts(index):  # all that were begun
                    scheduler.want(index, self._attempts_after(len(trial.drafts)))

    def _attempts_after(self, made: int) -> Sequence[int]:
        """The attempts that a question makes next, side by side, after those that were ``made``."""
        return range(made + 1, made + 1 + len(self.pacing.next_kinds(self.config, made)))

    def _grafted_many(
        self, questions: Sequence[str], prompts: Sequence[Prompt], trials: dict[int, Trial], batch_rows: int
    ) -> Iterator[tuple[int, Step]]:
        """The steps of the grafted drafts of all ``trials``, to their ends; those of a block of them side by side."""
        while trials:
            made = min(len(trial.drafts) for trial in trials.values())
            kinds = self.pacing.next_kinds(self.config, made)
            waiting = [index for index, trial in trials.items() if len(trial.drafts) == made]
            block = sorted(waiting, key=lambda index: len(prompts[index]))[: max(1, batch_rows // len(kinds))]
            chains = self._grafted([questions[index] for index in block], kinds, made, batch_rows)
            drafts = dict(zip(block, chains, strict=True))
            for number in range(len(kinds)):
                ready = {index: trials[index] for index in block if index in trials}
                for index, trial in ready.items():
                    trial.drafts.append(drafts[index][number])
                    yield index, trial.drafts[-1]
                self._score_many([(questions[index], trial) for index, trial in ready.items()], batch_rows, {})
                for index, trial in ready.items():
                    yield index, trial.drafts[-1]
                    if trial.over:
                        yield index, trials.pop(index).answer()

    def _drafted(self, scheduler: BatchScheduler, trials: dict[int, Trial]) -> Iterator[tuple[int, Draft]]:
        """The next draft of every question under way that has one ended and none to be scored."""
        for index in scheduler.under_way:
            trial = trials.setdefault(index, Trial(self.config))
            ended = None if trial.waiting else scheduler.ended(index, len(trial.drafts) + 1)
            if ended is not None:
                trial.drafts.append(self._with_text(ended))
                yield index, trial.drafts[-1]

    def _score_many(self, trials: Sequence[tuple[str, Trial]], batch_rows: int, prefixes: CachedPrefixes) -> None:
        lower_cache = self._lower_cache(prefixes)
        needs = self.scorer(self.config.score).needs
        self.score_last(
            trials, partial(self.reader.signals_many, needs=needs, batch_rows=batch_rows, lower_cache=lower_cache)
        )

    def draft_many(
        self, questions: Sequence[str], attempts: int, batch_rows: int = 32, progress: Progress = SILENT
    ) -> list[list[Draft]]:
        """``attempts`` drafts for every question, about ``batch_rows`` at a time; as some end, others come in.

        Attempt k of a question draws from the same random stream as in :meth:`steps`, or is of the same kind.

        Raises:
            RsgwmError: so many there are not.
        """
        kinds = self.config.kinds(attempts)
        samples = kinds.count(SAMPLED)
        drafts: dict[int, list[Draft]] = {index: [] for index in range(len(questions))}
        if samples:
            with progress.task("draft", len(questions)) as advance:
                for index, written in self.drafts_as_they_end(questions, samples, batch_rows):
                    drafts[index] = written
                    advance(1, "")
        if kinds[samples:]:
            for index, chains in enumerate(self._grafted(questions, kinds[samples:], samples, batch_rows, progress)):
                drafts[index] += chains
        return [drafts[index] for index in range(len(questions))]

    def drafts_as_they_end(
        self, questions: Sequence[str], attempts: int, batch_rows: int = 32
    ) -> Iterator[tuple[int, list[Draft]]]:
        """``attempts`` sampled drafts, each question's with its index once all of them have ended."""
        numbers = range(1, attempts + 1)
        prompts = [self.prompt(question) for question in questions]
        if not self.batches:
            for index, (prompt, text) in enumerate(zip(prompts, questions, strict=True)):
                yield index, self._draft([DraftRequest(prompt, text, attempt) for attempt in numbers])
            return
        scheduler = BatchScheduler(self._decoder(), questions, prompts, batch_rows)
        while not scheduler.over:
            self._write(scheduler, numbers)
            for index in scheduler.under_way:
                ended = [scheduler.ended(index, attempt) for attempt in numbers]
                if None not in ended:
                    yield index, [self._with_text(written) for written in ended if written is not None]
                    scheduler.done(index)

    def _write(self, scheduler: BatchScheduler, first: Sequence[int]) -> bool:
        with self.slots.using(self.drafter):
            return scheduler.write(first)

    def _decoder(self) -> BatchedDecoder:
        return BatchedDecoder(self.slots.model, self.parts, self.end_ids, self.config.sampling, self._split())

    def _split(self) -> LayerSplit | None:
        """The layers that no adapter changes, apart from the rest; None where there are none."""
        count = self.slots.first_changed(name for name in (self.drafter, *self.verifiers) if name is not None)
        if count not in self._splits:
            self._splits[count] = split_layers(self.slots.model, count)
        return self._splits[count]

    def _lower_cache(
        self, prefixes: CachedPrefixes | None = None, prompt: Sequence[int] = ()
    ) -> LowerLayerCache | None:
        split = self._split()
        return self.reader.lower_cache(split, prefixes, prompt) if split is not None else None

    def _draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        with self.slots.using(self.drafter):
            drafts = draft(self.slots.model, self.parts, self.end_ids, requests, self.config.sampling)
        return [self._with_text(written) for written in drafts]

    def _with_text(self, written: Draft) -> Draft:
        return replace(written, text=self.tokenizer.decode(list(written.tokens)))

    def as_draft(self, answer: str) -> Draft:
        """A given answer text in the form of a draft, so that it can be scored."""
        return Draft(0, tuple(self.template.completion(self.tokenizer, answer)[:-1]), True, answer)

    def prompt(self, question: str, about: str = "the question") -> Prompt:
        """The ids that the drafter reads for a question; RsgwmError about one that is empty or too long."""
        if not question.strip():
            raise RsgwmError(f"{about} is empty")
        prompt = self.template.draft_prompt(self.tokenizer, question)
        longest = self.config.sampling.max_tokens
        return self.slots.base.fitting_prompt(prompt, longest, about, "shorten it or lower max_tokens")

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that this verifier can give: ``combined`` only with a calibration."""
        plain = tuple(name for name in SCORES if name != "combined")
        return plain if self.calibration is None else self.calibration.scores

    def scorer(self, score: str) -> Scorer:
        """What turns the verifier's signals into a score."""
        if self.combine == "learned" or (self.calibration is not None and self.calibration.learned):
            return learned_scorer(score, self.calibration, self.combine, len(self.verifiers))
        return Scorer(score) if self.calibration is None else self.calibration.scorer(score)

    def by_adapter(self, signals: Signals, score: str) -> dict[str, float]:
        """The score that each adapter of a pool gives a draft; empty for a single verifier."""
        return dict(zip(self.verifiers, scores_of_each(self.scorer(score), signals), strict=False))

    def score_many(
        self, questions: Sequence[str], drafts: Sequence[Draft], score: str, batch_rows: int = 32
    ) -> list[float]:
        """Scores of (question, draft) pairs by the verifier."""
        scorer = self.scorer(score)
        values = scorer.values(self.reader.signals_many(questions, drafts, scorer.needs, batch_rows))
        return [float(value) for value in values.tolist()]
