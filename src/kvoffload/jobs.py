"""Work that must not be torn by the cancellation of whoever asked for it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Generic, TypeVar

import anyio

from .errors import ClosedError

WAKES_PER_TURN = 8
"""Callers that go on in one turn of the event loop. What each does next takes a tenth of a
millisecond or more, and timers wait for all of them: where many calls end at once, the others go on
in the turns after."""

T = TypeVar("T")

log = logging.getLogger("kvoffload")


class Job(Generic[T]):
    """One piece of work in the manager's task group; callers wait for it."""

    __slots__ = ("_error", "_is_told", "_result", "_waiters", "abandoned")

    def __init__(self) -> None:
        self._is_told = False
        self._waiters: list[asyncio.Future[None]] = []
        self._result: T | None = None
        self._error: BaseException | None = None
        self.abandoned = False
        """Whether the one caller that waited was cancelled: nobody vouches for its buffers."""

    async def run(self, work: Callable[[Job[T]], Awaitable[T]]) -> None:
        """Do the work; the outcome is kept for whoever waits."""
        try:
            self._result = await work(self)
        except Exception as exc:  # noqa: BLE001  # whoever waits gets it
            self._error = exc
            if self.abandoned:
                log.warning("a job that nobody waits for any more failed: %r", exc)
        except BaseException as exc:
            self._error = exc
            raise

    def tell(self) -> None:
        """Let who waits go on."""
        self._is_told = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def result(self) -> T:
        """Wait for the outcome. Cancelled, the work goes on, abandoned."""
        if not self._is_told:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except BaseException:
                self.abandoned = True
                raise
        # Kept here no longer: the error's traceback holds this frame, with all that it names.
        error, self._error = self._error, None
        if error is not None:
            try:
                if isinstance(error, Exception):
                    raise error
                raise ClosedError("the manager was closed before this was done") from error
            finally:
                del error, self
        return self._result  # type: ignore[return-value]  # set when there is no error


class Jobs:
    """Runs jobs in the manager's task group and knows how many are under way."""

    def __init__(self, start: Callable[[Callable[[], Coroutine[Any, Any, None]]], object]) -> None:
        self._start = start
        self._running = 0
        self._idle = anyio.Event()
        self._idle.set()
        self._over: deque[Job[Any]] = deque()  # and not told yet
        self._told = 0  # in this turn of the loop

    @property
    def running(self) -> int:
        """Jobs under way."""
        return self._running

    def start(self, work: Callable[[Job[T]], Awaitable[T]]) -> Job[T]:
        """Start a job."""
        job: Job[T] = Job()
        if not self._running:
            self._idle = anyio.Event()
        self._running += 1
        self._start(partial(self._run, job, work))
        return job

    async def drain(self) -> None:
        """Wait until no job is under way."""
        while self._running:
            await self._idle.wait()

    async def _run(self, job: Job[T], work: Callable[[Job[T]], Awaitable[T]]) -> None:
        try:
            await job.run(work)
        finally:
            self._tell(job)
            self._running -= 1
            if not self._running:
                self._idle.set()

    def _tell(self, job: Job[Any]) -> None:
        """Let who waits for a job go on, unless enough do in this turn of the loop."""
        if self._told < WAKES_PER_TURN:
            if not self._told:
                asyncio.get_running_loop().call_soon(self._next_turn)
            self._told += 1
            job.tell()
        else:
            self._over.append(job)

    def _next_turn(self) -> None:
        over, self._told = self._over, 0
        while over and self._told < WAKES_PER_TURN:
            self._tell(over.popleft())
