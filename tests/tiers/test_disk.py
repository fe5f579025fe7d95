"""The disk tier in one process and in several: batches, errors, the lock, closing, durability."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvoffload.errors import (
    ClosedError,
    ConfigError,
    CorruptBlockError,
    TierError,
    TierLockedError,
    TierUnavailableError,
)
from kvoffload.storage import format as fmt
from kvoffload.storage.files import FileLayer
from kvoffload.tiers.disk import DiskTier
from kvoffload.types import Medium, StoredBlock, Tier

T = TypeVar("T")
BLOCK = 4096


class Layer(FileLayer):
    """The real calls, counted, with something to do before them by name of call and file."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.before: dict[str, Callable[[], None]] = {}
        self.loop_thread = threading.get_ident()

    def _note(self, call: str, fd: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink().name.split("-")[0]
        self.calls[f"{call} {name}"] += 1
        self.before.get(f"{call} {name}", lambda: None)()

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self._note("read", fd)
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self._note("write", fd)
        return super().pwritev(fd, buffers, offset)

    def sync(self, fd: int, *, names: bool = False) -> None:
        self._note("sync", fd)
        super().sync(fd, names=names)

    def lock(self, fd: int) -> None:
        self._note("lock", fd)
        super().lock(fd)

    def close(self, fd: int) -> None:
        assert threading.get_ident() != self.loop_thread, "a file was closed on the event loop"
        super().close(fd)

    def open(self, path: Path, flags: int) -> int:
        self.before.get("open", lambda: None)()
        return super().open(path, flags)


class Gate:
    """Something to hang on, off the loop, until it is told to go on."""

    def __init__(self) -> None:
        self._entered = threading.Event()
        self._go_on = threading.Event()

    def __call__(self) -> None:
        self._entered.set()
        assert self._go_on.wait(30)

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, 30)

    def open(self) -> None:
        self._go_on.set()


def failing(number: int, times: int = 10**6) -> Callable[[], None]:
    left = [times]

    def fail() -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cold"


@pytest.fixture
def layer() -> Layer:
    return Layer()


@pytest.fixture
def tier(path: Path, layer: Layer) -> DiskTier:
    tier = DiskTier(path, 16, BLOCK, io_threads=2)
    tier.file_layer = layer
    return tier


def payload_of(key: bytes, size: int = BLOCK) -> bytes:
    return (key * (size // max(1, len(key)) + 1))[:size]


async def write(tier: DiskTier, blocks: dict[int, bytes]) -> list[TierError | None]:
    payloads = [memoryview(payload_of(key)) for key in blocks.values()]
    return await tier.write(list(blocks), payloads, list(blocks.values()))


async def put(tier: DiskTier, blocks: dict[int, bytes]) -> None:
    assert await write(tier, blocks) == [None] * len(blocks)


async def read(tier: DiskTier, slots: Sequence[int]) -> list[bytes | TierError]:
    buffers = [bytearray(BLOCK) for _ in slots]
    outcomes = await tier.read(slots, [memoryview(buffer) for buffer in buffers])
    return [error or bytes(data) for error, data in zip(outcomes, buffers, strict=True)]


async def keys_in(path: Path) -> list[bytes]:
    """Open what another tier left, and say what is there."""
    tier = DiskTier(path, 16, BLOCK)
    found = await tier.open()
    await tier.close([block.slot for block in found])
    return [block.key for block in found]


def used_bytes(path: Path, *, on_disk: bool = False) -> int:
    stats = [file.stat() for file in path.iterdir() if file.name != "lock"]
    return sum(512 * each.st_blocks if on_disk else each.st_size for each in stats)


def open_fds(path: Path) -> list[str]:
    """Return this process's descriptors in a directory."""
    targets = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return [str(fd.readlink()) for fd in targets if str(path) in str(fd.readlink())]


# Settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("path", ""),
        ("path", b"bytes"),
        ("path", "with\0zero"),
        ("path", None),
        ("name", ""),
        ("num_blocks", 0),
        ("num_blocks", 2**32),
        ("num_blocks", True),
        ("num_blocks", 1.0),
        ("block_bytes", 0),
        ("block_bytes", -1),
        ("io_threads", 0),
        ("fsync", "never"),
        ("fsync", None),
        ("direct_io", "maybe"),
        ("io_timeout_s", -1),
        ("io_timeout_s", float("nan")),
        ("min_free_bytes", -1),
        ("min_free_bytes", 1.5),
    ],
)
def test_a_wrong_setting_is_refused_by_name(path: Path, setting: str, value: object) -> None:
    """Before anything is touched."""
    settings: dict[str, Any] = {"path": path, "num_blocks": 4, "block_bytes": 64, setting: value}
    with pytest.raises(ConfigError, match=setting) as caught:
        DiskTier(**settings)
    assert repr(value) in str(caught.value)
    assert not path.exists()


