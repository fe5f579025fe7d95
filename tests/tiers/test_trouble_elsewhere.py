"""One operation hangs or fails: what doesn't need it goes on, and takes no thread to find out."""

from __future__ import annotations

import asyncio
import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvoffload import DiskTier, TierError, TierTimeoutError, TierUnavailableError
from kvoffload.storage import format as fmt
from kvoffload.storage.breaker import Breaker
from kvoffload.storage.files import FileLayer
from kvoffload.storage.slabs import SlotFiles
from kvoffload.testing import FaultyFileLayer, ManualClock, eventually, payload_for
from kvoffload.types import TierState

BLOCK = 4096
GROUP = 2**21
LIMIT_S = 0.3


@pytest.fixture
def files() -> FaultyFileLayer:
    return FaultyFileLayer()


def make(
    path: Path,
    files: FaultyFileLayer,
    *,
    num_blocks: int = 8,
    block_bytes: int = BLOCK,
    fsync: str = "flush",
    io_threads: int = 4,
    io_timeout_s: float | None = LIMIT_S,
    min_free_bytes: int = 0,
) -> DiskTier:
    tier = DiskTier(
        path / "cold",
        num_blocks,
        block_bytes,
        fsync=fsync,
        direct_io="off",
        io_threads=io_threads,
        io_timeout_s=io_timeout_s,
        min_free_bytes=min_free_bytes,
    )
    tier.file_layer = files
    return tier


async def put(tier: DiskTier, *slots: int, size: int = BLOCK) -> list[TierError | None]:
    payloads = [memoryview(payload_for(slot, size)) for slot in slots]
    return await tier.write(slots, payloads, [b"k%d" % slot for slot in slots])


async def get(tier: DiskTier, slot: int, size: int = BLOCK) -> TierError | bytes:
    buffer = bytearray(size)
    (outcome,) = await tier.read([slot], [memoryview(buffer)])
    return outcome or bytes(buffer)


async def closed(tier: DiskTier) -> None:
    """Close once the threads that hung are back."""
    while True:
        try:
            await tier.close()
        except TierError:
            await asyncio.sleep(0.01)
        else:
            return


async def all_idle(tier: DiskTier) -> None:
    """Wait until a batch would find all threads."""
    session = tier._session
    assert session is not None
    threads = session.threads
    await eventually(lambda: threads._idle == threads._workers)


async def raises_timeout(tier: DiskTier) -> None:
    with pytest.raises(TierTimeoutError):
        await tier.flush()


async def test_a_flush_that_hangs_takes_one_thread(tmp_path: Path, files: FaultyFileLayer) -> None:
    """Each flush after it took one more to wait in, until reads of a good disk were refused."""
    tier = make(tmp_path, files)
    await tier.open()
    await put(tier, 0)
    with files.hang("sync", files="slab-*"):
        for _ in range(4):
            await raises_timeout(tier)
            assert await get(tier, 0) == payload_for(0, BLOCK)
    await closed(tier)


async def test_flushes_at_once_take_one_thread(tmp_path: Path, files: FaultyFileLayer) -> None:
    """Cancelled ones too: reads find a thread from the start, not after the first time limit."""
    tier = make(tmp_path, files, io_timeout_s=60.0)
    await tier.open()
    await put(tier, 0)
    with files.hang("sync", files="slab-*") as hang:
        flushes = [asyncio.create_task(tier.flush()) for _ in range(4)]
        await hang.entered.wait()
        async with asyncio.timeout(20):
            for _ in range(8):  # each gave way to a flush that was queued before
                assert await get(tier, 0) == payload_for(0, BLOCK)
            for flush in flushes[:2]:
                flush.cancel()
            flushes.append(asyncio.create_task(tier.flush()))
            assert await get(tier, 0) == payload_for(0, BLOCK)
    results = await asyncio.gather(*flushes, return_exceptions=True)
    assert [type(result) for result in results[:2]] == [asyncio.CancelledError] * 2
    assert results[2:] == [None] * 3
    await tier.close()


