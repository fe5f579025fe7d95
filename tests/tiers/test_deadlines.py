"""A disk that does not answer costs its callers `io_timeout_s`, and nobody a wrong byte."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from kvoffload import (
    AsyncLRUManager,
    DiskTier,
    LoadTimeoutError,
    MemoryTier,
    TierError,
    TierTimeoutError,
    TierUnavailableError,
)
from kvoffload.storage.files import FileLayer
from kvoffload.testing import eventually, payload_for

T = TypeVar("T")

BLOCK = 4096
LIMIT_S = 0.3


class StickyFiles(FileLayer):
    """Real files, of which a call gets stuck when it is told to."""

    def __init__(self) -> None:
        self._stuck: Callable[[str, int], bool] | None = None
        self._free = threading.Event()
        self._free.set()
        self.stuck_calls = 0

    @contextmanager
    def stuck(self, call: str, offset: int | None = None) -> Iterator[None]:
        """Hold calls of one kind up, in the thread that makes them, until the end of the block."""
        self._free.clear()
        self._stuck = lambda name, at: name == call and offset in (None, at)
        try:
            yield
        finally:
            self._stuck = None
            self._free.set()

    def _pass(self, call: str, offset: int) -> None:
        if self._stuck is not None and self._stuck(call, offset):
            self.stuck_calls += 1
            assert self._free.wait(60)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self._pass("preadv", offset)
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self._pass("pwritev", offset)
        return super().pwritev(fd, buffers, offset)

    def sync(self, fd: int, *, names: bool = False) -> None:
        self._pass("sync", 0)
        super().sync(fd, names=names)

    def open(self, path: Path, flags: int) -> int:
        self._pass("open", 0)
        return super().open(path, flags)


@pytest.fixture
def files() -> StickyFiles:
    return StickyFiles()


@pytest.fixture
def tier(tmp_path: Path, files: StickyFiles) -> DiskTier:
    tier = DiskTier(tmp_path / "cold", 8, BLOCK, io_threads=2, io_timeout_s=LIMIT_S)
    tier.file_layer = files
    return tier


async def put(tier: DiskTier, *slots: int) -> list[TierError | None]:
    payloads = [memoryview(payload_for(slot, BLOCK)) for slot in slots]
    return await tier.write(slots, payloads, [b"k%d" % slot for slot in slots])


async def put_one(tier: DiskTier, slot: int) -> TierError | None:
    return (await put(tier, slot))[0]


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Call again and again until the threads that were stuck are back."""
    while True:
        try:
            result = await call()
        except TierError:
            pass
        else:
            if not isinstance(result, TierError):
                return result
        await asyncio.sleep(0.001)


async def get(tier: DiskTier, slot: int) -> bytes | TierError:
    buffer = bytearray(BLOCK)
    (outcome,) = await tier.read([slot], [memoryview(buffer)])
    return outcome or bytes(buffer)


async def test_a_stuck_read_is_a_load_that_timed_out(tier: DiskTier, files: StickyFiles) -> None:
    """Whoever asked recomputes; other blocks are served meanwhile, and this one again later."""
    await tier.open()
    await put(tier, 0, 1)
    with files.stuck("preadv", 0):
        error = await get(tier, 0)
        assert isinstance(error, TierTimeoutError)
        assert isinstance(error, LoadTimeoutError | TierUnavailableError)
        assert f"io_timeout_s={LIMIT_S:g}" in str(error)
        assert await get(tier, 1) == payload_for(1, BLOCK)
        again = await get(tier, 0)
        assert isinstance(again, TierTimeoutError)
        assert files.stuck_calls == 1, "a second thread was sent after the first"
    assert await patiently(lambda: get(tier, 0)) == payload_for(0, BLOCK)
    await tier.close()


