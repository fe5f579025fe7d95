"""Places of a disk that are bad, or have no space, cost what lies there and nothing else."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvoffload import AsyncLRUManager, DiskTier, MemoryTier, TierError, TierTimeoutError
from kvoffload.slots import Slots
from kvoffload.storage.breaker import Breaker
from kvoffload.storage.files import FileLayer
from kvoffload.storage.slabs import SlotFiles
from kvoffload.testing import FaultyFileLayer, ManualClock, payload_for
from kvoffload.types import TierState

BLOCK = 65536
SMALL = 100
RETRY_S = 10.0


@pytest.fixture
def files() -> FaultyFileLayer:
    return FaultyFileLayer()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def cold(tmp_path: Path, files: FaultyFileLayer, clock: ManualClock) -> DiskTier:
    return make(tmp_path / "cold", files, clock)


def make(
    path: Path,
    files: FileLayer,
    clock: ManualClock,
    *,
    num_blocks: int = 16,
    min_free_bytes: int = 0,
    io_timeout_s: float | None = 30.0,
) -> DiskTier:
    cold = DiskTier(
        path,
        num_blocks,
        BLOCK,
        direct_io="off",
        io_threads=2,
        io_timeout_s=io_timeout_s,
        min_free_bytes=min_free_bytes,
    )
    cold.file_layer = files
    cold.write_breaker = Breaker(3, retry_s=RETRY_S, clock=clock)
    cold.growth_breaker = Breaker(1, retry_s=RETRY_S, clock=clock)
    return cold


@asynccontextmanager
async def managed(cold: DiskTier) -> AsyncIterator[AsyncLRUManager]:
    async with AsyncLRUManager(
        hot=MemoryTier(2, BLOCK), cold=cold, policy="lru", promote_threshold=10**6
    ) as manager:
        yield manager


async def put(cold: DiskTier, *slots: int, size: int = BLOCK) -> list[TierError | None]:
    payloads = [memoryview(payload_for(slot, size)) for slot in slots]
    return await cold.write(slots, payloads, [b"k%d" % slot for slot in slots])


def number_of(outcome: TierError | None) -> int | None:
    """Return what the operating system said."""
    cause = None if outcome is None else outcome.__cause__
    return cause.errno if isinstance(cause, OSError) else None


async def seconds_until_written(cold: DiskTier, slot: int, clock: ManualClock) -> float:
    """Ask twice a second."""
    start = clock()
    while await put(cold, slot) != [None]:
        clock.advance(0.5)
        assert clock() - start < 1000
    return clock() - start


# Bad sectors


async def test_one_bad_sector_costs_one_slot_and_not_the_tier(
    cold: DiskTier, files: FaultyFileLayer, clock: ManualClock
) -> None:
    """The slot was the last one given back, so the next block was to lie there again.

    Each store failed, the breaker opened, and each of its trials went to that slot too: of 200
    stores, 198 lost a block.
    """
    async with managed(cold) as kv:
        bad = files.fail("pwritev", times=None, files="slab-*", offset=5 * BLOCK)
        lost = 0
        for number in range(100):
            await kv.store([number], [payload_for(number, BLOCK)])
            clock.advance(1)
            stats = kv.get_stats().tiers["cold"]
            assert stats.state is TierState.SERVING
        there = [number for number in range(100) if kv.locate([number])[0].tier]
        lost = 2 + 15 - len(there)  # as many would be there, but for the trials
        assert stats.blocks == len(there) - 2
        assert stats.blocks + stats.free_blocks + stats.pending_blocks == 16
        assert bad.triggered <= 1 + 100 // 16
        assert 0 <= lost <= 1
        files.heal()


async def test_a_slot_that_failed_once_comes_back_into_use(
    cold: DiskTier, files: FaultyFileLayer
) -> None:
    """It may have been a hiccup; as many blocks later as the tier has, it is tried again."""
    async with managed(cold) as kv:
        files.fail("pwritev", files="slab-*", offset=5 * BLOCK)
        for number in range(50):
            await kv.store([number], [payload_for(number, BLOCK)])
        assert kv.get_stats().tiers["cold"].blocks == 16


async def test_some_that_succeed_in_a_batch_keep_the_tier_storing(
    cold: DiskTier, files: FaultyFileLayer
) -> None:
    """Three batches with one bad place each used to stop it."""
    await cold.open()
    files.fail("pwritev", times=None, files="slab-*", offset=5 * BLOCK)
    for _ in range(5):
        good, bad, better = await put(cold, 0, 5, 10)
        assert good is better is None
        assert number_of(bad) == errno.EIO
        assert cold.state is TierState.SERVING
    await cold.close()


def test_a_slot_that_failed_is_taken_after_all_others() -> None:
    slots = Slots(4)
    first, second = slots.take(2)
    slots.failed(first)
    slots.tried(2)
    slots.give_back([first, second])
    assert (slots.free, slots.useless, slots.in_use, slots.retired) == (3, 1, 0, 0)
    assert slots.take(4) == [second, 2, 3]
    assert (slots.free, slots.useless, slots.in_use) == (0, 1, 3)
    slots.tried(1)
    assert slots.free == 0
    slots.give_back([3])
    slots.tried(1)
    assert (slots.free, slots.useless, slots.in_use) == (2, 0, 2)
    assert slots.take(1) == [3]
    assert slots.take(1) == [first]


@pytest.mark.parametrize("capacity", [1, 2, 7])
def test_slots_that_all_failed_are_all_tried_again(capacity: int) -> None:
    """Nothing is written any more then, and they would stay away for good."""
    slots = Slots(capacity)
    for _ in range(capacity):
        (slot,) = slots.take(1)
        slots.failed(slot)
        slots.tried(1)
        slots.give_back([slot])
    assert slots.free == capacity
    assert slots.useless == 0


# Breakers


async def test_growth_is_tried_again_though_blocks_keep_coming(
    cold: DiskTier, files: FaultyFileLayer, clock: ManualClock
) -> None:
    """Refusals counted as failures, so that it was never tried while anybody asked."""
    await cold.open()
    files.fill(0)
    assert number_of((await put(cold, 0))[0]) == errno.ENOSPC
    assert cold.state is TierState.FULL
    files.heal()
    assert await seconds_until_written(cold, 1, clock) <= RETRY_S
    assert cold.growth_breaker.is_closed
    await cold.close()


async def test_min_free_bytes_is_looked_at_again_though_blocks_keep_coming(
    tmp_path: Path, files: FaultyFileLayer, clock: ManualClock
) -> None:
    cold = make(tmp_path / "cold", files, clock, min_free_bytes=4 * BLOCK)
    await cold.open()
    files.fill(5 * BLOCK)
    first, second = await put(cold, 0, 1)
    assert first is None
    assert number_of(second) == errno.ENOSPC
    assert cold.state is TierState.FULL
    files.fill(6 * BLOCK)
    assert await seconds_until_written(cold, 1, clock) <= RETRY_S
    assert cold.growth_breaker.is_closed
    await cold.close()


async def test_writes_that_a_full_disk_meets_all_at_once_are_one_failure(
    cold: DiskTier, files: FaultyFileLayer, clock: ManualClock
) -> None:
    """Eight of them doubled the wait seven times, to a minute."""
    await cold.open()
    files.fill(0)
    await asyncio.gather(*(put(cold, slot) for slot in range(8)))
    files.heal()
    clock.advance(RETRY_S)
    assert await put(cold, 8) == [None]
    await cold.close()


async def test_a_hiccup_that_many_writes_wait_out_is_one_failure(
    tmp_path: Path, files: FaultyFileLayer, clock: ManualClock
) -> None:
    """Twenty that took too long doubled the wait to a minute as well."""
    cold = make(tmp_path / "cold", files, clock, io_timeout_s=0.2)
    await cold.open()
    with files.hang("pwritev", files="slab-*"):
        outcomes = await asyncio.gather(*(put(cold, slot) for slot in range(12)))
    assert {type(outcome) for (outcome,) in outcomes} == {TierTimeoutError}
    assert cold.state is TierState.READ_ONLY
    files.heal()
    for _ in range(1000):
        if number_of((await put(cold, 15))[0]) == errno.EAGAIN:
            break
        await asyncio.sleep(0.01)  # a thread is not back yet
    clock.advance(RETRY_S)
    assert await put(cold, 15) == [None]
    assert cold.write_breaker.is_closed
    await cold.close()


def test_only_the_attempt_that_was_let_through_doubles_the_wait() -> None:
    """The others were under way before the breaker opened, and say nothing of now."""
    clock = ManualClock()
    breaker = Breaker(2, retry_s=1, clock=clock)
    assert [breaker.failed() for _ in range(9)] == [False, True] + 7 * [False]
    clock.advance(1)
    assert breaker.allows()
    breaker.failed()
    breaker.failed()
    clock.advance(1)
    assert not breaker.allows()
    clock.advance(1)
    assert breaker.allows()


# Space


async def test_a_slot_of_a_small_block_has_no_space_for_a_large_one(
    cold: DiskTier, files: FaultyFileLayer
) -> None:
    """It counted as filled, so a full disk looked like a broken one: nothing was stored at all."""
    await cold.open()
    await put(cold, *range(0, 16, 2), size=SMALL)
    await put(cold, 1)
    files.fill(0)
    for slot in range(0, 16, 2):
        assert number_of((await put(cold, slot))[0]) == errno.ENOSPC
        assert cold.state is TierState.FULL
    assert cold.write_breaker.is_closed
    assert await put(cold, 1) == [None]
    files.heal()
    await cold.close()


async def test_a_gap_between_small_neighbours_may_want_space_that_there_is_not(
    cold: DiskTier, files: FaultyFileLayer
) -> None:
    """Each has its own, but in one call the rest of their slots is written too."""
    await cold.open()
    for slot in range(4):
        await put(cold, slot, size=SMALL)
    files.fill(0)
    for _ in range(4):
        assert errno.ENOSPC in map(number_of, await put(cold, 0, 1, 2, 3, size=SMALL))
        assert cold.state is TierState.FULL
    assert await put(cold, 0, size=SMALL) == [None]
    files.heal()
    await cold.close()


async def test_min_free_bytes_stay_free_where_small_blocks_give_way_to_large_ones(
    tmp_path: Path, files: FaultyFileLayer, clock: ManualClock
) -> None:
    cold = make(tmp_path / "cold", files, clock, num_blocks=32, min_free_bytes=36 * BLOCK)
    await cold.open()
    files.fill(41 * BLOCK)
    for slot in range(0, 32, 2):
        await put(cold, slot, size=SMALL)
    outcomes = [(await put(cold, slot))[0] for slot in range(0, 32, 2)]
    assert 2 <= outcomes.count(None) <= 4
    assert await asyncio.to_thread(files.free_bytes, cold.path) >= 36 * BLOCK
    await cold.close()


async def test_how_far_slots_are_filled_is_known_after_a_restart(
    cold: DiskTier, files: FaultyFileLayer
) -> None:
    await cold.open()
    await put(cold, 0, 4, size=SMALL)
    await put(cold, 1, 3, 15)
    await cold.close()
    await cold.open()
    files.fill(0)
    outcomes = await put(cold, 0, 1, 2, 3, 4, 15)
    assert [number_of(outcome) for outcome in outcomes] == [
        *(errno.ENOSPC, None, errno.ENOSPC),
        *(None, errno.ENOSPC, None),
    ]
    assert await put(cold, 4, size=SMALL) == [None]
    files.heal()
    await cold.close()


def test_space_is_told_by_slot_and_byte(tmp_path: Path) -> None:
    files = SlotFiles(FileLayer(), tmp_path, "slab-{}".format, slot_bytes=8192, slots_per_file=3)
    data = memoryview(bytes(8192))
    assert files.write([0, 2, 3, 5], [data, data, data, data[:4096]]) == [None] * 4
    assert files.filled_bytes(7).tolist() == [8192, 0, 8192, 8192, 0, 4096, 0]
    assert files.filled_bytes(5).tolist() == [8192, 0, 8192, 8192, 0]
    files.close()


def test_a_file_that_is_full_says_nothing_of_the_next_one(tmp_path: Path) -> None:
    """Whichever is looked at first; the end of one is where the other begins."""
    files = SlotFiles(FileLayer(), tmp_path, "slab-{}".format, slot_bytes=4096, slots_per_file=1)
    data = [memoryview(bytes(4096))] * 40
    assert files.write(range(40), data) == [None] * 40
    assert files.filled_bytes(40).tolist() == [4096] * 40
    files.close()
