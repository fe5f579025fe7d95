"""Time that passes only when a test says so, and waiting for background work without sleeping."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

import anyio
from anyio.lowlevel import checkpoint


class ManualClock:
    """A clock that stands still until `advance`: pass it as `clock=` to any manager.

    Calling it returns the seconds, `sleep` returns once they were advanced far enough. Waking
    sleepers run on the next turn of the event loop, so let background work catch up with
    `eventually` after an `advance`, and make sure that it is asleep before one with
    `wait_for_sleepers`::

        clock = ManualClock()
        async with LRUOffloadManager(tier, clock=clock, reservation_ttl_s=60) as kv:
            await kv.prepare_store([b"block"])
            clock.advance(61)
            await eventually(lambda: kv.get_stats().expired == 1)

    It belongs to one event loop; reading it from another thread is fine.

    Args:
        start: Seconds it shows first.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._order = count()
        self._sleepers: list[tuple[float, int, anyio.Event]] = []
        self._joined = anyio.Event()

    def __call__(self) -> float:
        """Return the seconds."""
        return self._now

    def __repr__(self) -> str:
        return f"<ManualClock at {self._now:g} s, {self.sleepers} asleep>"

    @property
    def sleepers(self) -> int:
        """Calls of `sleep` that wait for an `advance`."""
        return len(self._sleepers)

    def advance(self, seconds: float) -> None:
        """Let this much time pass at once, and wake the sleepers that are due, earliest first.

        Time jumps: what sleeps for a second again and again wakes once in an `advance(10)`.

        Raises:
            ValueError: `seconds` is negative; monotonic time doesn't run backwards.
        """
        if seconds < 0:
            raise ValueError(f"monotonic time can't go back by {-seconds} s")
        self._now += seconds
        while self._sleepers and self._sleepers[0][0] <= self._now:
            heapq.heappop(self._sleepers)[2].set()

    async def sleep(self, seconds: float) -> None:
        """Return once `seconds` were advanced; at once, after one turn of the loop, if none."""
        if seconds <= 0:
            await checkpoint()
            return
        sleeper = (self._now + seconds, next(self._order), anyio.Event())
        heapq.heappush(self._sleepers, sleeper)
        self._joined.set()
        self._joined = anyio.Event()
        try:
            await sleeper[2].wait()
        finally:
            if sleeper in self._sleepers:  # cancelled
                self._sleepers.remove(sleeper)
                heapq.heapify(self._sleepers)

    async def wait_for_sleepers(self, count: int = 1) -> None:
        """Return as soon as at least `count` calls of `sleep` wait."""
        while len(self._sleepers) < count:
            await self._joined.wait()


async def eventually(predicate: Callable[[], bool], *, timeout_s: float = 5.0) -> None:
    """Let the event loop turn until the predicate holds.

    For what happens in the background and has no event to wait for: a counter, a state.

    Args:
        predicate: Called once a turn; cheap, and without side effects.
        timeout_s: Real seconds to give up after.

    Raises:
        AssertionError: It did not hold in time.
    """
    turns = 0
    with anyio.move_on_after(timeout_s):
        while not predicate():
            # Turns first, for work on the loop needs no time; then gently, for threads do.
            turns += 1
            await anyio.sleep(0 if turns < 100 else 0.001)
        return
    raise AssertionError(f"did not come true within {timeout_s} s: {predicate!r}")