async def test_writes_whose_sync_hangs_take_one_thread(
    tmp_path: Path, files: FaultyFileLayer
) -> None:
    """With `fsync="always"` each write syncs, and so does each erasure."""
    tier = make(tmp_path, files, fsync="always")
    clock = ManualClock()
    tier.write_breaker = Breaker(3, clock=clock)
    await tier.open()
    await put(tier, 0, 1)
    with files.hang("sync", files="slab-*"):
        for slot in range(2, 7):
            (outcome,) = await put(tier, slot)
            assert isinstance(outcome, TierTimeoutError)
            assert await get(tier, 0) == payload_for(0, BLOCK)
            clock.advance(100.0)
        with pytest.raises(TierTimeoutError):
            await tier.erase([1])
        assert await get(tier, 0) == payload_for(0, BLOCK)
    await closed(tier)


async def test_a_file_that_can_not_be_opened_keeps_nobody_from_others(
    tmp_path: Path, files: FaultyFileLayer
) -> None:
    """It was opened under the lock that every other operation takes for a moment."""
    block_bytes = 2**22
    second = fmt.slots_per_slab(block_bytes)
    tier = make(tmp_path, files, num_blocks=2 * second, block_bytes=block_bytes)
    await tier.open()
    await put(tier, 0)
    with files.hang("open", files="slab-000001") as hang:
        writing = asyncio.create_task(put(tier, second))
        await hang.entered.wait()
        assert await get(tier, 0) == payload_for(0, BLOCK)
        (outcome,) = await writing
        assert isinstance(outcome, TierTimeoutError)
        assert await put(tier, 1) == [None]
    await closed(tier)


def test_a_file_that_can_not_be_closed_keeps_nobody_from_others(tmp_path: Path) -> None:
    """One that was idle too long: on some file systems to close it is to write it back."""
    closing, go_on = threading.Event(), threading.Event()

    class Layer(FileLayer):
        def close(self, fd: int) -> None:
            closing.set()
            assert go_on.wait(30)
            super().close(fd)

    files = SlotFiles(
        Layer(), tmp_path, "part-{}".format, slot_bytes=8, slots_per_file=1, max_open=1
    )
    with ThreadPoolExecutor(1) as threads:
        assert files.write([0], [memoryview(b"a" * 8)]) == [None]
        writing = threads.submit(files.write, [1], [memoryview(b"b" * 8)])
        assert closing.wait(30)
        buffer = bytearray(8)
        reading = threading.Thread(target=files.read, args=([1], [memoryview(buffer)]), daemon=True)
        reading.start()
        reading.join(10)
        go_on.set()
        assert not reading.is_alive(), "it waited for the file that is being closed"
        assert writing.result(30) == [None]
    files.close()


def test_two_threads_open_a_file_once(tmp_path: Path) -> None:
    """Or one of the descriptors would stay open for ever."""
    opened: list[int] = []
    both = threading.Barrier(2)

    class Layer(FileLayer):
        def open(self, path: Path, flags: int) -> int:
            fd = super().open(path, flags)
            opened.append(fd)
            return fd

    files = SlotFiles(Layer(), tmp_path, "part-{}".format, slot_bytes=8, slots_per_file=2)

    def write(slot: int) -> list[OSError | None]:
        both.wait(30)
        return files.write([slot], [memoryview(b"a" * 8)])

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(write, [0, 1])) == [[None], [None]]
    assert len(opened) == 1
    files.close()