async def test_direct_io_is_not_pretended(path: Path) -> None:
    """Slots of 64 bytes can't be moved so; a user who insists is told what would do."""
    with pytest.raises(ConfigError, match=r"needs block_bytes of 32768 or more.*not 64"):
        await DiskTier(path, 4, 64, direct_io="on").open()


async def test_it_is_a_tier(tier: DiskTier, path: Path) -> None:
    assert isinstance(tier, Tier)
    assert (tier.name, tier.medium, tier.num_blocks, tier.block_bytes) == (
        *("cold", Medium.DISK, 16, BLOCK),
    )
    assert tier.persistent
    assert not tier.addressable
    assert tier.path == path
    assert repr(tier) == f"<DiskTier 'cold' in {str(path)!r}: 16 blocks of 4096 bytes, closed>"
    await tier.open()
    assert repr(tier).endswith("open>")
    with pytest.raises(TypeError, match="views"):
        tier.view(0, 1)
    await tier.close()
    assert repr(tier).endswith("closed>")


async def test_a_path_may_be_text_and_relative(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on meaning the same when the process changes its directory."""
    monkeypatch.chdir(path.parent)
    tier = DiskTier("cold", 16, BLOCK)
    await tier.open()
    monkeypatch.chdir("/")
    await put(tier, {0: b"a"})
    await tier.close()
    assert await keys_in(path) == [b"a"]


# Batches


async def test_a_batch_is_one_hop_and_few_calls(tier: DiskTier, layer: Layer) -> None:
    """Sixteen neighbours in any order: one call for payloads, one for records."""
    await tier.open()
    layer.calls.clear()
    slots = [*range(15, -1, -1)]
    await put(tier, {slot: b"key %d" % slot for slot in slots})
    assert layer.calls == {"write slab": 1, "write records": 1}
    layer.calls.clear()
    assert await read(tier, slots) == [payload_of(b"key %d" % slot) for slot in slots]
    assert layer.calls == {"read slab": 1}
    layer.calls.clear()
    await tier.erase(slots)
    assert layer.calls == {"write records": 1}
    await tier.close()


async def test_a_replaced_block_is_invalid_before_its_payload_changes(
    tier: DiskTier, layer: Layer, path: Path
) -> None:
    """Old record, payload, new record: a process killed between has no false block."""
    await tier.open()
    await put(tier, {0: b"old"})
    records: list[fmt.Record | None] = []
    layer.before["write slab"] = lambda: records.append(
        fmt.parse_record((path / "records").read_bytes()[: fmt.SECTOR_BYTES], 0)
    )
    await put(tier, {0: b"new"})
    assert records == [None]
    await tier.close()


async def test_batches_larger_than_a_group(path: Path) -> None:
    """What is hashed and moved at a time is bounded; what a caller may ask at once is not."""
    size = 1 << 20
    tier = DiskTier(path, 11, size)
    await tier.open()
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (11, size), dtype=np.uint8)
    order = rng.permutation(11).tolist()
    keys = [b"%d" % slot for slot in order]
    outcomes = await tier.write(order, [memoryview(data[slot]) for slot in order], keys)
    assert outcomes == [None] * 11
    into = np.zeros_like(data)
    outcomes = await tier.read(range(11), [memoryview(row) for row in into])
    assert outcomes == [None] * 11
    assert (into == data).all()
    await tier.close()


async def test_buffers_of_other_shapes(tier: DiskTier) -> None:
    """What counts is contiguous bytes, whatever an array calls them."""
    await tier.open()
    data = np.arange(512, dtype=np.float32).reshape(2, 16, 16)
    assert await tier.write([3], [data.data], [b"k"]) == [None]
    into = np.zeros_like(data)
    assert await tier.read([3], [into.data]) == [None]
    assert (into == data).all()
    assert await tier.write([4], [np.zeros((0, 4)).data], [b"empty"]) == [None]
    assert await tier.read([4], [memoryview(bytearray())]) == [None]
    await tier.close()


async def test_empty_payloads_are_blocks(tier: DiskTier, path: Path) -> None:
    """They need no slab, and are found again without one."""
    await tier.open()
    assert await tier.write([2, 9], [memoryview(b"")] * 2, [b"a", b"b"]) == [None, None]
    assert await tier.read([9, 2], [memoryview(bytearray())] * 2) == [None, None]
    await tier.close()
    assert not (path / "slab-000000").exists()
    tier = DiskTier(path, 16, BLOCK)
    assert await tier.open() == [StoredBlock(b"a", 2, 0), StoredBlock(b"b", 9, 0)]
    await tier.close()


async def test_reading_what_is_not_there_says_what_is(tier: DiskTier) -> None:
    await tier.open()
    await put(tier, {0: b"a", 1: b"b"})
    empty, good, other = await tier.read(
        [5, 0, 1], [memoryview(bytearray(size)) for size in (9, BLOCK, 9)]
    )
    assert good is None
    assert "slot 5: it holds no block" in str(empty)
    assert f"slot 1: it holds {BLOCK} bytes, and the buffer has 9" in str(other)
    await tier.close()


@pytest.mark.parametrize(
    ("slots", "payloads", "keys", "complaint"),
    [
        ([16], [b"x"], [b"k"], "0 to 15, not 16"),
        ([-1], [b"x"], [b"k"], "0 to 15, not -1"),
        ([1, 1], [b"x", b"y"], [b"k", b"l"], "once"),
        ([1, 2], [b"x"], [b"k", b"l"], "2 slots, but 1"),
        ([1], [b"x"], [], "1 slots, but 0"),
        ([1], [bytes(BLOCK + 1)], [b"k"], "block_bytes=4096 bytes, not 4097"),
        ([1], [b"x"], [bytes(256)], "255 bytes"),
        ([1], [b"x"], ["text"], "255 bytes"),
        ([1], [np.zeros((8, 8), np.uint8)[:, ::2]], [b"k"], "contiguous"),
    ],
)
async def test_a_wrong_argument_changes_nothing(
    tier: DiskTier, slots: list[int], payloads: list[Any], keys: list[Any], complaint: str
) -> None:
    await tier.open()
    await put(tier, {1: b"before"})
    with pytest.raises(ConfigError, match=complaint):
        await tier.write(slots, [memoryview(payload) for payload in payloads], keys)
    assert await read(tier, [1]) == [payload_of(b"before")]
    await tier.close()


async def test_a_buffer_that_cannot_be_read_into_is_refused(tier: DiskTier) -> None:
    await tier.open()
    await put(tier, {1: b"a"})
    with pytest.raises(ConfigError, match="writable"):
        await tier.read([1], [memoryview(bytes(BLOCK))])
    with pytest.raises(TypeError):
        await tier.erase(["one"])  # type: ignore[list-item]
    await tier.close()


# What is on the disk


async def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    """Whatever the process's umask; directories above are made as usual."""
    path = tmp_path / "above" / "cold"
    tier = DiskTier(path, 16, BLOCK)
    umask = os.umask(0)
    try:
        await tier.open()
        await put(tier, {0: b"secret"})
        await tier.close([0])
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    names = sorted(file.name for file in path.iterdir())
    assert names == ["header-0", "header-1", "lock", "order", "records", "slab-000000"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}


async def test_usage_is_bounded(tier: DiskTier, path: Path) -> None:
    """However often blocks come and go: slots, records, and a little."""
    for turn in range(3):
        await tier.open()
        for slot in range(16):
            await put(tier, {slot: b"%d %d" % (turn, slot)})
        await tier.erase(range(0, 16, 2))
        await tier.close(range(16))
    assert used_bytes(path) <= 16 * (BLOCK + fmt.SECTOR_BYTES) + 2 * fmt.SECTOR_BYTES + 4 * 16 + 64


async def test_an_unused_slot_takes_the_space_of_its_record_alone(path: Path) -> None:
    """That it has from the start, so that a disk that fills up has no payload without a record."""
    tier = DiskTier(path, 100_000, 1 << 20)
    await tier.open()
    assert await tier.write([60_000], [memoryview(b"far out")], [b"k"]) == [None]
    await tier.close()
    assert used_bytes(path, on_disk=True) < 100_000 * fmt.SECTOR_BYTES + (1 << 20)


# Errors


async def test_a_full_disk_fails_the_slots_it_concerns(
    tier: DiskTier, layer: Layer, path: Path
) -> None:
    """They are empty then, not torn; the others are there; and when there is room, all is well."""
    await tier.open()
    await put(tier, {0: b"old", 5: b"neighbour"})
    layer.before["write slab"] = failing(errno.ENOSPC, times=1)
    outcomes = await write(tier, {0: b"new", 3: b"other"})
    assert isinstance(outcomes[0], TierUnavailableError)
    assert outcomes[1] is None
    assert outcomes[0].tier == "cold"
    assert isinstance(outcomes[0].__cause__, OSError)
    assert outcomes[0].__cause__.errno == errno.ENOSPC
    assert str(path / "slab-000000") in str(outcomes[0])
    assert "free some space" in str(outcomes[0])
    empty, *rest = await read(tier, [0, 3, 5])
    assert "no block" in str(empty)
    assert rest == [payload_of(b"other"), payload_of(b"neighbour")]
    await put(tier, {0: b"new"})
    await tier.close([0, 3, 5])
    assert await keys_in(path) == [b"new", b"other", b"neighbour"]


async def test_a_block_whose_record_failed_is_not_there_after_a_crash(
    tier: DiskTier, layer: Layer, path: Path
) -> None:
    """Also where the system wrote the record and said it hadn't."""
    await tier.open()
    fail = failing(errno.EIO, times=1)

    def write_then_fail() -> None:
        if layer.calls["write records"] == 1:
            record = fmt.Record(2, 9, BLOCK, BLOCK, fmt.checksum(payload_of(b"k")), b"k")
            with (path / "records").open("r+b") as file:
                file.seek(2 * fmt.SECTOR_BYTES)
                file.write(fmt.pack_record(record))
        fail()

    layer.calls.clear()
    layer.before["write records"] = write_then_fail
    (outcome,) = await write(tier, {2: b"k"})
    assert isinstance(outcome, TierUnavailableError)
    shutil.copytree(path, path.with_name("crashed"))
    await tier.close()
    assert await keys_in(path.with_name("crashed")) == []


async def test_a_block_that_could_not_be_invalidated_is_not_overwritten(
    tier: DiskTier, layer: Layer
) -> None:
    """Its record is good on disk, so its payload has to stay the one that it tells of."""
    await tier.open()
    await put(tier, {2: b"old"})
    layer.before["write records"] = failing(errno.EIO)
    (outcome,) = await write(tier, {2: b"new"})
    assert isinstance(outcome, TierUnavailableError)
    assert await read(tier, [2]) == [payload_of(b"old")]
    layer.before.clear()
    await tier.close()


async def test_an_unreadable_block_is_no_lost_block(tier: DiskTier, layer: Layer) -> None:
    """EIO may pass; wrong bytes don't. Each error is an object of its own."""
    await tier.open()
    await put(tier, {0: b"a", 1: b"b"})
    layer.before["read slab"] = failing(errno.EIO)
    first, second = await read(tier, [0, 1])
    assert isinstance(first, TierUnavailableError)
    assert isinstance(second, TierUnavailableError)
    assert first is not second
    layer.before.clear()
    assert await read(tier, [0, 1]) == [payload_of(b"a"), payload_of(b"b")]
    await tier.close()


async def test_bytes_that_went_bad_are_found_at_every_read(tier: DiskTier, path: Path) -> None:
    """While the tier is open: another process wrote there, or the disk lies."""
    await tier.open()
    await put(tier, {0: b"a", 1: b"b", 2: b"c"})
    with (path / "slab-000000").open("r+b") as file:
        file.seek(BLOCK + 100)
        file.write(b"!")
    for _ in range(2):
        good, bad, also_good = await read(tier, [0, 1, 2])
        assert isinstance(bad, CorruptBlockError)
        assert (good, also_good) == (payload_of(b"a"), payload_of(b"c"))
    os.truncate(path / "slab-000000", 2 * BLOCK + 5)
    good, _, gone = await read(tier, [0, 1, 2])
    assert good == payload_of(b"a")
    assert isinstance(gone, CorruptBlockError)
    await tier.close()


async def test_a_failed_erasure_names_its_slots(tier: DiskTier, layer: Layer) -> None:
    await tier.open()
    await put(tier, {0: b"a", 5: b"b"})
    layer.before["write records"] = failing(errno.EIO, times=1)
    with pytest.raises(TierUnavailableError, match=r"slots \[0\]"):
        await tier.erase([0, 5])
    kept, gone = await read(tier, [0, 5])
    assert kept == payload_of(b"a")
    assert "no block" in str(gone)
    await tier.close()


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.EACCES, "may write to"), (errno.EROFS, "can be written to")]
)
async def test_a_directory_that_may_not_be_used(
    tier: DiskTier, layer: Layer, path: Path, number: int, advice: str
) -> None:
    layer.before["open"] = failing(number)
    with pytest.raises(TierError, match=advice) as caught:
        await tier.open()
    assert isinstance(caught.value.__cause__, OSError)
    layer.before.clear()
    assert await tier.open() == []
    await tier.close()


