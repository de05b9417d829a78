"""Questions with gold answers, from the public data sets or any JSONL."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One item. ``rationale`` is the worked solution without the final line; ``gold`` is the final answer as text.

    A data set without rationales (CommonsenseQA, StrategyQA) leaves ``rationale`` empty or gives its facts.
    """

    id: str
    task: str
    question: str
    rationale: str
    gold: str

    @property
    def answer(self) -> str:
        """The full gold answer in GSM8K style: the rationale, then a line ``#### gold``."""
        return f"{self.rationale}\n#### {self.gold}" if self.rationale else f"#### {self.gold}"
