"""What was evicted by name stays away, after a crash and after a restart; and opens succeed."""

from __future__ import annotations

import anyio
import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    LRUOffloadManager,
    MemoryTier,
    TieredLRUManager,
    TierError,
)
from kvoffload.testing import FaultyTier, RestartableTier, eventually, payload_for

BLOCK_BYTES = 64


def payload(block_hash: BlockHash) -> bytes:
    return payload_for(block_hash, BLOCK_BYTES)


async def lookup_after_crash(tier: RestartableTier, block_hash: BlockHash) -> int:
    """Crash now, open again, and say how many blocks of this one-block chain are there."""
    async with LRUOffloadManager(tier.after_crash()) as kv:
        return await kv.lookup([block_hash])


async def flush_twice_at_once(kv: AsyncLRUManager) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(kv.flush)
        tasks.start_soon(kv.flush)


async def test_two_flushes_leave_no_record_that_an_eviction_misses() -> None:
    """A conversation evicted by name came back after a crash.

    Two flushes at once had each written it, and only one record was known to the eviction.
    """
    inner = RestartableTier(8, BLOCK_BYTES)
    hot, cold = MemoryTier(2, BLOCK_BYTES), FaultyTier(inner)
    async with AsyncLRUManager(hot=hot, cold=cold) as kv:
        await kv.store(["a"], [payload("a")])
        await flush_twice_at_once(kv)
        assert await kv.evict(["a"]) == ["a"]
        assert await lookup_after_crash(inner, "a") == 0


async def test_a_block_that_two_flushes_wrote_can_be_opened() -> None:
    """A tier with two records of one block made every later open fail with a KeyError.

    The record that does not count is known, too: an eviction erases both.
    """
    inner = RestartableTier(8, BLOCK_BYTES)
    hot, cold = MemoryTier(2, BLOCK_BYTES), FaultyTier(inner)
    async with AsyncLRUManager(hot=hot, cold=cold) as kv:
        await kv.store(["a"], [payload("a")])
        await flush_twice_at_once(kv)
    async with LRUOffloadManager(cold) as again:
        assert await again.lookup(["a"]) == 1
        async with again.load(["a"]) as lease:
            assert bytes(lease[0]) == payload("a")
        again.check_invariants()
        assert await again.evict(["a"]) == ["a"]
        assert await lookup_after_crash(inner, "a") == 0


async def test_view_of_the_own_namespace_clears_for_good() -> None:
    """`kv.namespace("").clear()` emptied the manager, and a crash brought all of it back."""
    cold = RestartableTier(8, BLOCK_BYTES)
    async with AsyncLRUManager(hot=cold) as kv:
        await kv.store(["a"], [payload("a")])
        await kv.namespace("").clear()
        assert await lookup_after_crash(cold, "a") == 0


async def test_a_block_on_two_persistent_tiers_is_evicted_from_both() -> None:
    """A promoted block leaves a copy on the lower disk; after a restart evict missed that copy."""
    upper = RestartableTier(2, BLOCK_BYTES, name="upper")
    lower = RestartableTier(8, BLOCK_BYTES, name="lower")
    async with TieredLRUManager(upper, lower, promote_threshold=1) as kv:
        await kv.store(["x"], [payload("x")])
        await kv.store(["y", "z"], [payload("y"), payload("z")])
        assert kv.locate(["x"])[0].tier == "lower"
        await kv.evict(["y", "z"])
        for _ in range(2):
            async with kv.load(["x"]):
                pass
        assert kv.locate(["x"])[0].tier == "upper"
    async with TieredLRUManager(upper, lower) as again:
        assert await again.lookup(["x"]) == 1
        assert await again.evict(["x"]) == ["x"]
    async with TieredLRUManager(upper, lower) as once_more:
        assert await once_more.lookup(["x"]) == 0


async def test_an_abandoned_write_can_be_evicted_for_good() -> None:
    """A store that was cancelled left a record behind, of a block that no eviction knew.

    An eviction by name erases it, and says so where the tier could not.
    """
    inner = RestartableTier(8, BLOCK_BYTES)
    cold = FaultyTier(inner)
    async with AsyncLRUManager(hot=cold) as kv:
        with cold.hang("write") as hang:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(kv.store, ["a"], [payload("a")])
                await hang.entered.wait()
                tasks.cancel_scope.cancel()
        await eventually(lambda: kv.get_stats().pending == 0)
        assert await kv.lookup(["a"]) == 0
        cold.fail("erase")
        with pytest.raises(TierError):
            await kv.evict(["a"])
        await kv.evict(["a"])
        assert await lookup_after_crash(inner, "a") == 0
