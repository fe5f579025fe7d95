"""Threads of disk tiers in step with the event loop, and time that passes when nothing else can.

Real threads make real file calls, but the loop goes on only when each of them has nothing to do or
is stuck. So what a test does at a turn of the loop is the same each time it runs, however busy the
machine. Time stands still meanwhile. A loop with nothing left to do jumps to its next deadline, as
if the disk had not answered for so long.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TypeVar, TypeVarTuple

import pytest

from kvoffload.storage.calls import Call, Helper
from kvoffload.storage.threads import Threads
from kvoffload.testing import FileHang

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

POLL_S = 0.00002
PATIENCE_S = 60.0


class Lockstep:
    """Knows of each thread of the tiers that are made while it is installed whether it is still.

    Attributes:
        now: The time, in seconds.
    """

    def __init__(self) -> None:
        self.now = 1.0
        self._pools: list[Threads] = []
        self._waits: dict[int, Callable[[], bool]] = {}
        self._patch = pytest.MonkeyPatch()

    def clock(self) -> float:
        return self.now

    def install(self) -> None:
        lockstep = self

        class WatchedThreads(Threads):
            def __init__(self, num_threads: int, name: str, on_idle: Callable[[], None]) -> None:
                super().__init__(num_threads, name, on_idle)
                lockstep._pools.append(self)

            def wait_for_others(self, is_stuck: Callable[[], bool], interval_s: float) -> None:
                with lockstep.waiting(lambda: self._calls > 1):
                    super().wait_for_others(is_stuck, interval_s)

        class WatchedEvent(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                with lockstep.waiting(lambda: not self.is_set()):
                    return super().wait(timeout)

        class WatchedHelper(Helper):
            def __init__(self, call: Call, work: Callable[[], None]) -> None:
                super().__init__(call, work)
                self.done = WatchedEvent()

        class WatchedHang(FileHang):
            def hold_up(self) -> None:
                with lockstep.waiting(lambda: not self._released.is_set()):
                    super().hold_up()

        class WatchedLock:
            """A lock that may be held in a file call that is stuck."""

            def __init__(self) -> None:
                self._lock = threading.Lock()
                self._is_taken = False  # a little later than it is, and no longer

            def __enter__(self) -> None:
                if not self._lock.acquire(blocking=False):
                    with lockstep.waiting(lambda: self._is_taken):
                        self._lock.acquire()
                self._is_taken = True

            def __exit__(self, *exc: object) -> None:
                self._is_taken = False
                self._lock.release()

        watched = SimpleNamespace(Lock=WatchedLock, local=threading.local)
        self._patch.setattr("kvoffload.storage.slabs.threading", watched)
        self._patch.setattr("kvoffload.storage.space.threading", watched)
        for module in ("calls", "threads"):
            self._patch.setattr(f"kvoffload.storage.{module}.monotonic", self.clock)
        self._patch.setattr("kvoffload.storage.threads.Helper", WatchedHelper)
        self._patch.setattr("kvoffload.storage.session.Threads", WatchedThreads)
        self._patch.setattr("kvoffload.testing.faulty_files.FileHang", WatchedHang)
        # A group for each block or two: or there would be nothing for a second thread to do.
        self._patch.setattr("kvoffload.storage.blocks.GROUP_BYTES", 8192)
        self._patch.setattr("kvoffload.storage.blocks.DIRECT_GROUP_BYTES", 4096)

    def uninstall(self) -> None:
        self._patch.undo()

    @contextmanager
    def waiting(self, still: Callable[[], bool]) -> Iterator[None]:
        """Note that this thread can't go on as long as this holds."""
        me = threading.get_ident()
        self._waits[me] = still
        try:
            yield
        finally:
            del self._waits[me]

    def wait(self) -> None:
        """Hold the loop's thread until the others have nothing to do, or are stuck."""
        give_up_at = time.monotonic() + PATIENCE_S
        while not self._is_still():
            assert time.monotonic() < give_up_at, "the threads never come to rest"
            time.sleep(POLL_S)

    def _is_still(self) -> bool:
        busy = 0
        for pool in tuple(self._pools):
            with pool._work_came:
                if pool._idle and (pool._queue or pool._urgent or pool._helpers):
                    return False
                busy += pool._workers - pool._idle
                if pool._retired and not pool._workers:
                    self._pools.remove(pool)
        return busy == sum(still() for still in tuple(self._waits.values()))


class LockstepLoop(asyncio.SelectorEventLoop):
    """A loop of asyncio's on the time of a lockstep."""

    def __init__(self, lockstep: Lockstep) -> None:
        super().__init__(_JumpingSelector(lockstep))
        self._lockstep = lockstep

    def time(self) -> float:
        return self._lockstep.now

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Run on the loop's own thread what is not for the threads of a tier."""
        if executor is not None:
            return super().run_in_executor(executor, func, *args)
        future: asyncio.Future[T] = self.create_future()
        future.set_result(func(*args))
        return future


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, lockstep: Lockstep) -> None:
        super().__init__()
        self._lockstep = lockstep

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        self._lockstep.wait()
        came = super().select(0)
        if not came:
            assert timeout is not None, "nothing will ever happen again"
            self._lockstep.now += timeout
        return came
