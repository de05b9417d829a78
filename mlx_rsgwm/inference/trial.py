"""A question under way in the loop: what was drafted, what became of it, and what the loop returns of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlx_rsgwm.inference.draft import Answer, Draft, Signals
from mlx_rsgwm.inference.policy import LoopConfig, accepts, decide, failed_check
from mlx_rsgwm.inference.scores import Scorer

Reads = Callable[[Sequence[str], Sequence[Draft]], list[Signals]]


class Trial:
    """A question under way: its drafts in order, of which the last may wait for the verifier."""

    def __init__(self, config: LoopConfig) -> None:
        self._config = config
        self.drafts: list[Draft] = []

    @property
    def waiting(self) -> bool:
        """Whether the last draft is to be scored."""
        return bool(self.drafts) and self.drafts[-1].state == "drafted"

    @property
    def over(self) -> bool:
        """Whether the last draft was accepted, or no further one is left."""
        return self.drafts[-1].state == "accepted" or len(self.drafts) == self._config.most

    @property
    def sampled_out(self) -> bool:
        """Whether every sampled draft was rejected and grafted ones are left."""
        return not self.over and len(self.drafts) >= self._config.samples

    def earlier_alike(self) -> Draft | None:
        """A scored draft of the same content as the last one, whose score holds for that, too."""
        return next((draft for draft in self.drafts[:-1] if draft.content == self.drafts[-1].content), None)

    def check(self, question: str) -> bool:
        """Whether the last draft passes what needs no verifier; one that does not is rejected."""
        failed = failed_check(self.drafts[-1].text, question, self._config.check)
        if failed is not None:
            self.drafts[-1] = self.drafts[-1].failed(failed)
        return failed is None

    def score(self, signals: Signals | None, score: float) -> Draft:
        """The verifier spoke of the last draft."""
        self.drafts[-1] = self.drafts[-1].scored(signals, score, accepts(score, self._config.threshold))
        return self.drafts[-1]

    def answer(self) -> Answer:
        """What the loop returns of the drafts so far, all scored or rejected by a check."""
        decision = decide([draft.score for draft in self.drafts], self._config.threshold)
        chosen = self.drafts[decision.chosen]
        text = None if self._config.abstain and not decision.accepted else chosen.text
        score, failed = chosen.score or 0.0, chosen.false_equation
        return Answer(text, score, decision.accepted, decision.attempts, failed, chosen.kind)


def judge(trials: Sequence[tuple[str, Trial]], reads: Reads, scorer: Scorer) -> None:
    """Check, then score the last draft of every (question, trial); what an earlier one said is not read again."""
    passed = [(question, trial) for question, trial in trials if trial.check(question)]
    if not passed:
        return
    alike = [trial.earlier_alike() for _, trial in passed]
    new = [pair for pair, earlier in zip(passed, alike, strict=True) if earlier is None]
    signals = reads([question for question, _ in new], [trial.drafts[-1] for _, trial in new])
    values: list[float] = scorer.values(signals).tolist()
    read = iter(zip(signals, values, strict=True))
    for (_, trial), earlier in zip(passed, alike, strict=True):
        if earlier is None:
            trial.score(*next(read))
        else:
            assert earlier.score is not None
            trial.score(earlier.signals, earlier.score)
