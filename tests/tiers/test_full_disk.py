"""Stories of real file systems that fill up, fail, go away or belong to somebody else.

On a small tmpfs and on ext4 in a file, which are mounted for the purpose; skipped where that is
not allowed.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    BlockState,
    DiskTier,
    EventKind,
    MemoryTier,
    OffloadingEvent,
    RejectReason,
    TierError,
    TierState,
    TierUnavailableError,
)
from kvoffload.storage.breaker import Breaker
from kvoffload.testing import ManualClock, payload_for

MIB = 2**20
BLOCK = 65536
HOT_BLOCKS = 4
RETRY_S = 10.0


class Volume:
    """A file system of some MiB, mounted while it is entered.

    Attributes:
        path: Where it is mounted.
        device: The name of what is mounted.
        size: Bytes that it has for files, about.
    """

    def __init__(self, place: Path, kind: str) -> None:
        self.path = place / "volume"
        self.device = kind
        self.size = 0
        self._image = place / "image"
        self._kind = kind

    def __enter__(self) -> Volume:
        self.path.mkdir()
        if self._kind == "ext4":
            with self._image.open("wb") as image:
                image.truncate(12 * MIB)
            self._run("mkfs.ext4", "-q", "-m", "0", str(self._image))
        self.mount()
        self.size = self.free_bytes()
        return self

    def __exit__(self, *_: object) -> None:
        self.unmount()

    def mount(self) -> None:
        options = ["-t", "tmpfs", "-o", "size=8m", "tmpfs"]
        if self._kind == "ext4":
            options = ["-o", "loop,errors=remount-ro", str(self._image)]
        try:
            self._run("mount", *options, str(self.path))
        except subprocess.CalledProcessError as exc:
            pytest.skip(f"{self._kind} can't be mounted here: {exc.stderr.splitlines()[0]}")
        self.device = Path(self._run("findmnt", "-n", "-o", "SOURCE", str(self.path)).strip()).name

    def remount(self, options: str) -> None:
        self._run("mount", "-o", f"remount,{options}", str(self.path))

    def unmount(self) -> None:
        # Lazily, for a test that failed may have left files open.
        self._run("umount", "--lazy", str(self.path))

    def turn_read_only(self) -> None:
        """Let the kernel meet an error; `remount` can't while files are open for writing."""
        trigger = Path(f"/sys/fs/ext4/{self.device}/trigger_fs_error")
        if not os.access(trigger, os.W_OK):
            pytest.skip("nothing here makes a file system fail")
        trigger.write_text("1")

    def free_bytes(self) -> int:
        stats = os.statvfs(self.path)
        return stats.f_bavail * stats.f_frsize

    def fill(self, *, leave: int = 0) -> Path:
        """Put a file there that leaves so many bytes, about."""
        ballast = self.path / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                for _ in range(0, self.free_bytes() - leave, 4096):
                    file.write(bytes(4096))
                while not leave:  # to the last byte
                    file.write(bytes(512))
            except OSError as exc:
                if exc.errno != errno.ENOSPC:
                    raise
        return ballast

    @staticmethod
    def _run(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except FileNotFoundError:
            pytest.skip(f"there is no {command[0]} here")
        return done.stdout


@pytest.fixture(params=["tmpfs", "ext4"])
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Volume]:
    with Volume(tmp_path, request.param) as volume:
        yield volume


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Volume]:
    with Volume(tmp_path, "tmpfs") as volume:
        yield volume


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Volume]:
    with Volume(tmp_path, "ext4") as volume:
        yield volume


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def new_cold(
    path: Path, clock: ManualClock, num_blocks: int = 400, *, fsync: str = "flush"
) -> DiskTier:
    """Make a tier of 25 MiB, which tries again when the clock says so."""
    cold = DiskTier(path, num_blocks, BLOCK, fsync=fsync)
    cold.write_breaker = Breaker(3, retry_s=RETRY_S, clock=clock)
    cold.growth_breaker = Breaker(1, retry_s=RETRY_S, clock=clock)
    return cold


@asynccontextmanager
async def managed(cold: DiskTier) -> AsyncIterator[AsyncLRUManager]:
    hot = MemoryTier(HOT_BLOCKS, BLOCK)
    async with AsyncLRUManager(hot=hot, cold=cold, policy="lru", promote_threshold=10**6) as kv:
        yield kv
        the_books_balance(kv)


