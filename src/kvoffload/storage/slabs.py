"""Equal slots in files of a bounded size: which file, where in it, and moving many at once.

Payloads and records are both kept so: in slots of a block's size, and of one sector.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..aligned import ALIGNMENT, address_of, aligned_empty, round_up
from ..types import ByteArray
from .files import FileLayer
from .os_errors import is_full, naming
from .runs import RUN_SLOTS, Transfer, filled, join_runs, move_run, new_filler

MAX_OPEN_FILES = 64
"""Idle files of one kind that are kept open; beyond it the least recently used is closed."""

O_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""Flag of direct I/O; macOS has none."""

BOUNCE_BYTES = 2**22
"""Most bytes that go through a buffer of a thread's own at a time, unless one slot is larger."""


class SlotFiles:
    """Slots of one size in numbered files, made when first written.

    Threads may call at once, for different slots.

    Attributes:
        direct: Bypass the page cache. Buffers that are not aligned for it go through others that
            are, by a copy. Set before the first file is opened.
        read_only: Open files to be read alone. Set before too.
        lost: Why what was written may never reach the disk, once a sync has failed. It stays so.
    """

    def __init__(
        self,
        layer: FileLayer,
        directory: Path,
        file_name: Callable[[int], str],
        *,
        slot_bytes: int,
        slots_per_file: int,
        max_open: int = MAX_OPEN_FILES,
    ) -> None:
        """Describe the files; nothing is opened.

        Args:
            layer: The file calls.
            directory: Where the files are.
            file_name: Gives a file's name for its number.
            slot_bytes: Bytes of a slot, and the distance from one to the next.
            slots_per_file: Slots in each file.
            max_open: Files kept open while idle.
        """
        self.direct = False
        self.read_only = False
        self.lost: OSError | None = None
        self._layer = layer
        self._directory = directory
        self._file_name = file_name
        self.slot_bytes = slot_bytes
        self.slots_per_file = slots_per_file
        self._max_open = max_open
        self._lock = threading.Lock()
        self._fds: OrderedDict[int, int] = OrderedDict()  # least recently used first
        self._users: dict[int, int] = {}
        self._turns: dict[int, threading.Lock] = {}  # to open a file
        self._sync_lock = threading.Lock()
        # By file, which of its slots were written since its last good sync.
        self._dirty: dict[int, bytearray] = {}
        self._doubtful: set[int] = set()
        self._new_names = False
        self._filler = new_filler()
        self._own = threading.local()

    def path_of(self, slot: int) -> Path:
        """Return the path of the file that a slot lies in."""
        return self._path(slot // self.slots_per_file)

    def read(self, slots: Sequence[int], buffers: Sequence[memoryview]) -> list[OSError | None]:
        """Fill each buffer from the start of its slot.

        Args:
            slots: Slots, in any order.
            buffers: A writable flat view of bytes for each, at most a slot long.

        Returns:
            One outcome a slot; where the file ends before the buffer does, or isn't there, the
            error has `errno.ENODATA` or `errno.ENOENT`.
        """
        return self._move(slots, buffers, self._layer.preadv, writing=False)

    def write(self, slots: Sequence[int], buffers: Sequence[memoryview]) -> list[OSError | None]:
        """Write each buffer to the start of its slot.

        Returns:
            One outcome a slot; what a slot with an error holds now is anybody's guess.
        """
        return self._move(slots, buffers, self._layer.pwritev, writing=True)

    def read_span(self, slot: int, buffer: memoryview) -> int:
        """Read on from a slot over the ones that follow in its file; return how many bytes.

        Raises:
            OSError: It failed; `FileNotFoundError` where the file isn't there.
        """
        index, first = divmod(slot, self.slots_per_file)
        done = 0
        with self._opened(index, create=False) as fd:
            while done < len(buffer):
                offset = first * self.slot_bytes + done
                moved = self._layer.preadv(fd, [buffer[done:]], offset)
                if not moved:
                    break
                done += moved
        return done

    def sync(self) -> None:
        """Make every `write` that has returned survive a power loss.

        Raises:
            OSError: It could not be made sure. Where a file could not even be opened, the next
                try may do it. Else it can't be from then on: the system drops what it failed to
                write, and would call the next try a success.
        """
        with self._sync_lock:  # a second caller must not return before the first one's is done
            if self.lost is not None:
                what = "an earlier write never reached the disk"
                raise OSError(self.lost.errno, what, self.lost.filename) from self.lost
            with self._lock:
                dirty = sorted(self._dirty)
            for index in dirty:
                self._sync_file(index)
            if self._new_names:
                self._sync_names()

    def take_doubtful(self) -> list[int]:
        """Return, once each, the slots that may have lost what was written to them.

        They were written before a sync of their file that failed, and since the last good one. Who
        writes meanwhile learns from `lost`, before and after, that it may have met those as well.
        """
        with self._lock:
            doubtful, self._doubtful = self._doubtful, set()
        return sorted(doubtful)

    def doubt(self, slots: Iterable[int]) -> None:
        """Have `take_doubtful` return these slots too."""
        with self._lock:
            self._doubtful.update(slots)

    def truncate(self, num_slots: int, *, extend: bool = False) -> None:
        """Cut off, or remove, what lies beyond this many slots; leave other files alone.

        Args:
            num_slots: Slots that may stay.
            extend: Also make the last file reach to the end of the last slot, by a hole.

        Raises:
            OSError: It failed.
        """
        last = (num_slots - 1) // self.slots_per_file
        extents = self.extents()
        if extend:
            extents.setdefault(last, 0)
        for index, size in extents.items():
            if index > last:
                self._remove(index)
                continue
            slots = min(num_slots - index * self.slots_per_file, self.slots_per_file)
            bound = slots * self.slot_bytes
            if size > bound or (extend and index == last and size < bound):
                with self._opened(index, create=extend) as fd:
                    self._layer.truncate(fd, bound)
                    self._mark(index)

    def reserve(self, num_slots: int) -> None:
        """Give the first file its space up to this many slots, where there is that much.

        Raises:
            OSError: It failed for another reason.
        """
        with self._opened(0, create=True) as fd:
            try:
                self._layer.reserve(fd, num_slots * self.slot_bytes)
            except OSError as exc:
                if not is_full(exc):
                    raise

    def extents(self) -> dict[int, int]:
        """Return the bytes of each file by its number.

        Raises:
            OSError: It failed.
        """
        extents = {}
        for name in self._layer.list_directory(self._directory):
            index = int("".join(filter(str.isdecimal, name)) or 0)
            if self._file_name(index) == name:
                with self._opened(index, create=False) as fd:
                    extents[index] = self._layer.size(fd)
        return extents

    def filled_bytes(self, num_slots: int) -> NDArray[np.int64]:
        """Return how many bytes of each slot, from its start, have space on the disk already.

        Raises:
            OSError: It failed.
        """
        filled_bytes = np.zeros(num_slots, np.int64)
        for index in self.extents():
            with self._opened(index, create=False) as fd:
                for start, end in self._layer.data_spans(fd):
                    first = index * self.slots_per_file + -(-start // self.slot_bytes)
                    last, rest = divmod(end, self.slot_bytes)
                    last += index * self.slots_per_file
                    filled_bytes[first:last] = self.slot_bytes
                    if rest and first <= last < num_slots:
                        filled_bytes[last] = rest
        return filled_bytes

    def distrust(self) -> None:
        """Have the next `sync` include what another process wrote and may not have synced."""
        for index, size in self.extents().items():
            self._mark(index, 0, -(-size // self.slot_bytes))
        self._new_names = True

    def close(self) -> None:
        """Close all files; nobody may be using them."""
        while self._fds:
            _, fd = self._fds.popitem()
            with suppress(OSError):
                self._layer.close(fd)

    # Inside

    def _move(
        self,
        slots: Sequence[int],
        buffers: Sequence[memoryview],
        transfer: Transfer,
        *,
        writing: bool,
    ) -> list[OSError | None]:
        outcomes: list[OSError | None] = [None] * len(slots)
        for run, move in self._runs(slots, buffers):
            index, first = divmod(slots[run[0]], self.slots_per_file)
            views = [buffers[position] for position in run]
            try:
                with self._opened(index, create=writing) as fd:
                    errors = move(fd, views, first * self.slot_bytes, transfer, writing)
                    if writing:
                        # Not earlier: a sync that runs meanwhile would take the mark away.
                        self._mark(index, first, len(run))
            except OSError as exc:
                errors = [exc] * len(run)
            if any(errors):
                for position, error in zip(run, errors, strict=True):
                    if error is not None:
                        error.filename = error.filename or str(self._path(index))
                        outcomes[position] = error
        return outcomes

    def _runs(
        self, slots: Sequence[int], buffers: Sequence[memoryview]
    ) -> list[tuple[list[int], _Move]]:
        """Group positions for a call each, with the way to move them; those of no bytes in none."""
        if len(slots) == 1 and not self.direct:
            # A block so large that it goes alone: what is saved here is some percent of it.
            return [([0], self._move_run)] if len(buffers[0]) else []
        order: Sequence[int] = sorted(range(len(slots)), key=slots.__getitem__)
        through: list[int] = []
        if self.direct:
            through = [position for position in order if not _is_aligned(buffers[position])]
            if 2 * len(through) > len(order):
                through, order = list(order), []  # not to tear neighbours apart for a few
            elif through:
                copied = set(through)
                order = [position for position in order if position not in copied]
        sizes = list(map(len, buffers))
        per_bounce = min(RUN_SLOTS, max(1, BOUNCE_BYTES // self.slot_bytes))
        ways: tuple[tuple[Sequence[int], int, _Move], ...] = (
            (order, RUN_SLOTS, self._move_run),
            (through, per_bounce, self._bounce_run),
        )
        return [
            (run, move)
            for positions, most, move in ways
            for run in join_runs(
                positions,
                slots,
                sizes,
                slot_bytes=self.slot_bytes,
                slots_per_file=self.slots_per_file,
                most_slots=most,
            )
        ]

    def _move_run(
        self, fd: int, views: list[memoryview], offset: int, transfer: Transfer, _: bool
    ) -> list[OSError | None]:
        """Move the views themselves."""
        sizes = list(map(len, views))
        buffers = views
        if min(sizes) < self.slot_bytes:
            buffers = filled(views, self.slot_bytes, self._filler)
        return move_run(
            transfer,
            fd,
            buffers,
            offset,
            sizes=sizes,
            slot_bytes=self.slot_bytes,
            direct=self.direct,
        )

    def _bounce_run(
        self, fd: int, views: list[memoryview], offset: int, transfer: Transfer, writing: bool
    ) -> list[OSError | None]:
        """Move the views through a buffer that direct I/O takes."""
        sizes = list(map(len, views))
        total = (len(views) - 1) * self.slot_bytes + round_up(sizes[-1])
        bounce = self._bounce(total)
        places = [bounce[n * self.slot_bytes :][:size] for n, size in enumerate(sizes)]
        if writing:
            for n, (place, view) in enumerate(zip(places, views, strict=True)):
                place[:] = np.frombuffer(view, np.uint8)
                # What lay here before was another block's, and has no business on the disk.
                bounce[n * self.slot_bytes + sizes[n] : (n + 1) * self.slot_bytes] = 0
        outcomes = move_run(
            transfer,
            fd,
            [bounce.data],
            offset,
            sizes=sizes,
            slot_bytes=self.slot_bytes,
            direct=True,
        )
        if not writing:
            for place, view, outcome in zip(places, views, outcomes, strict=True):
                if outcome is None:
                    np.frombuffer(view, np.uint8)[:] = place
        return outcomes

    def _bounce(self, size: int) -> ByteArray:
        """Return aligned memory, this thread's own."""
        bounce: ByteArray | None = getattr(self._own, "bounce", None)
        if bounce is None or len(bounce) < size:
            bounce = aligned_empty(max(size, round_up(min(BOUNCE_BYTES, self.slot_bytes * 64))))
            self._own.bounce = bounce
        return bounce[:size]

    def _opened(self, index: int, *, create: bool) -> _Opened:
        """Return a context with a file's descriptor, which is not closed meanwhile."""
        return _Opened(self, index, create)

    def _begin_use(self, index: int, create: bool) -> int:
        with self._lock:
            self._users[index] = self._users.get(index, 0) + 1  # from here on it is not closed
            fd = self._fds.get(index)
            if fd is not None:
                self._fds.move_to_end(index)
        try:
            if fd is None:
                fd = self._open(index, create)
            if len(self._fds) > self._max_open:
                self._close_surplus()
        except BaseException:
            self._end_use(index)
            raise
        return fd

    def _end_use(self, index: int) -> None:
        with self._lock:
            self._users[index] -= 1
            if not self._users[index]:
                del self._users[index]

    def _open(self, index: int, create: bool) -> int:
        """Open a file that a thread uses; only who needs this very one waits, for it may hang."""
        with self._lock:
            turn = self._turns.setdefault(index, threading.Lock())
        with turn:
            fd = self._fds.get(index)
            if fd is None:
                fd = self._open_anew(index, create)
                with self._lock:
                    self._fds[index] = fd
        return fd

    def _open_anew(self, index: int, create: bool) -> int:
        path = self._path(index)
        access = os.O_RDONLY if self.read_only else os.O_RDWR
        flags = access | (O_DIRECT if self.direct else 0)
        try:
            return self._layer.open(path, flags)
        except FileNotFoundError:
            if not create:
                raise
        fd = self._layer.open(path, flags | os.O_CREAT)
        with self._lock:
            self._new_names = True
        return fd

    def _close_surplus(self) -> None:
        with self._lock:
            idle = [index for index in self._fds if index not in self._users]
            surplus = idle[: max(0, len(self._fds) - self._max_open)]
            fds = [self._fds.pop(index) for index in surplus]
        for index, fd in zip(surplus, fds, strict=True):
            # A later sync opens it again: the system writes back by file, not by descriptor.
            try:
                with naming(self._path(index)):
                    self._layer.close(fd)
            except OSError as exc:
                self._lose(exc, index)

    def _remove(self, index: int) -> None:
        with self._lock:
            if index in self._fds and index not in self._users:
                self._layer.close(self._fds.pop(index))
            self._layer.unlink(self._path(index))
            self._dirty.pop(index, None)
            self._new_names = True

    def _mark(self, index: int, first: int = 0, count: int = 0) -> None:
        """Note that a file was changed, and which of its slots."""
        with self._lock:
            marks = self._dirty.setdefault(index, bytearray())
            marks.extend(bytes(max(0, first + count - len(marks))))
            marks[first : first + count] = b"\1" * count

    def _sync_file(self, index: int) -> None:
        with self._opened(index, create=False) as fd:
            with self._lock:
                marks = self._dirty.pop(index)
            try:
                self._layer.sync(fd)
            except OSError as exc:
                self._lose(exc, index, marks)
                raise

    def _sync_names(self) -> None:
        fd = self._layer.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with self._lock:
                self._new_names = False
            with naming(self._directory):
                self._layer.sync(fd, names=True)
        except OSError as exc:
            self.lost = exc
            raise
        finally:
            self._layer.close(fd)

    def _lose(self, error: OSError, index: int, marks: bytearray | bytes = b"") -> None:
        """Note that a file lost what was written to slots marked so, or marked meanwhile."""
        with self._lock:
            self.lost = error
            for each in (marks, self._dirty.get(index, b"")):
                slots = np.flatnonzero(np.frombuffer(each, np.bool_))
                self._doubtful.update((index * self.slots_per_file + slots).tolist())

    def _path(self, index: int) -> Path:
        return self._directory / self._file_name(index)


class _Opened:
    """A use of a file: a context manager, in a form that costs little, for every call makes one."""

    __slots__ = ("_create", "_files", "_index")

    def __init__(self, files: SlotFiles, index: int, create: bool) -> None:
        self._files = files
        self._index = index
        self._create = create

    def __enter__(self) -> int:
        try:
            return self._files._begin_use(self._index, self._create)
        except OSError as exc:
            self._name(exc)
            raise

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._files._end_use(self._index)
        if isinstance(error, OSError):
            self._name(error)

    def _name(self, error: OSError) -> None:
        error.filename = error.filename or str(self._files._path(self._index))


_Move = Callable[[int, list[memoryview], int, Transfer, bool], list[OSError | None]]


def takes_direct_io(layer: FileLayer, directory: Path) -> bool:
    """Try whether the file system takes direct I/O.

    Raises:
        OSError: The trial failed for another reason.
    """
    if not O_DIRECT:
        return False
    path = directory / "probe"
    page = aligned_empty(ALIGNMENT)
    page[:] = 0
    try:
        fd = layer.open(path, os.O_RDWR | os.O_CREAT | O_DIRECT)
        try:
            layer.pwritev(fd, [page.data], 0)
            return layer.preadv(fd, [page.data], 0) == ALIGNMENT
        finally:
            layer.close(fd)
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            return True  # it was let in, and the disk is full
        if exc.errno in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM):
            return False
        raise
    finally:
        with suppress(OSError):
            layer.unlink(path)


def _is_aligned(view: memoryview) -> bool:
    return not len(view) % ALIGNMENT and not (
        len(view) and address_of(np.frombuffer(view, np.uint8)) % ALIGNMENT
    )
