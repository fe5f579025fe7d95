"""How long tiers take, and how many blocks are worth loading for that."""

from __future__ import annotations

import random

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload import AsyncLRUManager, ConfigError, CorruptBlockError, MemoryTier
from kvoffload.meter import Meter
from kvoffload.testing import FaultyTier, ManualClock, RestartableTier, eventually, payload_for

SIZE = 1000


@given(latency=st.floats(0, 10), byte_s=st.floats(1e-12, 1e-3), seed=st.integers(0, 99))
def test_a_meter_finds_the_line(latency: float, byte_s: float, seed: int) -> None:
    rng = random.Random(seed)
    meter = Meter()
    for _ in range(60):
        size = rng.randrange(1, 10**8)
        meter.note(size, latency + size * byte_s)
    for size in (1, 10**4, 10**8):
        expected = latency + size * byte_s
        assert meter.expect(size) == pytest.approx(expected, rel=1e-3, abs=1e-3 * byte_s * 10**8)


def test_a_meter_follows_a_disk_that_becomes_slow() -> None:
    meter = Meter()
    assert (meter.expect(10**6), meter.latency_s, meter.bytes_per_s) == (0, 0, 0)
    for byte_s in (1e-9, 1e-6):
        for number in range(1, 100):
            meter.note(number * 10**5, number * 10**5 * byte_s)
        assert meter.expect(10**7) == pytest.approx(10**7 * byte_s, rel=0.1)


def test_calls_of_one_size_tell_the_rate_only() -> None:
    meter = Meter()
    for _ in range(5):
        meter.note(1000, 0.5)
    assert meter.expect(4000) == pytest.approx(2.0)


@given(calls=st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 100)), max_size=30))
def test_whatever_was_measured_no_time_is_negative(calls: list[tuple[int, float]]) -> None:
    meter = Meter()
    for size, seconds in calls:
        meter.note(size, seconds)
    for size in (0, 1, 10**10):
        assert meter.expect(size) >= 0
    assert meter.latency_s >= 0
    assert meter.bytes_per_s >= 0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def manager(clock: ManualClock, cold: FaultyTier) -> AsyncLRUManager:
    return AsyncLRUManager(
        hot=MemoryTier(2, SIZE),
        cold=cold,
        policy="lru",
        clock=clock,
        promote_threshold=1000,
        watermarks=(0, 0),
    )


async def teach(kv: AsyncLRUManager, cold: FaultyTier, clock: ManualClock, seconds: float) -> None:
    """Read one block, and all, each of them in so many seconds a call."""
    for hashes in (["c7"], [f"c{number}" for number in range(2, 8)]) * 3:
        with cold.hang("read") as hang:
            load = kv.load(hashes)

            async def advance() -> None:
                await hang.entered.wait()
                clock.advance(seconds)
                hang.release()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(advance)
                async with load:
                    pass


async def test_a_slow_tier_is_left_alone(clock: ManualClock) -> None:
    """Six blocks in ten seconds are worth it for an engine that needs two for each, else not."""
    cold = FaultyTier(RestartableTier(16, SIZE, name="cold"))
    hashes = [f"c{number}" for number in range(8)]
    async with manager(clock, cold) as kv:
        await kv.store(hashes, [payload_for(each, SIZE) for each in hashes])
        async with kv.request(hashes) as request:
            unknown = request.plan(tokens_per_s=16.0)
            assert (unknown.blocks, unknown.load_s, unknown.compute_s) == (8, 0, 0)
        await teach(kv, cold, clock, 10.0)
        async with kv.request(hashes) as request:
            slow_engine = request.plan(tokens_per_s=8.0, block_tokens=16)
            assert slow_engine.blocks == 8
            assert slow_engine.load_s == pytest.approx(10.0, rel=0.01)
            fast_engine = request.plan(tokens_per_s=160.0, block_tokens=16)
            assert fast_engine.blocks == 2, "the two in memory"
            assert fast_engine.load_s == 0
            assert fast_engine.compute_s == pytest.approx(0.6)
            hurried = request.plan(tokens_per_s=8.0, deadline_s=9.0)
            assert hurried.blocks == 2
            async with request.load(fast_engine.blocks) as lease:
                assert lease.block_hashes == tuple(hashes[:2])
        stats = kv.get_stats().tiers["cold"]
        assert stats.read_latency_s == pytest.approx(10.0, rel=0.01)


async def test_what_is_being_read_already_comes_first(clock: ManualClock) -> None:
    """The queue counts, and can be seen."""
    cold = FaultyTier(RestartableTier(64, SIZE, name="cold"))
    hashes = [f"c{number}" for number in range(8)]
    others = [f"d{number}" for number in range(6)]
    async with manager(clock, cold) as kv:
        await kv.store(hashes, [payload_for(each, SIZE) for each in hashes])
        for _ in range(10):
            kv._core.index.levels[1].meter.note(1000, 1.0)  # a second a block
        async with kv.request(hashes) as request:
            alone = request.plan(tokens_per_s=1.0)
        assert alone.load_s == pytest.approx(6.0)
        await kv.store(others, [payload_for(each, SIZE) for each in others])
        await kv.store(["x", "y"], [b"", b""])

        async def read() -> None:
            async with kv.load(others):
                pass

        with cold.hang("read") as hang:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await hang.entered.wait()
                clock.advance(3.0)
                stats = kv.get_stats().tiers["cold"]
                assert (stats.queue_depth, stats.queue_bytes, stats.wait_s) == (6, 6000, 3.0)
                async with kv.request(hashes) as request:
                    behind = request.plan(tokens_per_s=1.0)
                assert behind.load_s == pytest.approx(6.0 + 8.0)
                hang.release()
        await eventually(lambda: not kv.get_stats().tiers["cold"].queue_depth)
        stats = kv.get_stats().tiers["cold"]
        assert (stats.queue_bytes, stats.wait_s) == (0, 0)


async def test_plans_and_loads_that_make_no_sense(clock: ManualClock) -> None:
    async with manager(clock, FaultyTier(RestartableTier(4, SIZE))) as kv:
        await kv.store(["a"], [b"a"])
        async with kv.request(["a", "b"]) as request:
            for wrong in (0, -1.0, float("inf")):
                with pytest.raises(ConfigError):
                    request.plan(tokens_per_s=wrong)
            with pytest.raises(ConfigError):
                request.plan(tokens_per_s=1.0, block_tokens=0)
            with pytest.raises(ConfigError):
                request.plan(tokens_per_s=1.0, deadline_s=-1)
            for many in (2, -1):
                with pytest.raises(ConfigError):
                    request.load(many)
            async with request.load(0) as lease:
                assert len(lease) == 0


async def test_a_plan_after_a_block_turned_out_to_be_damaged(clock: ManualClock) -> None:
    """It left the manager although it was pinned, and the plan knew it no more."""
    cold = FaultyTier(RestartableTier(16, SIZE, name="cold"))
    hashes = [f"c{number}" for number in range(8)]
    async with manager(clock, cold) as kv:
        await kv.store(hashes, [payload_for(each, SIZE) for each in hashes])
        async with kv.request(hashes) as request:
            cold.fail("read", CorruptBlockError, times=1)
            with pytest.raises(CorruptBlockError):
                async with request.load():
                    pass
            assert request.plan(tokens_per_s=1.0).blocks <= 7
