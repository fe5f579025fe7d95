"""Equal slots in files of a bounded size: which file, where in it, and moving many at once.

Payloads and records are both kept so: in slots of `block_bytes`, and of one sector.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import format as fmt
from .files import FileLayer, move_run
from .os_errors import naming

MAX_OPEN_FILES = 64
"""Idle files of one kind that are kept open; beyond it the least recently used is closed."""

GROUP_BYTES = 2**22
"""Bytes hashed and moved at a time, so that what was hashed is in the processor's cache still."""


class SlotFiles:
    """Slots of one size in numbered files, made when first written.

    Threads may call at once, for different slots.
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
        self._layer = layer
        self._directory = directory
        self._file_name = file_name
        self.slot_bytes = slot_bytes
        self.slots_per_file = slots_per_file
        self._max_open = max_open
        self._lock = threading.Lock()
        self._fds: OrderedDict[int, int] = OrderedDict()  # least recently used first
        self._users: dict[int, int] = {}
        self._sync_lock = threading.Lock()
        self._dirty: set[int] = set()
        self._new_names = False
        self._lost: OSError | None = None

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
            OSError: It could not be made sure. It can't be from then on either: the system drops
                what it failed to write, and would call the next try a success.
        """
        with self._sync_lock:  # a second caller must not return before the first one's is done
            if self._lost is not None:
                what = "an earlier write never reached the disk"
                raise OSError(self._lost.errno, what, self._lost.filename) from self._lost
            with self._lock:
                dirty, self._dirty = sorted(self._dirty), set()
                new_names, self._new_names = self._new_names, False
            try:
                for index in dirty:
                    with self._opened(index, create=False) as fd:
                        self._layer.sync(fd)
                if new_names:
                    self._sync_names()
            except OSError as exc:
                self._lost = exc
                raise

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
                    with self._lock:
                        self._dirty.add(index)

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

    def distrust(self) -> None:
        """Have the next `sync` include what another process wrote and may not have synced."""
        self._dirty.update(self.extents())
        self._new_names = True

    def close(self) -> None:
        """Close all files; nobody may be using them."""
        while self._fds:
            _, fd = self._fds.popitem()
            with suppress(OSError):
                self._layer.close(fd)

    def _move(
        self,
        slots: Sequence[int],
        buffers: Sequence[memoryview],
        transfer: Callable[[int, list[memoryview], int], int],
        *,
        writing: bool,
    ) -> list[OSError | None]:
        outcomes: list[OSError | None] = [None] * len(slots)
        sizes = [len(buffer) for buffer in buffers]
        for run in fmt.join_runs(slots, sizes, self.slot_bytes, self.slots_per_file):
            index, first = divmod(slots[run[0]], self.slots_per_file)
            views = [buffers[position] for position in run]
            try:
                with self._opened(index, create=writing) as fd:
                    errors = move_run(transfer, fd, views, first * self.slot_bytes, self.slot_bytes)
                    if writing:
                        # Not earlier: a sync that runs meanwhile would take the mark away.
                        with self._lock:
                            self._dirty.add(index)
            except OSError as exc:
                errors = [exc] * len(run)
            for position, error in zip(run, errors, strict=True):
                if error is not None:
                    error.filename = error.filename or str(self._path(index))
                outcomes[position] = error
        return outcomes

    @contextmanager
    def _opened(self, index: int, *, create: bool) -> Iterator[int]:
        with self._lock:
            fd = self._fds.get(index)
            if fd is None:
                fd = self._fds[index] = self._open(index, create)
            self._fds.move_to_end(index)
            self._users[index] = self._users.get(index, 0) + 1
            self._close_surplus()
        try:
            with naming(self._path(index)):
                yield fd
        finally:
            with self._lock:
                self._users[index] -= 1
                if not self._users[index]:
                    del self._users[index]

    def _open(self, index: int, create: bool) -> int:
        path = self._path(index)
        try:
            return self._layer.open(path, os.O_RDWR)
        except FileNotFoundError:
            if not create:
                raise
        fd = self._layer.open(path, os.O_RDWR | os.O_CREAT)
        self._new_names = True
        return fd

    def _close_surplus(self) -> None:
        idle = [index for index in self._fds if index not in self._users]
        for index in idle[: max(0, len(self._fds) - self._max_open)]:
            # A later sync opens it again: the system writes back by file, not by descriptor.
            try:
                with naming(self._path(index)):
                    self._layer.close(self._fds.pop(index))
            except OSError as exc:
                self._lost = exc

    def _remove(self, index: int) -> None:
        with self._lock:
            if index in self._fds and index not in self._users:
                self._layer.close(self._fds.pop(index))
            self._layer.unlink(self._path(index))
            self._dirty.discard(index)
            self._new_names = True

    def _sync_names(self) -> None:
        fd = self._layer.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with naming(self._directory):
                self._layer.sync(fd, names=True)
        finally:
            self._layer.close(fd)

    def _path(self, index: int) -> Path:
        return self._directory / self._file_name(index)


