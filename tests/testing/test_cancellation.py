from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import suppress
from typing import Literal

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint

from kvoffload.testing import cancel_everywhere, count_suspensions

How = Literal["scope", "task"]
both_ways = pytest.mark.parametrize("how", ["scope", "task"])
at_any_turn = pytest.mark.parametrize("turns", [0, 1, 3])


class Yields:
    """A bare yield to the event loop, as in `asyncio.sleep(0)`, without anyio's second one."""

    def __await__(self) -> Generator[None, None, None]:
        yield


async def nothing() -> int:
    return 5


async def waits_three_times() -> int:
    await Yields()
    await asyncio.sleep(0.0005)
    await Yields()
    return 6


async def test_count_suspensions() -> None:
    assert await count_suspensions(nothing()) == (5, 0)
    assert await count_suspensions(waits_three_times()) == (6, 3)


async def test_count_suspensions_of_a_future_and_of_a_thread() -> None:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, "done")
    assert await count_suspensions(future) == ("done", 1)
    result, suspensions = await count_suspensions(anyio.to_thread.run_sync(lambda: 7))
    assert result == 7
    assert suspensions > 0


async def test_count_suspensions_passes_errors_on() -> None:
    async def fail() -> None:
        await Yields()
        raise LookupError("from inside")

    with pytest.raises(LookupError, match="from inside"):
        await count_suspensions(fail())


async def test_count_suspensions_passes_cancellation_on() -> None:
    cleaned_up = False

    async def wait() -> None:
        nonlocal cleaned_up
        try:
            await asyncio.sleep(3600)
        finally:
            await Yields()
            cleaned_up = True

    with anyio.move_on_after(0.001) as scope:
        await count_suspensions(wait())
    assert scope.cancelled_caught
    assert not cleaned_up  # a scope cancels the clean-up too
    task = asyncio.ensure_future(count_suspensions(wait()))
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert cleaned_up  # task.cancel() cancels once


@both_ways
@at_any_turn
async def test_a_call_that_never_waits_is_run_once(how: How, turns: int) -> None:
    runs = 0

    async def call() -> None:
        nonlocal runs
        runs += 1

    checks = 0

    async def check() -> None:
        nonlocal checks
        checks += 1

    assert await cancel_everywhere(call, check, how=how, turns=turns) == 0
    assert (runs, checks) == (1, 1)


@both_ways
async def test_each_suspension_is_visited_once_in_turn(how: How) -> None:
    """The trace of the runs: cancelled at the first, second, third wait; then completed."""
    trace: list[str] = []
    loop = asyncio.get_running_loop()

    def set_after(turns: int, event: anyio.Event) -> None:
        if turns:
            loop.call_soon(set_after, turns - 1, event)
        else:
            event.set()

    async def call() -> None:
        reached = 0
        try:
            for _ in range(3):
                event = anyio.Event()
                set_after(10, event)
                await event.wait()
                reached += 1
        finally:
            trace.append(f"{reached}")

    async def check() -> None:
        trace.append("checked")

    async def prepare() -> None:
        trace.append("prepared")

    assert await cancel_everywhere(call, check, how=how, prepare=prepare) == 3
    runs = [("prepared", str(reached), "checked") for reached in range(4)]
    assert trace == [step for run in runs for step in run]


@both_ways
@pytest.mark.parametrize("turns", [0, 1])
async def test_bare_yields_are_visited(how: How, turns: int) -> None:
    reached: list[int] = []

    async def call() -> None:
        done = 0
        try:
            for _ in range(4):
                await Yields()
                done += 1
        finally:
            reached.append(done)

    assert await cancel_everywhere(call, how=how, turns=turns) == 4
    assert reached[-1] == 4
    assert sorted(set(reached[:-1])) == reached[:-1]
    if how == "task" and turns == 0:
        assert reached == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("turns", "cancelled_before_job"), [(0, True), (1, False)])
