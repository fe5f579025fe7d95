"""Waking tasks that wait for a change, free of cost while none waits."""

from __future__ import annotations

import asyncio
import contextlib


class Signal:
    """Wakes everyone who waits at the moment that it is fired.

    Attributes:
        times: How often it was fired, for who could not wait all the while.
    """

    __slots__ = ("_waiters", "times")

    def __init__(self) -> None:
        self.times = 0
        self._waiters: list[asyncio.Future[None]] = []

    def fire(self) -> None:
        """Wake who waits now."""
        self.times += 1
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def wait(self) -> None:
        """Wait until the next time it is fired."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except BaseException:
            with contextlib.suppress(ValueError):  # fired just now
                self._waiters.remove(waiter)
            raise