async def test_every_thread_of_a_stuck_batch_counts(tmp_path: Path, files: FaultyFileLayer) -> None:
    """All four threads are in one batch: to those who come after, none is left.

    They counted as one stuck call, and everybody waited out a time limit of their own.
    """
    tier = make(tmp_path, files, num_blocks=8, block_bytes=GROUP, io_timeout_s=1.0)
    await tier.open()
    await put(tier, *range(6), size=GROUP)
    await all_idle(tier)
    with files.hang("preadv", files="slab-*") as hang:
        views = [memoryview(bytearray(GROUP)) for _ in range(4)]
        outcomes = await tier.read(range(4), views)
        assert [type(outcome) for outcome in outcomes] == [TierTimeoutError] * 4
        assert hang.triggered == 4
        error = await get(tier, 4, GROUP)
        assert "every thread is stuck" in str(error)
    await closed(tier)


async def test_a_batch_stuck_in_one_of_its_threads_leaves_others_the_rest(
    tmp_path: Path, files: FaultyFileLayer
) -> None:
    """And once the stuck ones are back, they count no more."""
    tier = make(tmp_path, files, num_blocks=8, block_bytes=GROUP, io_timeout_s=1.0)
    await tier.open()
    await put(tier, *range(6), size=GROUP)
    with files.hang("preadv", files="slab-*", offset=0):
        views = [memoryview(bytearray(GROUP)) for _ in range(4)]
        outcomes = await tier.read(range(4), views)
        assert isinstance(outcomes[0], TierTimeoutError)
        assert await get(tier, 4, GROUP) == payload_for(4, GROUP)
        session = tier._session
        assert session is not None
        assert session.stuck_threads
    await eventually(lambda: not session.stuck_threads)
    assert await get(tier, 0, GROUP) == payload_for(0, GROUP)
    await tier.close()


async def test_a_cancelled_call_is_watched_still(tmp_path: Path, files: FaultyFileLayer) -> None:
    """Callers with deadlines of their own cancelled what was stuck, and nobody knew that it was.

    Whoever came after waited out a time limit for a thread, and a write to the slot did so for
    the read to come back; the close waited as long.
    """
    tier = make(tmp_path, files, io_threads=2)
    await tier.open()
    await put(tier, 0, 1)
    with files.hang("preadv", files="slab-*", offset=0) as hang:
        readings = [asyncio.create_task(get(tier, 0)) for _ in range(2)]
        await eventually(lambda: hang.triggered == 2)
        for reading in readings:
            reading.cancel()
        await asyncio.wait(readings)
        (waiting,) = await put(tier, 0)
        assert isinstance(waiting, TierTimeoutError)
        assert "stuck" in str(waiting)
        session = tier._session
        assert session is not None
        await eventually(lambda: session.stuck_threads == 2)
        error = await get(tier, 1)
        assert "every thread is stuck" in str(error)
        with pytest.raises(TierTimeoutError, match="every thread is stuck"):
            await tier.close()
    await closed(tier)


async def test_a_cancelled_call_that_comes_back_is_watched_no_more(
    tmp_path: Path, files: FaultyFileLayer
) -> None:
    """Nothing is stuck after it, and a write that waited for it is made."""
    tier = make(tmp_path, files, io_timeout_s=60.0)
    await tier.open()
    await put(tier, 0)
    with files.hang("preadv", files="slab-*") as hang:
        reading = asyncio.create_task(get(tier, 0))
        await hang.entered.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        writing = asyncio.create_task(put(tier, 0))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not writing.done()
    assert await writing == [None]
    assert await get(tier, 0) == payload_for(0, BLOCK)
    await tier.close()


async def test_a_file_system_that_does_not_tell_its_space_is_an_outcome(
    tmp_path: Path, files: FaultyFileLayer
) -> None:
    """The error came out of `write` as it was, and the breaker did not hear of it."""
    tier = make(tmp_path, files, min_free_bytes=1)
    tier.write_breaker = Breaker(1)
    await tier.open()
    files.fail("free_bytes", errno.EIO)
    (outcome,) = await put(tier, 0)
    assert isinstance(outcome, TierUnavailableError)
    assert tier.state is TierState.READ_ONLY
    await tier.close()
