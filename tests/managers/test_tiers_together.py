"""Blocks moving between tiers: demotion, promotion, one read for many, and tiers that fail."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    CapacityError,
    CorruptBlockError,
    DiskTier,
    EventKind,
    LoadTimeoutError,
    LRUOffloadManager,
    MemoryTier,
    OffloadingManager,
    RejectReason,
    TieredLRUManager,
    TierError,
)
from kvoffload.testing import CountingTier, FaultyTier, RestartableTier, eventually, payload_for

SIZE = 64


def payloads(hashes: Sequence[BlockHash]) -> list[bytes]:
    return [payload_for(block_hash, SIZE) for block_hash in hashes]


def tiers_of(kv: OffloadingManager, hashes: Sequence[BlockHash]) -> list[str | None]:
    return [location.tier for location in kv.locate(hashes)]


async def check(kv: OffloadingManager, hashes: Sequence[BlockHash]) -> None:
    async with kv.load(hashes) as lease:
        assert [bytes(view) for view in lease] == payloads(hashes)


def cold_tier(blocks: int) -> FaultyTier:
    return FaultyTier(RestartableTier(blocks, SIZE, name="cold"))


class TestDemotion:
    async def test_the_bytes_move(self) -> None:
        """What is evicted from hot is found, with its bytes, in warm, and then in cold."""
        hot, warm = MemoryTier(2, SIZE), MemoryTier(2, SIZE, name="warm")
        cold = CountingTier(RestartableTier(4, SIZE, name="cold"))
        async with TieredLRUManager(hot, warm, cold) as kv:
            for number in range(6):
                await kv.store([number], payloads([number]))
            assert tiers_of(kv, range(6)) == ["cold", "cold", "warm", "warm", "hot", "hot"]
            assert kv.get_stats().demotions == 6
            assert cold.blocks["write"] == 2
            await check(kv, range(6))
            assert kv.get_stats().evictions == 0

    async def test_a_chain_longer_than_hot_spills_down(self) -> None:
        """Head hottest, all in one call, and older blocks give way to it."""
        hot, warm = MemoryTier(2, SIZE), MemoryTier(3, SIZE, name="warm")
        async with TieredLRUManager(hot, warm, cold_tier(4)) as kv:
            await kv.store(["old1", "old2"], payloads(["old1", "old2"]))
            result = await kv.store(range(9), payloads(range(9)))
            assert result.stored == tuple(range(9))
            assert set(result.evicted) == {"old1", "old2"}
            assert tiers_of(kv, range(9)) == ["hot"] * 2 + ["warm"] * 3 + ["cold"] * 4
            result = await kv.store(range(100, 112), payloads(range(100, 112)))
            assert len(result.stored) == 9
            assert set(result.rejected.values()) == {RejectReason.FULL}
            assert list(result.rejected) == [109, 110, 111]

    async def test_a_clean_copy_is_not_written_again(self) -> None:
        """A promoted block that goes back down falls on the copy that it left."""
        cold = CountingTier(RestartableTier(8, SIZE, name="cold"))
        kv = AsyncLRUManager(hot=MemoryTier(2, SIZE), cold=cold, promote_threshold=1)
        async with kv:
            await kv.store(range(4), payloads(range(4)))
            assert tiers_of(kv, range(4)) == ["hot", "hot", "cold", "cold"]
            await check(kv, [2, 3])
            assert tiers_of(kv, range(4)) == ["cold", "cold", "hot", "hot"]
            written = cold.blocks["write"]
            await check(kv, [0, 1])
            assert tiers_of(kv, range(4)) == ["hot", "hot", "cold", "cold"]
            assert cold.blocks["write"] == written
            await check(kv, range(4))

    async def test_a_load_calls_a_demotion_off(self) -> None:
        """The block is pinned while it is written down: it stays, and the store finds another."""
        cold = cold_tier(8)
        async with AsyncLRUManager(hot=MemoryTier(2, SIZE), cold=cold, policy="lru") as kv:
            await kv.store(["a", "b"], payloads(["a", "b"]))
            with cold.hang("write") as hang:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(kv.store, ["c"], payloads(["c"]))
                    await hang.entered.wait()
                    async with kv.load(["b"]) as lease:  # on its way down, and counted as a hit
                        hang.release()
                        await eventually(lambda: kv.locate(["c"])[0].tier is not None)
                        assert bytes(lease[0]) == payload_for("b", SIZE)
                        assert tiers_of(kv, ["a", "b", "c"]) == ["cold", "hot", "hot"]
            kv.check_invariants()
            await check(kv, ["a", "b", "c"])

    async def test_evict_waits_for_a_block_on_its_way(self) -> None:
        """An explicit eviction is for good, also of what was just being written down."""
        inner = RestartableTier(8, SIZE, name="cold")
        cold = FaultyTier(inner)
        async with AsyncLRUManager(hot=MemoryTier(1, SIZE), cold=cold, policy="lru") as kv:
            await kv.store(["a"], payloads(["a"]))
            with cold.hang("write") as hang:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(kv.store, ["b"], payloads(["b"]))
                    await hang.entered.wait()
                    evicted: list[BlockHash] = []

                    async def evict() -> None:
                        evicted.extend(await kv.evict(["a"]))

                    tasks.start_soon(evict)
                    await anyio.lowlevel.checkpoint()
                    assert evicted == []
                    hang.release()
            assert evicted == ["a"]
            assert tiers_of(kv, ["a", "b"]) == [None, "hot"]
        async with LRUOffloadManager(inner) as kv2:
            assert await kv2.lookup(["a"]) == 0
            assert await kv2.lookup(["b"]) == 1


class TestPromotion:
    @pytest.mark.parametrize("threshold", [1, 3])
    async def test_after_so_many_uses_below(self, tmp_path: Path, threshold: int) -> None:
        """A cold block is served from where it is until it has shown that it is wanted."""
        cold = DiskTier(tmp_path, 8, SIZE)
        kv = AsyncLRUManager(hot=MemoryTier(2, SIZE), cold=cold, promote_threshold=threshold)
        async with kv:
            await kv.store(range(4), payloads(range(4)))
            for use in range(1, threshold + 1):
                await check(kv, [3])
                assert tiers_of(kv, [3]) == ["hot" if use == threshold else "cold"]
            assert kv.get_stats().promotions == 1
            assert kv.get_stats().tiers["cold"].hits == threshold

    async def test_not_from_under_another_reader(self) -> None:
        """A slot that someone looks at does not become a mere copy, which would give way."""
        hot, warm = MemoryTier(1, SIZE), MemoryTier(1, SIZE, name="warm")
        async with TieredLRUManager(hot, warm, promote_threshold=1) as kv:
            await kv.store(["a", "b"], payloads(["a", "b"]))
            async with (
                kv.request(["b"]) as request,
                request.load() as first,
                kv.load(["b"]) as second,
            ):
                assert tiers_of(kv, ["b"]) == ["warm"]
                await kv.store(["c"], payloads(["c"]))
                assert bytes(first[0]) == bytes(second[0]) == payload_for("b", SIZE)
            await check(kv, ["b"])
            assert tiers_of(kv, ["b"]) == ["hot"]


class TestOneReadForMany:
    async def test_callers_share_a_read(self) -> None:
        """Ten callers for one cold block: one read; a cancelled one does not disturb the others."""
        counting = CountingTier(RestartableTier(8, SIZE, name="cold"))
        cold = FaultyTier(counting)
        async with AsyncLRUManager(hot=MemoryTier(1, SIZE), cold=cold) as kv:
            await kv.store(range(4), payloads(range(4)))
            seen: list[bytes] = []

            async def look(scope: anyio.CancelScope) -> None:
                with scope:
                    async with kv.load([3, 2]) as lease:
                        seen.append(bytes(lease[0]))

            scopes = [anyio.CancelScope() for _ in range(10)]
            with cold.hang("read") as hang:
                async with anyio.create_task_group() as tasks:
                    for scope in scopes:
                        tasks.start_soon(look, scope)
                    await hang.entered.wait()
                    scopes[0].cancel()
                    scopes[5].cancel()
                    await anyio.lowlevel.checkpoint()
                    hang.release()
            assert seen == [payload_for(3, SIZE)] * 8
            assert counting.blocks["read"] == 2
            assert kv.get_stats().pinned == 0

    async def test_overlapping_requests_read_each_block_once(self) -> None:
        """The second reads only what the first is not reading already."""
        counting = CountingTier(RestartableTier(8, SIZE, name="cold"))
        cold = FaultyTier(counting)
        async with AsyncLRUManager(hot=MemoryTier(1, SIZE), cold=cold) as kv:
            await kv.store(range(6), payloads(range(6)))
            with cold.hang("read") as hang:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(check, kv, [1, 2, 3])
                    await hang.entered.wait()
                    tasks.start_soon(check, kv, [2, 3, 4])
                    await anyio.lowlevel.checkpoint()
                    hang.release()
            assert counting.blocks["read"] == 4


class TestDeadlines:
    async def test_a_hung_disk_times_the_caller_out(self) -> None:
        """The caller recomputes; nothing stays pinned, and the read serves the next caller."""
        cold = cold_tier(8)
        async with AsyncLRUManager(hot=MemoryTier(1, SIZE), cold=cold) as kv:
            await kv.store([1, 2], payloads([1, 2]))
            with cold.hang("read") as hang:
                with pytest.raises(LoadTimeoutError):
                    async with kv.load([2], timeout_s=0.01):
                        pass
                async with kv.request([1, 2]) as request:
                    with pytest.raises(LoadTimeoutError):
                        async with request.load(timeout_s=0.01):
                            pass
                assert hang.entered.is_set()
                hang.release()
            await check(kv, [1, 2])
            kv.check_invariants()
            assert kv.get_stats().pinned == 0

    async def test_no_time_at_all(self) -> None:
        """timeout_s=0 serves what lies in memory and nothing else."""
        async with AsyncLRUManager(hot=MemoryTier(1, SIZE), cold=cold_tier(8)) as kv:
            await kv.store([1, 2], payloads([1, 2]))
            async with kv.load([1], timeout_s=0) as lease:
                assert bytes(lease[0]) == payload_for(1, SIZE)
            with pytest.raises(LoadTimeoutError):
                async with kv.load([2], timeout_s=0):
                    pass


class TestCapacity:
    async def test_a_load_larger_than_memory(self, tmp_path: Path) -> None:
        """Refused at once and as a whole; what fits the free slots and the budget is served."""
        cold = DiskTier(tmp_path, 16, SIZE)
        kv = AsyncLRUManager(
            hot=MemoryTier(3, SIZE), cold=cold, staging_bytes=4 * SIZE, policy="lru"
        )
        async with kv:
            await kv.store(range(16), payloads(range(16)))
            await kv.evict([0, 1])
            cold_ones = list(range(3, 10))
            with pytest.raises(CapacityError, match="staging_bytes=256"):
                async with kv.load(cold_ones):
                    pass
            assert kv.get_stats().pinned == 0
            kv.check_invariants()
            await check(kv, cold_ones[:6])
            kv.check_invariants()

    async def test_staging_is_given_back(self) -> None:
        """As many loads one after the other as there are, within one block's budget."""
        kv = AsyncLRUManager(
            hot=MemoryTier(1, SIZE), cold=cold_tier(9), staging_bytes=SIZE, promote_threshold=99
        )
        async with kv:
            await kv.store(range(10), payloads(range(10)))
            for _ in range(3):
                for number in range(10):
                    await check(kv, [number])


