"""Events of a request told as OpenAI's API tells them: one answer at the end, or a stream of its parts."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import anyio
from starlette.responses import StreamingResponse
from starlette.types import Message, Send

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.serving.answers import DONE, Head, Json, Usage, begun, server_sent
from mlx_rsgwm.serving.delivery import Delivery
from mlx_rsgwm.serving.events import Ended, Piece, TokenLogprob
from mlx_rsgwm.serving.guard import describe
from mlx_rsgwm.serving.schema import Asked

LONGEST_STALL = 30.0  # seconds for which a client may read nothing of a stream before it is cut off

log = logging.getLogger(__name__)
Timed = Callable[[str], None]


@dataclass
class _Choice:
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str | None = None


async def whole_of(delivery: Delivery, head: Head, asked: Asked, count: int, timed: Timed) -> Json:
    """The answer with all its choices."""
    choices = [_Choice() for _ in range(count)]
    usage = Usage(delivery.prompt_tokens)
    first = True
    async for event in delivery.events():
        if isinstance(event, Piece):
            if first:
                timed("first")
            first = False
            choices[event.index].text += event.text
            choices[event.index].logprobs += event.logprobs
        elif isinstance(event, Ended):
            choices[event.index].reason = event.reason
            usage.count(event, asked.n)
    timed("answer")
    listed = [
        head.shape.choice(index, choice.text, None if asked.logprobs is None else choice.logprobs, choice.reason)
        for index, choice in enumerate(choices)
    ]
    return head.answer(listed, usage)


async def parts_of(delivery: Delivery, head: Head, asked: Asked, count: int, timed: Timed) -> AsyncIterator[bytes]:
    """The answer's parts as events of a stream."""
    shape = head.shape
    usage = Usage(delivery.prompt_tokens)
    empty = {"usage": None} if asked.include_usage else {}
    first = True
    for index in range(count if shape.begins else 0):
        yield head.chunk([begun(shape.delta, index)], **empty)
    async for event in delivery.events():
        if isinstance(event, Piece):
            if first:
                timed("first")
            first = False
            logprobs = None if asked.logprobs is None else event.logprobs
            yield head.chunk([shape.delta(event.index, event.text, logprobs, None)], **empty)
        elif isinstance(event, Ended):
            usage.count(event, asked.n)
            yield head.chunk([shape.delta(event.index, None, None, event.reason)], **empty)
    if asked.include_usage:
        yield head.chunk([], usage=usage.describe())


def streamed(delivery: Delivery, parts: AsyncIterator[bytes], timed: Timed) -> StreamingResponse:
    """The response that sends ``parts`` as they come."""
    sent = _to_the_end(delivery, parts, timed)
    return _Stream(sent, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


class _Stream(StreamingResponse):
    """A stream that ends where its client does not read: what is to be sent would wait for it for ever."""

    async def stream_response(self, send: Send) -> None:
        """Send the parts; where the client stalls, no more of them."""

        async def send_in_time(message: Message) -> None:
            with anyio.fail_after(LONGEST_STALL):
                await send(message)

        try:
            await super().stream_response(send_in_time)
        except TimeoutError:
            log.warning("a client read nothing for %g seconds and was cut off", LONGEST_STALL)
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


async def _to_the_end(delivery: Delivery, parts: AsyncIterator[bytes], timed: Timed) -> AsyncIterator[bytes]:
    """``parts`` and the end of the stream; what goes wrong on the way is told in it."""
    try:
        async for part in parts:
            yield part
        timed("answer")
        yield DONE
    except Exception as error:  # the status is sent already
        if not isinstance(error, RsgwmError):
            log.exception("a stream failed")
        yield server_sent(describe(error))
    finally:
        delivery.cancel()
