"""The clock that managers use unless another one is injected."""

from __future__ import annotations

import time

import anyio


class SystemClock:
    """The machine's monotonic clock."""

    def __call__(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Return after this many seconds."""
        await anyio.sleep(seconds)