@pytest.mark.parametrize("below", ["", "further/down"])
def test_a_path_through_a_file_is_a_wrong_setting(path: Path, below: str) -> None:
    path.write_bytes(b"a file")
    with pytest.raises(ConfigError, match="path must name a directory"):
        asyncio.run(DiskTier(path / below, 16, BLOCK).open())


def test_a_path_may_be_a_link_to_a_directory(path: Path) -> None:
    path.with_name("elsewhere").mkdir()
    path.symlink_to("elsewhere")

    async def scenario() -> None:
        tier = DiskTier(path, 16, BLOCK)
        await tier.open()
        await put(tier, {0: b"a"})
        await tier.close()
        assert await keys_in(path.with_name("elsewhere")) == [b"a"]

    asyncio.run(scenario())


# Durability


async def test_flush_forces_payloads_and_records_to_the_disk(tier: DiskTier, layer: Layer) -> None:
    await tier.open()
    await put(tier, {0: b"a"})
    await tier.flush()
    layer.calls.clear()
    await put(tier, {1: b"b"})
    assert "sync slab" not in layer.calls
    await tier.flush()
    assert (layer.calls["sync slab"], layer.calls["sync records"]) == (1, 1)
    layer.calls.clear()
    await tier.erase([1])
    await tier.flush()
    assert layer.calls["sync records"] == 1
    await tier.close()


