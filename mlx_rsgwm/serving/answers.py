"""What is answered, in the shapes of OpenAI's API: whole, or in chunks of a stream."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_rsgwm.serving.events import Ended, TokenLogprob, time_of_day

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Shape:
    """How an endpoint tells an answer. ``choice``: a whole one of index, text, log-probabilities and reason; ``delta``:
    a part of one, likewise; ``begins``: whether a choice is begun by a part that says who speaks."""

    prefix: str
    name: str
    chunk_name: str
    choice: Callable[[int, str | None, Sequence[TokenLogprob] | None, str | None], Json]
    delta: Callable[[int, str | None, Sequence[TokenLogprob] | None, str | None], Json]
    begins: bool


@dataclass
class Usage:
    """Tokens of a request; ``rejected``: of drafts that are not the answer, which are among those written."""

    prompt: int = 0
    written: int = 0
    cached: int = 0
    rejected: int = 0

    def count(self, ended: Ended, n: int) -> None:
        """Count a choice; of ``n`` to one prompt the first says how much of that was read before."""
        self.written += ended.tokens
        self.cached += ended.cached if ended.index % n == 0 else 0

    def describe(self) -> Json:
        """As OpenAI tells it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.written,
            "total_tokens": self.prompt + self.written,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"rejected_prediction_tokens": self.rejected},
        }


@dataclass(frozen=True)
class Head:
    """What all parts of an answer begin with."""

    shape: Shape
    model: str
    fingerprint: str
    name: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=time_of_day)

    def fields(self, name: str) -> Json:
        """Of the object ``name``."""
        return {
            "id": f"{self.shape.prefix}-{self.name}",
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def answer(self, choices: Sequence[Json], usage: Usage, **more: Any) -> Json:
        """The whole answer."""
        return {**self.fields(self.shape.name), "choices": list(choices), "usage": usage.describe(), **more}

    def chunk(self, choices: Sequence[Json], **more: Any) -> bytes:
        """A chunk of a stream."""
        return server_sent({**self.fields(self.shape.chunk_name), "choices": list(choices), **more})


def server_sent(value: Json) -> bytes:
    """A value as an event of a stream."""
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


def _token(logprob: TokenLogprob) -> Json:
    return {
        "token": logprob.text,
        "logprob": logprob.logprob,
        "bytes": None if logprob.raw is None else list(logprob.raw),
    }


def _chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> Json | None:
    if logprobs is None:
        return None
    content = [{**_token(each), "top_logprobs": [_token(other) for other in each.top]} for each in logprobs]
    return {"content": content, "refusal": None}


def chat_choice(index: int, text: str | None, logprobs: Sequence[TokenLogprob] | None, reason: str | None) -> Json:
    """A choice of ``chat.completion``."""
    message: Json = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
    return {"index": index, "message": message, "logprobs": _chat_logprobs(logprobs), "finish_reason": reason}


def chat_delta(index: int, text: str | None, logprobs: Sequence[TokenLogprob] | None, reason: str | None) -> Json:
    """A choice of ``chat.completion.chunk``."""
    delta = {} if text is None else {"content": text}
    return {"index": index, "delta": delta, "logprobs": _chat_logprobs(logprobs), "finish_reason": reason}


def begun(delta: Callable[[int, str | None, None, None], Json], index: int) -> Json:
    """The part that begins a choice: who speaks."""
    part = delta(index, "", None, None)
    part["delta"]["role"] = "assistant"
    return part


def text_choice(index: int, text: str | None, logprobs: Sequence[TokenLogprob] | None, reason: str | None) -> Json:
    """A choice of ``text_completion``."""
    told: Json | None = None
    if logprobs is not None:
        starts = [0]
        for each in logprobs:
            starts.append(starts[-1] + len(each.text))
        told = {
            "tokens": [each.text for each in logprobs],
            "token_logprobs": [each.logprob for each in logprobs],
            # Of tokens that look alike, as parts of characters do, the likeliest, which comes first.
            "top_logprobs": [{other.text: other.logprob for other in reversed(each.top)} for each in logprobs],
            "text_offset": starts[:-1],
        }
    return {"index": index, "text": text or "", "logprobs": told, "finish_reason": reason}


CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", chat_choice, chat_delta, True)
TEXT = Shape("cmpl", "text_completion", "text_completion", text_choice, text_choice, False)
