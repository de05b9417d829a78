"""A request on its way through the engine: which rows it wants written, and what becomes of their tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.trial import Trial
from mlx_rsgwm.serving.events import Event, Failed
from mlx_rsgwm.serving.library import Library, ServedModel
from mlx_rsgwm.serving.row_sampling import Pick
from mlx_rsgwm.serving.rows import Row


class Job(ABC):
    """A request. Its methods run in the engine's thread; ``cancelled`` may be set by any.

    ``tell`` takes events, in any thread, and must not wait. ``over``: no row of it is wanted any more.
    """

    def __init__(self, model: ServedModel, tell: Callable[[Event], None]) -> None:
        self.model, self.tell = model, tell
        self.cancelled = self.over = False

    @abstractmethod
    def begin(self, library: Library) -> list[Row]:
        """The first rows to write, each with this job as its owner."""

    @abstractmethod
    def wrote(self, row: Row, pick: Pick) -> bool:
        """The last token of a row, which does not end it; False where the job wants no more of it."""

    @abstractmethod
    def ended(self, row: Row, finished: bool) -> list[Row]:
        """A row ended, by itself (``finished``) or at its limit; returns further rows to write."""

    pipeline: DraftVerify | None = None  # of those whose drafts are verified, once begun

    @property
    def verdicts(self) -> Sequence[tuple[str, Trial]]:
        """Questions with drafts that wait for the verifier; the engine scores their last drafts."""
        return ()

    def scored_as(self, other: Job) -> bool:
        """Whether one pass can score drafts of both; each has its threshold and checks for itself."""
        assert self.pipeline is not None
        assert other.pipeline is not None
        return self.model is other.model and self.pipeline.config.score == other.pipeline.config.score

    def judged(self) -> list[Row]:
        """Some of them were scored; returns further rows to write."""
        return []

    def fail(self, error: Exception) -> None:
        """The request cannot be answered."""
        if not self.over:
            self.over = True
            self.tell(Failed(error))
