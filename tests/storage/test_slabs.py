"""Slots in files: few calls for many slots, an error for the slot it met, no file left behind."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvoffload.storage.files import FileLayer
from kvoffload.storage.slabs import SlotFiles

SLOT = 8


class Layer(FileLayer):
    """The real calls, counted, and told what to do first."""

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.writes: list[int] = []
        self.synced: list[str] = []
        self.open_fds: set[int] = set()
        self.most_bytes = 2**30
        self.before: dict[str, Callable[[], None]] = {}

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        self.open_fds.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self.open_fds.discard(fd)
        super().close(fd)
        self.before.get("close", lambda: None)()

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self.reads.append(len(buffers))
        self.before.get(f"read {offset // SLOT}", lambda: None)()
        return super().preadv(fd, self._some(buffers), offset)

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self.writes.append(len(buffers))
        self.before.get(f"write {offset // SLOT}", lambda: None)()
        return super().pwritev(fd, self._some(buffers), offset)

    def sync(self, fd: int, *, names: bool = False) -> None:
        self.synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        self.before.get("sync", lambda: None)()
        super().sync(fd, names=names)

    def _some(self, buffers: list[memoryview]) -> list[memoryview]:
        some: list[memoryview] = []
        room = self.most_bytes
        for buffer in buffers:
            some.append(buffer[:room])
            room -= len(some[-1])
        return some


def fail_with(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def layer() -> Layer:
    return Layer()


@pytest.fixture
def files(layer: Layer, tmp_path: Path) -> Iterator[SlotFiles]:
    files = make(layer, tmp_path)
    yield files
    files.close()
    assert not layer.open_fds


def make(layer: Layer, path: Path, *, slots_per_file: int = 4, max_open: int = 64) -> SlotFiles:
    return SlotFiles(
        layer,
        path,
        "part-{}".format,
        slot_bytes=SLOT,
        slots_per_file=slots_per_file,
        max_open=max_open,
    )


def views(*payloads: bytes) -> list[memoryview]:
    return [memoryview(payload) for payload in payloads]


def read(files: SlotFiles, slots: list[int], size: int = SLOT) -> list[bytes]:
    buffers = [bytearray(size) for _ in slots]
    assert files.read(slots, [memoryview(buffer) for buffer in buffers]) == [None] * len(slots)
    return [bytes(buffer) for buffer in buffers]


def test_neighbours_move_in_one_call(files: SlotFiles, layer: Layer) -> None:
    """In whatever order the caller names them, and a file ends a call."""
    slots = [2, 0, 3, 1, 5, 4, 7]
    payloads = [bytes([65 + slot]) * SLOT for slot in slots]
    assert files.write(slots, views(*payloads)) == [None] * 7
    assert layer.writes == [4, 2, 1]
    assert read(files, slots) == payloads
    assert layer.reads == [4, 2, 1]


def test_a_short_payload_leaves_other_slots_alone(files: SlotFiles) -> None:
    files.write([0, 1, 2], views(b"a" * SLOT, b"b" * SLOT, b"c" * SLOT))
    files.write([0, 1], views(b"A" * 3, b"B" * 2))
    assert [each[:2] for each in read(files, [0, 1])] == [b"AA", b"BB"]
    assert read(files, [2]) == [b"c" * SLOT]


@pytest.mark.parametrize("most_bytes", [1, 3, 8, 11, 20])
def test_calls_cut_short_go_on(files: SlotFiles, layer: Layer, most_bytes: int) -> None:
    """The system may move fewer bytes than asked, at any place."""
    layer.most_bytes = most_bytes
    payloads = [os.urandom(SLOT), os.urandom(SLOT), os.urandom(5)]
    assert files.write([1, 2, 3], views(*payloads)) == [None] * 3
    assert read(files, [1, 2]) == payloads[:2]
    assert read(files, [3], 5) == payloads[2:]


def test_an_error_concerns_the_slot_it_met(files: SlotFiles, layer: Layer) -> None:
    """Its neighbours in the same call are moved by the next one."""
    payloads = [bytes([65 + slot]) * SLOT for slot in range(4)]
    files.write([0, 1, 2, 3], views(*payloads))
    layer.most_bytes = SLOT  # so that the system gets stuck before slot 1
    layer.before["read 1"] = fail_with(errno.EIO)
    buffers = [bytearray(SLOT) for _ in range(4)]
    outcomes = files.read([0, 1, 2, 3], [memoryview(buffer) for buffer in buffers])
    assert [error and error.errno for error in outcomes] == [None, errno.EIO, None, None]
    assert [bytes(buffers[slot]) for slot in (0, 2, 3)] == [payloads[slot] for slot in (0, 2, 3)]
    layer.before["write 2"] = fail_with(errno.ENOSPC)
    outcomes = files.write([0, 1, 2, 3], views(*reversed(payloads)))
    assert [error and error.errno for error in outcomes] == [None, None, errno.ENOSPC, None]
    assert outcomes[2] is not None
    assert outcomes[2].filename.endswith("part-0")


def test_what_is_not_there_is_an_error_for_its_slots_alone(
    files: SlotFiles, tmp_path: Path
) -> None:
    """One file is gone, another ends too early."""
    files.write([0, 3, 4, 8], views(*[b"x" * SLOT] * 4))
    files.close()
    (tmp_path / "part-1").unlink()
    os.truncate(tmp_path / "part-0", 3 * SLOT + 2)
    outcomes = files.read([0, 3, 4, 8], [memoryview(bytearray(SLOT)) for _ in range(4)])
    assert [error and error.errno for error in outcomes] == [
        None,
        errno.ENODATA,
        errno.ENOENT,
        None,
    ]


def test_reading_makes_no_file(files: SlotFiles, tmp_path: Path) -> None:
    files.read([0], [memoryview(bytearray(SLOT))])
    assert list(tmp_path.iterdir()) == []


def test_files_open_at_once_are_bounded(layer: Layer, tmp_path: Path) -> None:
    """A tier of a terabyte has thousands of slabs, and a process a thousand descriptors."""
    files = make(layer, tmp_path, slots_per_file=1, max_open=3)
    for slot in range(10):
        files.write([slot], views(bytes([slot]) * SLOT))
        assert len(layer.open_fds) <= 3
    assert read(files, list(range(10))) == [bytes([slot]) * SLOT for slot in range(10)]
    files.sync()
    assert sorted(set(layer.synced)) == sorted([f"part-{i}" for i in range(10)] + [tmp_path.name])
    files.close()
    assert not layer.open_fds


def test_a_file_in_use_is_not_closed_under_its_user(layer: Layer, tmp_path: Path) -> None:
    """A reader is inside one file while others come and go."""
    files = make(layer, tmp_path, slots_per_file=1, max_open=1)
    files.write([0], views(b"0" * SLOT))
    entered, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        assert go_on.wait(30)

    layer.before["read 0"] = hang
    with ThreadPoolExecutor() as threads:
        slow = threads.submit(read, files, [0])
        assert entered.wait(30)
        del layer.before["read 0"]
        for slot in range(1, 5):
            files.write([slot], views(b"n" * SLOT))
        go_on.set()
        assert slow.result(30) == [b"0" * SLOT]
    files.close()


def test_sync_covers_each_write_once(files: SlotFiles, layer: Layer, tmp_path: Path) -> None:
    """And the directory where a file is new."""
    files.write([0, 5], views(b"x" * SLOT, b"y" * SLOT))
    files.sync()
    assert layer.synced == ["part-0", "part-1", tmp_path.name]
    layer.synced.clear()
    files.sync()
    assert layer.synced == []
    files.write([4], views(b"z" * SLOT))
    files.sync()
    assert layer.synced == ["part-1"]


def test_a_write_during_a_sync_is_left_to_the_next(files: SlotFiles, layer: Layer) -> None:
    """Else it would be taken for synced although the system may have been past it."""
    files.write([0], views(b"x" * SLOT))

    def write_meanwhile() -> None:
        layer.before.clear()
        assert files.write([1], views(b"y" * SLOT)) == [None]

    layer.before["sync"] = write_meanwhile
    files.sync()
    layer.synced.clear()
    files.sync()
    assert layer.synced == ["part-0"]


def test_a_second_sync_waits_for_the_first(files: SlotFiles, layer: Layer) -> None:
    """It finds nothing to do, but what it promises isn't true until the first is done."""
    files.write([0], views(b"x" * SLOT))
    entered, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        assert go_on.wait(30)

    layer.before["sync"] = hang
    with ThreadPoolExecutor() as threads:
        first = threads.submit(files.sync)
        assert entered.wait(30)
        second = threads.submit(files.sync)
        with pytest.raises(TimeoutError):
            second.result(0.05)
        go_on.set()
        first.result(30)
        second.result(30)


