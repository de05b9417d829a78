"""The endpoints of pairs: a chat that is drafted and verified, and verdicts on answers that others wrote."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_rsgwm.serving.answers import CHAT, Head
from mlx_rsgwm.serving.conversation import Conversation
from mlx_rsgwm.serving.delivery import Delivery, unless_gone
from mlx_rsgwm.serving.errors import RequestError
from mlx_rsgwm.serving.events import Verified
from mlx_rsgwm.serving.guard import read_body
from mlx_rsgwm.serving.library import ServedModel
from mlx_rsgwm.serving.schema import Asked, verification_request
from mlx_rsgwm.serving.telling import streamed
from mlx_rsgwm.serving.verification import (
    all_of,
    choice_of,
    headers_of,
    usage_of,
    verdicts_of,
    verification_of,
    verified_parts,
)
from mlx_rsgwm.serving.verified import Verification, VerifiedAnswer, Verifying

if TYPE_CHECKING:
    from mlx_rsgwm.serving.endpoints import Server

OF_THE_LOOP = ("attempts", "threshold", "score", "mode", "abstain")  # settings of ``verify`` that the loop has, too
OF_SAMPLING = ("temperature", "top_p")
CALIBRATED = ("temperature", "top_p", "max_tokens", "attempts")  # of which a calibration says what it was made for
HISTORY = (
    "the pair was trained on single questions; the last question and its answer were read before this one, nothing "
    "earlier, and what the scores mean may not hold"
)


def require_pair(model: ServedModel, asked: Asked) -> None:
    """Refuse what a verified model has no use for.

    Raises:
        RequestError: a parameter of texts that are written freely.
    """
    written = {
        "response_format": asked.schema is not None,
        "stop": bool(asked.stop),
        "logprobs": asked.logprobs is not None,
        "lora": asked.lora is not None,
    }
    named = [name for name in asked.given if name not in OF_SAMPLING] + [name for name, used in written.items() if used]
    if named:
        message = f"{named[0]} is not supported by {model.name!r}, whose answers are verified"
        raise RequestError(message, code="unsupported_parameter", param=named[0])


def question_of(conversation: Conversation, history: str) -> tuple[str, list[str]]:
    """The question as a pair is asked it, and what the client should know of that.

    Raises:
        RequestError: a system message, or earlier turns where ``history`` is ``refuse``.
    """
    if conversation.system:
        raise RequestError(
            "a verified model is asked in the words it was trained with and takes no system message",
            code="unsupported_message",
            param="messages",
        )
    if not conversation.before:
        return conversation.question, []
    if history == "refuse":
        raise RequestError(
            "a verified model answers single questions here; send the question alone",
            code="unsupported_message",
            param="messages",
        )
    asked, answer = conversation.before[-1]
    return f"{asked}\n{answer}\n\n{conversation.question}", [HISTORY]


def changes_of(asked: Asked, verify: Mapping[str, Any]) -> dict[str, Any]:
    """What a request changes of a pair's settings."""
    changes = {name: verify[name] for name in OF_THE_LOOP if name in verify}
    changes |= {name: asked.given[name] for name in OF_SAMPLING if name in asked.given}
    return changes | ({} if asked.max_tokens is None else {"max_tokens": asked.max_tokens})


def doubts_of(model: ServedModel, changes: Mapping[str, Any] | None) -> list[str]:
    """What is odd about the pair, and what its calibration was not made for, of the request's settings, too, unless
    others wrote the answers (``changes`` None)."""
    pipeline = model.pipeline
    doubts = list(model.warnings)
    if pipeline is not None and pipeline.calibration is not None:
        usual = {**vars(pipeline.config.sampling), "attempts": pipeline.config.attempts}
        asked = {} if changes is None else {name: changes.get(name, usual[name]) for name in CALIBRATED}
        recorded = pipeline.calibration.recorded
        differing = [name for name in model.differing if name not in CALIBRATED]
        differing += [
            f"{name} ({recorded[name]}, now {asked[name]})" for name in pipeline.calibration.differences(asked)
        ]
        if differing:
            doubts.append(
                f"the verifier was calibrated with another {', '.join(differing)}; what its scores mean may not hold"
            )
    return doubts


async def answer_verified(server: Server, request: Request, asked: Asked, model: ServedModel) -> Response:
    """A chat with a verified model."""
    require_pair(model, asked)
    assert asked.conversation is not None
    question, warnings = question_of(asked.conversation, server.settings.history)
    verify = asked.verify or {}
    changes = changes_of(asked, verify)
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    rounds = [Verifying(seed + index, changes, verify.get("target_far")) for index in range(server.choices(asked))]
    verification = partial(
        verification_of,
        model=model,
        shown=verify.get("drafts", "none"),
        warnings=[*doubts_of(model, changes), *warnings],
    )
    head = Head(CHAT, asked.model, server.fingerprint)
    timed = server.timed(time.monotonic())
    makers = [partial(VerifiedAnswer, model, question, verifying) for verifying in rounds]
    delivery = Delivery(server.engine, makers, 1, server.settings.timeout)
    with delivery.cancelled_on_failure():
        await unless_gone(request.receive, asyncio.ensure_future(delivery.begin()))
        if asked.stream:
            return streamed(delivery, verified_parts(delivery, head, verification, asked, timed), timed)
        answers: list[Verified] = await unless_gone(request.receive, asyncio.ensure_future(all_of(delivery)))
    timed("answer")
    told = verification(answers)
    usage = usage_of(answers, delivery.prompt_tokens // asked.n)
    choices = [choice_of(verified) for verified in answers]
    return JSONResponse(head.answer(choices, usage, verification=told), headers=headers_of(told))


async def verify_answers(server: Server, request: Request) -> Response:
    """``POST /v1/verifications``."""
    name, question, answers, changes, target = verification_request(await read_body(request.receive))
    model = server.library.find(name)
    if model.pipeline is None:
        raise RequestError(f"{name!r} has no verifier", code="not_a_verified_model", param="model")
    verifying = Verifying(0, changes, target, "")
    maker = partial(Verification, model, question, answers, verifying)
    delivery = Delivery(server.engine, [maker], 1, server.settings.timeout)
    with delivery.cancelled_on_failure():
        await unless_gone(request.receive, asyncio.ensure_future(delivery.begin()))
        (verified,) = await unless_gone(request.receive, asyncio.ensure_future(all_of(delivery)))
    return JSONResponse(verdicts_of(verified, model, doubts_of(model, None)))
