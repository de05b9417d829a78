"""The engine: one thread that has all of MLX, and writes the rows of all requests side by side.

A graph that was built in one thread cannot be evaluated in another, so the base is loaded, warmed up and used in this
thread alone; others hand in requests and functions to call, and are told events. A tick takes what was handed in, lets
go of what is not wanted, takes rows in, reads a piece of a prompt or has drafts verified, and writes a token of every
row. What goes wrong with a request's rows fails that request and no other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

import mlx.core as mx

from mlx_rsgwm.inference.trial import Trial
from mlx_rsgwm.serving.admission import Limits, Waiting
from mlx_rsgwm.serving.errors import RequestCancelled, ServerBusy, ServerStopping
from mlx_rsgwm.serving.jobs import Job
from mlx_rsgwm.serving.library import Library
from mlx_rsgwm.serving.reading import Reading
from mlx_rsgwm.serving.row_sampling import Pick
from mlx_rsgwm.serving.rows import Row, RowDecoder

T = TypeVar("T")
PIECE_SECONDS = 0.2  # of a prompt's reading, so that rows under way never wait longer for their next token
WHOLE_SECONDS = 3.0  # the same where no row is under way: long pieces are read quicker
MOST_POSITIONS = 1 << 13  # of all texts of a piece, which bounds the memory that it takes
GATHER_SECONDS = 0.003  # that an idle engine waits for a next request, as those that come together are read together
MOST_GATHERED = 0.05  # seconds of that in a row
FEWEST_POSITIONS = 16
PREFIX_SHARE = 0.25  # of the caches' memory, for texts that nobody writes any more
MOST_RETRIES = 3  # of a request whose rows were read anew since a step with others failed
STANDSTILL = 30.0  # seconds without a tick after which an engine with work is not healthy

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What the engine did so far."""

    requests: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    written_tokens: int = 0
    verified_drafts: int = 0
    steps: int = 0