def the_books_balance(kv: AsyncLRUManager) -> None:
    kv.check_invariants()
    tier = kv.get_stats().tiers["cold"]
    used = tier.blocks + tier.pending_blocks + tier.retired_blocks
    assert used + tier.free_blocks == tier.capacity_blocks


async def store(kv: AsyncLRUManager, names: Sequence[int]) -> list[BlockHash]:
    """Store blocks one by one, each of which must be there then; return what left for them."""
    evicted: list[BlockHash] = []
    for name in names:
        result = await kv.store([name], [payload_for(name, BLOCK)])
        assert result.stored + result.present == (name,)
        evicted += result.evicted
    return evicted


def there(kv: AsyncLRUManager, names: Sequence[int]) -> list[int]:
    places = kv.locate(names)
    return [
        name for name, place in zip(names, places, strict=True) if place.state is BlockState.READY
    ]


async def check(kv: AsyncLRUManager, names: Iterable[BlockHash]) -> None:
    """Load blocks, which must all be there with their own bytes."""
    for name in names:
        async with kv.load([name]) as (view,):
            assert view == payload_for(name, BLOCK)


def set_mode(path: str | Path, mode: int) -> None:
    Path(path).chmod(mode)


def run_script(script: str, path: Path) -> str:
    """Run a script with a path and the size of a block in a process of its own; return its output.

    It must end with 0.
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path), str(BLOCK)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


async def told(events: AsyncIterator[OffloadingEvent]) -> list[OffloadingEvent]:
    """Return all events of a manager that is closed."""
    return [event async for event in events]


def states(events: Sequence[OffloadingEvent]) -> list[str]:
    return [event.detail for event in events if event.kind is EventKind.STATE]


# Full


@pytest.mark.parametrize("fsync", ["flush", "always"])
async def test_a_full_disk_is_used_as_far_as_it_goes(
    volume: Volume, clock: ManualClock, fsync: str
) -> None:
    """Someone gave the tier more blocks than the disk can take.

    Stores go on, the coldest blocks give way, all that is not reported as gone is there with its
    own bytes, all the while, and the disk is used up.
    """
    dice = random.Random(0)
    names = range(volume.size // BLOCK + 60)
    left = set(names)
    async with managed(new_cold(volume.path / "cold", clock, fsync=fsync)) as kv:
        events = kv.events()
        for name in names:
            left -= set(await store(kv, [name]))
            present = [each for each in range(name + 1) if each in left]
            assert there(kv, range(name + 1)) == present
            await check(kv, [dice.choice(present)])
        stats = kv.get_stats()
        assert stats.tiers["cold"].state is TierState.FULL
        assert stats.tiers["cold"].blocks * BLOCK >= 0.8 * volume.size
        assert stats.evictions == len(names) - len(left)
        assert stats.io_errors == stats.tiers["cold"].errors > 0
        await check(kv, sorted(left))
    log = await told(events)
    assert states(log) == ["full"]
    gone = [name for event in log if event.kind is EventKind.REMOVED for name in event.block_hashes]
    reported = len(names) - len(left)
    assert set(gone[:reported]) == set(names) - left
    assert len(gone) - reported <= HOT_BLOCKS  # gave way to hotter ones when it was closed
    failed = [event.detail for event in log if event.kind is EventKind.FAILED]
    assert failed
    assert all("free some space there" in detail for detail in failed)


async def test_one_large_store_that_does_not_fit(volume: Volume, clock: ManualClock) -> None:
    """Each block is stored, or rejected with the reason; what is stored is there."""
    names = range(volume.size // BLOCK + 60)
    async with managed(new_cold(volume.path / "cold", clock)) as kv:
        result = await kv.store(names, [payload_for(name, BLOCK) for name in names])
        assert {*result.stored, *result.rejected} == {*names}
        assert len(result.stored) + len(result.rejected) == len(names)
        assert set(result.rejected.values()) == {RejectReason.FULL}
        assert len(result.stored) * BLOCK >= 0.8 * volume.size
        assert not result.evicted
        assert kv.get_stats().rejected == len(result.rejected)
        assert there(kv, names) == list(result.stored)
        await check(kv, result.stored)
        more = range(len(names), len(names) + 10)
        await store(kv, more)
        await check(kv, more)


async def test_a_full_disk_that_gets_space_again(volume: Volume, clock: ManualClock) -> None:
    """Logs had filled the disk, and are rotated away; nobody restarts the server for that."""
    ballast = volume.fill(leave=2 * MIB)
    async with managed(new_cold(volume.path / "cold", clock)) as kv:
        events = kv.events()
        before = await store(kv, range(60))
        full = kv.get_stats().tiers["cold"]
        assert before
        assert full.state is TierState.FULL
        ballast.unlink()
        clock.advance(RETRY_S)
        assert await store(kv, range(60, 100)) == []
        tier = kv.get_stats().tiers["cold"]
        assert tier.state is TierState.SERVING
        assert tier.blocks == full.blocks + 40
        await check(kv, [name for name in range(100) if name not in before])
    assert states(await told(events)) == ["full", "serving"]


async def test_a_volume_that_is_enlarged(tmpfs: Volume, clock: ManualClock) -> None:
    tmpfs.remount("size=2m")
    async with managed(new_cold(tmpfs.path / "cold", clock)) as kv:
        gone = set(await store(kv, range(60)))
        tmpfs.remount("size=8m")
        clock.advance(RETRY_S)
        assert await store(kv, range(60, 100)) == []
        await check(kv, [name for name in range(100) if name not in gone])


async def test_a_full_disk_is_tried_again_now_and_then(volume: Volume, clock: ManualClock) -> None:
    """It stays full: each attempt costs one block at most, and none that was safe."""
    ballast = volume.fill(leave=2 * MIB)
    async with managed(new_cold(volume.path / "cold", clock)) as kv:
        await store(kv, range(60))
        blocks = kv.get_stats().tiers["cold"].blocks
        for name in range(60, 70):
            clock.advance(100 * RETRY_S)
            await store(kv, [name])
            assert kv.get_stats().tiers["cold"].blocks >= blocks
            the_books_balance(kv)
        assert kv.get_stats().tiers["cold"].state is TierState.FULL
        await check(kv, there(kv, range(70)))
        ballast.unlink()


async def test_flush_close_and_open_again_on_a_full_disk(
    volume: Volume, clock: ManualClock
) -> None:
    """Not a byte is left. The flush counts what does not fit; what it counted is there again."""
    async with managed(new_cold(volume.path / "cold", clock)) as kv:
        await store(kv, range(40))
        await kv.flush()
        ballast = volume.fill()
        await store(kv, range(40, 60))
        result = await kv.flush()
        ready = there(kv, range(60))
        assert result.durable + result.not_durable == len(ready)
        assert result.durable >= 36
    async with managed(cold := new_cold(volume.path / "cold", clock)) as kv:
        assert cold.recovery is not None
        assert cold.recovery.clean
        found = there(kv, range(60))
        assert set(found) <= set(ready)
        assert len(found) >= result.durable
        assert ready[-1] in found  # the hottest is not what gives way
        await check(kv, found)
        await store(kv, range(60, 70))
        await check(kv, there(kv, range(70)))
        assert await kv.evict(there(kv, range(60))[:5])
        ballast.unlink()


async def test_a_crash_on_a_full_disk(volume: Volume, clock: ManualClock) -> None:
    """Recovery needs no space."""
    script = """
        import asyncio, os, sys
        from kvoffload import DiskTier
        from kvoffload.testing import payload_for

        async def main(path, block):
            tier = DiskTier(path, 400, block)
            await tier.open()
            payloads = [memoryview(payload_for(name, block)) for name in range(20)]
            keys = [b"b\\0%d" % name for name in range(20)]
            assert await tier.write(range(20), payloads, keys) == [None] * 20
            os._exit(0)

        asyncio.run(main(sys.argv[1], int(sys.argv[2])))
    """
    run_script(script, volume.path / "cold")
    ballast = volume.fill()
    tier = new_cold(volume.path / "cold", clock)
    found = await tier.open()
    assert tier.recovery is not None
    assert (tier.recovery.clean, len(found)) == (False, 20)
    buffers = [bytearray(block.size) for block in found]
    slots = [block.slot for block in found]
    assert await tier.read(slots, [memoryview(buffer) for buffer in buffers]) == [None] * 20
    assert buffers == [payload_for(name, BLOCK) for name in range(20)]
    await tier.erase(slots[:10])
    await tier.close()
    assert len(await tier.open()) == 10
    await tier.close()
    ballast.unlink()


async def test_a_directory_that_does_not_fit_at_all(volume: Volume, clock: ManualClock) -> None:
    """There is no space even for the headers: an error with the place, and nothing stays locked."""
    (volume.path / "cold").mkdir()
    ballast = volume.fill()
    cold = new_cold(volume.path / "cold", clock)
    with pytest.raises(TierUnavailableError, match=rf"{volume.path}/cold.*free some space"):
        await cold.open()
    with pytest.raises(TierUnavailableError, match="free some space"):
        async with managed(new_cold(volume.path / "cold", clock)):
            pass
    ballast.unlink()
    async with managed(cold) as kv:
        await store(kv, range(10))
        await check(kv, range(10))


async def test_what_must_stay_free_stays_free(volume: Volume) -> None:
    """Other programs share the disk."""
    floor = 3 * MIB
    cold = DiskTier(volume.path / "cold", 400, BLOCK, min_free_bytes=floor)
    names = range(volume.size // BLOCK)
    async with managed(cold) as kv:
        await store(kv, names)
        await kv.flush()
        assert kv.get_stats().tiers["cold"].state is TierState.FULL
        assert floor <= volume.free_bytes() <= floor + MIB
        await check(kv, there(kv, names))
    assert volume.free_bytes() >= floor


# Broken


async def test_a_file_system_that_turns_read_only(ext4: Volume, clock: ManualClock) -> None:
    """The kernel met an error and remounts: reads go on, stores stay in memory and say so.

    After a repair, all that was flushed is there.
    """
    kv = AsyncLRUManager(
        hot=MemoryTier(HOT_BLOCKS, BLOCK), cold=new_cold(ext4.path / "cold", clock), policy="lru"
    )
    await kv.__aenter__()
    events = kv.events()
    await store(kv, range(20))
    assert (await kv.flush()).not_durable == 0
    ext4.turn_read_only()
    gone: list[BlockHash] = []
    for name in range(20, 40):
        gone += await store(kv, [name])
    stats = kv.get_stats()
    assert stats.tiers["cold"].state is TierState.READ_ONLY
    assert stats.io_errors > 0
    present = there(kv, range(40))
    assert set(present) == set(range(40)) - set(gone)
    # A failing disk doesn't cost what lies there safely, but for what was tried.
    assert len([name for name in present if name < 20]) >= 12
    await check(kv, present)
    result = await kv.store(range(50, 60), [payload_for(name, BLOCK) for name in range(50, 60)])
    assert len(result.stored) == HOT_BLOCKS
    assert set(result.rejected.values()) == {RejectReason.FAILED}
    the_books_balance(kv)
    with pytest.raises(TierError, match=str(ext4.path)):
        await kv.flush()
    with pytest.raises(TierError, match=str(ext4.path)):
        await kv.__aexit__(None, None, None)
    log = await told(events)
    assert states(log) == ["read_only"]
    details = Counter(event.detail for event in log if event.kind is EventKind.FAILED)
    assert any(os.strerror(errno.EROFS) in detail for detail in details)

    ext4.unmount()
    ext4.mount()
    async with managed(cold := new_cold(ext4.path / "cold", clock)) as kv:
        assert cold.recovery is not None
        assert not cold.recovery.clean
        assert there(kv, range(60)) == list(range(20))
        await check(kv, range(20))
        assert await store(kv, range(20, 40)) == []


async def test_files_that_cannot_be_changed_for_a_while(ext4: Volume, clock: ManualClock) -> None:
    """An administrator's mistake, mended while the server runs."""
    directory = ext4.path / "cold"

    def set_immutable(flag: str) -> None:
        subprocess.run(["chattr", flag, *map(str, directory.iterdir())], check=True)

    async with managed(new_cold(directory, clock)) as kv:
        events = kv.events()
        await store(kv, range(20))
        set_immutable("+i")
        try:
            gone = await store(kv, range(20, 40))
            present = [name for name in range(40) if name not in gone]
            assert there(kv, range(40)) == present
            await check(kv, present)
            assert kv.get_stats().tiers["cold"].state is TierState.READ_ONLY
            the_books_balance(kv)
        finally:
            set_immutable("-i")
        clock.advance(RETRY_S)
        assert await store(kv, range(40, 60)) == []
        await check(kv, [*present, *range(40, 60)])
        assert (await kv.flush()).not_durable == 0
    log = await told(events)
    assert states(log) == ["read_only", "serving"]
    failed = [event.detail for event in log if event.kind is EventKind.FAILED]
    assert all("give a path that this process may write to" in detail for detail in failed)


