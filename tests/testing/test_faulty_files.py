"""Faults of file calls: on real files alone, and below a real disk tier."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kvoffload import CorruptBlockError, DiskTier, TierError, TierUnavailableError
from kvoffload.storage.files import FileLayer
from kvoffload.testing import FaultyFileLayer, PowerLoss, payload_for
from kvoffload.testing.file_faults import FILE_CALLS, FileCall, Move

BLOCK = 4096
O_DIRECT = getattr(os, "O_DIRECT", 0)


@pytest.fixture
def files() -> FaultyFileLayer:
    return FaultyFileLayer()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of two blocks."""
    path = tmp_path / "file"
    path.write_bytes(b"a" * BLOCK + b"b" * BLOCK)
    return path


@pytest.fixture
def fd(files: FaultyFileLayer, path: Path) -> Iterator[int]:
    fd = files.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def write(files: FileLayer, fd: int, data: bytes, offset: int = 0) -> int:
    return files.pwritev(fd, [memoryview(data)], offset)


def read(files: FileLayer, fd: int, size: int, offset: int = 0) -> tuple[int, bytes]:
    """Read into two buffers that were full of dots."""
    data = memoryview(bytearray(b"." * size))
    moved = files.preadv(fd, [data[: size // 2], data[size // 2 :]], offset)
    return moved, bytes(data)


CALLS: dict[FileCall, Callable[[FileLayer, Path, int], object]] = {
    "make_directory": lambda files, path, fd: files.make_directory(path.parent),
    "list_directory": lambda files, path, fd: files.list_directory(path.parent),
    "open": lambda files, path, fd: os.close(files.open(path, os.O_RDWR)),
    "close": lambda files, path, fd: files.close(os.dup(fd)),
    "lock": lambda files, path, fd: files.lock(fd),
    "size": lambda files, path, fd: files.size(fd),
    "links": lambda files, path, fd: files.links(fd),
    "data_spans": lambda files, path, fd: files.data_spans(fd),
    "free_bytes": lambda files, path, fd: files.free_bytes(path),
    "preadv": lambda files, path, fd: read(files, fd, BLOCK),
    "pwritev": lambda files, path, fd: write(files, fd, b"x"),
    "truncate": lambda files, path, fd: files.truncate(fd, 1),
    "reserve": lambda files, path, fd: files.reserve(fd, BLOCK),
    "sync": lambda files, path, fd: files.sync(fd),
    "unlink": lambda files, path, fd: files.unlink(path),
}


# Failures


def test_every_call_of_the_layer_can_meet_a_fault() -> None:
    """A call that is added to it must not bypass the tests of the tier in silence."""
    public = {name for name in vars(FileLayer) if not name.startswith("_")}
    assert public == set(FILE_CALLS) == set(CALLS)
    assert public <= set(vars(FaultyFileLayer))


@pytest.mark.parametrize("call", FILE_CALLS)
def test_any_call_fails_as_often_as_it_should(
    files: FaultyFileLayer, path: Path, fd: int, call: FileCall
) -> None:
    fault = files.fail(call, errno.ENOLCK, times=2, after=1)
    files.calls.clear()
    outcomes = []
    for _ in range(4):
        try:
            CALLS[call](files, path, fd)
        except OSError as error:
            outcomes.append(error.errno)
        else:
            outcomes.append(None)
            path.touch()
    assert outcomes == [None, errno.ENOLCK, errno.ENOLCK, None]
    assert fault.triggered == 2
    assert sum(files.calls[each] for each in files.calls if each[0] == call) == 4


@pytest.mark.parametrize("call", FILE_CALLS)
def test_without_faults_it_is_the_real_layer(
    files: FaultyFileLayer, path: Path, fd: int, call: FileCall
) -> None:
    if call in ("size", "links", "data_spans", "list_directory", "preadv", "free_bytes"):
        real, ours = (CALLS[call](layer, path, fd) for layer in (FileLayer(), files))
        assert ours == real or call == "free_bytes"  # others use the disk too
    else:
        CALLS[call](files, path, fd)
        assert {
            "pwritev": lambda: path.read_bytes()[:2] == b"xa",
            "truncate": lambda: path.stat().st_size == 1,
            "unlink": lambda: not path.exists(),
        }.get(call, lambda: True)()


def test_each_failure_is_an_error_of_its_own(files: FaultyFileLayer, fd: int) -> None:
    """The tier puts paths into them, and two threads may meet them at once."""
    given = BlockingIOError(errno.EAGAIN, "busy", "a path")
    files.fail("lock", given, times=None)
    caught = []
    for _ in range(2):
        with pytest.raises(BlockingIOError) as error:
            files.lock(fd)
        caught.append(error.value)
    assert caught[0] is not caught[1]
    assert given not in caught
    assert [(error.errno, error.filename) for error in caught] == [(errno.EAGAIN, "a path")] * 2


def test_a_failure_by_number_is_the_system_s_error(files: FaultyFileLayer, path: Path) -> None:
    files.fail("open", errno.ENOENT)
    with pytest.raises(FileNotFoundError, match="No such file"):
        files.open(path, os.O_RDWR)


def test_files_are_chosen_by_name(files: FaultyFileLayer, path: Path, fd: int) -> None:
    files.fail("sync", files="slab-*")
    files.sync(fd)
    slab = files.open(path.with_name("slab-000001"), os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match="Input/output"):
        files.sync(slab)
    files.close(slab)
    assert files.calls["sync", "file"] == files.calls["sync", "slab-000001"] == 1
    files.fail("unlink", files="fil?")
    files.unlink(path.with_name("slab-000001"))
    with pytest.raises(OSError, match="Input/output"):
        files.unlink(path)


def test_calls_are_chosen_by_a_byte_that_they_move(files: FaultyFileLayer, fd: int) -> None:
    """Which one comes first is up to the tier's threads; where a slot lies is not."""
    files.fail("preadv", times=None, offset=100)
    assert read(files, fd, 100) == (100, b"a" * 100)
    assert read(files, fd, 100, 101) == (100, b"a" * 100)
    for size, offset in ((101, 0), (2, 99), (1, 100)):
        with pytest.raises(OSError, match="Input/output"):
            read(files, fd, size, offset)


def test_a_late_failure_comes_when_it_is_done(files: FaultyFileLayer, path: Path, fd: int) -> None:
    """As where the answer of the disk was lost: the caller must not count on the old bytes."""
    files.fail("pwritev", late=True)
    with pytest.raises(OSError, match="Input/output"):
        write(files, fd, b"new")
    assert path.read_bytes()[:4] == b"newa"


def test_a_close_that_fails_has_closed(files: FaultyFileLayer, path: Path) -> None:
    """Or a fault would leak descriptors that no caller may close again."""
    fd = files.open(path, os.O_RDWR)
    files.fail("close")
    with pytest.raises(OSError, match="Input/output"):
        files.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_stopping_and_healing(files: FaultyFileLayer, fd: int) -> None:
    with files.fail("sync", times=None), pytest.raises(OSError, match="Input/output"):
        files.sync(fd)
    files.sync(fd)
    files.fail("sync", times=None)
    files.fail("size")
    files.fill(0)
    files.heal()
    files.sync(fd)
    assert files.size(fd) == 2 * BLOCK
    assert write(files, fd, b"x", 9 * BLOCK) == 1


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"call": "fsync"}, "call must be one of"),
        ({"times": 0}, "times=0"),
        ({"after": -1}, "after=-1"),
        ({"call": "sync", "offset": 0}, "moves no bytes"),
        ({"call": "open", "late": True}, "late is for"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(
    files: FaultyFileLayer, settings: dict[str, Any], complaint: str
) -> None:
    """Or a misspelt test would pass for want of its fault."""
    with pytest.raises(ValueError, match=complaint):
        files.fail(**{"call": "pwritev", **settings})


# Hangs


async def test_a_hang_holds_the_thread_until_its_release(
    files: FaultyFileLayer, path: Path, fd: int
) -> None:
    """And the call is made then, however late: the caller may have given up on it."""
    with files.hang("pwritev", files="file") as hang:
        assert not hang.entered.is_set()
        writing = [
            asyncio.create_task(asyncio.to_thread(write, files, fd, b"late", at)) for at in (0, 50)
        ]
        await hang.entered.wait()
        assert not any(task.done() for task in writing)
        assert await asyncio.to_thread(read, files, fd, 4) == (4, b"aaaa")
        hang.release()
        assert await asyncio.gather(*writing) == [4, 4]
        assert hang.entered.is_set()
    assert await asyncio.to_thread(read, files, fd, 4) == (4, b"late")


async def test_many_wait_for_a_hang_and_some_stop_waiting(files: FaultyFileLayer, fd: int) -> None:
    with files.hang("sync") as hang:
        waiting = [asyncio.create_task(hang.entered.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        syncing = asyncio.create_task(asyncio.to_thread(files.sync, fd))
        await asyncio.gather(waiting[0], waiting[2])
        assert waiting[1].cancelled()
        await hang.entered.wait()
        hang.release()
        await syncing


async def test_healing_releases_a_hang(files: FaultyFileLayer, fd: int) -> None:
    hang = files.hang("sync")
    syncing = asyncio.create_task(asyncio.to_thread(files.sync, fd))
    await hang.entered.wait()
    files.heal()
    await syncing


def test_a_hang_that_nobody_releases_gives_up(files: FaultyFileLayer, fd: int) -> None:
    """A test that fails before it releases must not keep the interpreter from ending."""
    files.hang("sync", give_up_s=0.01)
    with pytest.raises(TimeoutError):
        files.sync(fd)


def test_threads_share_the_count_of_a_fault(files: FaultyFileLayer, fd: int) -> None:
    """Of a thousand calls at once exactly those fail that should."""
    fault = files.fail("preadv", times=300, after=100)

    def fails(_: int) -> bool:
        try:
            read(files, fd, 2)
        except OSError:
            return True
        return False

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(fails, range(1000))) == 300
    assert fault.triggered == 300
    assert files.calls["preadv", "file"] == 1000


# Bytes that are missing or wrong


@pytest.mark.parametrize("flags", [0, O_DIRECT])
@pytest.mark.parametrize("keep_bytes", [0, 1, 700, BLOCK, 5000])
def test_a_short_read_fills_no_more_than_it_says(
    files: FaultyFileLayer, path: Path, flags: int, keep_bytes: int
) -> None:
    """A caller that doesn't look at the count gets what was in its buffer before."""
    fd = files.open(path, os.O_RDWR | flags)
    fault = files.cut_short("preadv", keep_bytes=keep_bytes)
    data = aligned(b"." * BLOCK)
    moved = min(keep_bytes, BLOCK)
    assert files.preadv(fd, [data[:512], data[512:]], 0) == moved
    assert bytes(data) == b"a" * moved + b"." * (BLOCK - moved)
    assert files.preadv(fd, [data], 0) == BLOCK
    assert fault.triggered == 1
    files.close(fd)


@pytest.mark.parametrize("flags", [0, O_DIRECT])
@pytest.mark.parametrize("keep_bytes", [0, 1, 700, BLOCK, 5000])
def test_a_short_write_takes_no_more_than_it_says(
    files: FaultyFileLayer, path: Path, flags: int, keep_bytes: int
) -> None:
    fd = files.open(path, os.O_RDWR | flags)
    files.cut_short("pwritev", keep_bytes=keep_bytes)
    data = aligned(b"x" * BLOCK)
    moved = min(keep_bytes, BLOCK)
    assert files.pwritev(fd, [data[:512], data[512:]], 0) == moved
    assert path.read_bytes()[:BLOCK] == b"x" * moved + b"a" * (BLOCK - moved)
    assert files.pwritev(fd, [data], 0) == BLOCK
    assert path.read_bytes()[:BLOCK] == b"x" * BLOCK
    files.close(fd)


def aligned(data: bytes) -> memoryview:
    view = memoryview(mmap.mmap(-1, len(data)))
    view[:] = data
    return view


@pytest.mark.parametrize("flags", [0, O_DIRECT])
@pytest.mark.parametrize("offset", [None, 0, 513, BLOCK - 1])
def test_a_bit_is_read_wrong(
    files: FaultyFileLayer, path: Path, flags: int, offset: int | None
) -> None:
    """One, once, in the buffer alone."""
    fd = files.open(path, os.O_RDWR | flags)
    fault = files.flip_bit("preadv", offset=offset)
    data = aligned(b"." * BLOCK)
    assert files.preadv(fd, [data[:512], data[512:]], 0) == BLOCK
    assert differences(bytes(data), b"a" * BLOCK) == {offset or 0: 1}
    assert path.read_bytes()[:BLOCK] == b"a" * BLOCK
    assert files.preadv(fd, [data], 0) == BLOCK
    assert bytes(data) == b"a" * BLOCK
    assert fault.triggered == 1
    files.close(fd)


@pytest.mark.parametrize("flags", [0, O_DIRECT])
@pytest.mark.parametrize("offset", [None, BLOCK, BLOCK + 513])
def test_a_bit_is_written_wrong(
    files: FaultyFileLayer, path: Path, flags: int, offset: int | None
) -> None:
    """One, once, in the file alone: what the caller wrote from is as it was."""
    fd = files.open(path, os.O_RDWR | flags)
    files.flip_bit("pwritev", offset=offset)
    data = aligned(b"x" * BLOCK)
    for damage in ({(offset or BLOCK) - BLOCK: 1}, {}):
        assert files.pwritev(fd, [data[:512], data[512:]], BLOCK) == BLOCK
        assert bytes(data) == b"x" * BLOCK
        assert differences(path.read_bytes()[BLOCK:], b"x" * BLOCK) == damage
    files.close(fd)


def differences(one: bytes, other: bytes) -> dict[int, int]:
    return {at: a ^ b for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b}


def test_a_bit_beyond_what_was_read_is_not_flipped(files: FaultyFileLayer, fd: int) -> None:
    files.flip_bit("preadv", offset=2 * BLOCK + 5)
    assert read(files, fd, 20, 2 * BLOCK - 10) == (10, b"b" * 10 + b"." * 10)


def test_lost_calls_are_reported_and_not_made(fd: int, path: Path) -> None:
    synced: list[int] = []

    class Watching(FileLayer):
        def sync(self, fd: int, *, names: bool = False) -> None:
            synced.append(fd)

    files = FaultyFileLayer(Watching())
    files.lose("pwritev")
    files.lose("sync")
    before = path.read_bytes()
    for moved, expected in ((2, before), (2, b"xx" + before[2:])):
        assert write(files, fd, b"xx") == moved
        assert path.read_bytes() == expected
    files.sync(fd)
    assert not synced
    files.sync(fd)
    assert synced == [fd]


# A full disk


def test_a_full_disk_takes_what_fits_and_then_nothing(
    files: FaultyFileLayer, path: Path, fd: int
) -> None:
    files.fill(3 * BLOCK + 5)
    data = bytes(range(256)) * 80  # five blocks
    assert write(files, fd, data, BLOCK) == 4 * BLOCK  # one of them was there
    assert path.read_bytes()[BLOCK:] == data[: 4 * BLOCK]
    assert files.free_bytes(path) == 5
    for offset in (5 * BLOCK, 9 * BLOCK - 10):
        with pytest.raises(OSError, match="No space left"):
            write(files, fd, b"more", offset)
    assert write(files, fd, b"over what is there", 4 * BLOCK) == 18
    assert path.stat().st_size == 5 * BLOCK


def test_a_started_block_is_paid_for(files: FaultyFileLayer, fd: int) -> None:
    """Its space is the file's from the first byte on, as file systems have it."""
    files.fill(BLOCK)
    assert write(files, fd, b"12345", 4 * BLOCK) == 5
    assert write(files, fd, b"x" * BLOCK, 4 * BLOCK + 5) == BLOCK - 5
    with pytest.raises(OSError, match="No space left"):
        write(files, fd, b"x", 5 * BLOCK)


def test_what_is_freed_can_be_used_again(files: FaultyFileLayer, path: Path, fd: int) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(BLOCK + 1))
    files.fill(0)
    files.truncate(fd, 9 * BLOCK)  # a hole takes nothing
    assert files.free_bytes(path) == 0
    files.truncate(fd, BLOCK)
    assert files.free_bytes(path) == BLOCK
    files.unlink(other)
    assert files.free_bytes(path) == 3 * BLOCK
    assert write(files, fd, bytes(9 * BLOCK), BLOCK) == 3 * BLOCK


def test_a_disk_is_never_emptier_than_the_real_one(files: FaultyFileLayer, path: Path) -> None:
    files.fill(2**62)
    assert files.free_bytes(path) <= 2**61


def test_threads_share_the_space(files: FaultyFileLayer, path: Path) -> None:
    """However their writes meet, no more than the free space is written."""
    files.fill(7 * BLOCK)
    fds = [files.open(path.with_name(f"file{n}"), os.O_RDWR | os.O_CREAT) for n in range(4)]
    written: list[int] = []

    def fill(fd: int) -> None:
        for at in range(4):
            with suppress(OSError):
                written.append(write(files, fd, bytes(BLOCK), at * BLOCK))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(fill, fds))
    assert sum(written) == 7 * BLOCK
    for fd in fds:
        files.close(fd)


# Direct I/O

needs_direct = pytest.mark.skipif(not O_DIRECT, reason="this system has no direct I/O")


@needs_direct
def test_direct_io_is_refused_when_a_file_is_opened(files: FaultyFileLayer, path: Path) -> None:
    """A new file is there then, as after Linux refused."""
    files.refuse_direct()
    new = path.with_name("new")
    with pytest.raises(OSError, match="Invalid argument"):
        files.open(new, os.O_RDWR | os.O_CREAT | O_DIRECT)
    assert new.exists()
    fd = files.open(new, os.O_RDWR)
    assert write(files, fd, b"x") == 1
    files.close(fd)
    files.heal()
    files.close(files.open(new, os.O_RDWR | O_DIRECT))


@needs_direct
def test_direct_io_is_refused_when_it_is_used(files: FaultyFileLayer, path: Path, fd: int) -> None:
    """And not where the same file was opened without."""
    files.refuse_direct("use")
    direct = files.open(path, os.O_RDWR | O_DIRECT)
    for call in (files.preadv, files.pwritev):
        with pytest.raises(OSError, match="Invalid argument"):
            call(direct, [aligned(bytes(BLOCK))], 0)
        assert call(fd, [aligned(bytes(BLOCK))], 0) == BLOCK
    files.close(direct)


@needs_direct
@pytest.mark.parametrize(
    ("start", "size", "offset", "fine"),
    [
        (0, BLOCK, BLOCK, True),
        (0, BLOCK, 512, False),
        (0, 512, 0, False),
        (512, BLOCK, 0, False),
    ],
)
def test_unaligned_direct_io_is_refused(
    files: FaultyFileLayer, path: Path, fd: int, start: int, size: int, offset: int, fine: bool
) -> None:
    """Also where the disk of this machine would do it; without direct I/O all is well."""
    files.refuse_unaligned(BLOCK)
    data = aligned(bytes(2 * BLOCK))[start : start + size]
    direct = files.open(path, os.O_RDWR | O_DIRECT)
    calls: list[tuple[Move, Callable[[int, list[memoryview], int], int]]] = [
        ("preadv", files.preadv),
        ("pwritev", files.pwritev),
    ]
    for _, call in calls:
        assert call(fd, [data], offset) == size
        if fine:
            assert call(direct, [data], offset) == size
        else:
            with pytest.raises(OSError, match="Invalid argument"):
                call(direct, [data], offset)
    files.close(direct)


# Below a disk tier


@pytest.fixture
def tier(tmp_path: Path, files: FaultyFileLayer) -> DiskTier:
    tier = DiskTier(tmp_path / "cold", 8, BLOCK, io_threads=2)
    tier.file_layer = files
    return tier


async def put(tier: DiskTier, slots: list[int]) -> list[TierError | None]:
    payloads = [memoryview(payload_for(slot, BLOCK)) for slot in slots]
    return await tier.write(slots, payloads, [b"%d" % slot for slot in slots])


async def get(tier: DiskTier, slots: list[int]) -> list[TierError | bool]:
    """Say of each slot what went wrong, or whether its payload is right."""
    buffers = [bytearray(BLOCK) for _ in slots]
    outcomes = await tier.read(slots, [memoryview(buffer) for buffer in buffers])
    return [
        error or bytes(buffer) == payload_for(slot, BLOCK)
        for slot, error, buffer in zip(slots, outcomes, buffers, strict=True)
    ]


async def test_every_file_call_of_a_tier_passes_through(
    tier: DiskTier, files: FaultyFileLayer
) -> None:
    await tier.open()
    assert await put(tier, [0]) == [None]
    assert await get(tier, [0]) == [True]
    await tier.close([0])
    made = {call for call, _ in files.calls}
    assert made >= {"make_directory", "open", "lock", "preadv", "pwritev", "sync", "close"}
    assert files.calls["sync", "records"] >= 2


async def test_short_calls_are_carried_on(tier: DiskTier, files: FaultyFileLayer) -> None:
    """As POSIX allows any of them to be; every part of a batch gets there."""
    files.cut_short("pwritev", keep_bytes=BLOCK, times=5, files="slab-*")
    files.cut_short("preadv", keep_bytes=BLOCK, times=5, files="slab-*")
    await tier.open()
    slots = [*range(8)]
    assert await put(tier, slots) == [None] * 8
    assert await get(tier, slots) == [True] * 8
    await tier.close()


async def test_a_bit_flip_is_found_by_the_checksum(tier: DiskTier, files: FaultyFileLayer) -> None:
    await tier.open()
    files.flip_bit("pwritev", files="slab-*", offset=3 * BLOCK + 77)
    assert await put(tier, [2, 3, 4]) == [None] * 3
    good, bad, also_good = await get(tier, [2, 3, 4])
    assert (good, also_good) == (True, True)
    assert isinstance(bad, CorruptBlockError)
    files.flip_bit("preadv", files="slab-*", offset=2 * BLOCK)
    assert isinstance((await get(tier, [2]))[0], CorruptBlockError)
    assert await get(tier, [2]) == [True]
    await tier.close()


async def test_a_lost_write_is_found_by_the_checksum(
    tier: DiskTier, files: FaultyFileLayer
) -> None:
    """The record got there and the payload didn't, and the disk said that all is well."""
    await tier.open()
    files.lose("pwritev", files="slab-*")
    assert await put(tier, [2]) == [None]
    assert isinstance((await get(tier, [2]))[0], CorruptBlockError)
    await tier.close()


async def test_a_full_disk_is_an_error_of_the_blocks_that_do_not_fit(
    tier: DiskTier, files: FaultyFileLayer
) -> None:
    """Half a payload counts for nothing, and blocks that have their space can be replaced."""
    await tier.open()
    assert await put(tier, [0]) == [None]
    files.fill(BLOCK)
    first, second = await put(tier, [1, 2])
    assert first is None
    assert isinstance(second, TierUnavailableError)
    assert second.__cause__ is not None
    assert await get(tier, [0, 1]) == [True, True]
    files.heal()
    await tier.close()


async def test_a_stuck_disk_holds_threads_and_not_the_loop(
    tier: DiskTier, files: FaultyFileLayer
) -> None:
    await tier.open()
    assert await put(tier, [0]) == [None]
    with files.hang("preadv", files="slab-*") as hang:
        reading = asyncio.create_task(get(tier, [0]))
        await hang.entered.wait()
        assert threading.active_count() > 1
        assert not reading.done()
        hang.release()
        assert await reading == [True]
    await tier.close()


async def test_a_tier_whose_file_system_has_no_direct_io(
    tier: DiskTier, files: FaultyFileLayer
) -> None:
    files.refuse_direct()
    await tier.open()
    assert await put(tier, [0, 1]) == [None, None]
    assert await get(tier, [0, 1]) == [True, True]
    await tier.close()


async def test_faults_and_a_power_loss_together(tmp_path: Path, tier: DiskTier) -> None:
    """A disk that says it has synced and hasn't: what a flush promised is lost, and not wrong."""
    disk = PowerLoss()
    tier.file_layer = files = FaultyFileLayer(disk)
    await tier.open()
    assert await put(tier, [0]) == [None]
    await tier.flush()
    files.lose("sync", files="slab-*")
    assert await put(tier, [0, 1]) == [None, None]
    await tier.flush()
    await asyncio.to_thread(disk.surviving, tier.path, tmp_path / "after")
    await tier.close()
    survivor = DiskTier(tmp_path / "after", 8, BLOCK)
    found = {block.slot for block in await survivor.open()}
    outcomes = await get(survivor, sorted(found))
    assert True in outcomes or outcomes == []
    await survivor.close()
