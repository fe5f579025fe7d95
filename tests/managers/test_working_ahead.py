"""Room made before anybody waits for it, and what a store does where there is none."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvoffload import (
    AsyncLRUManager,
    ConfigError,
    Key,
    LRUPolicy,
    ManagerSettings,
    MemoryTier,
    RejectReason,
    StoreResult,
    TieredLRUManager,
)
from kvoffload.testing import FaultyTier, RestartableTier, eventually, payload_for

SIZE = 64
HOT = 20
AHEAD = (0.2, 0.4)  # room for 4 at the least, for 8 once it was made


def disk(blocks: int = 100) -> FaultyTier:
    return FaultyTier(RestartableTier(blocks, SIZE, name="cold"))


@asynccontextmanager
async def opened(cold: FaultyTier, **settings: Any) -> AsyncIterator[AsyncLRUManager]:
    settings = {"watermarks": AHEAD, "policy": "lru", **settings}
    async with AsyncLRUManager(hot=MemoryTier(HOT, SIZE), cold=cold, **settings) as kv:
        yield kv
        kv.check_invariants()


def named(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


async def put(kv: AsyncLRUManager, names: Sequence[int]) -> StoreResult:
    return await kv.store(names, [payload_for(name, SIZE) for name in names])


async def check(kv: AsyncLRUManager, names: Sequence[int]) -> None:
    async with kv.load(names) as lease:
        for name, view in zip(names, lease, strict=True):
            assert view == payload_for(name, SIZE)


def at(kv: AsyncLRUManager, tier: str | None, names: Sequence[int]) -> list[int]:
    return [name for name, where in zip(names, kv.locate(names), strict=True) if where.tier == tier]


def free(kv: AsyncLRUManager) -> int:
    return kv.get_stats().tiers["hot"].free_blocks


async def test_a_store_meets_room_that_was_made_ahead() -> None:
    """Down to the low watermark nothing moves; below it the coldest do, up to the high one."""
    async with opened(disk()) as kv:
        await put(kv, named(0, 16))
        await asyncio.sleep(0)
        assert free(kv) == 4
        await put(kv, named(16, 1))
        await eventually(lambda: free(kv) == 8)
        assert at(kv, "cold", named(0, 17)) == named(11, 5)
        result = await put(kv, named(20, 8))
        assert result.waited_s == 0
        assert result.evicted == ()
        await check(kv, named(0, 17) + named(20, 8))


async def test_without_watermarks_nothing_moves_before_it_must() -> None:
    async with opened(disk(), watermarks=(0, 0)) as kv:
        await put(kv, named(0, HOT))
        for _ in range(10):
            await asyncio.sleep(0)
        assert at(kv, "hot", named(0, HOT)) == named(0, HOT)


async def test_a_store_that_must_wait_says_for_how_long() -> None:
    """More than there was room made for."""
    cold = disk()
    async with opened(cold) as kv:
        await put(kv, named(0, HOT))
        result = await put(kv, named(100, HOT))
        assert len(result.stored) == HOT
        assert result.waited_s > 0
        await check(kv, named(100, HOT))
        await check(kv, named(0, HOT))


async def test_a_store_that_must_not_wait_is_throttled() -> None:
    """The disk hangs: what finds room in memory is stored, the end of the chain is not."""
    cold = disk()
    async with opened(cold, when_full="reject") as kv:
        with cold.hang("write") as hang:
            await put(kv, named(0, 17))
            await hang.entered.wait()  # it is at work ahead
            result = await put(kv, named(20, 5))
            assert result.stored == (20, 21, 22)
            assert result.rejected == dict.fromkeys((23, 24), RejectReason.THROTTLED)
            assert result.evicted == ()
            assert await kv.prepare_store(named(30, 2)) is None
        await eventually(lambda: free(kv) >= 4)
        assert (await put(kv, named(23, 2))).stored == (23, 24)
        await check(kv, named(0, 17) + named(20, 5))


async def test_rejecting_lets_memory_take_what_leaves_memory() -> None:
    """A warm tier is no reason to refuse: only a disk is waited for."""
    manager = TieredLRUManager(
        MemoryTier(4, SIZE),
        MemoryTier(8, SIZE, name="warm"),
        disk(),
        watermarks=(0, 0),
        when_full="reject",
    )
    async with manager as kv:
        for first in (0, 4, 8):
            assert not (await kv.store(named(first, 4), [bytes(SIZE)] * 4)).rejected
        result = await kv.store(named(12, 4), [bytes(SIZE)] * 4)
        assert list(result.rejected) == named(12, 4)
        assert await kv.lookup(named(0, 12)) == 12


async def test_a_disk_that_fails_loses_nothing_ahead() -> None:
    """Nobody needs the room yet, so what could not be moved stays where it is."""
    cold = disk()
    with cold.fail("write", OSError(errno.EIO, "bad"), times=None):
        async with opened(cold) as kv:
            await put(kv, named(0, 17))
            await eventually(lambda: bool(kv.get_stats().io_errors))
            for _ in range(20):
                await asyncio.sleep(0)
            assert kv.get_stats().evictions == 0
            assert at(kv, "hot", named(0, 17)) == named(0, 17)
            assert kv.get_stats().io_errors < 100, "it tries again with each store, not for ever"


async def test_blocks_that_are_in_use_are_not_moved_ahead() -> None:
    async with opened(disk()) as kv:
        await put(kv, named(0, 10))
        async with kv.load(named(0, 10)):
            await put(kv, named(10, 8))
            await eventually(lambda: free(kv) == 8)
            assert at(kv, "hot", named(0, 10)) == named(0, 10)


async def test_through_a_store_is_on_disk_when_it_returns() -> None:
    """Without a flush, and before anything has left memory."""
    cold = disk()
    async with opened(cold, write_policy="through", watermarks=(0, 0)) as kv:
        await put(kv, named(0, 5))
        stats = kv.get_stats().tiers
        assert (stats["hot"].blocks, stats["cold"].blocks) == (5, 5)
        assert at(kv, "hot", named(0, 5)) == named(0, 5)
        output = await kv.prepare_store([7])
        assert output is not None
        output.store_spec.entries[0].view[:] = payload_for(7, SIZE)
        await kv.complete_store([7])
        assert kv.get_stats().tiers["cold"].blocks == 6
        # What is there is not written again.
        await put(kv, named(100, HOT))
        assert kv.get_stats().tiers["cold"].blocks_written == 6 + HOT
        await check(kv, named(0, 5))


async def test_through_the_coldest_on_a_full_disk_gives_way() -> None:
    """And not the copies of what is still in memory, which are hotter."""
    async with opened(disk(30), write_policy="through", watermarks=(0, 0)) as kv:
        for first in range(0, 60, 5):
            await put(kv, named(first, 5))
        assert at(kv, None, named(0, 60)) == named(0, 30)
        assert at(kv, "hot", named(0, 60)) == named(40, 20)
        assert (await kv.flush()).not_durable == 0
        assert kv.get_stats().tiers["cold"].blocks_written == 60
        await check(kv, named(30, 30))


async def test_through_a_disk_that_fails_the_block_is_in_memory() -> None:
    cold = disk()
    async with opened(cold, write_policy="through") as kv:
        with cold.fail("write", times=None):
            result = await put(kv, named(0, 3))
            assert result.stored == (0, 1, 2)
        assert kv.get_stats().io_errors == 3
        await check(kv, named(0, 3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"watermarks": (0.5, 0.1)},
        {"watermarks": (0.1,)},
        {"watermarks": 0.1},
        {"watermarks": (-0.1, 0.1)},
        {"watermarks": (0.1, 1.0)},
        {"watermarks": (0.1, "b")},
        {"when_full": "drop"},
        {"write_policy": "around"},
    ],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    """Told when the manager is made, or the settings are."""
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        AsyncLRUManager(hot=MemoryTier(4, SIZE), **wrong)
    with pytest.raises(ConfigError, match=name):
        ManagerSettings(**wrong)


async def test_through_a_store_evicts_none_of_its_own() -> None:
    """A chain spilled to a full disk, and the copies of its head took its end's place there."""
    hot = MemoryTier(3, SIZE)
    async with AsyncLRUManager(
        hot=hot, cold=disk(3), policy="lru", write_policy="through", watermarks=(0, 0)
    ) as kv:
        result = await put(kv, named(0, 6))
        assert result.stored == tuple(named(0, 6))
        assert result.evicted == ()
        await check(kv, named(0, 6))