class TestFaults:
    async def test_a_damaged_block_is_a_miss(self) -> None:
        """The caller gets an error and never the bytes; then it is gone, told and counted."""
        cold = cold_tier(8)
        async with AsyncLRUManager(hot=MemoryTier(1, SIZE), cold=cold) as kv:
            events = kv.events()
            await kv.store([1, 2, 3], payloads([1, 2, 3]))
            cold.fail("read", CorruptBlockError("bad", tier="cold"), times=1)
            with pytest.raises(CorruptBlockError):
                async with kv.load([2]):
                    pass
            assert await kv.lookup([1, 2, 3]) == 1
            await check(kv, [1, 3])
            stats = kv.get_stats()
            assert (stats.corrupt, stats.io_errors, stats.tiers["cold"].errors) == (1, 1, 1)
            kv.check_invariants()
            assert (await kv.store([2], payloads([2]))).stored == (2,)
        told = [event async for event in events]
        assert [event.sequence for event in told] == list(range(len(told)))
        failed = [event for event in told if event.kind is EventKind.FAILED]
        assert [(event.block_hashes, event.tier) for event in failed] == [((2,), "cold")]
        removed = [event for event in told if event.kind is EventKind.REMOVED]
        assert [event.block_hashes for event in removed] == [(2,)]

    async def test_a_read_error_keeps_the_block(self) -> None:
        """The disk may be back in a moment: an error now, the bytes later."""
        cold = cold_tier(8)
        async with AsyncLRUManager(hot=MemoryTier(1, SIZE), cold=cold) as kv:
            await kv.store([1, 2], payloads([1, 2]))
            cold.fail("read", OSError(errno.EIO, "I/O error"), times=1)
            with pytest.raises(TierError) as caught:
                async with kv.load([2]):
                    pass
            assert (caught.value.tier, caught.value.block_hash) == ("cold", 2)
            await check(kv, [1, 2])

    async def test_a_full_disk_costs_the_demoted_block_alone(self) -> None:
        """Hot goes on as a cache when cold takes nothing: what can't move down leaves."""
        cold = cold_tier(8)
        async with AsyncLRUManager(hot=MemoryTier(2, SIZE), cold=cold, policy="lru") as kv:
            await kv.store(["a", "b"], payloads(["a", "b"]))
            cold.fail("write", OSError(errno.ENOSPC, "No space left on device"))
            result = await kv.store(["c"], payloads(["c"]))
            assert (result.stored, result.evicted) == (("c",), ("b",))
            await check(kv, ["a", "c"])
            cold.heal()
            await kv.store(["d"], payloads(["d"]))
            assert tiers_of(kv, ["a", "b", "c", "d"]).count("cold") == 1
            kv.check_invariants()

    async def test_a_disk_that_takes_nothing_rejects(self) -> None:
        """Alone, or for what spills down: rejected with the reason, and nothing else is hurt."""
        tier = FaultyTier(RestartableTier(4, SIZE, name="cold"))
        async with LRUOffloadManager(tier) as kv:
            await kv.store(["a"], payloads(["a"]))
            tier.fail("write", OSError(errno.EIO, "I/O error"))
            result = await kv.store(["b", "a"], payloads(["b", "a"]))
            assert result.rejected == {"b": RejectReason.FAILED}
            assert result.present == ("a",)
            tier.heal()
            assert (await kv.store(["b"], payloads(["b"]))).stored == ("b",)
            await check(kv, ["a", "b"])

    async def test_a_tier_that_breaks_its_word(self) -> None:
        """A third party's tier raises what it should not: an error to its caller, no more."""

        class Rude(RestartableTier):
            async def read(
                self, slots: Sequence[int], into: Sequence[memoryview]
            ) -> list[TierError | None]:
                raise ZeroDivisionError

        async with AsyncLRUManager(hot=MemoryTier(1, SIZE), cold=Rude(4, SIZE, name="cold")) as kv:
            await kv.store([1, 2], payloads([1, 2]))
            with pytest.raises(TierError, match="ZeroDivisionError"):
                async with kv.load([2]):
                    pass
            await check(kv, [1])
            kv.check_invariants()

    async def test_a_cancelled_store_leaves_no_torn_block(self) -> None:
        """The caller reuses its buffer after the cancellation, while the disk still writes it.

        Were the block published, or found again after a restart, it would have other bytes.
        """
        inner = RestartableTier(4, SIZE, name="cold")
        tier = FaultyTier(inner)
        async with LRUOffloadManager(tier) as kv:
            buffer = bytearray(payload_for("a", SIZE))
            with tier.hang("write") as hang:
                task = asyncio.get_running_loop().create_task(kv.store(["a"], [buffer]))
                await hang.entered.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                buffer[:] = b"x" * SIZE
                hang.release()
            await eventually(lambda: kv.get_stats().pending == 0)
            assert await kv.lookup(["a"]) == 0
            kv.check_invariants()
        async with LRUOffloadManager(inner) as kv:
            if await kv.lookup(["a"]):
                await check(kv, ["a"])


