"""Little staging memory: it may cost time, and no block."""

from __future__ import annotations

from kvoffload import AsyncLRUManager, LRUOffloadManager, Medium, MemoryTier
from kvoffload.testing import FaultyTier, RestartableTier


async def test_demotion_between_disks_with_little_staging() -> None:
    """Demotion between disks with little staging."""
    cold, remote = (
        RestartableTier(4, 64),
        RestartableTier(16, 64, name="remote", medium=Medium.REMOTE),
    )
    async with AsyncLRUManager(hot=cold, remote=remote, staging_bytes=2 * 64, policy="lru") as kv:
        await kv.store(range(4), [b"1"] * 4)
        r = await kv.store(range(10, 14), [b"2"] * 4)
        assert r.evicted == ()  # remote has room for 16
        assert await kv.lookup(range(4)) == 4


async def test_close_keeps_what_fits_with_little_staging() -> None:
    """Close keeps what fits with little staging."""
    hot, cold = FaultyTier(MemoryTier(8, 64)), RestartableTier(16, 64)
    async with AsyncLRUManager(hot=hot, cold=cold, staging_bytes=2 * 64) as kv:
        await kv.store(range(8), [b"1"] * 8)
    async with LRUOffloadManager(cold) as kv:
        assert await kv.lookup(range(8)) == 8


async def test_granted_warm_slot_under_a_hot_tier_that_is_not_addressable() -> None:
    """Granted warm slot under a hot tier that is not addressable."""
    hot, warm, cold = (
        FaultyTier(MemoryTier(2, 64)),
        MemoryTier(4, 64, name="warm"),
        RestartableTier(8, 64),
    )
    async with AsyncLRUManager(hot=hot, warm=warm, cold=cold, staging_bytes=64) as kv:
        await kv.store(range(8), [bytes([i]) for i in range(8)])  # 2 hot 4 warm 2 cold
        await kv.evict([2, 3])
        assert [each.tier for each in kv.locate([6, 7])] == ["cold", "cold"]
        async with kv.load([6, 7]) as lease:  # one staged, one into the free warm slot
            assert [bytes(v) for v in lease] == [b"\6", b"\7"]


async def test_prepare_store_none_changes_nothing() -> None:
    """Prepare store none changes nothing."""
    async with LRUOffloadManager(FaultyTier(MemoryTier(4, 64)), staging_bytes=64) as kv:
        await kv.store(range(4), [b"1"] * 4)
        assert await kv.prepare_store(["x", "y"]) is None
        assert await kv.lookup(range(4)) == 4
