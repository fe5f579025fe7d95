"""Reopening: what a crash, a bad disk and another geometry leave of a directory."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from kvoffload.errors import ConfigError, CorruptBlockError, TierError, TierUnavailableError
from kvoffload.storage import format as fmt
from kvoffload.storage.files import FileLayer
from kvoffload.tiers.disk import DiskTier
from kvoffload.types import StoredBlock

BLOCK = 1024
SECTOR = fmt.SECTOR_BYTES


def payload_of(key: bytes) -> bytes:
    """Return bytes that no other key has, of a size of the key's own."""
    return (key * BLOCK)[: BLOCK - sum(key) % 3]


async def put(tier: DiskTier, blocks: dict[int, bytes]) -> None:
    payloads = [memoryview(payload_of(key)) for key in blocks.values()]
    assert await tier.write(list(blocks), payloads, list(blocks.values())) == [None] * len(blocks)


async def check(tier: DiskTier, found: Iterable[StoredBlock]) -> None:
    """Read every block and compare it with what its key stands for."""
    for block in found:
        into = bytearray(block.size)
        assert await tier.read([block.slot], [memoryview(into)]) == [None]
        assert bytes(into) == payload_of(block.key)


async def make(
    path: Path, blocks: dict[int, bytes], order: Sequence[int] = (), *, num_blocks: int = 8
) -> None:
    """Leave a directory that was closed cleanly."""
    tier = DiskTier(path, num_blocks, BLOCK)
    await tier.open()
    for slot, key in blocks.items():
        await put(tier, {slot: key})
    await tier.close(order)


async def make_crashed(path: Path, blocks: dict[int, bytes]) -> None:
    """Leave a directory as a process that was killed leaves it."""
    tier = DiskTier(path.with_name("before-the-crash"), 8, BLOCK)
    await tier.open()
    for slot, key in blocks.items():
        await put(tier, {slot: key})
    shutil.copytree(tier.path, path)
    await tier.close()
    shutil.rmtree(tier.path)


async def keys_of(path: Path, num_blocks: int = 8) -> list[bytes]:
    """Open, check every block, close, and return the keys in order."""
    tier = DiskTier(path, num_blocks, BLOCK)
    found = await tier.open()
    try:
        await check(tier, found)
    finally:
        await tier.close([block.slot for block in found])
    return [block.key for block in found]


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


BLOCKS = {3: b"first", 0: b"second", 6: b"third", 1: b"fourth"}
IN_ORDER_OF_WRITING = [b"first", b"second", b"third", b"fourth"]


# Order


async def test_a_clean_close_keeps_the_order_of_use(tmp_path: Path) -> None:
    """Blocks that the manager didn't name are there too, as the coldest."""
    await make(tmp_path / "cold", BLOCKS, order=[1, 6, 7, 3])
    tier = DiskTier(tmp_path / "cold", 8, BLOCK)
    found = await tier.open()
    assert [block.key for block in found] == [b"second", b"fourth", b"third", b"first"]
    assert tier.recovery is not None
    assert tier.recovery.clean
    await check(tier, found)
    await tier.close()


async def test_after_a_crash_the_order_of_writing_counts(tmp_path: Path) -> None:
    await make_crashed(tmp_path / "cold", BLOCKS)
    tier = DiskTier(tmp_path / "cold", 8, BLOCK)
    found = await tier.open()
    assert [block.key for block in found] == IN_ORDER_OF_WRITING
    assert tier.recovery is not None
    assert not tier.recovery.clean
    assert tier.recovery.blocks == 4
    await check(tier, found)
    await tier.close()


async def test_an_order_is_not_believed_after_a_crash(tmp_path: Path) -> None:
    """The order file of the close before is still there, for slots that changed hands since."""
    path = tmp_path / "cold"
    await make(path, BLOCKS, order=[6, 3, 1, 0])
    tier = DiskTier(path, 8, BLOCK)
    await tier.open()
    await put(tier, {6: b"newest"})
    shutil.copytree(path, tmp_path / "crashed")
    await tier.close()
    assert await keys_of(tmp_path / "crashed") == [b"first", b"second", b"fourth", b"newest"]


