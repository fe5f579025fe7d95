"""What is called durable is on the disk, whatever failed before; what is called gone stays away."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from kvoffload import AsyncLRUManager, BlockHash, DiskTier, MemoryTier, TierError, TierTimeoutError
from kvoffload.storage.files import FileLayer
from kvoffload.testing import FaultyFileLayer, PowerLoss, payload_for
from kvoffload.testing.clock import eventually

BLOCK = 4096
LIMIT_S = 0.3


class SharedDisk(PowerLoss):
    """Several openers at once: the first ones count as killed, and the lock went with them."""

    def lock(self, fd: int) -> None:
        pass


class ForgetfulDisk(FileLayer):
    """A system that takes what it failed to write for written, as Linux does.

    Attributes:
        failing: Name of the file of which the next sync fails.
    """

    def __init__(self) -> None:
        self.failing = ""
        self._disk: dict[str, bytearray] = {}
        self._dirty: dict[str, list[tuple[int, bytes]]] = {}
        self._names: dict[int, str] = {}

    def lock(self, fd: int) -> None:
        """Let several have it, as where all but the last were killed."""

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        if not flags & os.O_DIRECTORY:
            self._names[fd] = path.name
            if path.name not in self._disk:
                self._disk[path.name] = bytearray(path.read_bytes())
                self._dirty[path.name] = []
        return fd

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        moved = super().pwritev(fd, buffers, offset)
        self._dirty[self._names[fd]].append((offset, b"".join(buffers)[:moved]))
        return moved

    def truncate(self, fd: int, size: int) -> None:
        super().truncate(fd, size)
        disk = self._disk[self._names[fd]]
        del disk[size:]
        disk.extend(bytes(size - len(disk)))

    def sync(self, fd: int, *, names: bool = False) -> None:
        if names:
            return
        name = self._names[fd]
        dirty, self._dirty[name] = self._dirty[name], []
        if name == self.failing:
            self.failing = ""
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        disk = self._disk[name]
        for offset, data in dirty:
            disk.extend(bytes(max(0, offset + len(data) - len(disk))))
            disk[offset : offset + len(data)] = data

    def surviving(self, target: Path) -> None:
        """Build what a power loss leaves."""
        target.mkdir()
        for name, data in self._disk.items():
            (target / name).write_bytes(data)


def make(
    path: Path, files: FileLayer | None = None, *, fsync: str = "flush", num_blocks: int = 8
) -> DiskTier:
    tier = DiskTier(
        path,
        num_blocks,
        BLOCK,
        fsync=fsync,
        direct_io="off",
        io_threads=2,
        io_timeout_s=LIMIT_S,
    )
    if files is not None:
        tier.file_layer = files
    return tier


async def put(tier: DiskTier, *slots: int, name: str = "k") -> list[TierError | None]:
    return await tier.write(
        slots,
        [memoryview(payload_for(slot, BLOCK)) for slot in slots],
        [f"{name}{slot}".encode() for slot in slots],
    )


async def get(tier: DiskTier, slot: int) -> TierError | bytes:
    buffer = bytearray(BLOCK)
    (outcome,) = await tier.read([slot], [memoryview(buffer)])
    return outcome or bytes(buffer)


async def opened(tier: DiskTier) -> dict[int, str]:
    return {block.slot: block.key.decode() for block in await tier.open()}


def is_released(tier: DiskTier) -> bool:
    return tier._session is None or tier._session.released


async def closed(*tiers: DiskTier) -> None:
    """Close them, however they are."""
    for tier in tiers:
        try:
            await tier.close()
        except TierTimeoutError:  # what hung is not back yet
            await eventually(partial(is_released, tier))
            await closed(tier)
        except TierError:
            pass


async def found_by_others(path: Path) -> dict[int, str]:
    """Return what a tier finds in a copy that nobody else has, and can read."""
    tier = make(path)
    found = await opened(tier)
    for slot in found:
        assert await get(tier, slot) == payload_for(slot, BLOCK)
    await tier.close()
    return found


@contextmanager
def in_vain(what: str) -> Iterator[None]:
    with pytest.raises(TierError, match=what):
        yield


# What a dead process wrote


async def test_flush_after_a_kill_covers_records_and_erasures_of_the_dead_process(
    tmp_path: Path,
) -> None:
    """They lie in the page cache alone, and only the payloads used to be synced with its own.

    After the power loss the erased block was back, and the one that was called durable gone.
    """
    disk = SharedDisk()
    killed, survivor = make(tmp_path / "cold", disk), make(tmp_path / "cold", disk)
    await killed.open()
    await put(killed, 0, 1)
    await killed.flush()
    await killed.erase([0])
    await put(killed, 2)
    assert await opened(survivor) == {1: "k1", 2: "k2"}
    await survivor.flush()
    await asyncio.to_thread(disk.surviving, survivor.path, tmp_path / "after")
    assert await found_by_others(tmp_path / "after") == {1: "k1", 2: "k2"}
    await closed(survivor, killed)


async def test_a_clean_close_after_a_kill_covers_them_too(tmp_path: Path) -> None:
    """The header that says so may not vouch for records that are not there."""
    disk = SharedDisk()
    killed, survivor = make(tmp_path / "cold", disk), make(tmp_path / "cold", disk)
    await killed.open()
    await put(killed, 0, 1)
    await killed.erase([1])
    await survivor.open()
    await survivor.close()
    await asyncio.to_thread(disk.surviving, survivor.path, tmp_path / "after")
    after = make(tmp_path / "after")
    assert await opened(after) == {0: "k0"}
    assert after.recovery is not None
    assert after.recovery.clean
    await closed(after, killed)


async def test_a_full_disk_can_be_opened_after_a_kill(tmp_path: Path) -> None:
    """Records are written again then, but where the file is a hole there may be no space."""
    files = FaultyFileLayer(SharedDisk())
    files.fail("reserve", errno.ENOSPC, times=None)
    killed, survivor = make(tmp_path / "cold", files, num_blocks=64), None
    await killed.open()
    await put(killed, 0, 40)
    survivor = make(tmp_path / "cold", files, num_blocks=64)
    files.fill(0)
    assert await opened(survivor) == {0: "k0", 40: "k40"}
    await survivor.flush()
    files.heal()
    await closed(survivor, killed)


# Syncs that fail


async def test_records_that_a_sync_lost_are_durable_only_when_written_again(
    tmp_path: Path,
) -> None:
    """The next opening finds them in the page cache, and its sync has nothing to write.

    So `flush` succeeded, and after the power loss the erased block was back.
    """
    disk = ForgetfulDisk()
    tier = make(tmp_path / "cold", disk)
    await tier.open()
    await put(tier, 0, 1)
    await tier.flush()
    await put(tier, 2)
    await tier.erase([0])
    disk.failing = "records"
    with in_vain("power loss"):
        await tier.flush()
    with in_vain("good order"):
        await tier.close()
    tier = make(tmp_path / "cold", disk)
    assert await opened(tier) == {1: "k1", 2: "k2"}
    await tier.flush()
    disk.surviving(tmp_path / "after")
    assert await found_by_others(tmp_path / "after") == {1: "k1", 2: "k2"}
    await tier.close()


async def test_blocks_whose_payload_a_sync_lost_are_not_found_again(tmp_path: Path) -> None:
    """Nothing tells the next opening that the payloads in the page cache are nowhere else.

    So `flush` called them durable. What was flushed before stays; and until the close the lost
    ones can be read.
    """
    disk = ForgetfulDisk()
    tier = make(tmp_path / "cold", disk)
    await tier.open()
    await put(tier, 0, 1)
    await tier.flush()
    await put(tier, 1, 2, name="new")
    disk.failing = "slab-000000"
    with in_vain("power loss"):
        await tier.flush()
    assert await get(tier, 2) == payload_for(2, BLOCK)
    await put(tier, 3)
    with in_vain("never reached the disk"):
        await tier.flush()
    with in_vain("good order"):
        await tier.close()
    tier = make(tmp_path / "cold", disk)
    assert await opened(tier) == {0: "k0", 3: "k3"}
    await tier.flush()
    disk.surviving(tmp_path / "after")
    assert await found_by_others(tmp_path / "after") == {0: "k0", 3: "k3"}
    await tier.close()


async def test_if_the_first_sync_after_a_kill_fails_the_whole_slab_is_in_doubt(
    tmp_path: Path,
) -> None:
    """What the dead process had not synced may be any of it."""
    disk = ForgetfulDisk()
    killed = make(tmp_path / "cold", disk)
    await killed.open()
    await put(killed, 0, 5)
    second = make(tmp_path / "cold", disk)
    assert await opened(second) == {0: "k0", 5: "k5"}
    disk.failing = "slab-000000"
    with in_vain("power loss"):
        await second.flush()
    await closed(second)
    third = make(tmp_path / "cold", disk)
    assert await opened(third) == {}
    await closed(third, killed)


async def test_a_block_written_while_a_sync_fails_is_not_there(tmp_path: Path) -> None:
    """The sync may have dropped its payload before it was known that there is one.

    Its record was written afterwards, and nobody would have blanked that.
    """
    files = FaultyFileLayer()
    tier = make(tmp_path / "cold", files)
    await tier.open()
    hang = files.hang("pwritev", files="records", times=1)
    writing = asyncio.ensure_future(put(tier, 0))
    await hang.entered.wait()
    files.fail("sync", files="slab-*")
    with in_vain("power loss"):
        await tier.flush()
    hang.release()
    (outcome,) = await writing
    assert isinstance(outcome, TierError)
    assert isinstance(await get(tier, 0), TierError)
    await closed(tier)
    assert await found_by_others(tier.path) == {}


async def test_records_in_doubt_that_can_not_be_blanked_are_tried_again(tmp_path: Path) -> None:
    """By the next sync, and be it that of the close."""
    files = FaultyFileLayer()
    tier = make(tmp_path / "cold", files)
    await tier.open()
    await put(tier, 0, 2)
    files.fail("sync", files="slab-*")
    files.fail("pwritev", files="records", offset=2 * 512)
    with in_vain("power loss"):
        await tier.flush()
    await closed(tier)
    assert await found_by_others(tier.path) == {}


@pytest.mark.parametrize("call", ["directory", "slab"])
async def test_a_sync_that_could_not_begin_can_be_tried_again(tmp_path: Path, call: str) -> None:
    """The process is out of descriptors for a moment, and nothing was lost by that.

    It used to make every `flush` fail until the tier was reopened.
    """
    files = FaultyFileLayer()
    tier = make(tmp_path / "cold", files)
    await tier.open()
    await put(tier, 0)
    if call == "slab":
        assert tier._session is not None
        assert tier._session._store is not None
        tier._session._store.slabs.close()  # as one of many would be
    files.fail("open", errno.EMFILE, files="cold" if call == "directory" else "slab-*")
    with in_vain("open files"):
        await tier.flush()
    await tier.flush()
    assert files.calls["sync", "slab-000000"] == 1
    assert files.calls["sync", "cold"] >= 1
    await tier.close()
    assert await found_by_others(tier.path) == {0: "k0"}


async def test_always_goes_on_after_a_moment_without_descriptors(tmp_path: Path) -> None:
    files = FaultyFileLayer()
    tier = make(tmp_path / "cold", files, fsync="always")
    await tier.open()
    files.fail("open", errno.EMFILE, files="cold")
    (outcome,) = await put(tier, 0)
    assert isinstance(outcome, TierError)
    assert await put(tier, 1) == [None]
    await tier.close()


# Writes that fail


async def test_a_batch_that_took_too_long_is_not_there_at_all(tmp_path: Path) -> None:
    """One record fails, and blanking it hangs: all are reported as timed out.

    The good ones were published before that, and there again when the tier was reopened.
    """
    files = FaultyFileLayer()
    tier = make(tmp_path / "cold", files)
    await tier.open()
    files.fail("pwritev", files="records", offset=2 * 512)
    with files.hang("pwritev", files="records", offset=2 * 512, after=1):
        outcomes = await put(tier, 0, 2)
        assert [type(outcome) for outcome in outcomes] == [TierTimeoutError] * 2
    files.heal()
    await closed(tier)
    assert await found_by_others(tier.path) == {}


def managed(cold: DiskTier, hot_blocks: int) -> AsyncLRUManager:
    return AsyncLRUManager(hot=MemoryTier(hot_blocks, BLOCK), cold=cold, policy="lru")


async def stored(kv: AsyncLRUManager, *names: BlockHash) -> None:
    await kv.store(names, [payload_for(0, BLOCK) for _ in names])


async def test_a_block_whose_writing_timed_out_can_be_evicted_for_good(tmp_path: Path) -> None:
    """What hung goes on, and the record may be there for a while, or for good."""
    files = FaultyFileLayer(SharedDisk())
    cold = make(tmp_path / "cold", files)
    async with managed(cold, 2) as kv:
        await stored(kv, b"a", b"b")
        with files.hang("pwritev", files="records") as hang:
            await stored(kv, b"c", b"d")
            assert hang.triggered
            # Blanking what the write left fails, when it is back.
            files.fail("pwritev", files="records", after=0)
        session = cold._session
        assert session is not None
        await eventually(lambda: not session._drifting)
        files.heal()
        await kv.evict([b"a", b"b"])
        survivor = make(tmp_path / "cold", files)
        assert await opened(survivor) == {}
        await survivor.close()


async def test_a_block_that_could_not_be_taken_back_can_be_evicted_for_good(
    tmp_path: Path,
) -> None:
    """Its record was written, the answer was an error, and blanking it failed.

    So it left every tier; and the manager, which knew of no slot with it, erased nothing when it
    was evicted. After `kill -9` it was back.
    """
    files = FaultyFileLayer(SharedDisk())
    cold = make(tmp_path / "cold", files)
    async with managed(cold, 1) as kv:
        await stored(kv, b"a")
        files.fail("pwritev", files="records", late=True)
        files.fail("pwritev", files="records", after=1)
        await stored(kv, b"b")
        assert not kv.locate([b"a"])[0].tier
        await kv.evict([b"a"])
        survivor = make(tmp_path / "cold", files)
        assert await opened(survivor) == {}
        await survivor.close()


@pytest.mark.parametrize("gone", [b"x", b"a"])
async def test_a_slot_whose_writing_failed_may_show_the_block_before_as_well(
    tmp_path: Path, gone: bytes
) -> None:
    """`x` left the slot without being erased, and `a` could not be written there.

    The manager can't know which of the two is in the slot, and either must stay away.
    """
    files = FaultyFileLayer(SharedDisk())
    cold = make(tmp_path / "cold", files, num_blocks=1)
    async with managed(cold, 1) as kv:
        await stored(kv, b"x")
        await stored(kv, b"a")  # x goes down
        if gone == b"x":
            files.fail("pwritev", files="records")
        else:
            files.fail("pwritev", files="records", after=1, late=True)
            files.fail("pwritev", files="records", after=2)
        await stored(kv, b"b")  # a goes down, and x gives way
        assert files.calls["pwritev", "slab-000000"] == (1 if gone == b"x" else 2)
        await kv.evict([gone])
        survivor = make(tmp_path / "cold", files, num_blocks=1)
        assert await opened(survivor) == {}
        await survivor.close()


# Directories that go away


async def test_a_tier_whose_directory_was_renamed_leaves_the_next_one_at_its_path_alone(
    tmp_path: Path,
) -> None:
    """It opens files by their path: its slabs were those of the other tier, written by both."""
    old, new = make(tmp_path / "cold"), make(tmp_path / "cold")
    await old.open()
    await asyncio.to_thread(old.path.rename, tmp_path / "old")
    await new.open()
    await put(new, 0)
    await new.flush()
    (outcome,) = await put(old, 0, name="other")
    assert isinstance(outcome, TierError)
    assert "moved or removed" in str(outcome)
    with in_vain("moved or removed"):
        await old.flush()
    assert await get(new, 0) == payload_for(0, BLOCK)
    with in_vain("good order"):
        await old.close()
    await new.close()
    assert await found_by_others(new.path) == {0: "k0"}