def test_a_failed_sync_is_not_forgotten(files: SlotFiles, layer: Layer) -> None:
    """Linux drops the pages that it could not write, and calls the next fdatasync a success."""
    files.write([0], views(b"x" * SLOT))
    layer.before["sync"] = fail_with(errno.EIO)
    with pytest.raises(OSError, match="part-0"):
        files.sync()
    layer.before.clear()
    with pytest.raises(OSError, match="never reached the disk"):
        files.sync()


def test_a_late_error_at_close_fails_the_next_sync(layer: Layer, tmp_path: Path) -> None:
    """A network file system may tell of a lost write only when the file is closed."""
    files = make(layer, tmp_path, slots_per_file=1, max_open=1)
    files.write([0], views(b"x" * SLOT))
    layer.before["close"] = fail_with(errno.EDQUOT)
    assert files.write([1], views(b"y" * SLOT)) == [None]
    layer.before.clear()
    with pytest.raises(OSError, match="never reached the disk"):
        files.sync()
    files.close()


def test_truncate_removes_what_is_beyond(files: SlotFiles, tmp_path: Path) -> None:
    """Of the files that are its own."""
    files.write(list(range(12)), views(*[b"x" * SLOT] * 12))
    (tmp_path / "part-99x").write_bytes(b"a stranger's")
    (tmp_path / "part-007").write_bytes(b"not a name of ours either")
    files.truncate(6)
    assert files.extents() == {0: 4 * SLOT, 1: 2 * SLOT}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("part-0", "part-007", "part-1", "part-99x")
    ]


def test_truncate_extends_by_a_hole(files: SlotFiles, tmp_path: Path) -> None:
    files.truncate(2, extend=True)
    assert files.extents() == {0: 2 * SLOT}
    assert read(files, [1]) == [bytes(SLOT)]
    assert (tmp_path / "part-0").stat().st_blocks == 0


def test_a_link_is_not_followed(files: SlotFiles, tmp_path: Path) -> None:
    """Nobody makes the tier write into another file by planting a link."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "part-0").symlink_to(victim)
    (outcome,) = files.write([0], views(b"x" * SLOT))
    assert outcome is not None
    assert outcome.errno == errno.ELOOP
    assert victim.read_bytes() == b"precious"
