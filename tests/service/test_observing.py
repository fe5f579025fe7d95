from __future__ import annotations

import asyncio
from collections.abc import Callable

import anyio
import pytest

from kvoffload import BlockNotFoundError
from kvoffload.service.observing import Latencies, LoopLag, TimingSnapshot


class Time:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def timed(
    latencies: Latencies, time: Time, seconds: float, operation: str = "load", namespace: str = ""
) -> None:
    with latencies(operation, namespace, 2):
        time.now += seconds


def test_durations_by_operation_and_outcome() -> None:
    time = Time()
    latencies = Latencies(clock=time)
    timed(latencies, time, 0.25)
    timed(latencies, time, 4)
    timed(latencies, time, 1, "store")
    with pytest.raises(BlockNotFoundError), latencies("load", "", 3):
        time.now += 16
        raise BlockNotFoundError("no 'x'", block_hashes=["x"])
    with pytest.raises(asyncio.CancelledError), latencies("load", "", 3):
        raise asyncio.CancelledError
    assert {
        key: (timing.durations.count, timing.durations.sum_s, timing.blocks)
        for key, timing in latencies.snapshots().items()
    } == {
        ("load", "cancelled"): (1, 0, 3),
        ("load", "error"): (1, 16, 3),
        ("load", "ok"): (2, 4.25, 4),
        ("store", "ok"): (1, 1, 2),
    }
    assert latencies.snapshot("load").count == 4
    assert latencies.snapshot("load", "ok").count == 2
    assert latencies.snapshot("request").count == 0


def test_operations_in_progress() -> None:
    latencies = Latencies()
    with latencies("request", "", 1):
        with latencies("load", "", 1):
            assert latencies.in_progress == {"load": 1, "request": 1, "store": 0}
        assert latencies.in_progress == {"load": 0, "request": 1, "store": 0}
    assert not any(latencies.in_progress.values())


def test_a_clock_that_goes_back_does_not_spoil_the_sum() -> None:
    time = Time()
    latencies = Latencies(clock=time)
    timed(latencies, time, -5)
    assert latencies.snapshot("load").sum_s == 0


def test_namespaces_are_bounded_and_keep_what_they_have() -> None:
    time = Time()
    latencies = Latencies(max_namespaces=2, clock=time)
    for namespace in ("a", "b", "c", "a", "d"):
        timed(latencies, time, 1, namespace=namespace)
    own = latencies.namespace_snapshots()
    assert {name: timings["load", "ok"].durations.count for name, timings in own.items()} == {
        "a": 2,
        "b": 1,
    }
    assert latencies.snapshot("load").count == 5
    none = Latencies(max_namespaces=0)
    with none("load", "a", 1):
        pass
    assert none.namespace_snapshots() == {}
    with pytest.raises(ValueError, match="at least 0"):
        Latencies(max_namespaces=-1)


def test_timings_add_up() -> None:
    time = Time()
    latencies = Latencies(clock=time)
    timed(latencies, time, 1)
    timing = latencies.snapshots()["load", "ok"]
    both = timing + timing + TimingSnapshot()
    assert (both.durations.count, both.durations.sum_s, both.blocks) == (2, 2, 4)


def lagging(time: Time, late: list[float]) -> Callable[[float], object]:
    """A sleep that is late by these, and then cancelled."""
    left = iter(late)

    async def sleep(seconds: float) -> None:
        try:
            time.now += seconds + next(left)
        except StopIteration:
            raise asyncio.CancelledError from None

    return sleep


async def test_the_loop_is_late() -> None:
    time = Time()
    sleep = lagging(time, [0, 0.25, 1, -0.5])
    lag = LoopLag(interval_s=0.5, clock=time, sleep=sleep)  # type: ignore[arg-type]
    assert (lag.recent_max_s, lag.snapshot().count) == (0, 0)
    with pytest.raises(asyncio.CancelledError):
        await lag.run()
    assert lag.snapshot().count == 4
    assert lag.snapshot().sum_s == 1.25
    assert lag.recent_max_s == 1


async def test_what_was_long_ago_is_not_recent() -> None:
    time = Time()
    sleep = lagging(time, [4, 0, 0.5])
    lag = LoopLag(interval_s=0.5, recent=2, clock=time, sleep=sleep)  # type: ignore[arg-type]
    with pytest.raises(asyncio.CancelledError):
        await lag.run()
    assert lag.recent_max_s == 0.5
    assert lag.snapshot().sum_s == 4.5


async def test_it_watches_until_it_is_cancelled() -> None:
    lag = LoopLag(interval_s=1e-6)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lag.run)
        while lag.snapshot().count < 3:
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()


def test_the_interval_is_positive() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        LoopLag(interval_s=0)