async def test_a_stuck_write_shows_nothing_when_it_comes_back(
    tier: DiskTier, files: StickyFiles, tmp_path: Path
) -> None:
    """Its caller was told that it failed: the block must not be there after a restart."""
    await tier.open()
    with files.stuck("pwritev", 0):
        (outcome,) = await put(tier, 0)
        assert isinstance(outcome, TierTimeoutError)
        (refused,) = await put(tier, 0)
        assert isinstance(refused, TierUnavailableError), "the thread may still write there"
    with pytest.raises(TierError):
        await raise_unless_bytes(tier, 0)
    await tier.close()
    again = DiskTier(tmp_path / "cold", 8, BLOCK)
    assert await again.open() == []
    await again.close()


async def raise_unless_bytes(tier: DiskTier, slot: int) -> None:
    got = await get(tier, slot)
    if isinstance(got, TierError):
        raise got


async def test_the_slot_of_a_stuck_write_can_be_used_once_it_is_back(
    tier: DiskTier, files: StickyFiles
) -> None:
    """And the late bytes do not land on the next block's."""
    await tier.open()
    with files.stuck("pwritev", 0):
        await put(tier, 0)
    await patiently(lambda: put_one(tier, 0))
    assert await get(tier, 0) == payload_for(0, BLOCK)
    await tier.close()


@pytest.mark.parametrize("call", ["sync", "pwritev"])
async def test_a_stuck_erase_or_flush_is_told(
    tier: DiskTier, files: StickyFiles, call: str
) -> None:
    await tier.open()
    await put(tier, 0)
    with files.stuck(call), pytest.raises(TierTimeoutError):
        await (tier.flush() if call == "sync" else tier.erase([0]))
    await patiently(lambda: tier.flush() if call == "sync" else tier.erase([0]))
    await tier.close()


async def test_with_every_thread_stuck_callers_are_told_at_once(
    tier: DiskTier, files: StickyFiles
) -> None:
    """Rather than each waiting its time in the queue."""
    await tier.open()
    await put(tier, 0, 1, 2)
    with files.stuck("preadv"):
        assert isinstance(await get(tier, 0), TierTimeoutError)
        assert isinstance(await get(tier, 1), TierTimeoutError)
        calls = files.stuck_calls
        error = await get(tier, 2)
        assert isinstance(error, TierTimeoutError)
        assert "every thread is stuck" in str(error)
        assert files.stuck_calls == calls
    assert await patiently(lambda: get(tier, 2)) == payload_for(2, BLOCK)
    await tier.close()


async def test_waiting_for_a_thread_is_not_being_stuck(tmp_path: Path) -> None:
    """A queue that moves is no hung disk, however long it takes."""
    slow = threading.Semaphore(0)
    is_open = threading.Event()

    class Slow(FileLayer):
        def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
            if is_open.is_set():
                slow.acquire()
            return super().preadv(fd, buffers, offset)

    tier = DiskTier(tmp_path / "cold", 8, BLOCK, io_threads=1, io_timeout_s=0.5)
    tier.file_layer = Slow()
    await tier.open()
    await put(tier, *range(8))
    is_open.set()

    async def feed() -> None:
        for _ in range(8):
            await asyncio.sleep(0.12)
            slow.release()

    got, _ = await asyncio.gather(asyncio.gather(*(get(tier, slot) for slot in range(8))), feed())
    assert list(got) == [payload_for(slot, BLOCK) for slot in range(8)]
    await tier.close()


async def test_close_is_not_hung(tier: DiskTier, files: StickyFiles, tmp_path: Path) -> None:
    """It says that the directory stays locked, and it is free when the disk is back."""
    await tier.open()
    await put(tier, 0)
    await tier.flush()
    again = DiskTier(tmp_path / "cold", 8, BLOCK)
    with files.stuck("preadv"):
        await get(tier, 0)
        with pytest.raises(TierUnavailableError, match="stays locked"):
            await tier.close()
        with pytest.raises(TierUnavailableError):
            await tier.close()
    found = await patiently(again.open)
    assert [block.slot for block in found] == [0]
    assert await get(again, 0) == payload_for(0, BLOCK)
    await again.close()


