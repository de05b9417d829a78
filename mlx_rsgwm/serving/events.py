"""What the engine tells of a request, in this order: begun, pieces, ends of choices, finished; or that it failed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprob:
    """A token as text and bytes (None: of a part of a character), its log-probability in nats, and the likeliest
    tokens at its place with theirs."""

    text: str
    raw: tuple[int, ...] | None
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Begun:
    """The request was taken in; its prompt has so many tokens, of which ``cached`` were read before."""

    prompt_tokens: int
    cached: int = 0


@dataclass(frozen=True)
class Piece:
    """More text of a choice, which may be empty where only log-probabilities are told."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Ended:
    """A choice is whole: ``stop`` where it ended by itself or at a stop text, ``length`` where it was cut."""

    index: int
    reason: str
    tokens: int


@dataclass(frozen=True)
class Finished:
    """Nothing more comes."""


@dataclass(frozen=True)
class Failed:
    """Nothing more comes, for this reason."""

    error: Exception


Event = Begun | Piece | Ended | Finished | Failed