async def test_throttled_stores_have_room_made() -> None:
    """All was pinned, nothing could be moved, and nobody ever looked again: throttled for good."""
    async with opened(disk(), when_full="reject") as kv:
        await put(kv, named(0, 16))
        async with kv.load(named(0, 16)), kv.request(named(16, 4)) as request:
            await request.store([payload_for(name, SIZE) for name in named(16, 4)])
            for _ in range(50):
                await asyncio.sleep(0)
            assert free(kv) == 0
        assert (await put(kv, [50])).rejected == {50: RejectReason.THROTTLED}
        await eventually(lambda: free(kv) == 8)
        assert (await put(kv, [50])).stored == (50,)


async def test_prepare_store_that_finds_no_room_changes_nothing() -> None:
    """It evicted what would not be written to disk, and then gave up for the others' sake."""
    settings = {"when_full": "reject", "cold_admission": "reused", "watermarks": (0, 0)}
    async with opened(disk(), **settings) as kv:
        await put(kv, named(0, 10))
        await put(kv, named(10, 10))
        async with kv.load(named(10, 10)):
            pass
        assert await kv.prepare_store(named(100, 15)) is None
        assert kv.get_stats().evictions == 0
        assert await kv.lookup(named(0, 20)) == 20
        assert await kv.prepare_store(named(100, 10)) is not None
        await kv.complete_store(named(100, 10), success=False)