async def test_fsync_always_syncs_before_it_returns(path: Path, layer: Layer) -> None:
    tier = DiskTier(path, 16, BLOCK, fsync="always")
    tier.file_layer = layer
    await tier.open()
    layer.calls.clear()
    await put(tier, {0: b"a", 9: b"b"})
    assert (layer.calls["sync slab"], layer.calls["sync records"]) == (1, 1)
    layer.calls.clear()
    await tier.erase([0])
    assert layer.calls["sync records"] == 1
    layer.before["sync slab"] = failing(errno.EIO)
    outcomes = await write(tier, {1: b"c", 2: b"d"})
    assert all(isinstance(outcome, TierUnavailableError) for outcome in outcomes)
    with pytest.raises(TierError):
        await tier.close()
    assert await keys_in(path) == [b"b"]


async def test_a_failed_flush_is_an_error_from_then_on(
    tier: DiskTier, layer: Layer, path: Path
) -> None:
    """And the close is none in good order; what may be lost is not shown again as if safe."""
    await tier.open()
    await put(tier, {0: b"a"})
    layer.before["sync slab"] = failing(errno.EIO, times=1)
    with pytest.raises(TierUnavailableError, match="power loss"):
        await tier.flush()
    with pytest.raises(TierUnavailableError, match="never reached the disk"):
        await tier.flush()
    with pytest.raises(TierUnavailableError, match="good order"):
        await tier.close([0])
    tier = DiskTier(path, 16, BLOCK)
    assert [block.key for block in await tier.open()] == []
    assert tier.recovery is not None
    assert not tier.recovery.clean
    await tier.close()


