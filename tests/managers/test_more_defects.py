"""Further defects that a review found, each as the story in which it showed."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

import anyio
import anyio.lowlevel
import pytest

from kvoffload import (
    AsyncLRUManager,
    Key,
    LRUOffloadManager,
    LRUPolicy,
    MemoryTier,
    NotPinnedError,
    TierError,
)
from kvoffload.testing import FaultyTier, ManualClock, RestartableTier, eventually


async def test_a_late_complete_that_was_refused_is_the_late_one() -> None:
    """A late engine was refused once, and the next engine's completion was taken for the late one.

    Its block stayed pinned until it expired.
    """
    clock = ManualClock()
    async with LRUOffloadManager(MemoryTier(4, 64), clock=clock, reservation_ttl_s=10) as kv:
        await kv.store(["a"], [b"a"])
        await kv.prepare_load(["a"])
        await eventually(lambda: clock.sleepers > 0)
        clock.advance(11)
        await eventually(lambda: kv.get_stats().expired == 1)
        with pytest.raises(NotPinnedError):
            await kv.complete_load(["a"])  # the late holder came back, and was told
        await kv.prepare_load(["a"])
        await kv.complete_load(["a"])
        assert kv.get_stats().pinned == 0


async def test_close_with_a_stubborn_close_is_bounded() -> None:
    """A tier whose close can't be cancelled must not hang the service that wants to end."""
    cold = FaultyTier(RestartableTier(4, 64))
    kv = AsyncLRUManager(hot=MemoryTier(1, 64), cold=cold, close_timeout_s=0.05)
    await kv.__aenter__()
    hang = cold.hang("close", stubborn=True)
    closer = asyncio.get_running_loop().create_task(kv.__aexit__(None, None, None))
    try:
        await eventually(closer.done, timeout_s=30)
    finally:
        hang.release()
        await asyncio.wait([closer])


async def test_cancelled_close_waits_for_its_tasks() -> None:
    """A close that is cancelled while it waits for a stubborn task must not leave it unowned."""
    hot, cold = MemoryTier(1, 64), FaultyTier(RestartableTier(4, 64))
    kv = AsyncLRUManager(hot=hot, cold=cold, policy="lru", close_timeout_s=0.5)
    await kv.__aenter__()
    await kv.store(["a"], [b"a"])
    hang = cold.hang("write", stubborn=True)
    store = asyncio.get_running_loop().create_task(kv.store(["b"], [b"b"]))
    await hang.entered.wait()
    closer = asyncio.get_running_loop().create_task(kv.__aexit__(None, None, None))
    await eventually(lambda: hot._arena is None)  # drained in vain, and the tiers are closed
    closer.cancel()
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    still = not closer.done()
    hang.release()
    await asyncio.wait([closer, store])
    store.exception()
    assert still


async def test_policy_that_raises_on_a_lower_level_costs_no_block() -> None:
    """An error in the user's own policy, on a lower tier, lost slots that were already found."""

    class Bad(LRUPolicy):
        bad = False

        def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
            if self.bad and level == 1:
                raise ValueError("bug")
            return super().victims(level, count, pinned)

    policy = Bad()
    kv = AsyncLRUManager(
        hot=MemoryTier(2, 64),
        warm=MemoryTier(2, 64, name="warm"),
        cold=RestartableTier(8, 64),
        policy=policy,
    )
    async with kv:
        await kv.store(range(4), [b"1"] * 4)
        policy.bad = True
        with pytest.raises(ValueError, match="bug"):
            await kv.store([10], [b"3"])
        policy.bad = False
        kv.check_invariants()
        s = kv.get_stats()
        assert s.pending == 0
        for t in s.tiers.values():
            assert t.free_blocks + t.blocks == t.capacity_blocks
        assert await kv.lookup(range(4)) == 4


async def test_a_held_block_that_turned_out_bad_and_was_stored_anew() -> None:
    """The next holder's pin was never taken back, but that of the bad block twice."""
    hot = FaultyTier(MemoryTier(4, 64))
    cold = RestartableTier(8, 64, name="cold")
    async with AsyncLRUManager(hot=hot, cold=cold, policy="lru") as kv:
        view = kv.namespace("tenant")
        await view.store(["a"], [b"old"])
        old = await view.prepare_load(["a"])
        assert bytes(old.entries[0].view) == b"old"
        hot.flip_byte("read", times=1)
        await kv.flush()
        assert kv.get_stats().corrupt == 1
        await view.store(["a"], [b"new"])
        new = await view.prepare_load(["a"])
        assert bytes(new.entries[0].view) == b"new"
        for _ in range(2):
            kv.check_invariants()
            await view.complete_load(["a"])
        kv.check_invariants()
        assert kv.get_stats().pinned == 0
        assert kv.get_stats().tiers["hot"].free_blocks == 3


async def test_a_bad_block_read_beside_one_whose_promotion_raises_gives_its_slot_back() -> None:
    """The policy's error ended the read before the damaged record was erased: its slot was lost."""

    class Bad(LRUPolicy):
        bad = False

        def insert(self, keys: Sequence[Key], level: int) -> None:
            if self.bad and level == 0:
                raise ValueError("bug")
            super().insert(keys, level)

    policy, cold = Bad(), FaultyTier(RestartableTier(8, 64, name="cold"))
    kv = AsyncLRUManager(
        hot=MemoryTier(2, 64), cold=cold, policy=policy, promote_threshold=1, watermarks=(0, 0)
    )
    async with kv:
        await kv.store(range(4), [b"1"] * 4)
        low = [number for number in range(4) if kv.locate([number])[0].tier == "cold"]
        await kv.touch(low)
        cold.flip_byte("read", slots=[kv._core.index.ready[low[0]].slot])
        policy.bad = True
        with pytest.raises((ValueError, TierError)):
            async with kv.load(low):
                pass
        policy.bad = False
        await kv._core.jobs.drain()
        stats = kv.get_stats()
        assert stats.corrupt == 1
        assert stats.pinned == 0
        tier = stats.tiers["cold"]
        assert tier.free_blocks + tier.blocks == tier.capacity_blocks
        assert await kv.lookup(low[:1]) == 0
