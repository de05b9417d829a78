"""Events reach who waits for them; a client that leaves is noticed whatever else happens at that moment."""

import asyncio

import pytest

from mlx_rsgwm.serving.delivery import Delivery, unless_gone
from mlx_rsgwm.serving.errors import RequestError
from mlx_rsgwm.serving.events import Begun, Finished, Piece
from tests.serving.conftest import SECONDS


class Jobs:
    """In the place of an engine and its jobs: keeps what is handed in and how events are told."""

    def __init__(self):
        self.tells, self.cancelled, self.over = [], 0, False

    def make(self, tell):
        self.tells.append(tell)
        return self

    def submit(self, job):
        pass

    def cancel(self, job):
        self.cancelled += 1


async def texts_of(delivery):
    await delivery.begin()
    return [event.text async for event in delivery.events()]


def test_events_of_several_jobs_are_told_until_the_last_is_finished():
    async def run():
        jobs = Jobs()
        delivery = Delivery(jobs, [jobs.make, jobs.make], 1, SECONDS)
        for number, tell in enumerate(jobs.tells):
            for event in (Begun(3), Piece(0, f"text {number}", ()), Finished()):
                tell(event)
        texts = await asyncio.wait_for(texts_of(delivery), SECONDS)
        return texts, delivery.prompt_tokens

    assert asyncio.run(run()) == (["text 0", "text 1"], 6)


def test_a_client_that_leaves_as_an_event_comes_is_noticed():
    async def run():
        jobs = Jobs()
        delivery = Delivery(jobs, [jobs.make], 1, SECONDS)

        async def leaves():
            await asyncio.sleep(0.05)
            delivery._put(Begun(3))
            return {"type": "http.disconnect"}

        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(unless_gone(leaves, asyncio.ensure_future(texts_of(delivery))), SECONDS)

    asyncio.run(run())


def test_an_answer_that_takes_too_long_is_told():
    async def run():
        jobs = Jobs()
        await texts_of(Delivery(jobs, [jobs.make], 1, 0.05))

    with pytest.raises(RequestError, match="longer than the server allows"):
        asyncio.run(run())