class Blocks:
    """Payloads with their records, changed in an order that a crash at any point can't hurt.

    Old record blank, payload, new record: so a good record on disk always has its whole payload.
    A power loss may undo the order of what was not synced, and then the checksum tells.
    """

    def __init__(
        self,
        slabs: SlotFiles,
        records: SlotFiles,
        sizes: NDArray[np.int64],
        checksums: NDArray[np.uint64],
    ) -> None:
        """Take over files and what is known of them.

        Args:
            slabs: Payloads.
            records: Records; blank where there is no payload.
            sizes: Payload bytes by slot, -1 where there is none.
            checksums: Payload checksum by slot.
        """
        self._slabs = slabs
        self._records = records
        self._sizes = sizes
        self._checksums = checksums
        # Where the record on disk is surely blank, which saves blanking it.
        self._blank = sizes < 0

    def holds(self, slot: int) -> bool:
        """Tell whether there is such a slot, and a block in it."""
        return 0 <= slot < len(self._sizes) and bool(self._sizes[slot] >= 0)

    def read(self, slots: Sequence[int], into: Sequence[memoryview]) -> list[OSError | None]:
        """Fill each buffer with a slot's payload, of exactly its size, and check it.

        Returns:
            One outcome a slot; `errno.EBADMSG` where the payload does not match its checksum.
        """
        outcomes: list[OSError | None] = [None] * len(slots)
        for position, slot in enumerate(slots):
            held, wanted = int(self._sizes[slot]), len(into[position])
            if held != wanted:
                what = f"it holds {held} bytes" if held >= 0 else "it holds no block"
                what += f", and the buffer has {wanted}"
                outcomes[position] = OSError(errno.EINVAL, what)
        for group in _groups(slots, into, outcomes):
            errors = self._slabs.read([slots[i] for i in group], [into[i] for i in group])
            for position, error in zip(group, errors, strict=True):
                slot = slots[position]
                if error is None and fmt.checksum(into[position]) != self._checksums[slot]:
                    what = "the payload does not match its checksum"
                    error = OSError(errno.EBADMSG, what, str(self._slabs.path_of(slot)))
                outcomes[position] = error
        return outcomes

    def write(
        self,
        slots: Sequence[int],
        payloads: Sequence[memoryview],
        keys: Sequence[bytes],
        sequence: int,
    ) -> list[OSError | None]:
        """Write payloads and records, the first with this sequence number, the next with the next.

        Returns:
            One outcome a slot; one with an error holds no block or, where its old record could
            not be blanked, still the old one.
        """
        outcomes = self.erase(slots)
        checksums = [0] * len(slots)
        for group in _groups(slots, payloads, outcomes):
            for i in group:
                checksums[i] = fmt.checksum(payloads[i])
            errors = self._slabs.write([slots[i] for i in group], [payloads[i] for i in group])
            for i, error in zip(group, errors, strict=True):
                outcomes[i] = error
        whole = [i for i, outcome in enumerate(outcomes) if outcome is None]
        records = []
        for i in whole:
            size = len(payloads[i])
            slot_bytes = self._slabs.slot_bytes
            record = fmt.Record(slots[i], sequence + i, slot_bytes, size, checksums[i], keys[i])
            records.append(memoryview(fmt.pack_record(record)))
        targets = [slots[i] for i in whole]
        self._blank[targets] = False
        for i, error in zip(whole, self._records.write(targets, records), strict=True):
            outcomes[i] = error
            if error is None:
                self._checksums[slots[i]] = checksums[i]
                self._sizes[slots[i]] = len(payloads[i])
        # A record that is reported as failed may have been written all the same.
        self.erase([slots[i] for i in whole if outcomes[i] is not None])
        return outcomes

    def erase(self, slots: Sequence[int]) -> list[OSError | None]:
        """Blank the records of these slots; return one outcome a slot."""
        outcomes: list[OSError | None] = [None] * len(slots)
        todo = [i for i, slot in enumerate(slots) if not self._blank[slot]]
        blank = memoryview(fmt.BLANK_RECORD)
        errors = self._records.write([slots[i] for i in todo], [blank] * len(todo))
        for i, error in zip(todo, errors, strict=True):
            outcomes[i] = error
            if error is None:
                self._sizes[slots[i]] = -1
                self._blank[slots[i]] = True
        return outcomes


def _groups(
    slots: Sequence[int], buffers: Sequence[memoryview], outcomes: Sequence[OSError | None]
) -> Iterator[list[int]]:
    """Cut the positions without an error into pieces of about `GROUP_BYTES`, in order of slots."""
    group: list[int] = []
    room = GROUP_BYTES
    for i in sorted(
        (i for i, error in enumerate(outcomes) if error is None), key=slots.__getitem__
    ):
        if group and len(buffers[i]) > room:
            yield group
            group = []
            room = GROUP_BYTES
        group.append(i)
        room -= len(buffers[i])
    if group:
        yield group
