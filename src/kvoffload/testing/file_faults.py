"""What can go wrong in a `FaultyFileLayer`: one small object for each kind of trouble."""

from __future__ import annotations

import asyncio
import copy
import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeAlias, get_args

from ..storage.files import FileLayer

FileCall: TypeAlias = Literal[
    "make_directory",
    "list_directory",
    "open",
    "close",
    "lock",
    "size",
    "links",
    "data_spans",
    "free_bytes",
    "preadv",
    "pwritev",
    "truncate",
    "reserve",
    "sync",
    "unlink",
]
"""A method of `FileLayer`."""

Move: TypeAlias = Literal["preadv", "pwritev"]
"""A method of `FileLayer` that moves bytes."""

FILE_CALLS: tuple[FileCall, ...] = get_args(FileCall)
_MOVES: tuple[Move, ...] = get_args(Move)
_CHANGES: tuple[FileCall, ...] = ("pwritev", "truncate", "sync", "unlink", "close")


@dataclass(eq=False, repr=False)
class FileFault:
    """Trouble for some file calls, until it has struck often enough or is stopped.

    As a context manager it stops on leaving.

    Attributes:
        call: The call.
        times: Most calls that it strikes; `None` for all of them.
        after: Calls that it lets pass first.
        files: Pattern for the name of the file.
        offset: Byte of the file that a call must move to be struck; `None`: any call is.
        triggered: Calls that it struck so far.
    """

    call: FileCall
    times: int | None
    after: int
    files: str
    offset: int | None
    triggered: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.call not in FILE_CALLS:
            raise ValueError(f"call must be one of {FILE_CALLS}, not {self.call!r}")
        if self.offset is not None and self.call not in _MOVES:
            raise ValueError(f"{self.call!r} moves no bytes, so none can be chosen")
        if self.after < 0 or (self.times is not None and self.times < 1):
            raise ValueError(
                f"after={self.after} must be at least 0, times={self.times} at least 1 or None"
            )
        self._passed = 0
        self._stopped = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.call!r}, struck {self.triggered} times>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Strike no more."""
        self._stopped = True

    def strikes(self, call: FileCall, name: str, span: range) -> bool:
        """Say, and count, whether a call that begins now is struck; one thread at a time."""
        if self._stopped or call != self.call or not fnmatchcase(name, self.files):
            return False
        if self.offset is not None and self.offset not in span:
            return False
        if self._passed < self.after:
            self._passed += 1
            return False
        if self.times is not None and self.triggered == self.times:
            return False
        self.triggered += 1
        return True

    def hold_up(self) -> None:
        """Keep a struck call from beginning."""


@dataclass(eq=False, repr=False)
class Failure(FileFault):
    """Calls that raise an error, before or after they did what they should."""

    _: KW_ONLY
    error: OSError | int
    late: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.late and self.call not in _CHANGES:
            raise ValueError(f"late is for {_CHANGES}, not for {self.call!r}")
        # A file that could not be closed is closed all the same; nobody may close it again.
        self.late = self.late or self.call == "close"

    def new_error(self) -> OSError:
        """Return an error of the struck call's own, for callers add a path to it."""
        return os_error(self.error) if isinstance(self.error, int) else copy.copy(self.error)


@dataclass(eq=False, repr=False)
class FileHang(FileFault):
    """File calls that block their threads until `release`.

    Attributes:
        entered: Set as soon as the first call hangs.
        give_up_s: Seconds until a call fails.
    """

    _: KW_ONLY
    give_up_s: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.entered = ThreadEvent()
        self._released = threading.Event()

    def release(self) -> None:
        """Let the calls that hang go on, and later ones pass."""
        self._released.set()

    def stop(self) -> None:
        """Strike no more, and let go what hangs."""
        super().stop()
        self.release()

    def hold_up(self) -> None:
        """Block the thread until `release`."""
        self.entered.set()
        if not self._released.wait(self.give_up_s):
            raise os_error(errno.ETIMEDOUT)


@dataclass(eq=False, repr=False)
class CutShort(FileFault):
    """Reads and writes that move only the first bytes."""

    _: KW_ONLY
    keep_bytes: int


class FlippedBit(FileFault):
    """Reads and writes that get one bit wrong."""

    def flip(self, buffers: list[memoryview], start: int) -> None:
        """Flip the bit, if it is in these buffers, of which the first starts at this offset."""
        at = 0 if self.offset is None else self.offset - start
        for buffer in buffers:
            if at < len(buffer):
                buffer[at] ^= 1
                return
            at -= len(buffer)


class Loss(FileFault):
    """Writes and syncs that are reported and not made."""


class FullDisk:
    """A disk that has so much space left, in whole blocks of its file system.

    Attributes:
        free_bytes: The space.
    """

    def __init__(self, layer: FileLayer, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        self._layer = layer
        self._lock = threading.Lock()

    @contextmanager
    def charged(self, fd: int) -> Iterator[None]:
        """Take what a file grows by from the space, and give back what it shrinks by."""
        with self._lock:
            before = self._taken_blocks(fd)
            yield
            growth = len(self._taken_blocks(fd)) - len(before)
            self.free_bytes -= growth * _block_bytes(fd)

    def fitting_bytes(self, fd: int, span: range) -> int:
        """Return how many bytes of a file's span, from its start, there is space for."""
        block_bytes = _block_bytes(fd)
        taken = self._taken_blocks(fd)
        room = self.free_bytes // block_bytes
        for block in range(span.start // block_bytes, -(-span.stop // block_bytes)):
            if block not in taken:
                if not room:
                    return max(0, block * block_bytes - span.start)
                room -= 1
        return len(span)

    def taken_bytes(self, path: Path) -> int:
        """Return the space that a file has."""
        fd = self._layer.open(path, os.O_RDONLY)
        try:
            return len(self._taken_blocks(fd)) * _block_bytes(fd)
        finally:
            self._layer.close(fd)

    def give_back(self, freed_bytes: int) -> None:
        """Add to the space."""
        with self._lock:
            self.free_bytes += freed_bytes

    def _taken_blocks(self, fd: int) -> set[int]:
        size = _block_bytes(fd)
        spans = self._layer.data_spans(fd)
        return {n for start, end in spans for n in range(start // size, -(-end // size))}


class ThreadEvent:
    """An event that any thread sets, and coroutines wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: list[Future[None]] = []
        self._set = False

    def is_set(self) -> bool:
        """Tell whether it was set."""
        return self._set

    def set(self) -> None:
        """Let everybody go on who waits, now or later."""
        with self._lock:
            self._set = True
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)

    async def wait(self) -> None:
        """Return once it is set."""
        waiter: Future[None] = Future()
        with self._lock:
            if self._set:
                return
            self._waiters.append(waiter)
        await asyncio.wrap_future(waiter)


def os_error(number: int) -> OSError:
    """Return the operating system's error of this number."""
    return OSError(number, os.strerror(number))


def _block_bytes(fd: int) -> int:
    return os.fstat(fd).st_blksize
