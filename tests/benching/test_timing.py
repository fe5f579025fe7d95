"""Turns, and blocking work beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import kvoffload.benching.cold
from kvoffload.benching.cold import affordable
from kvoffload.benching.machine import describe_machine, file_system
from kvoffload.benching.raw_io import RawFile, Team, make_blocks, plan_calls, same_bytes
from kvoffload.benching.timing import LEAST_ROUNDS, alternate, apart, in_turns, stack_apart


def test_each_round_is_begun_by_another() -> None:
    turns = list(in_turns(["a", "b", "c"], range(3)))
    assert [name for _, name in turns] == list("abcbcacab")
    assert [number for number, _ in turns] == [0] * 3 + [1] * 3 + [2] * 3


async def test_there_are_a_few_rounds_however_little_time() -> None:
    calls: list[str] = []

    def contender(name: str) -> Callable[[], Awaitable[float]]:
        async def took() -> float:
            calls.append(name)
            return float(len(calls))

        return took

    found = await alternate({"a": contender("a"), "b": contender("b")}, 0.0)
    assert len(calls) == 2 * (LEAST_ROUNDS + 1), "the first round is run and doesn't count"
    assert len(found["a"].seconds) == len(found["b"].seconds) == LEAST_ROUNDS
    assert found["a"].best == 3
    assert found["b"].median == 5


async def test_cancelled_it_waits_for_the_thread() -> None:
    entered, go_on = threading.Event(), threading.Event()
    over = False

    def work() -> None:
        nonlocal over
        entered.set()
        go_on.wait(30)
        over = True

    task = asyncio.create_task(apart(work))
    assert await asyncio.to_thread(entered.wait, 30)
    for _ in range(2):
        task.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert over


async def test_what_the_work_raises_comes_back() -> None:
    def work() -> None:
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        await apart(work)


async def test_bare_calls_give_back_what_was_written(tmp_path: Path) -> None:
    payloads, into = make_blocks(8, 4096, seed=1), make_blocks(8, 4096)
    assert not same_bytes(payloads, into)
    async with stack_apart() as stack:
        file = await apart(
            lambda: stack.enter_context(RawFile(tmp_path / "raw", direct=False)),
        )
        team = await apart(lambda: stack.enter_context(Team(2)))
        await apart(lambda: file.fill(payloads))
        await apart(lambda: team.make(file.read, plan_calls(into, 3)))
    assert same_bytes(payloads, into)


def test_the_machine_is_described(tmp_path: Path) -> None:
    about = describe_machine(tmp_path)
    assert all(about.values())
    assert about["file system"] == file_system(tmp_path)
    assert int(about["cores"]) >= 1


@pytest.mark.parametrize(("trial_s", "blocks"), [(1e-6, 64), (1000.0, 16)])
async def test_a_slow_disk_gets_fewer_blocks(
    trial_s: float, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instants = iter([0.0, trial_s])
    monkeypatch.setattr(kvoffload.benching.cold, "perf_counter", lambda: next(instants))
    assert await affordable(tmp_path, make_blocks(64, 4096), 24.0) == blocks
    assert not await asyncio.to_thread(lambda: list(tmp_path.iterdir()))