async def test_flush_after_a_crash_covers_what_the_dead_process_wrote(
    tier: DiskTier, layer: Layer, path: Path
) -> None:
    """It may still be in the page cache alone, and this process counts it as durable."""
    await tier.open()
    await put(tier, {0: b"a"})
    shutil.copytree(path, path.with_name("crashed"))
    await tier.close()
    survivor = DiskTier(path.with_name("crashed"), 16, BLOCK)
    survivor.file_layer = layer
    await survivor.open()
    layer.calls.clear()
    await survivor.flush()
    assert layer.calls["sync slab"] == 1
    await survivor.close()


# One opener


async def test_a_second_opener_in_this_process_is_told_so(tier: DiskTier, path: Path) -> None:
    await tier.open()
    for other in (tier, DiskTier(path, 16, BLOCK, name="other")):
        with pytest.raises(TierLockedError, match=rf"process {os.getpid()} \(this one\)") as caught:
            await other.open()
        assert caught.value.tier == other.name
    await put(tier, {0: b"still mine"})
    await tier.close()
    assert await keys_in(path) == [b"still mine"]


CHILD = """
import asyncio, os, sys
from kvoffload.tiers.disk import DiskTier

async def main():
    tier = DiskTier(sys.argv[1], 16, 4096)
    await tier.open()
    payloads = [memoryview(key * 1024) for key in (b"kept", b"gone", b"same")]
    assert await tier.write([4, 2, 7], payloads, [b"kept", b"gone", b"same"]) == [None] * 3
    await tier.erase([2])
    print("ready", flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


@pytest.fixture
def child(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the tier, has written and erased, and flushed nothing."""
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def test_another_process_is_named_and_its_death_frees_the_lock(
    path: Path, child: subprocess.Popen[bytes]
) -> None:
    """After `kill -9`, what it wrote is there and what it erased is not."""

    async def scenario() -> None:
        tier = DiskTier(path, 16, BLOCK)
        with pytest.raises(TierLockedError, match=rf"process {child.pid};"):
            await tier.open()
        child.send_signal(signal.SIGKILL)
        child.wait()
        found = await tier.open()
        assert [(block.key, block.slot) for block in found] == [(b"kept", 4), (b"same", 7)]
        assert await read(tier, [4, 7]) == [payload_of(b"kept"), payload_of(b"same")]
        assert tier.recovery is not None
        assert (tier.recovery.clean, tier.recovery.damaged) == (False, 0)
        await tier.close()

    asyncio.run(scenario())