async def test_a_stuck_open_is_given_up(tier: DiskTier, files: StickyFiles, tmp_path: Path) -> None:
    with files.stuck("open"), pytest.raises(TierTimeoutError, match="can't open"):
        await tier.open()
    again = DiskTier(tmp_path / "cold", 8, BLOCK)
    await patiently(again.open)
    await again.close()


EXIT_WHILE_STUCK = """
import asyncio, sys, time
from kvoffload import DiskTier
from kvoffload.storage.files import FileLayer

class Stuck(FileLayer):
    is_open = False

    def preadv(self, fd, buffers, offset):
        if self.is_open:
            time.sleep(3600)
        return super().preadv(fd, buffers, offset)

async def main():
    tier = DiskTier(sys.argv[1], 4, 4096, io_timeout_s=0.5)
    tier.file_layer = Stuck()
    await tier.open()
    Stuck.is_open = True
    await tier.write([0], [memoryview(bytes(4096))], [b"k"])
    print((await tier.read([0], [memoryview(bytearray(4096))]))[0].__class__.__name__)
    try:
        await tier.close()
    except Exception as error:
        print(error.__class__.__name__)

asyncio.run(main())
"""


def test_the_process_can_end_while_a_thread_is_stuck(tmp_path: Path) -> None:
    """A worker that must be restarted, for its disk hangs, has to exit first."""
    done = subprocess.run(
        [sys.executable, "-c", EXIT_WHILE_STUCK, str(tmp_path / "cold")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["TierTimeoutError", "TierTimeoutError"], done.stderr
    assert done.returncode == 0


async def test_a_manager_lives_with_a_stuck_disk(tmp_path: Path, files: StickyFiles) -> None:
    """The load times out, its slots stay out of use until the thread is back, and none is lost."""
    cold = DiskTier(tmp_path / "cold", 4, BLOCK, io_threads=2, io_timeout_s=LIMIT_S)
    cold.file_layer = files
    async with AsyncLRUManager(
        hot=MemoryTier(2, BLOCK), cold=cold, policy="lru", staging_bytes=4 * BLOCK
    ) as manager:
        names = [b"a", b"b", b"c", b"d"]
        for name in names:
            await manager.store([name], [payload_for(name, BLOCK)])
        assert manager.locate([b"a"])[0].tier == "cold"
        with files.stuck("preadv"):
            with pytest.raises(LoadTimeoutError):
                async with manager.load([b"a"]):
                    pass
            await manager.evict([b"a"])
            stats = manager.get_stats().tiers["cold"]
            assert stats.retired_blocks == 1
            assert stats.errors
            assert (
                stats.free_blocks + stats.pending_blocks + stats.blocks + stats.retired_blocks
                == stats.capacity_blocks
            )
            async with manager.load([b"c", b"d"]) as lease:
                assert [bytes(view) for view in lease] == [
                    payload_for(name, BLOCK) for name in (b"c", b"d")
                ]
        await eventually(lambda: manager.get_stats().tiers["cold"].retired_blocks == 0)
        async with manager.load([b"b"]) as lease:
            assert bytes(lease[0]) == payload_for(b"b", BLOCK)


async def test_a_demotion_that_is_stuck_does_not_hold_up_the_store(
    tmp_path: Path, files: StickyFiles
) -> None:
    """The block that could not go down is lost, as if the cold tier were not there."""
    cold = DiskTier(tmp_path / "cold", 4, BLOCK, io_threads=2, io_timeout_s=LIMIT_S)
    cold.file_layer = files
    async with AsyncLRUManager(hot=MemoryTier(2, BLOCK), cold=cold, policy="lru") as manager:
        await manager.store([b"a"], [payload_for(b"a", BLOCK)])
        await manager.store([b"b"], [payload_for(b"b", BLOCK)])
        with files.stuck("pwritev"):
            result = await manager.store([b"c"], [payload_for(b"c", BLOCK)])
            assert result.stored == (b"c",)
            assert result.evicted == (b"a",)
            assert manager.get_stats().tiers["cold"].retired_blocks == 1
        await eventually(lambda: manager.get_stats().tiers["cold"].retired_blocks == 0)
        assert await manager.lookup([b"b", b"c"]) == 2
