"""The disk tier's file calls, which fail, hang, fall short or damage bytes when a test says so."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from ..storage.files import FileLayer
from .file_faults import (
    CutShort,
    Failure,
    FileCall,
    FileFault,
    FileHang,
    FlippedBit,
    FullDisk,
    Loss,
    Move,
    os_error,
)

_O_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none

FaultT = TypeVar("FaultT", bound=FileFault)


class FaultyFileLayer(FileLayer):
    """Real file calls that fail, hang, fall short or damage their bytes when a test says so.

    Give it to a tier before `open`; every file call of the tier passes through it, on the tier's
    threads::

        tier = DiskTier(path, 16, 4096)
        tier.file_layer = files = FaultyFileLayer()
        await tier.open()
        files.fail("sync", errno.EIO, files="slab-*")
        with files.hang("preadv") as hang:
            ...                        # start a load
            await hang.entered.wait()  # a thread is stuck in it now
            hang.release()

    Each fault concerns one kind of call, and stays until it struck `times` calls (`None`: every
    call) or is stopped. `after` lets that many calls pass first. `files` is a pattern, as of a
    shell, for the name of the file or directory; `offset` chooses the reads and writes that move
    the byte at this offset of the file, in whichever order a tier's threads make them. Several
    faults of one call add up: hangs first, then failures.

    Args:
        inner: What makes the calls; the operating system, unless it is a `PowerLoss`.

    Attributes:
        calls: How many there were, by call and name of the file: `calls["sync", "records"]`.
    """

    def __init__(self, inner: FileLayer | None = None) -> None:
        self.calls: Counter[tuple[FileCall, str]] = Counter()
        self._inner = FileLayer() if inner is None else inner
        self._lock = threading.Lock()
        self._faults: list[FileFault] = []
        self._opened: dict[int, _Opened] = {}
        self._full: FullDisk | None = None
        self._direct_refused: Literal["open", "use"] | None = None
        self._alignment = 1

    def __repr__(self) -> str:
        return f"<FaultyFileLayer around {type(self._inner).__name__}: {self._faults}>"

    # Faults

    def fail(
        self,
        call: FileCall,
        error: OSError | int = errno.EIO,
        *,
        times: int | None = 1,
        after: int = 0,
        files: str = "*",
        offset: int | None = None,
        late: bool = False,
    ) -> FileFault:
        """Make calls raise an error.

        Args:
            call: The call.
            error: The error, a copy of which is raised each time; or its number.
            times: Calls that fail; `None` for all of them.
            after: Calls to let pass first.
            files: Pattern for the file's name.
            offset: Fail only what moves this byte of the file.
            late: Do it and then fail, as where the disk did it and the answer was lost. A `close`
                always fails so, and the file is closed.

        Raises:
            ValueError: There is no such call, or no such choice for it.
        """
        return self._add(Failure(call, times, after, files, offset, error=error, late=late))

    def hang(
        self,
        call: FileCall,
        *,
        times: int | None = None,
        after: int = 0,
        files: str = "*",
        offset: int | None = None,
        give_up_s: float = 60.0,
    ) -> FileHang:
        """Make calls block their threads until the hang is released, or left as a context manager.

        They are made then: a write that hangs reaches the file late.

        Args:
            call: The call.
            times: Calls that hang; `None` for all that begin before the release.
            after: Calls to let pass first.
            files: Pattern for the file's name.
            offset: Hang only what moves this byte of the file.
            give_up_s: Seconds until a call fails with `errno.ETIMEDOUT`, so that a test that
                never releases it doesn't keep the interpreter from ending.
        """
        return self._add(FileHang(call, times, after, files, offset, give_up_s=give_up_s))

    def cut_short(
        self,
        call: Move,
        *,
        keep_bytes: int = 0,
        times: int | None = 1,
        after: int = 0,
        files: str = "*",
        offset: int | None = None,
    ) -> FileFault:
        """Make calls move only the first `keep_bytes` bytes, and return how many those are."""
        return self._add(CutShort(call, times, after, files, offset, keep_bytes=keep_bytes))

    def flip_bit(
        self,
        call: Move,
        *,
        offset: int | None = None,
        times: int | None = 1,
        after: int = 0,
        files: str = "*",
    ) -> FileFault:
        """Make calls get one bit wrong, and report nothing.

        A write leaves the damage in the file, and the caller's buffers as they are.

        Args:
            call: The call.
            offset: The byte of the file; calls that don't move it are let pass. `None`: the first
                byte of any call.
            times: Calls that are damaged; `None` for all of them.
            after: Calls to let pass first.
            files: Pattern for the file's name.
        """
        return self._add(FlippedBit(call, times, after, files, offset))

    def lose(
        self,
        call: Literal["pwritev", "sync"],
        *,
        times: int | None = 1,
        after: int = 0,
        files: str = "*",
        offset: int | None = None,
    ) -> FileFault:
        """Make calls do nothing and report success, as a disk that lies does."""
        return self._add(Loss(call, times, after, files, offset))

    def fill(self, free_bytes: int = 0) -> None:
        """Leave only this much space on the disk; what files have already can be overwritten.

        A write that needs more falls short, by whole blocks of the file system; one that finds
        none at all fails with `errno.ENOSPC`. Truncating and unlinking give space back.
        """
        self._full = FullDisk(self._inner, free_bytes)

    def refuse_direct(self, when: Literal["open", "use"] = "open") -> None:
        """Be a file system without direct I/O: `errno.EINVAL` for what wants it.

        Args:
            when: Refuse to open files so; or let them be opened, and refuse every read and write.
        """
        self._direct_refused = when

    def refuse_unaligned(self, alignment_bytes: int = 4096) -> None:
        """Be a disk with large sectors: `errno.EINVAL` for direct I/O that isn't aligned to them.

        Addresses, lengths and offsets count. The disk of the test may want less, or nothing.
        """
        self._alignment = alignment_bytes

    def heal(self) -> None:
        """Stop every fault, release every hang, and be an ordinary disk; damage stays."""
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.stop()
        self._full = None
        self._direct_refused = None
        self._alignment = 1

    # The file calls

    def make_directory(self, path: Path) -> None:
        """Make a directory; the files that it opens and syncs for that can meet faults too."""
        with self._call("make_directory", path.name):
            super().make_directory(path)

    def list_directory(self, path: Path) -> list[str]:
        """Return the names in a directory."""
        with self._call("list_directory", path.name):
            return self._inner.list_directory(path)

    def open(self, path: Path, flags: int) -> int:
        """Open a file."""
        with self._call("open", path.name):
            direct = bool(flags & _O_DIRECT)
            fd = self._inner.open(path, flags)
            if direct and self._direct_refused == "open":
                # If it is new it stays, for Linux too makes the file first.
                self._inner.close(fd)
                raise os_error(errno.EINVAL)
            self._opened[fd] = _Opened(path, direct)
            return fd

    def close(self, fd: int) -> None:
        """Close a file."""
        with self._call("close", self._name(fd)):
            # Not later: the number may be another file's as soon as it is closed.
            self._opened.pop(fd, None)
            self._inner.close(fd)

    def lock(self, fd: int) -> None:
        """Lock a file."""
        with self._call("lock", self._name(fd)):
            self._inner.lock(fd)

    def size(self, fd: int) -> int:
        """Return the bytes of a file."""
        with self._call("size", self._name(fd)):
            return self._inner.size(fd)

    def links(self, fd: int) -> int:
        """Return how many names a file has."""
        with self._call("links", self._name(fd)):
            return self._inner.links(fd)

    def data_spans(self, fd: int) -> list[tuple[int, int]]:
        """Return where a file has space of its own."""
        with self._call("data_spans", self._name(fd)):
            return self._inner.data_spans(fd)

    def free_bytes(self, path: Path) -> int:
        """Return what is free, or what `fill` left of it."""
        with self._call("free_bytes", path.name):
            free, full = self._inner.free_bytes(path), self._full
            return free if full is None else min(free, full.free_bytes)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        """Read what no fault keeps from it."""
        with self._call("preadv", self._name(fd), _span(buffers, offset)) as struck:
            self._check_direct(fd, buffers, offset)
            moved = self._read(fd, buffers, offset, _kept_bytes(struck, buffers))
            for fault in struck:
                if isinstance(fault, FlippedBit):
                    fault.flip(_first(buffers, moved), offset)
            return moved

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        """Write what no fault keeps from it."""
        with self._call("pwritev", self._name(fd), _span(buffers, offset)) as struck:
            self._check_direct(fd, buffers, offset)
            flips = [fault for fault in struck if isinstance(fault, FlippedBit)]
            if flips:
                buffers = [_joined(buffers)]
            for flip in flips:
                flip.flip(buffers, offset)
            kept_bytes = _kept_bytes(struck, buffers)
            if any(isinstance(fault, Loss) for fault in struck):
                return kept_bytes
            if kept_bytes == _size(buffers):
                return self._write(fd, buffers, offset)
            with self._buffered(fd) as buffered_fd:
                return self._write(buffered_fd, _first(buffers, kept_bytes), offset)

    def truncate(self, fd: int, size: int) -> None:
        """Set the bytes of a file."""
        full = self._full
        with (
            self._call("truncate", self._name(fd)),
            nullcontext() if full is None else full.charged(fd),
        ):
            self._inner.truncate(fd, size)

    def reserve(self, fd: int, size: int) -> None:
        """Give a file its space, unless the disk is full."""
        with self._call("reserve", self._name(fd)):
            if self._full is None:
                self._inner.reserve(fd, size)
            elif sum(end - start for start, end in self._inner.data_spans(fd)) < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self, fd: int, *, names: bool = False) -> None:
        """Make a file's bytes, or the names in a directory, survive a power loss."""
        with self._call("sync", self._name(fd)) as struck:
            if not any(isinstance(fault, Loss) for fault in struck):
                self._inner.sync(fd, names=names)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        full = self._full
        with self._call("unlink", path.name):
            freed_bytes = 0 if full is None else full.taken_bytes(path)
            self._inner.unlink(path)
            if full is not None:
                full.give_back(freed_bytes)

    # Inside

    def _add(self, fault: FaultT) -> FaultT:
        with self._lock:
            self._faults.append(fault)
        return fault

    def _name(self, fd: int) -> str:
        opened = self._opened.get(fd)
        return "" if opened is None else opened.path.name

    @contextmanager
    def _call(
        self, call: FileCall, name: str, span: range = range(0)
    ) -> Iterator[Sequence[FileFault]]:
        """Let what strikes this call hold it up and make it fail; yield all that strikes it."""
        with self._lock:
            self.calls[call, name] += 1
            struck = [fault for fault in self._faults if fault.strikes(call, name, span)]
        for fault in struck:
            fault.hold_up()
        failures = [fault for fault in struck if isinstance(fault, Failure)]
        for failure in failures:
            if not failure.late:
                raise failure.new_error()
        yield struck
        for failure in failures:
            raise failure.new_error()

    def _check_direct(self, fd: int, buffers: list[memoryview], offset: int) -> None:
        opened = self._opened.get(fd)
        if opened is None or not opened.direct:
            return
        numbers = (offset, *map(len, buffers), *map(_address, buffers))
        if self._direct_refused == "use" or any(number % self._alignment for number in numbers):
            raise os_error(errno.EINVAL)

    def _read(self, fd: int, buffers: list[memoryview], offset: int, kept_bytes: int) -> int:
        if kept_bytes == _size(buffers):
            return self._inner.preadv(fd, buffers, offset)
        # By way of a buffer, for a direct read can't be cut anywhere; and what is beyond the cut
        # must not reach the caller, who may forget to look at the count.
        whole = _scratch(_size(buffers))
        moved = min(kept_bytes, self._inner.preadv(fd, [whole], offset))
        at = 0
        for buffer in _first(buffers, moved):
            buffer[:] = whole[at : at + len(buffer)]
            at += len(buffer)
        return moved

    def _write(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        if not buffers:
            return 0
        full = self._full
        if full is None:
            return self._inner.pwritev(fd, buffers, offset)
        with full.charged(fd):
            fitting_bytes = full.fitting_bytes(fd, _span(buffers, offset))
            if not fitting_bytes:
                raise os_error(errno.ENOSPC)
            return self._inner.pwritev(fd, _first(buffers, fitting_bytes), offset)

    @contextmanager
    def _buffered(self, fd: int) -> Iterator[int]:
        """Yield a descriptor of the same file that can move any number of bytes."""
        opened = self._opened.get(fd)
        if opened is None or not opened.direct:
            yield fd
            return
        other = self._inner.open(opened.path, os.O_RDWR)
        try:
            yield other
        finally:
            self._inner.close(other)


@dataclass(frozen=True, slots=True)
class _Opened:
    path: Path
    direct: bool


def _kept_bytes(struck: Sequence[FileFault], buffers: list[memoryview]) -> int:
    """Return how many bytes a struck call moves at most."""
    cuts = [fault.keep_bytes for fault in struck if isinstance(fault, CutShort)]
    return min([*cuts, _size(buffers)])


def _size(buffers: list[memoryview]) -> int:
    return sum(map(len, buffers))


def _span(buffers: list[memoryview], offset: int) -> range:
    return range(offset, offset + _size(buffers))


def _first(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Return views of the first bytes."""
    first = []
    for buffer in buffers:
        if not count:
            break
        first.append(buffer[:count])
        count -= len(first[-1])
    return first


def _scratch(size: int) -> memoryview:
    """Return a buffer that is aligned for direct I/O."""
    return memoryview(mmap(-1, size))


def _joined(buffers: list[memoryview]) -> memoryview:
    whole = _scratch(_size(buffers))
    whole[:] = b"".join(buffers)
    return whole


def _address(buffer: memoryview) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)