FORK = """
import asyncio, os, sys
from kvoffload import errors
from kvoffload.tiers.disk import DiskTier

async def main():
    tier = DiskTier(sys.argv[1], 16, 4096)
    await tier.open()
    to_child, from_parent = os.pipe()
    from_child, to_parent = os.pipe()
    pid = os.fork()
    if pid == 0:
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                 if os.path.islink(f"/proc/self/fd/{fd}")]
        fine = not any(sys.argv[1] in link for link in links)
        try:
            await tier.flush()
            fine = False
        except errors.ClosedError:
            pass
        os.write(to_parent, b"y" if fine else b"n")
        os.read(to_child, 1)
        os._exit(0)
    assert os.read(from_child, 1) == b"y"
    assert await tier.write([0], [memoryview(b"x")], [b"k"]) == [None]
    await tier.close()
    again = DiskTier(sys.argv[1], 16, 4096)   # the child lives on, and has no lock
    assert len(await again.open()) == 1
    await again.close()
    os.write(from_parent, b"x")
    os.waitpid(pid, 0)

asyncio.run(main())
"""


def test_a_forked_child_has_no_part_in_it(path: Path) -> None:
    """It can't write, and doesn't keep the lock when the parent is gone."""
    subprocess.run([sys.executable, "-c", FORK, str(path)], check=True, timeout=60)


# Closing and cancelling


