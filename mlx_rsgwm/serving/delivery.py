"""From the engine's thread to a client's connection: events of a request's jobs, one after another, in asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mlx_rsgwm.serving.engine import Engine
from mlx_rsgwm.serving.errors import RequestError
from mlx_rsgwm.serving.events import Begun, Drafting, Ended, Event, Failed, Finished, Judged, Piece, Verified
from mlx_rsgwm.serving.jobs import Job

MOST_PENDING = 4096  # events that a client may be behind before it is cut off

Maker = Callable[[Callable[[Event], None]], Job]


class Delivery:
    """The events of some jobs, whose choices are numbered on: those of job k begin with ``width`` · k.

    Made and used in one event loop. Whoever made it calls :meth:`cancel` in the end, whatever happened.
    """

    def __init__(self, engine: Engine, makers: Sequence[Maker], width: int, seconds: float) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(seconds, self._too_late)
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._early: list[Event] = []
        self._jobs: list[Job] = []
        self._left = len(makers)
        self.prompt_tokens = 0
        with self.cancelled_on_failure():
            for place, make in enumerate(makers):
                job = make(partial(self._tell, place * width))
                self._jobs.append(job)
                engine.submit(job)

    def _tell(self, first: int, event: Event) -> None:
        """In the engine's thread."""
        if isinstance(event, (Piece, Ended, Drafting, Judged, Verified)):
            event = replace(event, index=event.index + first)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        if self._queue.qsize() >= MOST_PENDING:
            self.cancel()
            event = Failed(RequestError("the client reads too slowly", 503, "slow_client"))
        self._queue.put_nowait(event)

    async def begin(self) -> None:
        """Wait until all jobs are taken in, so that what is wrong with one is told before an answer begins.

        Raises:
            Exception: why a job is not answered.
        """
        begun = 0
        while begun < len(self._jobs):
            event = await self._next()
            if isinstance(event, Begun):
                begun += 1
                self.prompt_tokens += event.prompt_tokens
            else:
                self._early.append(event)

    async def events(self) -> AsyncIterator[Event]:
        """Everything after :meth:`begin`, until all jobs are finished.

        Raises:
            Exception: why a job is not answered to its end.
        """
        while self._left:
            event = self._early.pop(0) if self._early else await self._next()
            if isinstance(event, Finished):
                self._left -= 1
            else:
                yield event
        self._timer.cancel()

    def _too_late(self) -> None:
        # Not by asyncio.wait_for: until Python 3.12 it loses a cancellation that comes along with an event.
        self._queue.put_nowait(Failed(RequestError("the answer took longer than the server allows", 504, "timeout")))

    async def _next(self) -> Event:
        event = await self._queue.get()
        if isinstance(event, Failed):
            raise event.error
        return event

    @contextlib.contextmanager
    def cancelled_on_failure(self) -> Iterator[None]:
        """Nothing more is wanted where the block fails, or is cancelled itself."""
        try:
            yield
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Nothing more is wanted; jobs that are over do not mind."""
        self._timer.cancel()
        for job in self._jobs:
            if not job.over:
                self._engine.cancel(job)


async def unless_gone(receive: Callable[[], Any], work: asyncio.Task[Any]) -> Any:
    """What ``work`` returns; it is cancelled once the client, whose body was read, is gone.

    Raises:
        asyncio.CancelledError: the client is gone.
    """
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
        return await work
    finally:
        gone.cancel()


async def _gone(receive: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
