"""Little staging memory: it may cost time, and no block."""

from __future__ import annotations

from kvoffload import AsyncLRUManager, BlockHash, LRUOffloadManager, Medium, MemoryTier
from kvoffload.testing import FaultyTier, RestartableTier, payload_for

BLOCK_BYTES = 64


def payload(block_hash: BlockHash) -> bytes:
    return payload_for(block_hash, BLOCK_BYTES)


async def test_demotion_between_disks_with_little_staging() -> None:
    """Blocks on their way to a roomy remote tier were lost, as all did not fit staging at once."""
    cold = RestartableTier(4, BLOCK_BYTES)
    remote = RestartableTier(16, BLOCK_BYTES, name="remote", medium=Medium.REMOTE)
    kv = AsyncLRUManager(hot=cold, remote=remote, policy="lru", staging_bytes=2 * BLOCK_BYTES)
    old, new = range(4), range(10, 14)
    async with kv:
        await kv.store(old, [payload(number) for number in old])
        result = await kv.store(new, [payload(number) for number in new])
        assert result.evicted == ()
        assert [found.tier for found in kv.locate(old)] == ["remote"] * 4
        for number in old:
            async with kv.load([number]) as lease:
                assert bytes(lease[0]) == payload(number)


async def test_close_keeps_what_fits_with_little_staging() -> None:
    """A restart lost most blocks: the close kept only as many as staging held at once."""
    hot = FaultyTier(MemoryTier(8, BLOCK_BYTES))
    cold = RestartableTier(16, BLOCK_BYTES)
    chain = range(8)
    async with AsyncLRUManager(hot=hot, cold=cold, staging_bytes=2 * BLOCK_BYTES) as kv:
        await kv.store(chain, [payload(number) for number in chain])
    async with LRUOffloadManager(cold) as again:
        assert await again.lookup(chain) == 8
        async with again.load(chain) as lease:
            assert [bytes(view) for view in lease] == [payload(number) for number in chain]


async def test_a_load_beyond_staging_uses_the_free_slots_of_a_warm_tier() -> None:
    """A load was refused for want of staging, though the warm tier below had the slots it needs.

    The hot tier has no addresses, so what is read there can't be seen.
    """
    hot = FaultyTier(MemoryTier(2, BLOCK_BYTES))
    warm = MemoryTier(4, BLOCK_BYTES, name="warm")
    cold = RestartableTier(8, BLOCK_BYTES)
    chain = range(8)
    async with AsyncLRUManager(hot=hot, warm=warm, cold=cold, staging_bytes=BLOCK_BYTES) as kv:
        await kv.store(chain, [payload(number) for number in chain])
        await kv.evict([2, 3])  # of the warm ones
        assert [found.tier for found in kv.locate([6, 7])] == ["cold", "cold"]
        async with kv.load([6, 7]) as lease:
            assert [bytes(view) for view in lease] == [payload(6), payload(7)]


async def test_prepare_store_that_returns_none_changes_nothing() -> None:
    """A `prepare_store` refused for want of staging had evicted blocks before it returned None."""
    hot = FaultyTier(MemoryTier(4, BLOCK_BYTES))
    chain = range(4)
    async with LRUOffloadManager(hot, staging_bytes=BLOCK_BYTES) as kv:
        await kv.store(chain, [payload(number) for number in chain])
        assert await kv.prepare_store(["x", "y"]) is None
        assert await kv.lookup(chain) == 4
        assert kv.get_stats().evictions == 0