async def test_a_damaged_order_costs_the_order_alone(tmp_path: Path) -> None:
    await make(tmp_path / "cold", BLOCKS, order=[6, 3, 1, 0])
    flip(tmp_path / "cold" / "order", 36)
    assert await keys_of(tmp_path / "cold") == IN_ORDER_OF_WRITING


async def test_sequence_numbers_never_come_twice(tmp_path: Path) -> None:
    """Across clean closes and crashes, also when the highest one was erased."""
    seen: list[int] = []

    def sequences(path: Path) -> list[int]:
        return sorted(fmt.parse_records((path / "records").read_bytes()).sequences.tolist())

    path = tmp_path / "0"
    for turn in range(4):
        tier = DiskTier(path, 8, BLOCK)
        await tier.open()
        await put(tier, {6: b"to be kept"})
        await put(tier, {7: b"to be erased"})
        seen += sequences(path)
        await tier.erase([7])
        crashed = tmp_path / f"{turn + 1}"
        shutil.copytree(path, crashed)
        await tier.close()
        path = path if turn % 2 else crashed
    assert len(seen) == 8
    assert sorted(set(seen)) == seen


# Damage


@pytest.mark.parametrize("offset", [0, 9, 20, 45, 66, 511])
async def test_a_damaged_record_is_dropped_and_counted(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "cold"
    await make(path, BLOCKS)
    flip(path / "records", 6 * SECTOR + offset)
    tier = DiskTier(path, 8, BLOCK)
    found = await tier.open()
    assert [block.key for block in found] == [b"first", b"second", b"fourth"]
    assert tier.recovery is not None
    assert (tier.recovery.damaged, tier.recovery.blocks) == (1, 3)
    await check(tier, found)
    await tier.close()
    assert not any((path / "records").read_bytes()[6 * SECTOR : 7 * SECTOR])


async def test_a_damaged_payload_is_an_error_for_its_slot_alone(tmp_path: Path) -> None:
    """It is found when it is read, and others in the batch are read."""
    await make(tmp_path / "cold", BLOCKS)
    flip(tmp_path / "cold" / "slab-000000", BLOCK + 17)
    tier = DiskTier(tmp_path / "cold", 8, BLOCK)
    found = sorted(await tier.open(), key=lambda block: block.slot)
    buffers = [bytearray(block.size) for block in found]
    outcomes = await tier.read([block.slot for block in found], [memoryview(b) for b in buffers])
    assert [type(outcome) for outcome in outcomes] == [
        *(type(None), CorruptBlockError, type(None), type(None))
    ]
    assert "slot 1" in str(outcomes[1])
    await check(tier, [block for block in found if block.slot != 1])
    await tier.erase([1])
    await tier.close()
    assert await keys_of(tmp_path / "cold") == [b"first", b"second", b"third"]


async def test_a_payload_that_the_power_loss_took_is_not_another_ones(tmp_path: Path) -> None:
    """The record reached the disk and the payload didn't: the slot shows the block before it."""
    path = tmp_path / "cold"
    await make(path, {2: b"old", 3: b"other"})
    tier = DiskTier(path, 8, BLOCK)
    await tier.open()
    old = (path / "slab-000000").read_bytes()
    await put(tier, {2: b"new"})
    shutil.copytree(path, tmp_path / "crashed")
    await tier.close()
    (tmp_path / "crashed" / "slab-000000").write_bytes(old)
    tier = DiskTier(tmp_path / "crashed", 8, BLOCK)
    found = {block.key: block for block in await tier.open()}
    into = memoryview(bytearray(found[b"new"].size))
    (outcome,) = await tier.read([2], [into])
    assert isinstance(outcome, CorruptBlockError)
    await check(tier, [found[b"other"]])
    await tier.close()


async def test_a_missing_slab_takes_its_blocks_alone(tmp_path: Path) -> None:
    """Found at once by its absence, so those blocks are never promised."""
    path = tmp_path / "cold"
    per_slab = fmt.slots_per_slab(2**26)
    tier = DiskTier(path, 3 * per_slab, 2**26)
    await tier.open()
    for slot in (0, per_slab, 2 * per_slab):
        await put(tier, {slot: b"in %d" % slot})
    await tier.close()
    (path / "slab-000001").unlink()
    tier = DiskTier(path, 3 * per_slab, 2**26)
    found = await tier.open()
    assert [block.slot for block in found] == [0, 2 * per_slab]
    assert tier.recovery is not None
    assert tier.recovery.damaged == 1
    await check(tier, found)
    await put(tier, {per_slab: b"again"})
    await tier.close()


async def test_a_slab_cut_short_takes_its_last_blocks_alone(tmp_path: Path) -> None:
    path = tmp_path / "cold"
    await make(path, BLOCKS)
    with (path / "slab-000000").open("r+b") as file:
        file.truncate(4 * BLOCK - 100)
    assert await keys_of(path) == [b"second", b"fourth"]


async def test_records_cut_short_take_their_blocks_alone(tmp_path: Path) -> None:
    """In the middle of a record; and what is left was not closed like that."""
    path = tmp_path / "cold"
    await make(path, BLOCKS)
    with (path / "records").open("r+b") as file:
        file.truncate(3 * SECTOR + 100)
    tier = DiskTier(path, 8, BLOCK)
    found = await tier.open()
    assert [block.key for block in found] == [b"second", b"fourth"]
    assert tier.recovery is not None
    assert (tier.recovery.clean, tier.recovery.damaged) == (False, 1)
    await put(tier, {7: b"and on"})
    await tier.close()


async def test_a_blank_record_cut_short_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records are read piece by piece into one buffer, which still has the piece before."""
    monkeypatch.setattr("kvoffload.storage.recovery._SCAN_SLOTS", 2)
    path = tmp_path / "cold"
    await make(path, {0: b"a", 1: b"b"})
    with (path / "records").open("r+b") as file:
        file.truncate(2 * SECTOR + 100)
    tier = DiskTier(path, 8, BLOCK)
    assert len(await tier.open()) == 2
    assert tier.recovery is not None
    assert tier.recovery.damaged == 0
    await tier.close()


async def test_missing_records_are_an_empty_tier(tmp_path: Path) -> None:
    await make(tmp_path / "cold", BLOCKS)
    (tmp_path / "cold" / "records").unlink()
    assert await keys_of(tmp_path / "cold") == []


class BadSector(FileLayer):
    """A disk that can't read one sector of `records`, for so many times or until it is written."""

    def __init__(self, slot: int, *, number: int = errno.EIO, times: int = 10**6) -> None:
        self.at = slot * SECTOR
        self.number = number
        self.times = times

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        if self._hit(fd, buffers, offset) and self.times:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number))
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        if self._hit(fd, buffers, offset):
            self.times = 0
        return super().pwritev(fd, buffers, offset)

    def _hit(self, fd: int, buffers: list[memoryview], offset: int) -> bool:
        is_records = Path(f"/proc/self/fd/{fd}").readlink().name == "records"
        return is_records and offset <= self.at < offset + sum(map(len, buffers))