async def test_opening_a_read_only_file_system(volume: Volume, clock: ManualClock) -> None:
    """An error that names the place; nothing is changed or locked, and it opens once it can."""
    async with managed(new_cold(volume.path / "cold", clock)) as kv:
        await store(kv, range(20))
    volume.remount("ro")
    for path in (volume.path / "cold", volume.path / "other"):
        with pytest.raises(TierError, match=rf"{path}.*Read-only.*can be written to"):
            await new_cold(path, clock).open()
        with pytest.raises(TierError, match=rf"{path}.*Read-only"):
            async with managed(new_cold(path, clock)):
                pass
    volume.remount("rw")
    async with managed(cold := new_cold(volume.path / "cold", clock)) as kv:
        assert cold.recovery is not None
        assert cold.recovery.clean
        await check(kv, range(20))


# Meddled with


async def may_fail(call: Awaitable[object], path: Path) -> None:
    """Await what may fail, but only with a tier's error that names the place."""
    try:
        await call
    except TierError as exc:
        if str(path) not in str(exc):
            raise


async def test_a_directory_that_is_removed_while_it_is_open(
    tmp_path: Path, clock: ManualClock
) -> None:
    """Someone cleans up: no byte is wrong, errors name the place, the next start is empty."""
    path = tmp_path / "cold"
    kv = AsyncLRUManager(
        hot=MemoryTier(HOT_BLOCKS, BLOCK), cold=new_cold(path, clock), policy="lru"
    )
    await kv.__aenter__()
    await store(kv, range(20))
    shutil.rmtree(path)
    await store(kv, range(20, 40))
    for name in there(kv, range(40)):
        await may_fail(check(kv, [name]), path)
    the_books_balance(kv)
    await may_fail(kv.flush(), path)
    await may_fail(kv.__aexit__(None, None, None), path)
    async with managed(new_cold(path, clock)) as kv:
        assert there(kv, range(40)) == []
        await store(kv, range(20))
        await check(kv, range(20))