async def test_a_later_turn_finds_background_work_under_way(
    turns: int, cancelled_before_job: bool
) -> None:
    """At turn 0 the job that the call waits for has not begun, one turn later it has."""
    seen: list[bool] = []

    async def call() -> None:
        future: asyncio.Future[None] = loop.create_future()

        def job() -> None:
            seen.append(future.cancelled())
            loop.call_soon(loop.call_soon, finish)

        def finish() -> None:
            if not future.done():
                future.set_result(None)

        loop.call_soon(job)
        await future

    loop = asyncio.get_running_loop()
    assert await cancel_everywhere(call, how="task", turns=turns) == 1
    assert seen == [cancelled_before_job, False]


@both_ways
async def test_a_leak_is_found_by_the_check(how: How) -> None:
    """The kind of bug that this is for: a slot taken, an await, and no way back."""
    taken: set[int] = set()

    async def leaky() -> None:
        taken.add(1)
        await checkpoint()
        taken.discard(1)

    async def check() -> None:
        assert taken == set()

    with pytest.raises(AssertionError, match="assert"):
        await cancel_everywhere(leaky, check, how=how)


@both_ways
async def test_a_swallowed_cancellation_is_found(how: How) -> None:
    async def swallow() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.01)

    with pytest.raises(AssertionError, match="as if nothing had happened"):
        await cancel_everywhere(swallow, how=how)


async def test_a_shield_keeps_a_scope_away_but_not_a_task_cancel() -> None:
    finished: list[bool] = []

    async def shielded() -> None:
        with anyio.CancelScope(shield=True):
            try:
                await anyio.sleep(0.002)
            finally:
                finished.append(True)

    assert await cancel_everywhere(shielded, how="scope") == 1
    assert finished == [True, True]
    assert await cancel_everywhere(shielded, how="task") == 1


@both_ways
async def test_an_error_of_the_call_comes_out(how: How) -> None:
    """In no exception group; also where it replaces the cancellation."""

    async def fail() -> None:
        try:
            await checkpoint()
        finally:
            raise LookupError("clean-up went wrong")

    with pytest.raises(LookupError, match="clean-up went wrong"):
        await cancel_everywhere(fail, how=how)


@both_ways
async def test_a_call_that_cancels_itself_is_an_error(how: How) -> None:
    async def call() -> None:
        raise asyncio.CancelledError

    with pytest.raises(AssertionError, match="cancelled itself"):
        await cancel_everywhere(call, how=how)


@both_ways
async def test_own_timeouts_of_the_call_are_no_matter(how: How) -> None:
    async def call() -> None:
        with anyio.move_on_after(0.001):
            await anyio.sleep(3600)
        await checkpoint()

    assert await cancel_everywhere(call, how=how) >= 2


@both_ways
async def test_a_call_with_tasks_of_its_own(how: How) -> None:
    running = 0

    async def child() -> None:
        nonlocal running
        running += 1
        try:
            await anyio.sleep(0.001)
        finally:
            running -= 1

    async def call() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
            tasks.start_soon(child)
            await checkpoint()

    async def check() -> None:
        assert running == 0

    assert await cancel_everywhere(call, check, how=how) >= 2


async def test_an_endless_call_reaches_the_limit() -> None:
    async def endless() -> None:
        while True:
            await checkpoint()

    with pytest.raises(AssertionError, match="does it ever complete"):
        await cancel_everywhere(endless, how="task", limit=5)


async def test_cancelling_the_helper_cancels_the_call() -> None:
    ended = False

    async def call() -> None:
        nonlocal ended
        try:
            await asyncio.sleep(3600)
        finally:
            ended = True

    with anyio.move_on_after(0.001) as scope:
        await cancel_everywhere(call, turns=10**9)
    assert scope.cancelled_caught
    assert ended


async def test_how_is_checked() -> None:
    with pytest.raises(ValueError, match="'scope' or 'task'"):
        await cancel_everywhere(nothing, how="gently")  # type: ignore[arg-type]
