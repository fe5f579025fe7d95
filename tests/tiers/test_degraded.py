"""A disk that can't be written to, or is full, costs what it can't do, and nothing else."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvoffload import (
    AsyncLRUManager,
    DiskTier,
    EventKind,
    MemoryTier,
    RejectReason,
    TierError,
    TierState,
    TierUnavailableError,
)
from kvoffload.storage.breaker import Breaker
from kvoffload.storage.files import FileLayer
from kvoffload.testing import payload_for

BLOCK = 4096


class Disk(FileLayer):
    """Real files on a disk that is full, or bad, when it is told to be.

    Attributes:
        error: What each write of a payload fails with, if anything.
        space: Bytes of slabs that there is space for.
        free: What the file system says is free; as much as there really is, by default.
    """

    def __init__(self) -> None:
        self.error: int | None = None
        self.space = 2**40
        self.free: int | None = None

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink().name.startswith("slab"):
            if self.error is not None:
                raise OSError(self.error, os.strerror(self.error))
            # Space is taken from the front: what was written before is there.
            wanted = sum(map(len, buffers))
            room = max(0, self.space - offset)
            if not room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if wanted > room:
                return super().pwritev(fd, [memoryview(b"".join(buffers))[:room]], offset)
        return super().pwritev(fd, buffers, offset)

    def free_bytes(self, path: Path) -> int:
        return super().free_bytes(path) if self.free is None else self.free


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def cold(tmp_path: Path, disk: Disk, time: Time) -> DiskTier:
    cold = DiskTier(tmp_path / "cold", 8, BLOCK, direct_io="off")
    cold.file_layer = disk
    cold.write_breaker = Breaker(3, retry_s=10, clock=time)
    cold.growth_breaker = Breaker(1, retry_s=10, clock=time)
    return cold


@asynccontextmanager
async def managed(cold: DiskTier, hot_blocks: int = 2) -> AsyncIterator[AsyncLRUManager]:
    async with AsyncLRUManager(
        hot=MemoryTier(hot_blocks, BLOCK), cold=cold, policy="lru", promote_threshold=1000
    ) as manager:
        yield manager


async def store(manager: AsyncLRUManager, *numbers: int) -> list[int]:
    """Store blocks one by one; return those that left every tier for it."""
    evicted: list[int] = []
    for number in numbers:
        result = await manager.store([number], [payload_for(number, BLOCK)])
        assert result.stored == (number,)
        evicted += [gone for gone in result.evicted if isinstance(gone, int)]
    return evicted


async def check(manager: AsyncLRUManager, *numbers: int) -> None:
    """Load blocks, which must all be there with their own bytes."""
    for number in numbers:
        async with manager.load([number]) as lease:
            assert bytes(lease[0]) == payload_for(number, BLOCK)


def the_books_balance(manager: AsyncLRUManager) -> bool:
    stats = manager.get_stats().tiers["cold"]
    used = stats.blocks + stats.pending_blocks + stats.retired_blocks
    return stats.free_blocks + used == stats.capacity_blocks


# A disk whose writes fail


async def test_writes_that_fail_over_and_over_are_not_tried_for_a_while(
    cold: DiskTier, disk: Disk, time: Time
) -> None:
    """The disk serves reads all the while, and is tried again when the time has come."""
    await cold.open()
    await cold.write([0], [memoryview(payload_for(0, BLOCK))], [b"k"])
    disk.error = errno.EIO
    for _ in range(3):
        assert cold.state.value == "serving"
        (outcome,) = await cold.write([1], [memoryview(bytes(BLOCK))], [b"other"])
        assert isinstance(outcome, TierError)
    assert cold.state.value == "read_only"
    disk.error = None
    (outcome,) = await cold.write([1], [memoryview(bytes(BLOCK))], [b"other"])
    assert isinstance(outcome, TierUnavailableError)
    assert "tried again later" in str(outcome)
    buffer = bytearray(BLOCK)
    assert await cold.read([0], [memoryview(buffer)]) == [None]
    assert bytes(buffer) == payload_for(0, BLOCK)
    time.now += 10
    assert await cold.write([1], [memoryview(bytes(BLOCK))], [b"other"]) == [None]
    assert cold.state.value == "serving"
    await cold.close()


async def test_a_manager_keeps_what_a_failing_disk_has(
    cold: DiskTier, disk: Disk, time: Time
) -> None:
    """Nothing is evicted from it for the sake of a block that could not be written anyway."""
    async with managed(cold) as manager:
        events = manager.events()
        await store(manager, *range(10))
        disk.error = errno.EIO
        lost = await store(manager, 10, 11, 12)
        assert len(lost) >= 3  # what was to go down, and what gave way for it in vain
        assert manager.get_stats().tiers["cold"].state is TierState.READ_ONLY
        kept = [number for number in range(13) if number not in lost]
        assert await store(manager, 13, 14) == [11, 12]
        still = [number for number in kept if number not in (11, 12)]
        await check(manager, *still, 13, 14)
        assert the_books_balance(manager)

        disk.error = None
        time.now += 10
        assert await store(manager, 15) == []
        assert manager.get_stats().tiers["cold"].state is TierState.SERVING
        await check(manager, *still, 13, 14, 15)
    told = [(event.tier, event.detail) async for event in events if event.kind is EventKind.STATE]
    assert told == [("cold", "read_only"), ("cold", "serving")]


async def test_what_only_a_failing_disk_could_take_is_rejected_for_that(
    cold: DiskTier, disk: Disk
) -> None:
    async with managed(cold) as manager:
        disk.error = errno.EROFS
        for first in (0, 10, 20, 30):
            result = await manager.store(
                range(first, first + 4), [payload_for(n, BLOCK) for n in range(first, first + 4)]
            )
        assert manager.get_stats().tiers["cold"].state is TierState.READ_ONLY
        assert result.stored == (30, 31)
        assert dict(result.rejected) == {32: RejectReason.FAILED, 33: RejectReason.FAILED}


# A disk that is full


async def test_a_full_disk_is_used_as_far_as_it_goes(
    cold: DiskTier, disk: Disk, time: Time
) -> None:
    """With space for three of eight slots, the three hold the most recent; then it gets space."""
    async with managed(cold) as manager:
        events = manager.events()
        disk.space = 3 * BLOCK
        evicted = await store(manager, *range(12))
        assert manager.get_stats().tiers["cold"].state is TierState.FULL
        assert evicted == list(range(7))
        assert await manager.lookup(range(7, 12)) == 5
        await check(manager, *range(7, 12))
        assert the_books_balance(manager)

        disk.space = 2**40
        time.now += 10
        assert await store(manager, *range(12, 17)) == []
        assert manager.get_stats().tiers["cold"].state is TierState.SERVING
        await check(manager, *range(7, 17))
        assert the_books_balance(manager)
    told = [event.detail async for event in events if event.kind is EventKind.STATE]
    assert told == ["full", "serving"]


async def test_what_does_not_fit_a_full_disk_in_one_call(cold: DiskTier, disk: Disk) -> None:
    """Each block is stored or rejected, and those stored are there."""
    async with managed(cold) as manager:
        disk.space = 3 * BLOCK
        numbers = list(range(9))
        result = await manager.store(numbers, [payload_for(n, BLOCK) for n in numbers])
        assert [*result.stored, *result.rejected] == numbers
        assert result.stored == (0, 1, 2, 3, 4)
        assert set(result.rejected.values()) == {RejectReason.FULL}
        await check(manager, *range(5))
        assert the_books_balance(manager)
        result = await manager.store([20], [payload_for(20, BLOCK)])
        assert result.stored == (20,)
        await check(manager, 20)


async def test_what_must_stay_free_stays_free(tmp_path: Path, disk: Disk, time: Time) -> None:
    """Slots that have their space are written on, new ones are not begun."""
    cold = DiskTier(tmp_path / "cold", 8, BLOCK, min_free_bytes=100 * BLOCK, direct_io="off")
    cold.file_layer = disk
    cold.growth_breaker = Breaker(1, retry_s=10, clock=time)
    disk.free = 102 * BLOCK
    payloads = [memoryview(payload_for(n, BLOCK)) for n in range(3)]
    await cold.open()
    outcomes = await cold.write([0, 1, 2], payloads, [b"0", b"1", b"2"])
    assert outcomes[:2] == [None, None]
    assert isinstance(outcomes[2], TierUnavailableError)
    assert "min_free_bytes=409600" in str(outcomes[2])
    disk.free = 50 * BLOCK
    assert await cold.write([1, 0], payloads[:2], [b"x", b"y"]) == [None, None]
    assert cold.state is TierState.FULL
    await cold.close()

    # A restart knows which slots have their space.
    again = DiskTier(tmp_path / "cold", 8, BLOCK, min_free_bytes=100 * BLOCK, direct_io="off")
    again.file_layer = disk
    await again.open()
    await again.erase([0])
    outcomes = await again.write([0, 5], payloads[:2], [b"z", b"new"])
    assert outcomes[0] is None
    assert outcomes[1] is not None
    await again.close()


async def test_many_writers_together_leave_what_must_stay_free(tmp_path: Path) -> None:
    """Each looks at what is free before the others have taken theirs."""

    class Crowd(Disk):
        """Eleven blocks are free, and nobody writes before all who may have looked."""

        def __init__(self) -> None:
            super().__init__()
            self.free = 11 * BLOCK
            self.all_looked = threading.Barrier(5, action=self.let_pass)
            self.passing = False

        def let_pass(self) -> None:
            self.passing = True

        def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
            if Path(f"/proc/self/fd/{fd}").readlink().name.startswith("slab"):
                if not self.passing:
                    self.all_looked.wait(20)
                assert self.free is not None
                self.free -= sum(map(len, buffers))
            return super().pwritev(fd, buffers, offset)

    cold = DiskTier(
        tmp_path / "cold", 64, BLOCK, min_free_bytes=BLOCK, direct_io="off", io_threads=8
    )
    cold.file_layer = Crowd()
    cold.growth_breaker = Breaker(1000)
    await cold.open()
    outcomes = await asyncio.gather(
        *(
            cold.write([slot, slot + 1], [memoryview(bytes(BLOCK))] * 2, [b"%d" % slot] * 2)
            for slot in range(0, 16, 2)
        )
    )
    assert sum(outcome is None for batch in outcomes for outcome in batch) == 10
    await cold.close()


# A directory that is gone


async def test_nothing_is_called_durable_in_a_directory_that_was_removed(tmp_path: Path) -> None:
    """Its open files live on until the process ends, and with it goes what a flush promised."""
    cold = DiskTier(tmp_path / "cold", 8, BLOCK)
    await cold.open()
    payload = memoryview(payload_for(0, BLOCK))
    assert await cold.write([0], [payload], [b"k"]) == [None]
    await asyncio.to_thread(shutil.rmtree, tmp_path / "cold")
    with pytest.raises(TierError, match="removed while it was open"):
        await cold.flush()
    (outcome,) = await cold.write([1], [payload], [b"other"])
    assert isinstance(outcome, TierError)
    assert str(tmp_path / "cold") in str(outcome)
    buffer = bytearray(BLOCK)
    assert await cold.read([0], [memoryview(buffer)]) == [None]
    assert bytes(buffer) == payload_for(0, BLOCK)
    with pytest.raises(TierError, match="removed"):
        await cold.close()
    again = DiskTier(tmp_path / "cold", 8, BLOCK)
    assert await again.open() == []
    await again.close()