class Declining(LRUPolicy):
    """Declines what is named 1000."""

    def admit(self, keys: Sequence[Key], level: int, **_: object) -> Sequence[Key]:
        return [key for key in keys if key != 1000]


async def test_a_declined_block_waits_for_nobody() -> None:
    """A move ahead hung, and a store of a block that was not admitted waited for it."""
    cold = disk()
    async with opened(cold, policy=Declining()) as kv:
        with cold.hang("write") as hang:
            await put(kv, named(0, 17))
            await hang.entered.wait()
            result = await put(kv, [40, 1000])
            assert result.stored == (40,)
            assert result.rejected == {1000: RejectReason.NOT_ADMITTED}


class Raising(LRUPolicy):
    """Raises from `victims` as often as told."""

    times = 0

    def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
        if self.times:
            self.times -= 1
            raise RuntimeError("a bug of the policy")
        return super().victims(level, count, pinned)


async def test_working_ahead_survives_a_policy_that_raises() -> None:
    policy = Raising()
    async with opened(disk(), policy=policy) as kv:
        policy.times = 1
        await put(kv, named(0, 17))
        await eventually(lambda: not policy.times)
        await put(kv, named(17, 1))
        await eventually(lambda: free(kv) == 8)


async def test_through_a_policy_that_raises_leaks_no_slot() -> None:
    policy = Raising()
    async with opened(disk(6), policy=policy, write_policy="through", watermarks=(0, 0)) as kv:
        await put(kv, named(0, 4))
        policy.times = 1
        with pytest.raises(RuntimeError, match="bug"):
            await put(kv, named(10, 4))
        cold = kv.get_stats().tiers["cold"]
        assert cold.blocks + cold.free_blocks == 6


async def test_room_is_made_between_the_watermarks_only() -> None:
    """Whatever wakes it: above the low one there is enough."""
    async with opened(disk()) as kv:
        await put(kv, named(0, 15))
        kv._core.index.short.fire()
        for _ in range(50):
            await asyncio.sleep(0)
        assert free(kv) == 5


async def test_a_disk_that_is_full_in_every_place_is_not_emptied() -> None:
    """Copy-on-write, or a quota: what gave way ahead is not tried once more, nor at once again."""
    cold = disk(40)
    async with opened(cold) as kv:
        for first in range(0, 60, 10):
            await put(kv, named(first, 10))
        await eventually(lambda: free(kv) >= 4)
        there = kv.get_stats().tiers["cold"].blocks
        with cold.fail("write", OSError(errno.ENOSPC, "quota"), times=None):
            for name in named(100, 8):
                await put(kv, [name])
        assert there - kv.get_stats().tiers["cold"].blocks <= 16
