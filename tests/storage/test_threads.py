"""The tier's executor: it tells when nobody is inside any more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvoffload.storage.calls import Call
from kvoffload.storage.threads import Threads


async def came_back(call: Call) -> None:
    loop, back = asyncio.get_running_loop(), asyncio.Event()
    call.when_back(lambda: (loop.call_soon_threadsafe(back.set), None)[1])
    await back.wait()


async def test_the_last_call_closes_the_door() -> None:
    """Threads tell when nobody is inside any more; a call refused was never inside."""
    told: list[str] = []
    go_on = threading.Event()
    threads = Threads(1, "test", lambda: told.append("idle"))
    last = Call(threads)
    running = last.submit(go_on.wait, 30)
    queued = Call(threads).submit(told.append, "ran")
    assert queued.cancel()
    threads.retire()
    assert told == []
    with pytest.raises(RuntimeError):
        Call(threads).submit(told.append, "too late")
    assert told == []
    go_on.set()
    assert await running
    await came_back(last)
    assert told == ["idle"]
