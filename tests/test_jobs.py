"""Jobs: what their callers see when many end at once."""

from __future__ import annotations

import asyncio
from collections import Counter

import anyio

from kvoffload.jobs import WAKES_PER_TURN, Job, Jobs

MANY = 10 * WAKES_PER_TURN


async def test_callers_whose_work_ends_at_once_go_on_a_few_in_each_turn_of_the_loop() -> None:
    """64 requests whose reads came back together once held the loop for 10 ms in a row."""
    turn = 0
    woken: Counter[int] = Counter()
    order: list[int] = []
    gate = anyio.Event()
    loop = asyncio.get_running_loop()

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        if len(order) < MANY:
            loop.call_soon(next_turn)

    async def work(_: Job[None]) -> None:
        await gate.wait()

    async def call(jobs: Jobs, number: int) -> None:
        await jobs.start(work).result()
        woken[turn] += 1
        order.append(number)

    async with asyncio.TaskGroup() as tasks:
        jobs = Jobs(lambda run: tasks.create_task(run()))
        calls = [tasks.create_task(call(jobs, number)) for number in range(MANY)]
        await anyio.wait_all_tasks_blocked()
        next_turn()
        gate.set()
        await asyncio.wait(calls)
        await jobs.drain()
    assert order == list(range(MANY))
    assert max(woken.values()) <= WAKES_PER_TURN
    assert len(woken) >= MANY / WAKES_PER_TURN


async def test_a_drain_ends_though_those_who_wait_are_not_told_yet() -> None:
    async def work(_: Job[int]) -> int:
        return 1

    async with asyncio.TaskGroup() as tasks:
        jobs = Jobs(lambda run: tasks.create_task(run()))
        started = [jobs.start(work) for _ in range(MANY)]
        await jobs.drain()
        assert not jobs.running
        assert [await job.result() for job in started] == [1] * MANY