async def test_closed_is_closed(tier: DiskTier, path: Path) -> None:
    """And may be opened again."""
    with pytest.raises(ClosedError, match="cold"):
        await tier.flush()
    await tier.close()
    await tier.open()
    await put(tier, {0: b"a"})
    await tier.close()
    await tier.close()
    for call in (tier.read([], []), tier.write([], [], []), tier.erase([]), tier.flush()):
        with pytest.raises(ClosedError):
            await call
    assert not open_fds(path)
    assert [block.key for block in await tier.open()] == [b"a"]
    await tier.close()


async def test_a_failed_open_keeps_nothing(tier: DiskTier, path: Path, layer: Layer) -> None:
    layer.before["sync records"] = failing(errno.EIO)
    with pytest.raises(TierUnavailableError):
        await tier.open()
    assert not open_fds(path)
    with pytest.raises(ClosedError):
        await tier.flush()
    await tier.close()
    assert await keys_in(path) == []


async def test_a_cancelled_open_keeps_nothing(tier: DiskTier, path: Path, layer: Layer) -> None:
    """Its thread is in the middle of it and can't be stopped; `close` waits for that."""
    gate = layer.before["lock lock"] = Gate()
    opening = asyncio.ensure_future(tier.open())
    await gate.entered()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    closing = asyncio.ensure_future(tier.close())
    gate.open()
    await closing
    assert not open_fds(path)
    assert await keys_in(path) == []


async def test_close_waits_for_the_calls_of_cancelled_callers(
    tier: DiskTier, path: Path, layer: Layer
) -> None:
    """Their threads are still inside the files; the write is complete when it is done."""
    await tier.open()
    gate = layer.before["write slab"] = Gate()
    writing = asyncio.ensure_future(put(tier, {0: b"a"}))
    await gate.entered()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    closing = asyncio.ensure_future(tier.close([0]))
    again = asyncio.ensure_future(tier.close())
    await asyncio.wait([closing, again], timeout=0.05)
    assert not closing.done()
    assert not again.done()
    assert open_fds(path)
    with pytest.raises(ClosedError):
        await tier.flush()
    with pytest.raises(TierLockedError):
        await tier.open()
    gate.open()
    await closing
    await again
    assert not open_fds(path)
    assert await keys_in(path) == [b"a"]


async def test_calls_in_the_queue_come_before_close(
    tier: DiskTier, path: Path, layer: Layer
) -> None:
    """More calls than threads, all made before the close: all get done."""
    await tier.open()
    gate = layer.before["write slab"] = Gate()
    writing = [asyncio.ensure_future(put(tier, {slot: b"%d" % slot})) for slot in range(8)]
    await gate.entered()
    closing = asyncio.ensure_future(tier.close(range(8)))
    gate.open()
    await asyncio.gather(closing, *writing)
    assert await keys_in(path) == [b"%d" % slot for slot in range(8)]


async def test_close_is_bounded(tier: DiskTier, path: Path, layer: Layer) -> None:
    """A disk that hangs holds the threads up, not the caller; nothing is closed under them."""
    await tier.open()
    await put(tier, {0: b"a"})
    gate = layer.before["read slab"] = Gate()
    reading = asyncio.ensure_future(read(tier, [0]))
    await gate.entered()
    tier.close_timeout_s = 0.05
    for _ in range(2):
        with pytest.raises(TierUnavailableError, match="still under way"):
            await tier.close()
    assert open_fds(path)
    gate.open()
    assert await reading == [payload_of(b"a")]
    tier.close_timeout_s = 30
    await tier.close()
    assert not open_fds(path)
    assert await keys_in(path) == [b"a"]


@pytest.mark.parametrize("stage", ["read", "sync"])
async def test_a_cancelled_close_closes(
    tier: DiskTier, path: Path, layer: Layer, stage: str
) -> None:
    """Waiting for a read that keeps the only thread busy, or in the middle of its own sync."""
    tier = DiskTier(path, 16, BLOCK, io_threads=1)
    tier.file_layer = layer
    tier.close_timeout_s = 10
    await tier.open()
    await put(tier, {0: b"a"})
    gate = layer.before[f"{stage} slab"] = Gate()
    reading = asyncio.ensure_future(read(tier, [0]))
    if stage == "read":
        await gate.entered()
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(tier.close())
    await asyncio.sleep(0)
    if stage == "sync":
        await gate.entered()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    gate.open()
    assert await reading == [payload_of(b"a")]
    await tier.close()
    assert not open_fds(path)
    assert await keys_in(path) == [b"a"]


