"""Being told to stop: by the first signal in good order, by the second at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import anyio

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FORCED = b"kvoffload: told to stop a second time: what was in memory alone is not saved\n"


class StopSignals:
    """Handles the signals that stop a service, from before its event loop runs until after.

    Args:
        on_force: Called on the second signal, right before the process ends.
    """

    def __init__(self, on_force: Callable[[], None]) -> None:
        self._on_force = on_force
        self._count = 0
        self._wake: Callable[[], object] | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for each in SIGNALS:
            self._old[each] = signal.signal(each, self._handle)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each, old in self._old.items():
            signal.signal(each, old)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            # Not by way of the event loop, for it may be what hangs.
            self._on_force()
            os.write(2, FORCED)
            os._exit(128 + number)
        if self._wake is not None:
            self._wake()

    async def wait(self) -> None:
        """Return when the first signal has come."""
        told, loop = anyio.Event(), asyncio.get_running_loop()
        self._wake = lambda: loop.call_soon_threadsafe(told.set)
        try:
            if not self._count:
                await told.wait()
        finally:
            self._wake = None
