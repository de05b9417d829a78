"""What is told of a verified answer: how far it can be trusted, and what was rejected on the way."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from mlx_rsgwm.inference.draft import SAMPLED, Draft
from mlx_rsgwm.serving.answers import Head, Json, Usage, begun, chat_choice, chat_delta
from mlx_rsgwm.serving.delivery import Delivery
from mlx_rsgwm.serving.events import Drafting, Judged, Verified
from mlx_rsgwm.serving.library import ServedModel
from mlx_rsgwm.serving.schema import Asked
from mlx_rsgwm.serving.telling import Timed

SHOWN = ("none", "summary", "full")  # what is told of the drafts


def verification_of(answers: Sequence[Verified], model: ServedModel, shown: str, warnings: Sequence[str]) -> Json:
    """The object ``verification`` of an answer with these choices."""
    choices = [_choice(verified, shown) for verified in answers]
    who = _who(model, answers[0].drafter)  # of all choices, for they answer one question
    return {"choices": choices, "score_name": answers[0].score_name, **who, "warnings": list(warnings)}


def _choice(verified: Verified, shown: str) -> Json:
    draft = verified.drafts[verified.chosen]
    choice = {
        "index": verified.index,
        **_judged(verified, verified.chosen),
        "threshold": verified.threshold,
        "attempts": len(verified.drafts),
        **_odd(draft),
    }
    if shown != "none":
        choice["drafts"] = [
            {
                "attempt": draft.attempt,
                **_judged(verified, place),
                **_odd(draft),
                **({"text": draft.text.strip(), "finished": draft.finished} if shown == "full" else {}),
            }
            for place, draft in enumerate(verified.drafts)
        ]
    return choice


def _judged(verified: Verified, place: int) -> Json:
    draft = verified.drafts[place]
    return {"score": draft.score, "probability": verified.probabilities[place], "accepted": bool(draft.accepted)}


def _odd(draft: Draft) -> Json:
    """The false equation that a draft states, which the verifier was not shown for it; its kind, if not sampled."""
    false = {} if draft.false_equation is None else {"false_equation": draft.false_equation}
    return false if draft.kind == SAMPLED else {**false, "kind": draft.kind}


def _who(model: ServedModel, drafter: str | None = None) -> Json:
    """What drafts, where that is not known any that may, and what verifies."""
    details = model.details
    routed = {each["sha256"]: each for each in details.get("router", {}).get("drafters", ())}
    return {
        "drafter": routed.get(drafter, details["drafter"]),
        "verifier": details["verifier"],
        "calibrated": details["calibrated"],
    }


def headers_of(verification: Mapping[str, Any]) -> dict[str, str]:
    """The same in headers, for clients that show nothing else; of several choices with commas between them."""
    choices = verification["choices"]
    scores = ["null" if choice["score"] is None else f"{choice['score']:.6f}" for choice in choices]
    return {
        "x-rsgwm-score": ", ".join(scores),
        "x-rsgwm-accepted": ", ".join(str(choice["accepted"]).lower() for choice in choices),
        "x-rsgwm-attempts": ", ".join(str(choice["attempts"]) for choice in choices),
    }


def usage_of(answers: Sequence[Verified], prompt: int) -> Usage:
    """Tokens of all drafts of all choices; those that are not an answer were rejected."""
    written = sum(verified.tokens for verified in answers)
    chosen = [verified.drafts[verified.chosen] for verified in answers if verified.text is not None]
    rejected = written - sum(len(draft.tokens) for draft in chosen)
    return Usage(prompt, written, answers[0].cached, rejected)


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
    choice = chat_choice(verified.index, text, None, reason_of(verified))
    choice["message"]["refusal"] = refusal_text(verified) if text is None else None
    return choice


async def all_of(delivery: Delivery) -> list[Verified]:
    """What became of every choice of a delivery, in their order."""
    answers = [event async for event in delivery.events() if isinstance(event, Verified)]
    return _in_order(answers)


def _in_order(answers: Sequence[Verified]) -> list[Verified]:
    return sorted(answers, key=lambda verified: verified.index)


async def verified_parts(
    delivery: Delivery, head: Head, verification: Callable[[Sequence[Verified]], Json], asked: Asked, timed: Timed
) -> AsyncIterator[bytes]:
    """Comments while drafts are written and judged, then each choice, and where it ends ``verification`` of all that
    have ended."""
    empty = {"usage": None} if asked.include_usage else {}
    answers: list[Verified] = []
    for index in range(asked.n):
        yield head.chunk([begun(chat_delta, index)], **empty)
    async for event in delivery.events():
        if isinstance(event, (Drafting, Judged)):
            yield comment(event)
        elif isinstance(event, Verified):
            if not answers:
                timed("first")
            answers = _in_order([*answers, event])
            text = None if event.text is None else event.text.strip()
            delta = chat_delta(event.index, text, None, None)
            if text is None:
                delta["delta"]["refusal"] = refusal_text(event)
            yield head.chunk([delta], **empty)
            end = chat_delta(event.index, None, None, reason_of(event))
            yield head.chunk([end], **empty, verification=verification(answers))
    if asked.include_usage:
        usage = usage_of(answers, delivery.prompt_tokens // asked.n)
        yield head.chunk([], usage=usage.describe())


def comment(event: Drafting | Judged) -> bytes:
    """An event as a comment of a stream: clients pass it over, and none takes the connection for dead."""
    told: Json = {"choice": event.index, "draft": event.attempt}
    if isinstance(event, Drafting):
        told |= {"text": event.text}
    else:
        told |= {"score": event.score, "accepted": event.accepted}
    return b": " + json.dumps(told, ensure_ascii=False).encode() + b"\n\n"


def verdicts_of(verified: Verified, model: ServedModel, warnings: Sequence[str]) -> Json:
    """What the verifier says of answers that were given, in their order."""
    verdicts = [
        {"index": place, **_judged(verified, place), **_odd(draft)} for place, draft in enumerate(verified.drafts)
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
