"""Threads for calls that can't be stopped, at the moments that a server seldom brings about."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import pytest

from kvoffload import ClosedError
from kvoffload.remote.lanes import Lanes
from kvoffload.testing import eventually


async def test_closed_in_the_turn_in_which_a_waiting_call_gets_its_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread was told to end by then: the call was never made, and waited for ever."""
    lanes = Lanes([None], "test", "remote")
    begun, go_on = threading.Event(), threading.Event()
    results: list[object] = []
    tell = lanes._tell

    def tell_and_close(*args: Any) -> None:
        tell(*args)
        lanes.retire()

    monkeypatch.setattr(lanes, "_tell", tell_and_close)

    def work(*_: object) -> str:
        begun.set()
        go_on.wait(10)
        return "made"

    async def call() -> None:
        try:
            results.append(await lanes.run(work))
        except ClosedError as exc:
            results.append(type(exc))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await eventually(begun.is_set)
            tasks.start_soon(call)
            await eventually(lambda: len(lanes._waiting) == 1)
            go_on.set()
    assert len(results) == 2
    assert {*results} == {"made", ClosedError}