SPREAD = {0: b"a", 7: b"b", 8: b"c", 15: b"d", 16: b"e", 23: b"f", 24: b"g", 27: b"h"}


@pytest.mark.parametrize("scan_slots", [8, 16, 8192])
@pytest.mark.parametrize(("bad", "lost"), [(9, {8, 15}), (16, {16, 23}), (27, {24, 27})])
async def test_records_that_cannot_be_read_take_their_blocks_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    scan_slots: int,
    bad: int,
    lost: set[int],
) -> None:
    """One bad sector: the eight records of its page are given up, and all others are kept.

    In a piece of its own, within one, and in the last, which ends with the file.
    """
    monkeypatch.setattr("kvoffload.storage.recovery._SCAN_SLOTS", scan_slots)
    path = tmp_path / "cold"
    await make(path, SPREAD, num_blocks=28)
    tier = DiskTier(path, 28, BLOCK)
    tier.file_layer = BadSector(bad)
    found = await tier.open()
    assert {block.slot for block in found} == set(SPREAD) - lost
    assert tier.recovery is not None
    assert tier.recovery.blocks == 6
    assert tier.recovery.damaged == min(8, 28 - min(lost))
    assert f"can't be read (errors: 1, the first: [Errno {errno.EIO}]" in caplog.text
    assert str(path / "records") in caplog.text
    await check(tier, found)
    await put(tier, {slot: b"again in %d" % slot for slot in lost})
    await tier.close()
    expected = {key for slot, key in SPREAD.items() if slot not in lost}
    expected |= {b"again in %d" % slot for slot in lost}
    assert set(await keys_of(path, 28)) == expected


