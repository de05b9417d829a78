"""A question under way through the loop: its drafts so far, and what follows from their scores."""

from __future__ import annotations

from mlx_rsgwm.inference.draft import Answer, Draft, Signals
from mlx_rsgwm.inference.policy import LoopConfig, accepts, decide, failed_check


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
        """Whether the last draft was accepted, or no further attempt is left."""
        return self.drafts[-1].state == "accepted" or len(self.drafts) == self._config.attempts

    def add(self, draft: Draft) -> Draft:
        """The drafter spoke."""
        self.drafts.append(draft)
        return draft

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
        return Answer(text, chosen.score or 0.0, decision.accepted, decision.attempts, chosen.false_equation)
