"""A request that one voice answers: ``n`` rows over one prompt, told as they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_rsgwm.inference.sampling import uniforms
from mlx_rsgwm.serving.errors import ContextTooLong, RequestError
from mlx_rsgwm.serving.events import Begun, Ended, Event, Finished, Piece, TokenLogprob
from mlx_rsgwm.serving.jobs import Job
from mlx_rsgwm.serving.library import Library, ServedModel
from mlx_rsgwm.serving.row_sampling import Pick, RowSampling
from mlx_rsgwm.serving.rows import Row
from mlx_rsgwm.serving.text import HALF, TextStream, bytes_of

Prompt = Callable[[Library, ServedModel], tuple[int, ...]]


@dataclass(frozen=True)
class Writing:
    """How choices are written. ``stream``: what names their random streams, beside the seed; for ``rsgwm ask`` that is
    the question. ``max_tokens`` None: as many as ``usual``, or as the context has room for.
    ``schema``: of JSON, which the text is to be a value of. ``param``: what the request calls the prompt."""

    n: int = 1
    seed: int = 0
    stream: str = ""
    max_tokens: int | None = None
    usual: int = 512
    stop: tuple[str, ...] = ()
    trim: bool = True
    schema: str | None = None
    param: str = "prompt"
    sampling: RowSampling = field(default_factory=RowSampling)


def room_for(library: Library, prompt: tuple[int, ...], asked: int | None, usual: int, param: str) -> int:
    """Tokens that may be written after a prompt, which the request calls ``param``.

    Raises:
        ContextTooLong: fewer than were asked for, or none.
    """
    limit = library.base.config.get("max_position_embeddings") or (1 << 31)
    room = int(limit) - len(prompt)
    if room < (asked or 1):
        raise ContextTooLong(len(prompt), asked or 1, int(limit), param)
    return asked or min(usual, room)


class Completion(Job):
    """Texts by an adapter or the base. ``prompt`` is called in the engine's thread, which has the tokenizer."""

    def __init__(self, model: ServedModel, prompt: Prompt, writing: Writing, tell: Callable[[Event], None]) -> None:
        super().__init__(model, tell)
        self._prompt, self._writing = prompt, writing
        self._texts: dict[Row, TextStream] = {}
        self._places: dict[Row, int] = {}
        self._told: dict[Row, list[TokenLogprob]] = {}
        self._complete: set[Row] = set()  # rows after whose text their grammar has nothing

    def begin(self, library: Library) -> list[Row]:
        """The rows to write."""
        model, writing = self.model, self._writing
        if beyond := [token for token in writing.sampling.logit_bias if token >= library.vocabulary]:
            message = f"logit_bias has token {beyond[0]}; the model has {library.vocabulary}"
            raise RequestError(message, code="invalid_value", param="logit_bias")
        prompt = self._prompt(library, model)
        count = room_for(library, prompt, writing.max_tokens, writing.usual, writing.param)
        rows = [
            Row(
                prompt,
                model.slot,
                writing.sampling,
                uniforms(writing.seed, writing.stream, number, count),
                model.end_ids,
                self,
            )
            for number in range(1, writing.n + 1)
        ]
        self._tokenizer: Any = library.tokenizer
        for place, row in enumerate(rows):
            row.grammar = None if writing.schema is None else library.grammars.of(writing.schema, model.end_ids)
            self._places[row], self._told[row] = place, []
            self._texts[row] = TextStream(self._tokenizer.decode, writing.stop, writing.trim)
        self.tell(Begun(len(prompt)))
        return rows

    def wrote(self, row: Row, pick: Pick) -> bool:
        """Tell what the row's last token adds; False where it ends the row."""
        if pick.logprob is not None:
            self._told[row].append(self._logprob(pick))
        text = self._texts[row]
        self._piece(row, text.add(pick.token))
        if row.grammar is not None and not row.grammar.take(pick.token):
            self._complete.add(row)
        return not text.stopped and row not in self._complete

    def ended(self, row: Row, finished: bool) -> list[Row]:
        """Tell the row's end; ``finished``: by itself, not by its limit."""
        text = self._texts.pop(row)
        if not text.stopped:
            self._piece(row, text.end(), last=True)
        reason = "stop" if finished or text.stopped or row in self._complete else "length"
        self.tell(Ended(self._places[row], reason, len(row.tokens), min(row.cached, len(row.prompt))))
        if not self._texts:
            self.over = True
            self.tell(Finished())
        return []

    def _piece(self, row: Row, text: str, last: bool = False) -> None:
        logprobs = self._told[row]
        if text or (last and logprobs):
            self.tell(Piece(self._places[row], text, tuple(logprobs)))
            self._told[row] = []

    def _logprob(self, pick: Pick) -> TokenLogprob:
        top = tuple(self._named(token, value) for token, value in pick.top)
        return self._named(pick.token, pick.logprob or 0.0, top)

    def _named(self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        text = self._tokenizer.decode([token])
        piece = self._tokenizer.convert_ids_to_tokens(token) if HALF in text else None
        return TokenLogprob(text, bytes_of(text, piece), logprob, top)
