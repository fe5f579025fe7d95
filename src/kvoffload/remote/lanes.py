"""Threads for calls that nobody can stop: who gives one up goes on, and leaves the thread to it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np

from ..errors import ClosedError, TierUnavailableError
from ..types import ByteArray

PIECE_BYTES = 1024 * 1024
"""Bytes that are copied at a stretch; who gives a call up waits for no more than that."""
STUCK_S = 1.0
"""Seconds after which a call that nobody waits for any more counts as stuck."""

R = TypeVar("R")
T = TypeVar("T")


class GivenUpError(Exception):
    """Nobody waits for the call any more; its buffers are others' now."""


class Call:
    """One call, and its caller's buffers: they are looked at inside `with call`, nowhere else."""

    def __init__(
        self, run: Callable[[], Any], buffers: Sequence[memoryview], done: asyncio.Future[Any]
    ) -> None:
        self.run = run
        self.done = done
        self.began = done.get_loop().time()
        self.is_wanted = True
        self._buffers = buffers
        self._lock = threading.Lock()

    def give_up(self) -> None:
        """Keep the thread from the buffers, from now on."""
        with self._lock:
            self.is_wanted = False
            self._buffers = ()

    def bytes_of(self, number: int) -> ByteArray:
        """Return a buffer, for use inside `with call`."""
        return np.frombuffer(self._buffers[number], np.uint8)

    def __enter__(self) -> None:
        self._lock.acquire()
        if not self.is_wanted:
            self._lock.release()
            raise GivenUpError

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()


class Lane(Generic[R]):
    """One thread, which does one call at a time.

    A daemon, for one that is stuck may not keep the interpreter from ending.

    Attributes:
        room: What its calls have for themselves, for as long as they last.
        call: What it does, until that is over; whether somebody waits for it or not.
    """

    def __init__(self, room: R, name: str, give_back: Callable[[R], None]) -> None:
        self.room = room
        self.call: Call | None = None
        self._name = name
        self._give_back = give_back
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def give(self, work: Callable[[], None]) -> None:
        """Have something done."""
        if self._thread is None:
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        self._calls.put(work)

    def retire(self) -> None:
        """End the thread and give the room back, once it is done."""
        if self._thread is None:
            self._give_back(self.room)
        else:
            self._calls.put(None)

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until the thread ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _work(self) -> None:
        while (work := self._calls.get()) is not None:
            work()
            del work  # or what it holds would live until the next one comes
        self._give_back(self.room)


class Lanes(Generic[R]):
    """A bounded number of threads, for one event loop.

    Args:
        rooms: What each thread has for itself.
        name: Name of the threads, and of what they wait for.
        tier: Name of the tier, for errors.
        give_back: Takes each room when its thread ended.
    """

    def __init__(
        self,
        rooms: Sequence[R],
        name: str,
        tier: str,
        give_back: Callable[[R], None] = lambda _: None,
    ) -> None:
        self._name = name
        self._tier = tier
        self._loop = asyncio.get_running_loop()
        self._lanes = [Lane(room, f"kvoffload-{name}", give_back) for room in rooms]
        self._idle = list(self._lanes)
        self._waiting: deque[asyncio.Future[Lane[R]]] = deque()
        self._is_retired = False

    async def run(self, work: Callable[[Call, R], T], buffers: Sequence[memoryview] = ()) -> T:
        """Do something on a thread, given the call and the thread's room.

        Cancelled, it returns at once: the buffers are not looked at any more, and the thread is
        taken again once the work is over.

        Raises:
            TierUnavailableError: All threads are stuck.
            ClosedError: They are retired.
        """
        lane = await self._take()
        done: asyncio.Future[T] = self._loop.create_future()
        call = Call(lambda: work(call, lane.room), buffers, done)
        lane.call = call
        try:
            lane.give(lambda: self._do(lane, call))
        except BaseException:  # the system starts no more threads
            self._free(lane)
            raise
        try:
            return await done
        except BaseException:
            call.give_up()
            raise

    def retire(self) -> None:
        """Take no more calls, and let those under way fail."""
        self._is_retired = True
        for lane in self._lanes:
            if lane.call is not None:
                lane.call.give_up()
                _fail(lane.call.done, self._closed())
            lane.retire()
        for waiting in self._waiting:
            _fail(waiting, self._closed())
        self._waiting.clear()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until retired threads ended; on another thread."""
        for lane in self._lanes:
            lane.join(timeout_s)

    # Inside

    async def _take(self) -> Lane[R]:
        if self._is_retired:
            raise self._closed()
        if self._idle:
            return self._idle.pop()
        stuck = [self._stuck_s(lane.call) for lane in self._lanes]
        if min(stuck) > STUCK_S:
            raise TierUnavailableError(
                f"all {len(stuck)} threads wait for {self._name}, for up to {max(stuck):.1f} s",
                tier=self._tier,
            )
        waiting: asyncio.Future[Lane[R]] = self._loop.create_future()
        self._waiting.append(waiting)
        try:
            lane = await waiting
        except BaseException:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            elif waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self._free(waiting.result())
            raise
        if self._is_retired:  # since it was given the thread, which ends
            raise self._closed()
        return lane

    def _stuck_s(self, call: Call | None) -> float:
        """Return for how long a call goes on that is given up."""
        return 0.0 if call is None or call.is_wanted else self._loop.time() - call.began

    def _free(self, lane: Lane[R]) -> None:
        lane.call = None
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(lane)
                return
        self._idle.append(lane)

    def _do(self, lane: Lane[R], call: Call) -> None:
        """Do a call, on its thread."""
        result, error = None, None
        try:
            if call.is_wanted:
                result = call.run()
        except BaseException as exc:  # noqa: BLE001  # it belongs to who waits
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._tell, lane, call, result, error)

    def _tell(self, lane: Lane[R], call: Call, result: object, error: BaseException | None) -> None:
        self._free(lane)
        if error is not None:
            _fail(call.done, error)
        elif not call.done.done():
            call.done.set_result(result)

    def _closed(self) -> ClosedError:
        return ClosedError(f"remote tier {self._tier!r} was closed")


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            future.set_exception(error)