async def test_records_that_can_be_read_at_the_second_try_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "cold"
    await make(path, SPREAD, num_blocks=28)
    tier = DiskTier(path, 28, BLOCK)
    tier.file_layer = BadSector(9, times=1)
    assert {block.slot for block in await tier.open()} == set(SPREAD)
    assert tier.recovery is not None
    assert tier.recovery.damaged == 0
    await tier.close()


async def test_an_error_that_may_pass_drops_no_records(tmp_path: Path) -> None:
    """The disk didn't say that they are lost: opening fails, and the next one finds all of them."""
    path = tmp_path / "cold"
    await make(path, SPREAD, num_blocks=28)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    tier = DiskTier(path, 28, BLOCK)
    tier.file_layer = BadSector(9, number=errno.ESTALE)
    with pytest.raises(TierUnavailableError, match="records"):
        await tier.open()
    assert before == {file.name: file.read_bytes() for file in path.iterdir()}
    tier.file_layer = FileLayer()
    assert {block.slot for block in await tier.open()} == set(SPREAD)
    await tier.close()


async def test_an_old_copy_of_a_block_is_dropped(tmp_path: Path) -> None:
    """The block was evicted from slot 2 without being erased, and written to slot 5 later."""
    path = tmp_path / "cold"
    await make(path, {2: b"twice", 4: b"once", 5: b"twice"}, order=[5, 4])
    tier = DiskTier(path, 8, BLOCK)
    found = await tier.open()
    assert [(block.key, block.slot) for block in found] == [(b"twice", 5), (b"once", 4)]
    assert tier.recovery is not None
    assert tier.recovery.duplicates == 1
    await tier.close()
    assert not any((path / "records").read_bytes()[2 * SECTOR : 3 * SECTOR])


async def test_what_was_found_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await make(tmp_path / "cold", BLOCKS)
    flip(tmp_path / "cold" / "records", 0)
    with caplog.at_level(logging.INFO, logger="kvoffload"):
        await keys_of(tmp_path / "cold")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "3 blocks" in record.getMessage()
    assert "1 damaged" in record.getMessage()


# Header


@pytest.mark.parametrize("copy", ["header-0", "header-1"])
@pytest.mark.parametrize("harm", [lambda path: flip(path, 20), Path.unlink])
async def test_one_good_header_is_enough(
    tmp_path: Path, copy: str, harm: Callable[[Path], None]
) -> None:
    path = tmp_path / "cold"
    await make(path, BLOCKS, order=[1, 6, 0, 3])
    harm(path / copy)
    tier = DiskTier(path, 8, BLOCK)
    found = await tier.open()
    assert [block.slot for block in found] == [1, 6, 0, 3]
    assert tier.recovery is not None
    assert tier.recovery.clean
    assert not tier.recovery.header_rebuilt
    await tier.close()
    assert fmt.parse_header((path / copy).read_bytes()) is not None


