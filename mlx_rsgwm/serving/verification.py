"""What is told of a verified answer: how far it can be trusted, and what was rejected on the way."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from mlx_rsgwm.inference.draft import Draft
from mlx_rsgwm.serving.answers import Head, Json, Usage, begun, chat_choice, chat_delta
from mlx_rsgwm.serving.delivery import Delivery
from mlx_rsgwm.serving.events import Drafting, Judged, Verified
from mlx_rsgwm.serving.library import ServedModel
from mlx_rsgwm.serving.telling import Timed

SHOWN = ("none", "summary", "full")  # what is told of the drafts


def verification_of(verified: Verified, model: ServedModel, shown: str, warnings: Sequence[str]) -> Json:
    """The object ``verification`` of an answer."""
    draft = verified.drafts[verified.chosen]
    choice = {
        "index": 0,
        **_judged(verified, verified.chosen),
        "threshold": verified.threshold,
        "attempts": len(verified.drafts),
        **_false(draft),
    }
    if shown != "none":
        choice["drafts"] = [
            {
                "attempt": draft.attempt,
                **_judged(verified, place),
                **_false(draft),
                **({"text": draft.text.strip(), "finished": draft.finished} if shown == "full" else {}),
            }
            for place, draft in enumerate(verified.drafts)
        ]
    return {"choices": [choice], "score_name": verified.score_name, **_who(model), "warnings": list(warnings)}


def _judged(verified: Verified, place: int) -> Json:
    draft = verified.drafts[place]
    return {"score": draft.score, "probability": verified.probabilities[place], "accepted": bool(draft.accepted)}


def _false(draft: Draft) -> Json:
    """The false equation that a draft states, which the verifier was not shown for it."""
    return {} if draft.false_equation is None else {"false_equation": draft.false_equation}


def _who(model: ServedModel) -> Json:
    details = model.details
    return {name: details[name] for name in ("drafter", "verifier", "calibrated")}


def headers_of(verification: Mapping[str, Any]) -> dict[str, str]:
    """The same in headers, for clients that show nothing else."""
    choice = verification["choices"][0]
    score = choice["score"]
    return {
        "x-rsgwm-score": "" if score is None else f"{score:.6f}",
        "x-rsgwm-accepted": str(choice["accepted"]).lower(),
        "x-rsgwm-attempts": str(choice["attempts"]),
    }


def usage_of(verified: Verified, prompt: int) -> Usage:
    """Tokens of all drafts; those that are not the answer were rejected."""
    answer = 0 if verified.text is None else len(verified.drafts[verified.chosen].tokens)
    return Usage(prompt, verified.tokens, verified.cached, verified.tokens - answer)


def refusal_text(verified: Verified) -> str:
    """Why there is no answer."""
    best = max((draft.score for draft in verified.drafts if draft.score is not None), default=None)
    told = "every draft states a false equation" if best is None else f"the best of them scores {best:.3f}"
    return f"No answer: of {len(verified.drafts)} drafts none reached {verified.threshold:.3f}; {told}."


def reason_of(verified: Verified) -> str:
    """Why the answer ends where it does: an abstention does so by itself."""
    return "stop" if verified.text is None or verified.drafts[verified.chosen].finished else "length"


def choice_of(verified: Verified) -> Json:
    """The choice of a whole answer; one that abstains has no content, and says why."""
    text = None if verified.text is None else verified.text.strip()
    choice = chat_choice(0, text, None, reason_of(verified))
    choice["message"]["refusal"] = refusal_text(verified) if text is None else None
    return choice


async def last_of(delivery: Delivery) -> Verified:
    """The verdict that a delivery ends with."""
    last = None
    async for event in delivery.events():
        last = event if isinstance(event, Verified) else last
    assert last is not None
    return last


async def verified_parts(
    delivery: Delivery, head: Head, verification: Callable[[Verified], Json], include_usage: bool, timed: Timed
) -> AsyncIterator[bytes]:
    """Comments while drafts are written and judged, then the answer, and ``verification`` where it ends."""
    empty = {"usage": None} if include_usage else {}
    yield head.chunk([begun(chat_delta, 0)], **empty)
    async for event in delivery.events():
        if isinstance(event, (Drafting, Judged)):
            yield comment(event)
        elif isinstance(event, Verified):
            timed("first")
            text = None if event.text is None else event.text.strip()
            delta = chat_delta(0, text, None, None)
            if text is None:
                delta["delta"]["refusal"] = refusal_text(event)
            yield head.chunk([delta], **empty)
            end = chat_delta(0, None, None, reason_of(event))
            yield head.chunk([end], **empty, verification=verification(event))
            if include_usage:
                usage = usage_of(event, delivery.prompt_tokens)
                yield head.chunk([], usage=usage.describe())


def comment(event: Drafting | Judged) -> bytes:
    """An event as a comment of a stream: clients pass it over, and none takes the connection for dead."""
    if isinstance(event, Drafting):
        told: Json = {"draft": event.attempt, "text": event.text}
    else:
        told = {"draft": event.attempt, "score": event.score, "accepted": event.accepted}
    return b": " + json.dumps(told, ensure_ascii=False).encode() + b"\n\n"


def verdicts_of(verified: Verified, model: ServedModel, warnings: Sequence[str]) -> Json:
    """What the verifier says of answers that were given, in their order."""
    verdicts = [
        {"index": place, **_judged(verified, place), **_false(draft)} for place, draft in enumerate(verified.drafts)
    ]
    return {
        "object": "list",
        "model": model.name,
        "data": verdicts,
        "threshold": verified.threshold,
        "score_name": verified.score_name,
        **_who(model),
        "warnings": list(warnings),
    }