async def test_a_tier_that_was_not_closed_is_told_of(tier: DiskTier) -> None:
    await tier.open()
    with pytest.warns(ResourceWarning, match="was not closed"):
        tier.__del__()
    await tier.close()
    tier.__del__()


async def test_an_order_of_nonsense_slots_does_not_keep_it_from_closing(
    tier: DiskTier, path: Path
) -> None:
    await tier.open()
    await put(tier, {0: b"a", 1: b"b"})
    await tier.close([99, 1, -1, 1, 7, 0])
    assert await keys_in(path) == [b"b", b"a"]


# Any history


class History(RuleBasedStateMachine):
    """Any sequence of writes, erasures, flushes, crashes, closes and resizes, against a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.home = Path(tempfile.mkdtemp(prefix="kvoffload-test-"))
        self.lives = 0
        self.num_blocks = 6
        # Slot to key and payload; a dict's order is the order of writing.
        self.model: dict[int, tuple[bytes, bytes]] = {}

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    @initialize()
    def open_new(self) -> None:
        self.reopen([], clean=True)

    def reopen(self, coldest_first: list[int], *, clean: bool) -> None:
        newest = {self.model[slot][0]: slot for slot in self.model}
        slots = [slot for slot in coldest_first if newest[self.model[slot][0]] == slot]
        slots = slots[max(0, len(slots) - self.num_blocks) :]
        self.tier = DiskTier(self.home / str(self.lives), self.num_blocks, 64)
        found = self.run(self.tier.open())
        assert [(block.key, block.size) for block in found] == [
            (self.model[slot][0], len(self.model[slot][1])) for slot in slots
        ]
        assert self.tier.recovery is not None
        assert self.tier.recovery.clean == clean
        assert self.tier.recovery.damaged == 0
        place = {old: block.slot for old, block in zip(slots, found, strict=True)}
        self.model = {place[slot]: self.model[slot] for slot in self.model if slot in place}

    @rule(
        keys=st.dictionaries(st.integers(0, 5), st.sampled_from([b"a", b"b", b"c", b"d"])),
        size=st.integers(0, 64),
        salt=st.binary(min_size=1, max_size=8),
    )
    def write(self, keys: dict[int, bytes], size: int, salt: bytes) -> None:
        keys = {slot: key for slot, key in keys.items() if slot < self.num_blocks}
        payloads = [payload_of(salt + bytes([slot]), size) for slot in keys]
        outcomes = self.run(
            self.tier.write(list(keys), [memoryview(p) for p in payloads], list(keys.values()))
        )
        assert outcomes == [None] * len(keys)
        for (slot, key), payload in zip(keys.items(), payloads, strict=True):
            self.model.pop(slot, None)
            self.model[slot] = key, payload

    @rule(slots=st.sets(st.integers(0, 5)))
    def erase(self, slots: set[int]) -> None:
        slots = {slot for slot in slots if slot < self.num_blocks}
        self.run(self.tier.erase(sorted(slots)))
        for slot in slots:
            self.model.pop(slot, None)

    @rule()
    def flush(self) -> None:
        self.run(self.tier.flush())

    @rule()
    def crash(self) -> None:
        """The process is killed; its files are as they are."""
        self.lives += 1
        shutil.copytree(self.tier.path, self.home / str(self.lives))
        self.run(self.tier.close())
        self.reopen(list(self.model), clean=False)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), num_blocks=st.integers(1, 8))
    def close_and_resize(self, data: st.DataObject, num_blocks: int) -> None:
        order = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True))
        self.run(self.tier.close(order))
        self.num_blocks = num_blocks
        self.reopen([slot for slot in self.model if slot not in order] + order, clean=True)

    @invariant()
    def every_slot_has_what_was_written(self) -> None:
        if not hasattr(self, "tier"):
            return
        buffers = [bytearray(len(payload)) for _, payload in self.model.values()]
        outcomes = self.run(self.tier.read(list(self.model), [memoryview(b) for b in buffers]))
        assert outcomes == [None] * len(buffers)
        assert [bytes(buffer) for buffer in buffers] == [data for _, data in self.model.values()]

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.run(self.tier.close())
        self.runner.close()
        shutil.rmtree(self.home)


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
