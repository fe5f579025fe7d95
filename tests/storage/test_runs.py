"""Neighbouring slots move in few calls, and no short call or error takes one for another."""

from __future__ import annotations

import errno
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.storage.runs import (
    MOST_GAP,
    RUN_SLOTS,
    Transfer,
    filled,
    join_runs,
    move_run,
    new_filler,
)

PAGE = 4096


def join(slots: list[int], sizes: list[int], slot_bytes: int, per_file: int) -> list[list[int]]:
    order = sorted(range(len(slots)), key=slots.__getitem__)
    return join_runs(order, slots, sizes, slot_bytes=slot_bytes, slots_per_file=per_file)


@given(
    st.lists(st.integers(0, 40), max_size=30, unique=True),
    st.data(),
    st.integers(1, 8),
    st.sampled_from([1, 2, 16, 2 * MOST_GAP]),
)
def test_runs_are_neighbours_and_leave_nothing_out(
    slots: list[int], data: st.DataObject, slots_per_file: int, slot_bytes: int
) -> None:
    sizes = [data.draw(st.sampled_from([0, 1, slot_bytes])) for _ in slots]
    runs = join(slots, sizes, slot_bytes, slots_per_file)
    assert sorted(i for run in runs for i in run) == [i for i, size in enumerate(sizes) if size]
    for run in runs:
        assert len({slots[i] // slots_per_file for i in run}) == 1
        for before, after in itertools.pairwise(run):
            assert slots[after] == slots[before] + 1
            assert slot_bytes - sizes[before] <= MOST_GAP


def test_neighbours_share_a_run() -> None:
    assert join([5, 3, 4, 9], [8, 8, 8, 8], 8, 100) == [[1, 2, 0], [3]]


def test_a_run_ends_with_its_file() -> None:
    assert join([0, 1, 2, 3], [8] * 4, 8, 2) == [[0, 1], [2, 3]]


def test_a_run_is_not_longer_than_the_system_takes() -> None:
    count = RUN_SLOTS + 1
    runs = join(list(range(count)), [8] * count, 8, 2 * count)
    assert [len(run) for run in runs] == [RUN_SLOTS, 1]


class File:
    """A file in memory whose calls fall short, and fail where the disk is bad."""

    def __init__(self, content: bytes, *, seed: int, grain: int, bad: range = range(0)) -> None:
        self.content = bytearray(content)
        self._random = random.Random(seed)
        self._grain = grain
        self._bad = bad

    def read(self, _: int, buffers: list[memoryview], offset: int) -> int:
        count = self._count(sum(map(len, buffers)), offset)
        count = min(count, max(0, len(self.content) - offset))
        data = self.content[offset : offset + count]
        for buffer in buffers:
            piece, data = data[: len(buffer)], data[len(buffer) :]
            buffer[: len(piece)] = piece
        return count

    def write(self, _: int, buffers: list[memoryview], offset: int) -> int:
        data = b"".join(buffers)
        count = self._count(len(data), offset)
        self.content += bytes(max(0, offset + count - len(self.content)))
        self.content[offset : offset + count] = data[:count]
        return count

    def _count(self, wanted: int, offset: int) -> int:
        """Say how much a call moves: all or less, and nothing of what is bad."""
        assert wanted
        if self._grain > 1:
            assert offset % self._grain == wanted % self._grain == 0
        if offset in self._bad:
            raise OSError(errno.EIO, "bad")
        if self._random.random() < 0.6:
            wanted = max(
                self._grain, self._random.randrange(wanted + 1) // self._grain * self._grain
            )
        if self._bad and offset < self._bad.start:
            wanted = min(wanted, self._bad.start - offset)
        return wanted


@pytest.mark.parametrize("direct", [False, True])
@given(data=st.data())
def test_short_calls_errors_and_the_end_of_the_file_concern_whom_they_meet(
    direct: bool, data: st.DataObject
) -> None:
    """Each slot gets its own bytes, or an error; only those in a bad place or beyond the end do."""
    slot_bytes = 2 * PAGE if direct else 10
    grain = PAGE if direct else 1
    count = data.draw(st.integers(1, 6))
    sizes = [data.draw(st.integers(1, slot_bytes)) for _ in range(count)]
    first = data.draw(st.integers(0, 2)) * slot_bytes
    length = data.draw(st.integers(0, first + count * slot_bytes))
    bad_slot = data.draw(st.none() | st.integers(0, count - 1))
    bad = range(0)
    if bad_slot is not None:
        bad = range(first + bad_slot * slot_bytes, first + (bad_slot + 1) * slot_bytes)
    content = random.Random(1).randbytes(length)
    file = File(content, seed=data.draw(st.integers(0, 99)), grain=grain, bad=bad)

    if direct:  # one buffer for all, of whole pages, as bounced slots have
        whole = memoryview(bytearray((count - 1) * slot_bytes + -(-sizes[-1] // PAGE) * PAGE))
        buffers = [whole]
        views = [whole[n * slot_bytes :][:size] for n, size in enumerate(sizes)]
    else:
        views = [memoryview(bytearray(size)) for size in sizes]
        buffers = filled(views, slot_bytes, new_filler())
    transfer: Transfer = file.read
    outcomes = move_run(
        transfer, 0, buffers, first, sizes=sizes, slot_bytes=slot_bytes, direct=direct
    )
    for number, (view, size, outcome) in enumerate(zip(views, sizes, outcomes, strict=True)):
        start = first + number * slot_bytes
        if number == bad_slot:
            assert outcome is not None
            assert outcome.errno in (errno.EIO, errno.ENODATA)
        elif start + size <= length:
            assert outcome is None
            assert view == content[start : start + size]
        else:
            assert outcome is not None
            assert outcome.errno == errno.ENODATA


@pytest.mark.parametrize("direct", [False, True])
@given(data=st.data())
def test_short_writes_go_on(direct: bool, data: st.DataObject) -> None:
    slot_bytes = 2 * PAGE if direct else 10
    count = data.draw(st.integers(1, 6))
    sizes = [data.draw(st.integers(1, slot_bytes)) for _ in range(count)]
    file = File(b"", seed=data.draw(st.integers(0, 99)), grain=PAGE if direct else 1)
    payloads = [random.Random(n).randbytes(size) for n, size in enumerate(sizes)]
    if direct:
        whole = memoryview(bytearray((count - 1) * slot_bytes + -(-sizes[-1] // PAGE) * PAGE))
        for n, payload in enumerate(payloads):
            whole[n * slot_bytes :][: len(payload)] = payload
        buffers = [whole]
    else:
        buffers = filled([memoryview(one) for one in payloads], slot_bytes, new_filler())
    outcomes = move_run(
        file.write, 0, buffers, 0, sizes=sizes, slot_bytes=slot_bytes, direct=direct
    )
    assert outcomes == [None] * count
    for n, payload in enumerate(payloads):
        assert file.content[n * slot_bytes :][: len(payload)] == payload
