"""Many questions under way at once: as the drafts of some end, others come in, so that a batch stays full."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mlx_rsgwm.inference.batched_decode import BatchedDecoder
from mlx_rsgwm.inference.draft import Draft
from mlx_rsgwm.inference.prefix_cache import CachedPrefixes

Prompt = tuple[int, ...]


class BatchScheduler:
    """Drafts of many questions, which go by their indices, about ``batch_rows`` of them at a time.

    Questions come in by the length of their prompts, a quarter of a batch or more at a time; :meth:`want` asks for
    further attempts, for which the prompt is read again. What a batch holds follows from the questions and
    ``batch_rows`` alone, so a run can be repeated to the last bit. ``decoder`` is new, and the adapter that drafts must
    be active in :meth:`write`.
    """

    def __init__(
        self, decoder: BatchedDecoder, questions: Sequence[str], prompts: Sequence[Prompt], batch_rows: int
    ) -> None:
        self._decoder = decoder
        self._questions, self._prompts = questions, prompts
        self._rows = max(1, batch_rows)
        order = sorted(range(len(questions)), key=lambda index: len(prompts[index]))
        self._waiting: deque[tuple[int, Sequence[int]]] = deque((index, ()) for index in order)
        self._places: dict[int, dict[int, int]] = {}  # of every question under way: attempt, place in the decoder
        self._wanted: set[tuple[int, int]] = set()

    @property
    def under_way(self) -> list[int]:
        """Questions that have come in and are not done."""
        return list(self._places)

    @property
    def over(self) -> bool:
        """True once every question is done."""
        return not self._places and not self._waiting

    @property
    def prefixes(self) -> CachedPrefixes:
        """:attr:`BatchedDecoder.prefixes` of the questions under way."""
        return self._decoder.prefixes

    def attempts(self, index: int) -> int:
        """How many attempts the question has come in with so far."""
        return len(self._places[index])

    def ended(self, index: int, attempt: int) -> Draft | None:
        """The draft, or None while it is not written."""
        place = self._places[index].get(attempt)
        return None if place is None else self._decoder.ended.get((place, attempt))

    def want(self, index: int, attempts: Sequence[int]) -> None:
        """Have further attempts at a question made, before others come in."""
        self._waiting.appendleft((index, attempts))

    def done(self, index: int) -> None:
        """Nothing more is wanted of a question; what was kept of it is let go."""
        for place in set(self._places.pop(index).values()):
            self._wanted = {key for key in self._wanted if key[0] != place}
            self._decoder.forget(place)

    def write(self, first: Sequence[int]) -> bool:
        """One token more for every draft that is wanted; False when none was left to write.

        Before that waiting questions come in, if a quarter of the rows is free, with their ``first`` attempts.
        """
        self._fill(first)
        if not self._wanted:
            return False
        self._decoder.step(self._wanted)
        self._wanted -= self._decoder.ended.keys()
        return True

    def _fill(self, first: Sequence[int]) -> None:
        free = self._rows - len(self._wanted)
        if self._wanted and free < self._rows / 4:
            return
        entering: dict[tuple[int, ...], list[int]] = {}
        while self._waiting:
            index, attempts = self._waiting[0]
            attempts = tuple(attempts or first)
            if len(attempts) > free and (self._wanted or entering):
                break
            self._waiting.popleft()
            free -= len(attempts)
            entering.setdefault(attempts, []).append(index)
        for attempts, indices in entering.items():
            texts, prompts = [self._questions[i] for i in indices], [self._prompts[i] for i in indices]
            places = self._decoder.read(prompts, texts, attempts)
            for index, place in zip(indices, places, strict=True):
                self._places.setdefault(index, {}).update(dict.fromkeys(attempts, place))
                self._wanted |= {(place, attempt) for attempt in attempts}
