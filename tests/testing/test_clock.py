from __future__ import annotations

import anyio
import pytest

from kvoffload.testing import ManualClock, count_suspensions, eventually


async def test_time_stands_still_until_advanced() -> None:
    clock = ManualClock(start=5.0)
    assert clock() == clock() == 5.0
    clock.advance(0)
    assert clock() == 5.0
    clock.advance(2.5)
    assert clock() == 7.5


def test_says_what_time_it_is() -> None:
    assert repr(ManualClock(start=1.5)) == "<ManualClock at 1.5 s, 0 asleep>"


async def test_time_does_not_run_backwards() -> None:
    clock = ManualClock()
    with pytest.raises(ValueError, match="back"):
        clock.advance(-1)
    assert clock() == 0.0


async def test_sleepers_wake_when_due_and_not_before() -> None:
    clock = ManualClock()
    woken: list[str] = []

    async def sleep(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append(name)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sleep, "long", 10)
        tasks.start_soon(sleep, "short", 1)
        tasks.start_soon(sleep, "middle", 5)
        await clock.wait_for_sleepers(3)
        clock.advance(0.999)
        await anyio.wait_all_tasks_blocked()
        assert woken == []
        clock.advance(0.001)
        await anyio.wait_all_tasks_blocked()
        assert woken == ["short"]
        clock.advance(100)
        assert woken == ["short"]
        assert clock.sleepers == 0
    assert woken == ["short", "middle", "long"]


async def test_sleepers_of_the_same_moment_wake_in_the_order_they_came() -> None:
    clock = ManualClock()
    woken: list[int] = []

    async def sleep(name: int) -> None:
        await clock.sleep(3)
        woken.append(name)

    async with anyio.create_task_group() as tasks:
        for name in range(5):
            tasks.start_soon(sleep, name)
        await clock.wait_for_sleepers(5)
        clock.advance(3)
    assert woken == list(range(5))


@pytest.mark.parametrize("seconds", [0, -1])
async def test_sleeping_for_no_time_gives_way_once(seconds: float) -> None:
    assert await count_suspensions(ManualClock().sleep(seconds)) == (None, 1)


async def test_a_cancelled_sleeper_is_forgotten() -> None:
    clock = ManualClock()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(clock.sleep, 1)
        tasks.start_soon(clock.sleep, 2)
        await clock.wait_for_sleepers(2)
        tasks.cancel_scope.cancel()
    assert clock.sleepers == 0
    clock.advance(5)


async def test_waiting_for_sleepers_that_are_late() -> None:
    """The test waits first, the background task goes to sleep afterwards."""
    clock = ManualClock()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(clock.wait_for_sleepers, 2)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(clock.sleep, 1)
        tasks.start_soon(clock.sleep, 1)
        await clock.wait_for_sleepers(2)
        clock.advance(1)


async def test_a_sleeper_that_sleeps_again_is_not_woken_twice_by_one_jump() -> None:
    clock = ManualClock()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await clock.sleep(1)
            ticks += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        await clock.wait_for_sleepers()
        clock.advance(10)
        await eventually(lambda: ticks == 1)
        await clock.wait_for_sleepers()
        clock.advance(1)
        await eventually(lambda: ticks == 2)
        tasks.cancel_scope.cancel()


async def test_eventually_returns_as_soon_as_it_is_true() -> None:
    answers = iter([False] * 150 + [True])
    await eventually(lambda: next(answers))
    assert next(answers, None) is None


async def test_eventually_gives_up() -> None:
    with pytest.raises(AssertionError, match="did not come true"):
        await eventually(lambda: False, timeout_s=0.01)