class Engine:
    """Requests in, events out. ``open_library`` is called in the engine's thread, once, and loads the base."""

    def __init__(self, open_library: Callable[[], Library], limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.counts = Counts()
        self._open = open_library
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._queued: set[Job] = set()  # handed in, no row has come in yet
        self._started: Future[Library] = Future()
        self._stop_at: float | None = None
        self._beat = time.monotonic()
        self._jobs: dict[Job, int] = {}  # under way, and how often their rows were read anew
        self._readings: deque[Reading] = deque()
        self._positions = 512.0  # read in a second, as measured so far
        self._drafts = 20.0  # verified in a second
        self._verified_last = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # What any thread may call.

    def start(self) -> Future[Library]:
        """Begin to load; the future is done once requests are answered, or says why they will not be."""
        self._thread.start()
        return self._started

    def submit(self, job: Job) -> None:
        """Hand a request in.

        Raises:
            ServerBusy: as many wait as may.
            ServerStopping: nothing new is taken.
        """
        with self._lock:
            if self._stop_at is not None:
                raise ServerStopping
            if len(self._queued) >= self.limits.queue + max(0, self.limits.rows - max(self._under_way())):
                raise ServerBusy(len(self._queued))
            self._queued.add(job)
        self._commands.put(lambda: self._take(job))

    def cancel(self, job: Job) -> None:
        """A request is not wanted any more; its rows are let go before the next token."""
        job.cancelled = True
        self._commands.put(lambda: None)

    def call(self, function: Callable[[Library], T]) -> Future[T]:
        """Have a function called in the engine's thread, between two tokens."""
        future: Future[T] = Future()

        def command() -> None:
            try:
                future.set_result(function(self._library))
            except Exception as error:
                future.set_exception(error)

        if self._stop_at is not None:
            raise ServerStopping
        self._commands.put(command)
        return future

    def stop(self, drain: float = 0.0) -> None:
        """Take nothing new, go on for at most ``drain`` seconds with what is under way, and end the thread."""
        with self._lock:
            self._stop_at = time.monotonic() + drain
        self._commands.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(drain + STANDSTILL)

    @property
    def library(self) -> Library:
        """What is served, once the engine is ready."""
        return self._library

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self._started.done() and self._started.exception() is None and self._stop_at is None

    @property
    def healthy(self) -> bool:
        """False where the thread ended by itself, or stands still with work to do."""
        if self._started.done() and not self._thread.is_alive() and self._stop_at is None:
            return False
        with self._lock:
            work = bool(self._queued or self._jobs)
        return not work or not self._started.done() or time.monotonic() - self._beat < STANDSTILL

    def load(self) -> dict[str, int]:
        """How many requests wait, how many others are under way, and their rows."""
        with self._lock:
            running, rows = self._under_way()
            return {"waiting": len(self._queued), "running": running, "rows": rows}

    def _under_way(self) -> tuple[int, int]:
        """Requests that do not wait, and rows; the lock is held."""
        return len(set(self._jobs) - self._queued), len(self._decoder.rows) if self.ready else 0

    # The engine's thread.

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            mx.clear_streams()  # a process that ends while its threads still have some is aborted now and then

    def _serve(self) -> None:
        try:
            self._library = self._open()
            memory = self.limits.memory()
            prefixes = int(memory * PREFIX_SHARE)
            self._decoder = RowDecoder(self._library.slots, prefixes)
            self._waiting = Waiting(self.limits, self._decoder.bytes_a_token, memory - prefixes)
        except BaseException as error:  # it is told where the engine was started
            self._started.set_exception(error)
            return
        self._started.set_result(self._library)
        while self._stop_at is None or (self._busy and time.monotonic() < self._stop_at):
            self._take_commands()
            self._beat = time.monotonic()
            try:
                self._tick()
            except Exception as error:
                log.exception("the engine's tick failed")
                self._fail_all(error)
        self._take_commands()
        self._fail_all(ServerStopping())

    @property
    def _busy(self) -> bool:
        return bool(self._jobs or not self._commands.empty())

    def _take_commands(self) -> None:
        idle = not self._jobs and self._stop_at is None
        wait, seconds = idle, None
        until = float("inf")
        while True:
            try:
                command = self._commands.get(wait, seconds)
            except Empty:
                return
            command()
            until = min(until, time.monotonic() + MOST_GATHERED)
            wait, seconds = idle and time.monotonic() < until, GATHER_SECONDS

    def _tick(self) -> None:
        for job in [job for job in self._jobs if job.cancelled]:
            self.counts.cancelled += 1
            job.fail(RequestCancelled())
            self._end(job)
        self._admit()
        verdicts = self._verdicts()
        if self._readings and (self._verified_last or not verdicts):
            self._verified_last = False
            self._read_piece()
        elif verdicts:
            self._verified_last = True
            self._verify(verdicts)
        self._write()

    def _take(self, job: Job) -> None:
        """A request was handed in."""
        self.counts.requests += 1
        if job.cancelled:
            self.counts.cancelled += 1
            self._leave_queue(job)
            job.fail(RequestCancelled())
            return
        try:
            self._library.begin(job.model)
        except Exception as error:
            self._leave_queue(job)
            job.fail(error)
            return
        self._jobs[job] = 0
        self._ask(job, lambda: job.begin(self._library))

    def _ask(self, job: Job, rows: Callable[[], Sequence[Row]]) -> None:
        """Let rows that a request wants wait; what goes wrong fails it."""
        try:
            wanted = list(rows())
        except Exception as error:
            self._fail(job, error)
            return
        if job.over:
            self._end(job)
            return
        if job.verdicts:
            self._leave_queue(job)
        if wanted:
            with self._lock:
                came_in = job not in self._queued
            self._waiting.add(job, wanted, first=came_in)

    def _admit(self) -> None:
        under_way = [*self._decoder.rows, *(row for reading in self._readings for row in reading.rows)]
        entering = self._waiting.next(under_way)
        for job, _ in entering:
            self._leave_queue(job)
        rows = [row for _, rows in entering for row in rows]
        if rows:
            self._readings += self._decoder.read(rows)

    def _read_piece(self) -> None:
        reading = self._readings.popleft()
        if all(row.owner.over for row in reading.rows):
            return
        texts, length = reading.size
        seconds = PIECE_SECONDS if self._decoder.rows else WHOLE_SECONDS
        most = min(self._positions * seconds, MOST_POSITIONS)
        count = min(length, max(FEWEST_POSITIONS, int(most / texts)))
        started = time.monotonic()
        try:
            over = reading.read_on(count)
        except Exception as error:
            self._read_alone(reading.rows, error)
            return
        speed = texts * count / max(time.monotonic() - started, 1e-6)
        self._positions = 0.7 * self._positions + 0.3 * speed
        self.counts.prompt_tokens += texts * count
        if over:
            self._decoder.drop([row for row in reading.rows if row.owner.over])
        else:
            self._readings.appendleft(reading)

    def _verdicts(self) -> list[tuple[Job, tuple[str, Trial]]]:
        """Drafts that one pass of a verifier can read: of the model that waits longest, scored alike."""
        waiting = [job for job in self._jobs if job.verdicts]
        alike = [job for job in waiting if job.scored_as(waiting[0])]
        verdicts = [(job, verdict) for job in alike for verdict in job.verdicts]
        return verdicts[: max(1, int(self._drafts * PIECE_SECONDS))]

    def _verify(self, verdicts: Sequence[tuple[Job, tuple[str, Trial]]]) -> None:
        started = time.monotonic()
        jobs = list(dict.fromkeys(job for job, _ in verdicts))
        try:
            self._score(jobs[0], [verdict for _, verdict in verdicts])
            failed: dict[Job, Exception] = {}
        except Exception as error:
            failed = {jobs[0]: error} if len(jobs) == 1 else self._score_alone(jobs, verdicts)
        speed = len(verdicts) / max(time.monotonic() - started, 1e-6)
        self._drafts = 0.7 * self._drafts + 0.3 * speed
        self.counts.verified_drafts += len(verdicts)
        for job in jobs:
            if job in failed:
                self._fail(job, failed[job])
            else:
                self._ask(job, job.judged)
                if job in self._jobs:
                    self._jobs[job] = self._jobs.pop(job)  # others' turn comes first

    def _score(self, job: Job, trials: Sequence[tuple[str, Trial]]) -> None:
        """Have the verifier of a job score the last drafts of trials, its own or others that are scored alike."""
        pipeline = job.pipeline
        assert pipeline is not None
        needs = pipeline.scorer(pipeline.config.score).needs
        pipeline.score_last(trials, partial(pipeline.reader.signals, needs=needs))

    def _score_alone(
        self, jobs: Sequence[Job], verdicts: Sequence[tuple[Job, tuple[str, Trial]]]
    ) -> dict[Job, Exception]:
        """After a failed pass: the drafts of each request by themselves; why those fail that do."""
        failed: dict[Job, Exception] = {}
        for job in jobs:
            try:
                self._score(job, [verdict for owner, verdict in verdicts if owner is job and verdict[1].waiting])
            except Exception as error:
                failed[job] = error
        return failed

    def _write(self) -> None:
        """A token more for every row that is wanted."""
        self._decoder.drop([row for row in self._decoder.rows if row.owner.over])
        drawn = self._decoder.draw()
        gone = [row for row, token in drawn if not self._hand_over(row, token)]
        self._decoder.drop([row for row in self._decoder.rows if row in gone or row.owner.over])
        rows = self._decoder.rows
        self.counts.steps += bool(drawn)
        try:
            self._decoder.read_last()
        except Exception as error:
            self._decoder.forget()
            self._read_alone(rows, error)

    def _hand_over(self, row: Row, token: Pick | Exception) -> bool:
        """Tell a row's job of its token; whether the row goes on."""
        job: Job = row.owner
        if job.over:
            return False
        if isinstance(token, Exception):
            self._fail(job, token)
            return False
        finished = token.token in row.end_ids
        try:
            if not finished:
                row.tokens.append(token.token)
                self.counts.written_tokens += 1
                if job.wrote(row, token) and len(row.tokens) < len(row.uniforms):
                    return True
        except Exception as error:
            self._fail(job, error)
            return False
        self._ask(job, lambda: job.ended(row, finished))
        return False

    def _read_alone(self, rows: Sequence[Row], error: Exception) -> None:
        """After a failed step: read the rows anew, those of each request by themselves, to see whose they were."""
        jobs: dict[Job, list[Row]] = {}
        for row in rows:
            if not row.owner.over:
                jobs.setdefault(row.owner, []).append(row)
        for job, wanted in jobs.items():
            self._jobs[job] += 1
            if len(jobs) == 1 or self._jobs[job] > MOST_RETRIES:
                self._fail(job, error)
            else:
                self._readings += self._decoder.read(wanted)

    def _fail(self, job: Job, error: Exception) -> None:
        self.counts.failed += 1
        job.fail(error)
        self._end(job)

    def _fail_all(self, error: Exception) -> None:
        self._readings.clear()
        self._decoder.forget()
        for job in list(self._jobs):
            self._fail(job, error)

    def _end(self, job: Job) -> None:
        """Let go of all that a request has; its rows go with the next token."""
        job.over = True
        self._leave_queue(job)
        if self._jobs.pop(job, None) is not None:
            self._waiting.leave(job)
            self._library.end(job.model)

    def _leave_queue(self, job: Job) -> None:
        with self._lock:
            self._queued.discard(job)
