"""What was evicted explicitly came back after a crash or a restart, once, in each of these."""

from __future__ import annotations

import anyio

from kvoffload import AsyncLRUManager, LRUOffloadManager, MemoryTier, TieredLRUManager
from kvoffload.testing import FaultyTier, RestartableTier


async def test_two_flushes_leave_an_untracked_record() -> None:
    """Both flushes write the block; the record of the slower one must be known to an eviction."""
    inner = RestartableTier(8, 64)
    cold = FaultyTier(inner)
    async with AsyncLRUManager(hot=MemoryTier(2, 64), cold=cold) as kv:
        await kv.store(["a"], [b"a"])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kv.flush)
            tasks.start_soon(kv.flush)
        assert await kv.evict(["a"]) == ["a"]
        crashed = inner.after_crash()
    async with LRUOffloadManager(crashed) as kv:
        assert await kv.lookup(["a"]) == 0


async def test_two_flushes_then_reopen() -> None:
    """Two flushes then reopen."""
    cold = FaultyTier(RestartableTier(8, 64))
    async with AsyncLRUManager(hot=MemoryTier(2, 64), cold=cold) as kv:
        await kv.store(["a"], [b"a"])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kv.flush)
            tasks.start_soon(kv.flush)
    async with LRUOffloadManager(cold) as kv:  # KeyError
        assert await kv.lookup(["a"]) == 1


async def test_view_of_the_own_namespace_clears_for_good() -> None:
    """View of the own namespace clears for good."""
    cold = RestartableTier(8, 64)
    async with AsyncLRUManager(hot=cold) as kv:
        await kv.store(["a"], [b"a"])
        await kv.namespace("").clear()
        crashed = cold.after_crash()
    async with LRUOffloadManager(crashed) as kv:
        assert await kv.lookup(["a"]) == 0


async def test_a_block_on_two_persistent_tiers() -> None:
    """A block on two persistent tiers."""
    a, b = RestartableTier(2, 64, name="a"), RestartableTier(8, 64, name="b")
    async with TieredLRUManager(a, b, promote_threshold=1) as kv:
        await kv.store(["x"], [b"x"])
        await kv.store([1, 2], [b"1", b"2"])  # x goes down
        await kv.evict([1, 2])
        async with kv.load(["x"]):
            pass
        async with kv.load(["x"]):
            pass
        assert kv.locate(["x"])[0].tier == "a"  # up again, a clean copy below
    async with TieredLRUManager(a, b) as kv:
        assert await kv.lookup(["x"]) == 1
        assert await kv.evict(["x"]) == ["x"]
    async with TieredLRUManager(a, b) as kv:
        assert await kv.lookup(["x"]) == 0