@pytest.mark.parametrize("harm", [lambda path: flip(path, 20), Path.unlink])
async def test_without_a_good_header_the_records_tell(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    path = tmp_path / "cold"
    await make(path, BLOCKS, order=[1, 6, 0, 3])
    harm(path / "header-0")
    harm(path / "header-1")
    with pytest.raises(ConfigError, match=rf"{BLOCK}\D.*{2 * BLOCK}\D"):
        await DiskTier(path, 8, 2 * BLOCK).open()
    tier = DiskTier(path, 8, BLOCK)
    found = await tier.open()
    assert [block.key for block in found] == IN_ORDER_OF_WRITING
    assert tier.recovery is not None
    assert tier.recovery.header_rebuilt
    await check(tier, found)
    await tier.close()
    assert await keys_of(path) == IN_ORDER_OF_WRITING


async def test_a_header_torn_in_the_middle_of_a_write_leaves_the_other(tmp_path: Path) -> None:
    """They are written one after the other, so the one not being written is good."""
    await make(tmp_path / "cold", BLOCKS)
    headers = [tmp_path / "cold" / name for name in ("header-0", "header-1")]
    written: list[bytes] = []

    class Watching(FileLayer):
        def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
            if Path(f"/proc/self/fd/{fd}").readlink().name.startswith("header"):
                good = [fmt.parse_header(path.read_bytes()) for path in headers]
                assert all(good)
                written.append(bytes(buffers[0]))
            return super().pwritev(fd, buffers, offset)

        def sync(self, fd: int, *, names: bool = False) -> None:
            written.append(b"synced")
            super().sync(fd, names=names)

    tier = DiskTier(tmp_path / "cold", 8, BLOCK)
    tier.file_layer = Watching()
    await tier.open()
    header, synced, again, *_ = written
    assert header == again != synced == b"synced"
    await tier.close()


# Geometry and format


async def test_another_block_size_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cold"
    await make(path, BLOCKS, order=[1, 6, 0, 3])
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "lock"}
    with pytest.raises(ConfigError, match=rf"block_bytes {BLOCK}\D.*block_bytes {2 * BLOCK}\D"):
        await DiskTier(path, 8, 2 * BLOCK).open()
    assert before == {
        file.name: file.read_bytes() for file in path.iterdir() if file.name != "lock"
    }
    assert await keys_of(path) == [b"fourth", b"third", b"second", b"first"]


async def test_another_format_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cold"
    await make(path, BLOCKS)
    patch(path / "header-1", 0, fmt.pack_header(fmt.Header(BLOCK, 8, generation=9, version=7)))
    with pytest.raises(
        ConfigError, match=rf"format version 7.*format version {fmt.FORMAT_VERSION}"
    ):
        await DiskTier(path, 8, BLOCK).open()


async def test_records_of_another_format_version_are_refused_without_a_header(
    tmp_path: Path,
) -> None:
    """Rather than dropped as damaged: another release can read them."""
    path = tmp_path / "cold"
    await make(path, {})
    (path / "header-0").unlink()
    (path / "header-1").unlink()
    record = bytearray(fmt.pack_record(fmt.Record(0, 1, BLOCK, 0, 0, b"k"))[:-8])
    record[8] = 77
    patch(path / "records", 0, bytes(record) + fmt.checksum(bytes(record)).to_bytes(8, "little"))
    before = (path / "records").read_bytes()
    with pytest.raises(ConfigError, match="format version 77"):
        await DiskTier(path, 8, BLOCK).open()
    assert (path / "records").read_bytes() == before


async def test_more_slots_is_growth(tmp_path: Path) -> None:
    path = tmp_path / "cold"
    await make(path, BLOCKS, order=[1, 6, 0, 3])
    tier = DiskTier(path, 20, BLOCK)
    found = await tier.open()
    assert [block.slot for block in found] == [1, 6, 0, 3]
    await put(tier, {19: b"in the new part"})
    await tier.close([1, 6, 0, 3, 19])
    assert await keys_of(path, 20) == [b"fourth", b"third", b"second", b"first", b"in the new part"]


async def test_fewer_slots_keep_the_most_recent(tmp_path: Path) -> None:
    """Wherever they lie: what was in slots that are no more moves to ones that are."""
    path = tmp_path / "cold"
    await make(path, {0: b"a", 1: b"b", 2: b"c", 6: b"d", 7: b"e"}, order=[2, 0, 7, 1, 6])
    tier = DiskTier(path, 3, BLOCK)
    found = await tier.open()
    assert [block.key for block in found] == [b"e", b"b", b"d"]
    assert {block.slot for block in found} == {0, 1, 2}
    assert tier.recovery is not None
    assert tier.recovery.dropped == 2
    await check(tier, found)
    await tier.close([block.slot for block in found])
    assert (path / "records").stat().st_size == 3 * SECTOR
    assert (path / "slab-000000").stat().st_size <= 3 * BLOCK
    assert await keys_of(path, 3) == [b"e", b"b", b"d"]


async def test_fewer_slots_after_a_crash_keep_the_last_written(tmp_path: Path) -> None:
    await make_crashed(tmp_path / "cold", BLOCKS)
    assert await keys_of(tmp_path / "cold", 2) == [b"third", b"fourth"]


