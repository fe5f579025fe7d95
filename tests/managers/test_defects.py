"""Defects that a review found, each as the story in which it showed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import anyio
import anyio.lowlevel
import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockState,
    CorruptBlockError,
    Key,
    LRUOffloadManager,
    LRUPolicy,
    MemoryTier,
    TieredLRUManager,
)
from kvoffload.policy.recency import RecencyQueue
from kvoffload.testing import FaultyTier, ManualClock, RestartableTier, eventually


async def test_hotter_blocks_go_to_the_higher_tier() -> None:
    """A demotion of several put the hottest of them on the slow disk, and the coldest in memory."""
    async with TieredLRUManager(
        MemoryTier(4, 64), MemoryTier(2, 64, name="warm"), RestartableTier(8, 64)
    ) as kv:
        for i in range(4):
            await kv.store([i], [b"x"])  # 3 hottest
        await kv.store(range(10, 14), [b"y"] * 4)
        assert [each.tier for each in kv.locate(range(4))] == ["cold", "cold", "warm", "warm"]


async def test_evict_during_a_flush() -> None:
    """An eviction by name during a flush returned without evicting: the flush pinned the block."""
    cold = FaultyTier(RestartableTier(8, 64))
    async with AsyncLRUManager(hot=MemoryTier(2, 64), cold=cold) as kv:
        await kv.store(["a"], [b"a"])
        with cold.hang("write") as hang:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(kv.flush)
                await hang.entered.wait()
                out = []

                async def evict() -> None:
                    out.extend(await kv.evict(["a"]))

                tasks.start_soon(evict)
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
                hang.release()
        assert out == ["a"]


async def test_evict_during_a_prefetch() -> None:
    """The same with a prefetch: the block was pinned for its read, and stayed."""
    cold = FaultyTier(RestartableTier(8, 64))
    async with AsyncLRUManager(hot=MemoryTier(2, 64), cold=cold) as kv:
        await kv.store(range(4), [b"a"] * 4)
        await kv.evict([0])
        with cold.hang("read") as hang:
            async with anyio.create_task_group() as tasks:
                kv.hint_prefetch([3])
                await hang.entered.wait()
                out = []

                async def evict() -> None:
                    out.extend(await kv.evict([3]))

                tasks.start_soon(evict)
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
                hang.release()
        assert out == [3]


async def test_condemned_block_with_a_copy_and_its_successor() -> None:
    """A block stored anew, after its bytes were found bad, lost the flushed copy of its own.

    The end of the bad one, which a request still pinned, took the books of both apart.
    """
    hot, cold = FaultyTier(MemoryTier(4, 64)), RestartableTier(8, 64)
    async with AsyncLRUManager(hot=hot, cold=cold) as kv:
        await kv.store(["a"], [b"a"])
        await kv.flush()
        async with kv.request(["a"]) as request:  # pins only
            hot.flip_byte("read")
            with pytest.raises(CorruptBlockError):
                async with request.load():
                    pass
            await kv.store(["a"], [b"a"])
            await kv.flush()
            kv.check_invariants()
        kv.check_invariants()


async def test_late_complete_of_an_expired_reservation_publishes_another_s() -> None:
    """A slow engine completed too late, and published what another had only begun to write."""
    clock = ManualClock()
    async with LRUOffloadManager(MemoryTier(4, 64), clock=clock, reservation_ttl_s=10) as kv:
        await kv.prepare_store(["a"])  # A
        await eventually(lambda: clock.sleepers > 0)
        clock.advance(11)
        await eventually(lambda: kv.locate(["a"])[0].state is BlockState.ABSENT)
        await kv.prepare_store(["a"])  # B, has written nothing yet
        await kv.complete_store(["a"])  # A, late: should be a no-op
        assert kv.locate(["a"])[0].state is BlockState.PENDING


@pytest.mark.parametrize("method", ["admit", "victims"])
async def test_policy_that_raises_leaks_nothing(method: str) -> None:
    """An error in the user's own policy left a block pending, which nobody could store again."""

    class Bad(LRUPolicy):
        bad = False

        def admit(self, keys: Sequence[Key], level: int, **_: object) -> Collection[Key]:
            if self.bad and method == "admit":
                raise ValueError("bug")
            return super().admit(keys, level)

        def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
            if self.bad and method == "victims":
                raise ValueError("bug")
            return super().victims(level, count, pinned)

    policy = Bad()
    async with AsyncLRUManager(hot=MemoryTier(2, 64), policy=policy) as kv:
        await kv.store([1, 2], [b"1"] * 2)
        policy.bad = True
        with pytest.raises(ValueError, match="bug"):
            await kv.store([3], [b"3"])
        policy.bad = False
        assert kv.get_stats().pending == 0


async def test_victims_fewer_than_there_are() -> None:
    """A policy that names no victim broke `prepare_store`; it means that there is no room."""

    class Bad(LRUPolicy):
        def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
            return []

    async with AsyncLRUManager(hot=MemoryTier(2, 64), policy=Bad()) as kv:
        await kv.store([1, 2], [b"1"] * 2)
        assert await kv.prepare_store([3]) is None
        assert kv.get_stats().pending == 0


async def test_returned_keys_are_bounded() -> None:
    """A popular block, pinned and released all day, made the policy grow without end."""
    async with LRUOffloadManager(MemoryTier(2, 64)) as kv:
        await kv.store(["a"], [b"1"])
        await kv.store(["b"], [b"1"])
        await kv.prepare_load(["a"])
        await kv.store(["c"], [b"1"])  # steps over a
        for _ in range(1000):
            await kv.complete_load(["a"])
            await kv.prepare_load(["a"])
        await kv.complete_load(["a"])
        policy = kv._core.index.policy
        assert isinstance(policy, LRUPolicy)
        queue = policy._levels[0]
        assert isinstance(queue, RecencyQueue)
        assert len(queue._returned) < 10


async def test_waits_leave_nothing_in_the_signal() -> None:
    """Each wait for a pending block that timed out left a little memory behind for good."""
    async with LRUOffloadManager(MemoryTier(2, 64)) as kv:
        await kv.prepare_store(["a"])
        for _ in range(50):
            async with kv.request(["a"], wait_pending_s=0.0001):
                pass
        assert len(kv._core.index.changed._waiters) < 5


async def test_ready_again_while_its_predecessor_s_bad_read_ends() -> None:
    """A good block could not be loaded: the load got the error of the bad one it had replaced."""
    cold = FaultyTier(RestartableTier(8, 64))
    async with AsyncLRUManager(hot=cold) as kv:
        await kv.store(["a"], [b"a"])
        cold.flip_byte("read")
        with cold.hang("erase") as hang:
            async with anyio.create_task_group() as tasks:

                async def bad() -> None:
                    with pytest.raises(CorruptBlockError):
                        async with kv.load(["a"]):
                            pass

                tasks.start_soon(bad)
                await hang.entered.wait()
                assert (await kv.store(["a"], [b"a"])).stored == ("a",)

                async def good() -> None:
                    async with kv.load(["a"]) as lease:
                        assert bytes(lease[0]) == b"a"

                tasks.start_soon(good)
                for _ in range(10):
                    await anyio.lowlevel.checkpoint()
                hang.release()
