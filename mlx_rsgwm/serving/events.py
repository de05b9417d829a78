"""What the engine tells of a request, in this order: begun, pieces and ends of choices, finished; or that it failed.

Of a verified one: begun, drafts and verdicts, what came of them, finished. ``index``: of the choice, from 0.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from mlx_rsgwm.inference.draft import Draft


def time_of_day() -> int:
    """Seconds since 1970, which OpenAI's objects carry as ``created``; nothing is measured by it."""
    return int(time.time())


@dataclass(frozen=True)
class TokenLogprob:
    """A token as text and bytes (None: they cannot be told), its log-probability in nats, and the likeliest
    tokens at its place with theirs."""

    text: str
    raw: tuple[int, ...] | None
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Begun:
    """The request was taken in; its prompt has so many tokens."""

    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """More text of a choice, which may be empty where only log-probabilities are told."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Ended:
    """A choice is whole: ``stop`` where it ended by itself or at a stop text, ``length`` where it was cut.

    ``cached``: tokens of its prompt that were read before.
    """

    index: int
    reason: str
    tokens: int
    cached: int = 0


@dataclass(frozen=True)
class Finished:
    """Nothing more comes."""


@dataclass(frozen=True)
class Failed:
    """Nothing more comes, for this reason."""

    error: Exception


@dataclass(frozen=True)
class Drafting:
    """How far an attempt at a question is written."""

    attempt: int
    text: str
    index: int = 0


@dataclass(frozen=True)
class Judged:
    """What the verifier said of an attempt; no score where it states a ``false_equation`` and was not shown to it."""

    attempt: int
    score: float | None
    accepted: bool
    false_equation: str | None = None
    index: int = 0


@dataclass(frozen=True)
class Verified:
    """All judged drafts; ``text``: the answer, None where there is none; ``chosen``: the place of its draft.

    ``probabilities``: of being right, for each draft, None where no calibration says it. ``tokens``: of all drafts,
    those included that nobody waited for. ``cached``: tokens of the prompt that were read before. ``drafter``: of
    the drafts, its slot.
    """

    drafts: tuple[Draft, ...]
    text: str | None
    chosen: int
    threshold: float
    score_name: str
    probabilities: tuple[float | None, ...]
    tokens: int
    cached: int = 0
    index: int = 0
    drafter: str | None = None


Event = Begun | Piece | Ended | Drafting | Judged | Verified | Finished | Failed
