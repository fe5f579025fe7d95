"""The kit at work: what managers do when their tiers fail, hang, lie or go away."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import anyio
import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    BlockState,
    CapacityError,
    CorruptBlockError,
    EventKind,
    LoadTimeoutError,
    LRUOffloadManager,
    MemoryTier,
    PrepareStoreOutput,
    RejectReason,
    StoreResult,
    TierError,
    TierUnavailableError,
)
from kvoffload.testing import (
    CountingTier,
    FaultyTier,
    RestartableTier,
    eventually,
    payload_for,
    small_manager,
)

SIZE = 64


def payloads(block_hashes: Sequence[BlockHash]) -> list[bytes]:
    return [payload_for(block_hash, SIZE) for block_hash in block_hashes]


def cold_tier(num_blocks: int = 8) -> FaultyTier:
    return FaultyTier(MemoryTier(num_blocks, SIZE, name="cold"))


async def store(kv: AsyncLRUManager | LRUOffloadManager, *block_hashes: BlockHash) -> None:
    for block_hash in block_hashes:
        result = await kv.store([block_hash], [payload_for(block_hash, SIZE)])
        assert result.rejected == {}


def tier_of(kv: AsyncLRUManager, block_hash: BlockHash) -> str | None:
    return kv.locate([block_hash])[0].tier


# Failing


async def test_a_write_that_fails_rejects_its_block() -> None:
    """The only tier reports ENOSPC for one slot of the batch: that block alone is rejected."""
    tier = FaultyTier(MemoryTier(4, SIZE))
    async with small_manager("lru", hot=tier) as kv:
        tier.fail("write", OSError(errno.ENOSPC, "disk full"), slots=[1])
        hashes = ["a", "b", "c"]
        result = await kv.store(hashes, payloads(hashes))
        assert len(result.stored) == 2
        assert list(result.rejected.values()) == [RejectReason.FAILED]
        [failed] = result.rejected
        assert kv.locate([failed])[0].state is BlockState.ABSENT
        stats = kv.get_stats()
        assert (stats.io_errors, stats.rejected, stats.pending) == (1, 1, 0)
        async with kv.load(result.stored) as lease:
            assert [view.tobytes() for view in lease] == payloads(result.stored)
        await store(kv, failed)


async def test_a_read_that_fails_is_an_error_and_leaves_the_block() -> None:
    """EIO once: the load raises, nothing stays pinned, and the next load has it."""
    tier = FaultyTier(MemoryTier(4, SIZE))
    async with small_manager("lru", hot=tier) as kv:
        await store(kv, "a", "b")
        events = kv.events()
        tier.fail("read", OSError(errno.EIO, "input/output error"))
        with pytest.raises(TierError) as caught:
            async with kv.load(["a", "b"]):
                pytest.fail("a lease on bytes that could not be read")
        assert not isinstance(caught.value, CorruptBlockError)
        assert kv.get_stats().pinned == 0
        assert (await anext(events)).kind is EventKind.FAILED
        async with kv.load(["a", "b"]) as lease:
            assert [view.tobytes() for view in lease] == payloads(["a", "b"])


async def test_a_damaged_block_is_dropped_and_becomes_a_miss() -> None:
    """A bit flipped on the way to the disk: never other bytes, then a miss, then stored anew."""
    tier = FaultyTier(MemoryTier(4, SIZE))
    async with small_manager("lru", hot=tier) as kv:
        tier.flip_byte("write")
        await store(kv, "a")
        await store(kv, "b")
        events = kv.events()
        with pytest.raises(CorruptBlockError) as caught:
            async with kv.load(["b", "a"]):
                pytest.fail("a lease on damaged bytes")
        assert caught.value.block_hash == "a"
        assert await kv.lookup(["a"]) == 0
        assert kv.get_stats().corrupt == 1
        assert EventKind.FAILED in {(await anext(events)).kind, (await anext(events)).kind}
        await store(kv, "a")
        async with kv.load(["a", "b"]) as lease:
            assert [view.tobytes() for view in lease] == payloads(["a", "b"])


async def test_a_demotion_that_fails_loses_its_block_alone() -> None:
    """The cold tier is out of order: the new block is stored, the old one is gone, counted."""
    cold = cold_tier()
    async with small_manager(hot=2, cold=cold) as kv:
        await store(kv, "a", "b")
        cold.fail("write", OSError(errno.EIO, "gone"))
        result = await kv.store(["c"], payloads(["c"]))
        assert result.stored == ("c",)
        assert result.evicted == ("a",)
        assert kv.get_stats().io_errors == 1
        await store(kv, "d")
        assert tier_of(kv, "b") == "cold"


async def test_a_tier_that_can_not_be_opened() -> None:
    """The error comes out, and the tiers opened before it are closed again."""
    hot = CountingTier(MemoryTier(2, SIZE))
    cold = cold_tier()
    cold.fail("open", TierUnavailableError)
    with pytest.raises(TierUnavailableError):
        async with small_manager(hot=hot, cold=cold):
            pytest.fail("entered without its cold tier")
    assert hot.calls["open"] == 1
    assert hot.calls["close"] >= 1


async def test_a_tier_that_can_not_be_closed() -> None:
    """The other tiers are closed all the same."""
    hot = FaultyTier(MemoryTier(2, SIZE))
    hot.fail("close", OSError(errno.EIO, "gone"))
    cold = CountingTier(cold_tier())
    with pytest.raises(TierError):
        async with small_manager(hot=hot, cold=cold) as kv:
            await store(kv, "a")
    assert cold.calls["close"] == 1


async def test_a_bug_in_a_tier_does_not_kill_the_manager() -> None:
    """A write breaks with an exception that no tier should raise; the caller is told, no more."""
    tier = FaultyTier(MemoryTier(4, SIZE))
    async with small_manager("lru", hot=tier) as kv:
        await store(kv, "a")
        tier.fail("write", ZeroDivisionError("a bug"))
        try:
            result = await kv.store(["b"], payloads(["b"]))
        except Exception:  # noqa: BLE001 - an error or a rejection, both tell the caller
            pass
        else:
            assert set(result.rejected) == {"b"}
        await eventually(lambda: kv.get_stats().pending == 0)
        assert kv.locate(["b"])[0].state is BlockState.ABSENT
        await store(kv, "b")
        tier.fail("read", ZeroDivisionError("a bug"))
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is, it must not hang
            async with kv.load(["a"]):
                pytest.fail("a lease on bytes that were not read")
        assert kv.get_stats().pinned == 0
        async with kv.load(["a", "b"]) as lease:
            assert [view.tobytes() for view in lease] == payloads(["a", "b"])


# Hanging


async def test_a_load_that_takes_too_long() -> None:
    """The disk hangs: after the deadline the caller recomputes, and a later load finds it."""
    cold = cold_tier()
    async with small_manager(hot=1, cold=cold) as kv:
        await store(kv, "a", "b")
        assert tier_of(kv, "a") == "cold"
        with cold.hang("read") as hang:
            with pytest.raises(LoadTimeoutError):
                async with kv.load(["a"], timeout_s=0.01):
                    pytest.fail("a lease on bytes that were not read")
            assert hang.entered.is_set()
            async with kv.load(["b"]) as lease:  # what is hot is not held up
                assert lease[0] == payload_for("b", SIZE)
        await eventually(lambda: kv.get_stats().pinned == 0)
        async with kv.load(["a"], timeout_s=5.0) as lease:
            assert lease[0] == payload_for("a", SIZE)


async def test_many_callers_for_one_cold_block_cause_one_read() -> None:
    """And one of them that gives up disturbs none of the others."""
    cold = CountingTier(cold_tier())
    faulty = cold.inner
    assert isinstance(faulty, FaultyTier)
    got: list[bytes] = []
    impatient = anyio.CancelScope()

    async def load(kv: AsyncLRUManager) -> None:
        async with kv.load(["a"]) as lease:
            got.append(lease[0].tobytes())

    async def give_up(kv: AsyncLRUManager) -> None:
        with impatient:
            await load(kv)

    async with small_manager(hot=1, cold=cold) as kv:
        await store(kv, "a", "b")
        cold.reset()
        hang = faulty.hang("read")
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(load, kv)
            tasks.start_soon(give_up, kv)
            for _ in range(5):
                tasks.start_soon(load, kv)
            await hang.entered.wait()
            await anyio.wait_all_tasks_blocked()
            impatient.cancel()
            await anyio.wait_all_tasks_blocked()
            assert impatient.cancelled_caught
            assert got == []
            hang.release()
        assert got == [payload_for("a", SIZE)] * 10
        assert (cold.calls["read"], cold.blocks["read"]) == (1, 1)
        assert kv.get_stats().pinned == 0


async def test_the_first_of_many_callers_may_give_up_too() -> None:
    """The read belongs to the manager, not to the caller that happened to start it."""
    cold = CountingTier(cold_tier())
    faulty = cold.inner
    assert isinstance(faulty, FaultyTier)
    got: list[bytes] = []
    first = anyio.CancelScope()

    async def load_first(kv: AsyncLRUManager) -> None:
        with first:
            async with kv.load(["a"]):
                pytest.fail("cancelled before the read ended")

    async def load(kv: AsyncLRUManager) -> None:
        async with kv.load(["a"]) as lease:
            got.append(lease[0].tobytes())

    async with small_manager(hot=1, cold=cold) as kv:
        await store(kv, "a", "b")
        cold.reset()
        hang = faulty.hang("read")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load_first, kv)
            await hang.entered.wait()
            tasks.start_soon(load, kv)
            await anyio.wait_all_tasks_blocked()
            first.cancel()
            await anyio.wait_all_tasks_blocked()
            hang.release()
        assert got == [payload_for("a", SIZE)]
        assert cold.calls["read"] == 1


async def test_a_block_being_stored_is_pending_for_others() -> None:
    """Two callers store the same block at once: one write, and the other is told at once."""
    tier = FaultyTier(MemoryTier(4, SIZE))
    counting = CountingTier(tier)
    async with small_manager("lru", hot=counting) as kv:
        with tier.hang("write") as hang:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(store, kv, "a")
                await hang.entered.wait()
                assert kv.locate(["a"])[0].state is BlockState.PENDING
                assert await kv.lookup(["a"]) == 0
                result = await kv.store(["a"], payloads(["a"]))
                assert result.present == ("a",)
                hang.release()
        assert counting.calls["write"] == 1
        assert await kv.lookup(["a"]) == 1


async def test_a_block_that_became_ready_meanwhile_is_no_victim_of_its_call() -> None:
    """A store names a block that another caller is storing, and has to wait for room.

    The other caller completes it while the first one waits. Whatever gives way then, it is not a
    block that the waiting call names: it would be both present and evicted.
    """
    cold = cold_tier(1)
    async with small_manager(hot=2, cold=cold) as kv:
        await store(kv, "a")
        await kv.prepare_store(["named"])
        results: list[StoreResult] = []

        async def store_both() -> None:
            hashes = ["named", "new"]
            results.append(await kv.store(hashes, payloads(hashes)))

        with cold.hang("write") as hang:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(store, kv, "b")  # pushes "a" down, which hangs
                await hang.entered.wait()
                tasks.start_soon(store_both)
                await anyio.wait_all_tasks_blocked()
                assert results == []
                await kv.complete_store(["named"])
                await anyio.wait_all_tasks_blocked()
                hang.release()
        [result] = results
        assert "named" in result.present
        assert "named" not in result.evicted
        assert kv.locate(["named"])[0].state is BlockState.READY


async def test_a_prepared_call_does_not_evict_what_it_named_either() -> None:
    """The same in two phases: filtered as pending, it must not be told as evicted."""
    cold = cold_tier(1)
    async with small_manager(hot=2, cold=cold) as kv:
        await store(kv, "a")
        await kv.prepare_store(["named"])
        outputs: list[PrepareStoreOutput | None] = []

        async def prepare_both() -> None:
            outputs.append(await kv.prepare_store(["named", "new"]))

        with cold.hang("write") as hang:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(store, kv, "b")  # pushes "a" down, which hangs
                await hang.entered.wait()
                tasks.start_soon(prepare_both)
                await anyio.wait_all_tasks_blocked()
                await kv.complete_store(["named"])
                await anyio.wait_all_tasks_blocked()
                hang.release()
        [output] = outputs
        if output is not None:
            assert output.block_hashes_to_store == ("new",)
            assert "named" not in output.block_hashes_evicted
            await kv.complete_store(["new"], success=False)
        assert kv.locate(["named"])[0].state is BlockState.READY


async def test_a_request_waits_for_the_block_that_another_one_stores() -> None:
    tier = FaultyTier(MemoryTier(4, SIZE))
    async with small_manager("lru", hot=tier) as kv:
        hits: list[int] = []

        async def wait() -> None:
            async with kv.request(["a", "b"], wait_pending_s=3600.0) as request:
                hits.append(request.hit)

        with tier.hang("write") as hang:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(store, kv, "a")
                await hang.entered.wait()
                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                assert hits == []
                hang.release()
        assert hits == [1]


async def test_a_demotion_is_called_off_by_a_load() -> None:
    """A block on its way down is no miss, and needs no read: the lease shows where it was."""
    cold = CountingTier(cold_tier())
    faulty = cold.inner
    assert isinstance(faulty, FaultyTier)
    async with small_manager(hot=1, cold=cold) as kv:
        await store(kv, "a")
        with faulty.hang("write") as hang:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(kv.store, ["b"], payloads(["b"]))
                await hang.entered.wait()
                assert await kv.lookup(["a"]) == 1
                assert kv.locate(["a"])[0].state is BlockState.READY
                async with kv.load(["a"]) as lease:
                    assert lease[0] == payload_for("a", SIZE)
                    hang.release()
                    await anyio.wait_all_tasks_blocked()
                    assert lease[0] == payload_for("a", SIZE)
        assert cold.calls["read"] == 0
        assert await kv.lookup(["a"]) == 1
        await eventually(lambda: kv.get_stats().pinned == 0)


async def test_evict_waits_for_a_block_on_its_way_down() -> None:
    """It is gone from both tiers afterwards, whichever it had reached."""
    cold = cold_tier()
    gone: list[BlockHash] = []

    async def evict(kv: AsyncLRUManager) -> None:
        gone.extend(await kv.evict(["a"]))

    async with small_manager(hot=1, cold=cold) as kv:
        await store(kv, "a")
        with cold.hang("write") as hang:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(store, kv, "b")
                await hang.entered.wait()
                tasks.start_soon(evict, kv)
                await anyio.wait_all_tasks_blocked()
                assert gone == []
                hang.release()
        assert gone == ["a"]
        assert kv.locate(["a", "b"])[0].state is BlockState.ABSENT
        assert await kv.lookup(["b"]) == 1
        await eventually(lambda: kv.get_stats().tiers["cold"].free_blocks == 8)


async def test_cancelling_a_store_that_hangs_leaks_nothing() -> None:
    """The client goes away while the disk hangs; once it is back, every slot is accounted for."""
    tier = FaultyTier(MemoryTier(4, SIZE))
    async with small_manager("lru", hot=tier) as kv:
        with tier.hang("write") as hang:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(store, kv, "a", "b")
                await hang.entered.wait()
                tasks.cancel_scope.cancel()
            stats = kv.get_stats().tiers["hot"]
            assert stats.free_blocks + stats.pending_blocks + stats.blocks == 4
        await eventually(lambda: kv.get_stats().pending == 0)
        stats = kv.get_stats().tiers["hot"]
        assert stats.free_blocks + stats.blocks == 4
        await store(kv, "a", "b", "c", "d")


# Too much at once


async def test_a_load_larger_than_the_memory_for_it() -> None:
    """Refused at once rather than waiting for itself, and nothing stays pinned."""
    hashes = [f"block{number}" for number in range(8)]
    kv = AsyncLRUManager(hot=MemoryTier(2, SIZE), cold=cold_tier(), staging_bytes=3 * SIZE)
    async with kv:
        await store(kv, *hashes)
        cold = [each for each in hashes if tier_of(kv, each) == "cold"]
        hot = [each for each in hashes if tier_of(kv, each) == "hot"]
        assert len(cold) == 6
        async with kv.load(hot):
            with pytest.raises(CapacityError):
                async with kv.load(cold):
                    pytest.fail("more blocks in memory than there is memory")
            assert kv.get_stats().pinned == len(hot)
            async with kv.load(cold[:3]) as lease:
                assert [view.tobytes() for view in lease] == payloads(cold[:3])
        assert kv.get_stats().pinned == 0
        async with kv.load(cold[3:]) as lease:
            assert [view.tobytes() for view in lease] == payloads(cold[3:])


# Going away


async def test_a_crash_keeps_what_was_demoted_and_an_eviction_keeps_away() -> None:
    """`kill -9`: what lay on disk comes back, what was evicted does not, nor what lay in memory."""
    cold = RestartableTier(8, SIZE)
    async with small_manager(hot=1, cold=cold) as kv:
        await store(kv, "a", "b", "c")
        await kv.evict(["a"])
        crashed = cold.after_crash()
    async with small_manager(hot=1, cold=crashed) as kv:
        states = [location.state for location in kv.locate(["a", "b", "c"])]
        assert states == [BlockState.ABSENT, BlockState.READY, BlockState.ABSENT]
        async with kv.load(["b"]) as lease:
            assert lease[0] == payload_for("b", SIZE)


async def test_a_flush_outlasts_a_power_loss() -> None:
    """And so does an eviction before it."""
    cold = RestartableTier(8, SIZE)
    async with small_manager(hot=4, cold=cold) as kv:
        await store(kv, "a", "b", "c")
        await kv.flush()
        await kv.evict(["a"])
        too_early = cold.after_crash(power_loss=True)
        await kv.flush()
        crashed = cold.after_crash(power_loss=True)
    async with small_manager(hot=4, cold=too_early) as kv:
        assert await kv.lookup(["b", "c"]) == 2
    async with small_manager(hot=4, cold=crashed) as kv:
        assert await kv.lookup(["b", "c"]) == 2
        assert kv.locate(["a"])[0].state is BlockState.ABSENT
