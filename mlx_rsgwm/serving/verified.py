"""A request that a pair answers: drafts are rows like any others, and the verifier reads them between two tokens.

The decisions are those of :class:`~mlx_rsgwm.inference.loop.DraftVerify`: the same random streams, checks, scores and
rule, so an answer is the one that ``rsgwm ask`` gives with the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.inference.draft import SAMPLED, Draft
from mlx_rsgwm.inference.grafting import Chain, grafted_layer
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.policy import LoopConfig, decide
from mlx_rsgwm.inference.sampling import Sampling, uniforms
from mlx_rsgwm.inference.trial import Trial
from mlx_rsgwm.serving.completion import room_for
from mlx_rsgwm.serving.errors import RequestError
from mlx_rsgwm.serving.events import Begun, Drafting, Event, Finished, Judged, Verified
from mlx_rsgwm.serving.jobs import Job
from mlx_rsgwm.serving.library import Library, ServedModel
from mlx_rsgwm.serving.row_sampling import Pick, RowSampling
from mlx_rsgwm.serving.rows import Row

SHOWN_EVERY = 4  # tokens of a draft between two looks at it


@dataclass(frozen=True)
class Verifying:
    """How a question is answered. ``changes``: of the pair's settings, by the names of :class:`LoopConfig` and
    :class:`Sampling`; ``target_far``: the share of wrong answers among accepted ones that is to be kept, by the
    calibration's bound. ``inside``: what stands before these settings where the request names them."""

    seed: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict)
    target_far: float | None = None
    inside: str = "verify."

    def pipeline(self, model: ServedModel) -> DraftVerify:
        """The model's pair with these settings.

        Raises:
            RequestError: they are out of range, or no bound is known that keeps the share.
        """
        pair = model.pipeline
        assert pair is not None
        changes = dict(self.changes)
        if self.target_far is not None:
            changes |= self._bounded(pair, changes)
        sampling = {name: changes.pop(name) for name in ("temperature", "top_p", "max_tokens") if name in changes}
        try:
            drawn: Sampling = replace(pair.config.sampling, seed=self.seed, **sampling)
            config: LoopConfig = replace(pair.config, sampling=drawn, **changes)
        except RsgwmError as error:
            raise RequestError(error, code="invalid_value", param=self.inside.rstrip(".") or None) from None
        if config.score not in pair.scores:
            message = f"the score is one of {', '.join(pair.scores)} here, found {config.score!r}"
            raise RequestError(message, code="invalid_value", param=f"{self.inside}score")
        return pair.with_config(config)

    def _bounded(self, pair: DraftVerify, changes: Mapping[str, Any]) -> dict[str, Any]:
        bound = pair.calibration.risk_bound if pair.calibration is not None else None
        param = f"{self.inside}target_far"
        if "threshold" in changes or "score" in changes:
            message = f"{param} settles score and threshold; leave them out"
            raise RequestError(message, code="invalid_value", param=param)
        if bound is None or pair.calibration is None or bound.far > (self.target_far or 0):
            known = "none" if bound is None else f"a share of {bound.far:g}"
            raise RequestError(
                f"no threshold is known that keeps target_far; the calibration bounds {known} "
                "(rsgwm calibrate --target-far)",
                code="no_risk_bound",
                param=param,
            )
        return {"threshold": bound.threshold, "score": pair.calibration.score}


