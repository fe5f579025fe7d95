"""A tier is closed while calls wait for others: it closes, and they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvoffload import ClosedError, DiskTier, TierError
from kvoffload.testing import FaultyFileLayer, FileHang, payload_for

BLOCK = 4096


@pytest.fixture
def files() -> FaultyFileLayer:
    return FaultyFileLayer()


def make(path: Path, files: FaultyFileLayer, io_threads: int, fsync: str = "flush") -> DiskTier:
    tier = DiskTier(path / "cold", 8, BLOCK, io_threads=io_threads, direct_io="off", fsync=fsync)
    tier.file_layer = files
    tier.close_timeout_s = 10.0
    return tier


async def put(tier: DiskTier, *slots: int) -> list[TierError | None]:
    payloads = [memoryview(payload_for(slot, BLOCK)) for slot in slots]
    return await tier.write(slots, payloads, [b"k%d" % slot for slot in slots])


async def get(tier: DiskTier, slot: int) -> TierError | bytes:
    buffer = bytearray(BLOCK)
    (outcome,) = await tier.read([slot], [memoryview(buffer)])
    return outcome or bytes(buffer)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def cancelled_read_of_slot_0(tier: DiskTier, files: FaultyFileLayer) -> FileHang:
    """Leave a thread in a read whose caller is gone."""
    hang = files.hang("preadv", files="slab-*", offset=0, times=1)
    reading = asyncio.create_task(get(tier, 0))
    await hang.entered.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    return hang


@pytest.mark.parametrize("io_threads", [1, 2])
async def test_a_write_that_waits_for_a_cancelled_read_is_refused_at_close(
    tmp_path: Path, files: FaultyFileLayer, io_threads: int
) -> None:
    """The tier was closed, and then the write's turn came: it found the files closed under it."""
    tier = make(tmp_path, files, io_threads)
    await tier.open()
    await put(tier, 0, 1)
    hang = await cancelled_read_of_slot_0(tier, files)
    writing = asyncio.create_task(put(tier, 0))
    await turns()
    closing = asyncio.create_task(tier.close())
    await turns()
    hang.release()
    await closing
    with pytest.raises(ClosedError, match="closed meanwhile"):
        await writing
    again = make(tmp_path, files, io_threads)
    assert [block.slot for block in await again.open()] == [0, 1]
    await again.close()


async def test_a_write_is_not_made_behind_the_call_that_closes(
    tmp_path: Path, files: FaultyFileLayer
) -> None:
    """With one thread, that one waited for the write, which waited for the thread: for ever.

    Another read between the two kept the closing call from beginning until the write was queued.
    """
    tier = make(tmp_path, files, 1)
    await tier.open()
    await put(tier, 0, 1)
    hang = await cancelled_read_of_slot_0(tier, files)
    later = files.hang("preadv", files="slab-*", offset=BLOCK)
    reading = asyncio.create_task(get(tier, 1))
    await turns()
    writing = asyncio.create_task(put(tier, 0))
    await turns()
    closing = asyncio.create_task(tier.close())
    await turns()
    hang.release()
    await later.entered.wait()
    with pytest.raises(ClosedError):
        await writing
    later.release()
    await closing
    assert await reading == payload_for(1, BLOCK)


@pytest.mark.parametrize(
    "call", [lambda tier: tier.flush(), lambda tier: put(tier, 2), lambda tier: tier.erase([1])]
)
async def test_what_waits_for_a_sync_is_refused_at_close(
    tmp_path: Path, files: FaultyFileLayer, call: Callable[[DiskTier], Awaitable[object]]
) -> None:
    tier = make(tmp_path, files, 2, fsync="always")
    await tier.open()
    await put(tier, 1)
    hang = files.hang("sync", files="slab-*")
    writing = asyncio.create_task(put(tier, 0))
    await hang.entered.wait()
    waiting = asyncio.ensure_future(call(tier))
    await turns()
    closing = asyncio.create_task(tier.close())
    await turns()
    hang.release()
    await closing
    assert await writing == [None]
    with pytest.raises(ClosedError):
        await waiting