async def test_a_damaged_block_is_lost_when_it_has_to_move(tmp_path: Path) -> None:
    path = tmp_path / "cold"
    await make(path, {0: b"stays", 6: b"damaged", 7: b"moves"})
    flip(path / "slab-000000", 6 * BLOCK)
    tier = DiskTier(path, 3, BLOCK)
    found = await tier.open()
    assert [block.key for block in found] == [b"stays", b"moves"]
    assert tier.recovery is not None
    assert (tier.recovery.damaged, tier.recovery.dropped) == (1, 0)
    await check(tier, found)
    await tier.close()


# Crashes


class Crash(FileLayer):
    """Lets so many changes to the files through, half of the next one, and then none."""

    def __init__(self, changes: int) -> None:
        self.changes = changes

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        if self._dies():
            data = b"".join(buffers)
            super().pwritev(fd, [memoryview(data[: len(data) // 2])], offset)
        if self.changes < 0:
            raise OSError("the process is dead")
        return super().pwritev(fd, buffers, offset)

    def truncate(self, fd: int, size: int) -> None:
        if self._dies() or self.changes < 0:
            raise OSError("the process is dead")
        super().truncate(fd, size)

    def unlink(self, path: Path) -> None:
        if self._dies() or self.changes < 0:
            raise OSError("the process is dead")
        super().unlink(path)

    def _dies(self) -> bool:
        self.changes -= 1
        return self.changes == -1


async def test_a_crash_at_any_change_of_a_file_loses_nothing_that_was_promised(
    tmp_path: Path,
) -> None:
    """Torn writes included. Blocks whose write returned are there, erased ones are not.

    One by one, every change that opening, writing, replacing, erasing and closing make is the
    last one; then the directory is opened again.
    """
    survived = 0
    for changes in range(1000):
        path = tmp_path / f"{changes}"
        await make(path, {0: b"kept", 1: b"replaced", 2: b"erased", 7: b"moved"}, [2, 1, 0, 7])
        promised = {b"kept", b"replaced", b"erased", b"moved"}
        allowed = {*promised, b"replacement", b"new"}
        layer = Crash(changes)
        tier = DiskTier(path, 5, BLOCK)
        tier.file_layer = layer
        with suppress(TierError):
            slots = {block.key: block.slot for block in await tier.open()}
            slots[b"new"] = ({0, 1, 2, 3, 4} - set(slots.values())).pop()
            promised.discard(b"replaced")
            keys = [b"new", b"replacement"]
            payloads = [memoryview(payload_of(key)) for key in keys]
            outcomes = await tier.write([slots[b"new"], slots[b"replaced"]], payloads, keys)
            promised |= {key for key, error in zip(keys, outcomes, strict=True) if error is None}
            if b"replacement" in promised:
                allowed.discard(b"replaced")
            promised.discard(b"erased")
            await tier.erase([slots[b"erased"]])
            allowed.discard(b"erased")
            await tier.flush()
        with suppress(TierError):
            await tier.close([3, 0, 1])
        keys_found = await keys_of(path, 5)
        assert promised <= set(keys_found) <= allowed, f"after {changes} changes"
        shutil.rmtree(path)
        if layer.changes >= 0:
            break
        survived += 1
    assert survived > 12


# Size and speed


async def test_a_hundred_thousand_slots_reopen_in_no_time(tmp_path: Path) -> None:
    """Records alone are read, in big pieces, and parsed in bulk: sooner than they are made here."""
    count = 100_000
    path = tmp_path / "cold"
    path.mkdir()
    record = fmt.Record(0, 0, BLOCK, 0, fmt.checksum(b""), b"")
    started = time.process_time()
    with (path / "records").open("wb") as file:
        for slot in range(count):
            key = slot.to_bytes(32, "big")
            file.write(fmt.pack_record(replace(record, slot=slot, sequence=slot, key=key)))
    made_s = time.process_time() - started
    tier = DiskTier(path, count, BLOCK)
    started = time.process_time()
    found = await tier.open()
    opened_s = time.process_time() - started
    await tier.close()
    assert [block.slot for block in found] == list(range(count))
    assert opened_s < made_s, (opened_s, made_s)