class VerifiedAnswer(Job):
    """One question, drafted and verified."""

    def __init__(self, model: ServedModel, question: str, verifying: Verifying, tell: Callable[[Event], None]) -> None:
        super().__init__(model, tell)
        self._question, self._verifying = question, verifying
        self._rows: dict[Row, int] = {}  # being written, and the numbers of their attempts
        self._written: dict[int, Draft] = {}  # and not judged yet
        self._tokens = self._cached = 0

    def begin(self, library: Library) -> list[Row]:
        """The first attempts."""
        pipeline = self._verifying.pipeline(self.model)
        config = pipeline.config
        self._trial = Trial(config)
        self._prompt = tuple(pipeline.template.draft_prompt(pipeline.tokenizer, self._question))
        room_for(library, self._prompt, config.sampling.max_tokens, config.sampling.max_tokens, "messages")
        self._pair = self.pipeline = pipeline.of_question(self._question)
        self.tell(Begun(len(self._prompt)))
        return self._attempts()

    def _attempts(self) -> list[Row]:
        """Rows of the attempts that come next."""
        pair, made = self._pair, len(self._trial.drafts)
        kinds = pair.pacing.next_kinds(pair.config, made)
        rows = {self._row(number, kind): number for number, kind in enumerate(kinds, made + 1)}
        self._rows |= rows
        return list(rows)

    def _row(self, number: int, kind: str) -> Row:
        pair, sampling = self._pair, self._pair.config.sampling
        if kind == SAMPLED:
            stream = uniforms(sampling.seed, self._question, number, sampling.max_tokens)
            settings, chain = RowSampling(sampling.temperature, sampling.top_p), None
        else:
            stream = np.zeros(sampling.max_tokens, dtype=np.float32)
            place = grafted_layer(pair.slots.model, pair.config.layer)
            settings, chain = RowSampling(temperature=0), Chain(kind, place, sampling.seed)
        return Row(self._prompt, pair.drafter, settings, stream, pair.end_ids, self, chain=chain)

    def wrote(self, row: Row, pick: Pick) -> bool:
        """Show how far a draft is, now and then."""
        self._tokens += 1
        if len(row.tokens) % SHOWN_EVERY == 0:
            self.tell(Drafting(self._rows[row], self._pair.tokenizer.decode(row.tokens)))
        return True

    def ended(self, row: Row, finished: bool) -> list[Row]:
        """Keep the draft until it is its turn to be judged."""
        number = self._rows.pop(row)
        self._cached = row.cached if number == 1 else self._cached
        kind = SAMPLED if row.chain is None else row.chain.kind
        draft = Draft(number, tuple(row.tokens), finished, self._pair.tokenizer.decode(row.tokens), kind=kind)
        self._written[number] = draft
        self.tell(Drafting(number, draft.text))
        return self._go_on()

    def _go_on(self) -> list[Row]:
        """Hand the next draft in order to the verifier; further attempts where none is left or under way."""
        following = len(self._trial.drafts) + 1
        if not self._trial.waiting and following in self._written:
            self._trial.drafts.append(self._written.pop(following))
            return []
        return [] if self._trial.waiting or following in self._rows.values() else self._attempts()

    @property
    def verdicts(self) -> Sequence[tuple[str, Trial]]:
        """What waits for the verifier."""
        return [(self._question, self._trial)] if not self.over and self._trial.waiting else []

    def judged(self) -> list[Row]:
        """Tell what became of the last draft; the answer, if that was the last."""
        draft = self._trial.drafts[-1]
        self.tell(Judged(draft.attempt, draft.score, bool(draft.accepted), draft.false_equation))
        if not self._trial.over:
            return self._go_on()
        self.over = True
        drafts, threshold = self._trial.drafts, self._pair.config.threshold
        chosen = decide([draft.score for draft in drafts], threshold).chosen
        self.tell(_verified(self._pair, drafts, self._trial.answer().text, chosen, self._tokens, self._cached))
        self.tell(Finished())
        return []


def _verified(
    pipeline: DraftVerify, drafts: Sequence[Draft], text: str | None, chosen: int, tokens: int = 0, cached: int = 0
) -> Verified:
    """What is told of judged drafts."""
    config, calibration = pipeline.config, pipeline.calibration
    likely = tuple(
        None if calibration is None or draft.score is None else calibration.probability(config.score, draft.score)
        for draft in drafts
    )
    told = (config.threshold, config.score, likely, tokens, cached)
    return Verified(tuple(drafts), text, chosen, *told, drafter=pipeline.drafter)


class Verification(Job):
    """Answers to one question that somebody else wrote, judged by a pair's verifier."""

    def __init__(
        self,
        model: ServedModel,
        question: str,
        answers: Sequence[str],
        verifying: Verifying,
        tell: Callable[[Event], None],
    ) -> None:
        super().__init__(model, tell)
        self._question, self._answers, self._verifying = question, answers, verifying

    def begin(self, library: Library) -> list[Row]:
        """Nothing is written; every answer waits for the verifier."""
        self._pair = self.pipeline = self._verifying.pipeline(self.model)
        self._trials = [Trial(self._pair.config) for _ in self._answers]
        for trial, text in zip(self._trials, self._answers, strict=True):
            draft = self._pair.as_draft(text)
            prompt = self._pair.template.verify_prompt(self._pair.tokenizer, self._question, text)
            room_for(library, tuple(prompt), 1, 1, "answers")
            trial.drafts.append(draft)
        self.tell(Begun(0))
        return []

    def wrote(self, row: Row, pick: Pick) -> bool:
        """Never called: there are no rows."""
        raise AssertionError("a verification writes nothing")

    def ended(self, row: Row, finished: bool) -> list[Row]:
        """Never called: there are no rows."""
        raise AssertionError("a verification writes nothing")

    @property
    def verdicts(self) -> Sequence[tuple[str, Trial]]:
        """The answers that wait for the verifier."""
        return [] if self.over else [(self._question, trial) for trial in self._trials if trial.waiting]

    def judged(self) -> list[Row]:
        """Tell all verdicts once the last is there."""
        if not any(trial.waiting for trial in self._trials):
            self.over = True
            drafts = tuple(trial.drafts[-1] for trial in self._trials)
            self.tell(_verified(self._pair, drafts, None, 0))
            self.tell(Finished())
        return []