async def test_files_of_others_stay_as_they_are(volume: Volume, clock: ManualClock) -> None:
    """The tier has a whole disk, where an administrator keeps notes, some with unlucky names."""
    names = ["notes.txt", "slab-000000.bak", "slab-0", "slab-00000x", "header-2", "records.old"]
    foreign = {volume.path / name: f"this is {name}".encode() for name in names}
    for path, content in foreign.items():
        path.write_bytes(content)
    (volume.path / "lost+found").mkdir(exist_ok=True)
    for num_blocks in (40, 60, 10, 30):  # growth and shrinking
        async with managed(new_cold(volume.path, clock, num_blocks)) as kv:
            await store(kv, range(num_blocks + 20))
            await kv.evict(range(0, num_blocks, 7))
            await kv.flush()
            if num_blocks == 60:
                await kv.clear()
        assert {path: path.read_bytes() for path in foreign} == foreign
        assert (volume.path / "lost+found").is_dir()


@pytest.mark.parametrize("made", [False, True], ids=["new", "of-another-user"])
async def test_a_place_that_one_may_not_write_to(clock: ManualClock, made: bool) -> None:
    """The error names the path, and says what to do."""
    script = """
        import asyncio, os, sys
        from kvoffload import AsyncLRUManager, DiskTier, MemoryTier, TierError

        async def main(path, block):
            # All is imported by now, from where others may not read.
            if os.geteuid() == 0:
                os.setegid(65534)
                os.seteuid(65534)
            cold = DiskTier(path, 400, block)
            try:
                async with AsyncLRUManager(hot=MemoryTier(4, block), cold=cold):
                    print("opened")
            except TierError as exc:
                print(exc)

        asyncio.run(main(sys.argv[1], int(sys.argv[2])))
    """
    with tempfile.TemporaryDirectory() as place:  # pytest's own place is closed to others
        path = Path(place) / "cold"
        if made:
            async with managed(new_cold(path, clock)) as kv:
                await store(kv, range(10))
            set_mode(path, 0o500)
        set_mode(place, 0o555)
        told = run_script(script, path)
        set_mode(place, 0o755)
        assert str(path) in told
        assert "Permission denied; give a path that this process may write to" in told
        if made:
            set_mode(path, 0o700)
            async with managed(new_cold(path, clock)) as kv:
                await check(kv, range(10))