class TestDurability:
    async def test_flush_counts_and_evicts_nothing(self) -> None:
        """What doesn't fit the cold tier is counted, not made room for."""
        inner = RestartableTier(3, SIZE, name="cold")
        async with AsyncLRUManager(hot=MemoryTier(4, SIZE), cold=inner) as kv:
            await kv.store(range(5), payloads(range(5)))
            before = tiers_of(kv, range(5))
            result = await kv.flush()
            assert (result.durable, result.not_durable) == (3, 2)
            assert tiers_of(kv, range(5)) == before
            kv.check_invariants()

    async def test_a_clean_close_keeps_the_hottest(self) -> None:
        """Colder blocks give way on the cold tier; recency outlives the restart."""
        inner = RestartableTier(3, SIZE, name="cold")

        def make() -> AsyncLRUManager:
            return AsyncLRUManager(hot=MemoryTier(2, SIZE), cold=inner, policy="lru")

        async with make() as kv:
            await kv.store(["c1", "c2", "c3", "c4", "c5"], payloads(["c1", "c2", "c3", "c4", "c5"]))
            await kv.touch(["c5"])
        async with make() as kv:
            assert [await kv.lookup([f"c{n}"]) for n in range(1, 6)] == [1, 1, 0, 0, 1]
            await check(kv, ["c1", "c2", "c5"])

    async def test_what_was_evicted_does_not_come_back(self) -> None:
        """Neither what was cold, nor the record that a block left in a slot it was moved from."""
        inner = RestartableTier(8, SIZE, name="cold")

        def make() -> AsyncLRUManager:
            return AsyncLRUManager(hot=MemoryTier(2, SIZE), cold=inner, promote_threshold=1)

        async with make() as kv:
            await kv.store(range(4), payloads(range(4)))
            await check(kv, [3])
            assert tiers_of(kv, [3]) == ["hot"]
            assert set(await kv.evict([3, 2, 99])) == {3, 2}
        async with make() as kv:
            assert [await kv.lookup([number]) for number in range(4)] == [1, 1, 0, 0]
            await kv.clear()
        async with make() as kv:
            assert sum([await kv.lookup([number]) for number in range(4)]) == 0

    async def test_erase_that_fails_is_told(self) -> None:
        """The blocks left, but may come back after a restart: the caller must know."""
        cold = cold_tier(8)
        async with AsyncLRUManager(hot=MemoryTier(1, SIZE), cold=cold) as kv:
            await kv.store([1, 2], payloads([1, 2]))
            cold.fail("erase", OSError(errno.EIO, "I/O error"), times=1)
            with pytest.raises(TierError):
                await kv.evict([2])
            assert await kv.lookup([2]) == 0
            assert kv.get_stats().io_errors == 1
            kv.check_invariants()
            assert await kv.evict([2]) == []  # and this time it is erased
            assert (await kv.store([2], payloads([2]))).stored == (2,)

    async def test_namespaces_come_back(self) -> None:
        """A reopened tier gives each tenant its own blocks, under the same hashes."""
        inner = RestartableTier(8, SIZE, name="cold")
        async with AsyncLRUManager(hot=MemoryTier(4, SIZE), cold=inner, namespace="m") as kv:
            await kv.store(["x"], [b"own"])
            await kv.namespace("t").store(["x"], [b"tenant's"])
        async with AsyncLRUManager(hot=MemoryTier(4, SIZE), cold=inner, namespace="m") as kv:
            async with kv.load(["x"]) as own, kv.namespace("t").load(["x"]) as tenants:
                assert (bytes(own[0]), bytes(tenants[0])) == (b"own", b"tenant's")
            assert kv.namespace("t").get_stats().tiers["cold"].blocks == 1
        kv = AsyncLRUManager(hot=MemoryTier(4, SIZE), cold=inner, namespace="t")
        async with kv, kv.load(["x"]) as lease:
            assert bytes(lease[0]) == b"tenant's"
