"""The cold tier's files: their format, the slots in them, and recovery (docs/disk-format.md).

Here is what the modules share: the file calls, which tests can make fail, the lock, and how the
operating system's errors become the tier's. All of this package blocks and runs on the tier's
threads; it raises `OSError`, and always with the path.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from ..errors import (
    ConfigError,
    CorruptBlockError,
    TierError,
    TierLockedError,
    TierUnavailableError,
)

_P = ParamSpec("_P")
_T = TypeVar("_T")

_ADVICE = {
    errno.ENOSPC: "free some space there, or give fewer num_blocks",
    errno.EDQUOT: "raise the quota, or give fewer num_blocks",
    errno.EIO: "check the disk",
    errno.EACCES: "give a path that this process may write to",
    errno.EPERM: "give a path that this process may write to",
    errno.EROFS: "give a path that can be written to",
    errno.EMFILE: "raise this process's limit of open files",
    errno.ELOOP: "symbolic links in the tier's directory are not followed",
}
_PASSING = frozenset(
    (
        *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
        *(errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ESTALE, errno.ENODEV, errno.ENXIO),
    )
)
_LOST = frozenset((errno.ENOENT, errno.ENODATA, errno.EBADMSG))


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What a disk tier found when it was opened; counts are blocks.

    Attributes:
        clean: Closed in good order, or new; the order of eviction is the one it was closed with.
        blocks: Good ones, which are there now.
        damaged: Dropped, for the record did not check or the payload isn't all there.
        duplicates: Older copies of a block that lay in two slots; dropped.
        dropped: The coldest ones, for which there are fewer slots than before.
        header_rebuilt: Neither copy of the header was good.
    """

    clean: bool
    blocks: int
    damaged: int = 0
    duplicates: int = 0
    dropped: int = 0
    header_rebuilt: bool = False


class FileLayer:
    """The file calls that the tier makes; a subclass can make them fail.

    Each is about one call of the operating system and raises `OSError` as that does.
    """

    def make_directory(self, path: Path) -> None:
        """Make the directory, closed to others, and the ones above it, where they are missing.

        What was made survives a power loss.
        """
        missing = [place for place in (path, *path.parents) if not place.exists()]
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in missing:
            fd = self.open(place.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self.sync(fd, names=True)
            finally:
                self.close(fd)

    def list_directory(self, path: Path) -> list[str]:
        """Return the names in a directory."""
        return [entry.name for entry in path.iterdir()]

    def open(self, path: Path, flags: int) -> int:
        """Open a file, closed to others where it is made and never a link, or a directory."""
        follow = 0 if flags & os.O_DIRECTORY else os.O_NOFOLLOW
        return os.open(path, flags | follow | os.O_CLOEXEC, 0o600)

    def close(self, fd: int) -> None:
        """Close a file."""
        os.close(fd)

    def lock(self, fd: int) -> None:
        """Lock a file for one opener, or raise `BlockingIOError`."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def size(self, fd: int) -> int:
        """Return the bytes of a file."""
        return os.fstat(fd).st_size

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        """Read into the buffers; return how many bytes there were."""
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        """Write the buffers; return how many bytes were taken."""
        return os.pwritev(fd, buffers, offset)

    def truncate(self, fd: int, size: int) -> None:
        """Set the bytes of a file; more is a hole."""
        os.ftruncate(fd, size)

    def sync(self, fd: int, *, names: bool = False) -> None:
        """Make a file's bytes and length, or the `names` in a directory, survive a power loss."""
        # macOS has no fdatasync; and names are metadata, which fdatasync may leave out.
        (os.fsync if names else getattr(os, "fdatasync", os.fsync))(fd)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()


class Threads(ThreadPoolExecutor):
    """A tier's threads, which know how many calls are under way, of cancelled callers too."""

    def __init__(self, num_threads: int, name: str, on_idle: Callable[[], None]) -> None:
        """Take the most threads, a name for them, and what the last call does on leaving."""
        super().__init__(num_threads, thread_name_prefix=f"kvoffload-{name}")
        self._on_idle = on_idle
        self._calls = 0
        self._retired = False
        self._changed = threading.Condition()

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Queue a call."""
        with self._changed:
            self._calls += 1
        try:
            future = super().submit(fn, *args, **kwargs)
        except BaseException:
            self._leave()
            raise
        future.add_done_callback(self._leave)  # comes also if it is cancelled in the queue
        return future

    def wait_for_others(self) -> None:
        """Return, inside a call, when it is the only one left."""
        with self._changed:
            self._changed.wait_for(lambda: self._calls == 1)

    def retire(self) -> None:
        """Take no more calls, and have `on_idle` called once the last one is done."""
        self.shutdown(wait=False)
        with self._changed:
            self._retired = True
            idle = not self._calls
        if idle:
            self._on_idle()

    def _leave(self, _: object = None) -> None:
        with self._changed:
            self._calls -= 1
            self._changed.notify_all()
            idle = self._retired and not self._calls
        if idle:
            self._on_idle()


class DirectoryLock:
    """One opener's hold on a directory: `flock` on a file in it, which also tells who holds it."""

    def __init__(self, layer: FileLayer, directory: Path) -> None:
        """Name the directory; nothing is touched."""
        self._layer = layer
        self._directory = directory
        self._fd: int | None = None

    def acquire(self, tier: str) -> None:
        """Make the directory if need be, and lock it.

        Raises:
            ConfigError: The path is, or leads through, something else than a directory.
            TierLockedError: Another opener has it; names its process.
            OSError: The operating system refused.
        """
        try:
            self._layer.make_directory(self._directory)
        except (FileExistsError, NotADirectoryError) as exc:
            raise ConfigError(
                f"path must name a directory, or nothing yet: {self._directory} is, or leads "
                "through, something else"
            ) from exc
        path = self._directory / "lock"
        pid = str(os.getpid())
        # Kept before it is locked, so that `release` closes it whatever happens next.
        self._fd = fd = self._layer.open(path, os.O_RDWR | os.O_CREAT)
        with naming(path):
            try:
                self._layer.lock(fd)
            except BlockingIOError as exc:
                line = bytearray(32)
                count = self._layer.preadv(fd, [memoryview(line)], 0)
                holder = line[:count].split(b"\n")[0].decode("ascii", "replace")
                raise TierLockedError(
                    f"tier {tier!r}: {self._directory} is in use by "
                    + (f"process {holder}" if holder else "another process")
                    + (" (this one)" if holder == pid else "")
                    + "; close it there, or give each tier a path of its own",
                    tier=tier,
                ) from exc
            # Where a longer number was, its last digits stay, in a line of their own.
            self._layer.pwritev(fd, [memoryview(f"{pid}\n".encode())], 0)

    def release(self) -> None:
        """Let go, if it is held."""
        fd, self._fd = self._fd, None
        if fd is not None:
            # Closing and not unlocking: that would, in a forked child, take the parent's lock.
            with suppress(OSError):
                self._layer.close(fd)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path into errors of calls that know descriptors alone."""
    try:
        yield
    except OSError as exc:
        exc.filename = exc.filename or str(path)
        raise


def is_missing(exc: OSError | None) -> bool:
    """Tell whether bytes are not there, rather than not readable."""
    return exc is not None and exc.errno in (errno.ENOENT, errno.ENODATA)


def raise_first(outcomes: list[OSError | None]) -> None:
    """Raise the first error among outcomes, if there is one."""
    for outcome in outcomes:
        if outcome is not None:
            raise outcome


def tier_error(exc: OSError, tier: str, what: str, *, payload: bool = False) -> TierError:
    """Return the tier's error for one of the operating system, its cause.

    Args:
        exc: The cause.
        tier: Name of the tier.
        what: What could not be done.
        payload: Whether it was to read one, so that missing or wrong bytes mean a lost block.
    """
    lost = payload and exc.errno in _LOST
    passing = TierUnavailableError if exc.errno in _PASSING else TierError
    kind = CorruptBlockError if lost else passing
    advice = "the block is lost, store it again" if lost else _ADVICE.get(exc.errno or 0)
    where = f" ({exc.filename})" if exc.filename else ""
    message = f"tier {tier!r}: {what}{where}: {exc.strerror or exc}"
    error = kind(message + (f"; {advice}" if advice else ""), tier=tier)
    error.__cause__ = exc
    return error


def move_run(
    transfer: Callable[[int, list[memoryview], int], int],
    fd: int,
    views: list[memoryview],
    offset: int,
    slot_bytes: int,
) -> list[OSError | None]:
    """Move views that lie one after the other, by as few calls as it takes.

    An error stops the slot that it met, and the next one goes on.

    Args:
        transfer: Vectored read or write at an offset; returns the bytes moved.
        fd: The file.
        views: Flat views of bytes, none empty; all but the last are a slot long.
        offset: Where the first one starts in the file.
        slot_bytes: Bytes from one to the next.

    Returns:
        One outcome a view; `errno.ENODATA` where the file ends too early.
    """
    outcomes: list[OSError | None] = [None] * len(views)
    at = 0  # the view to go on with
    done = 0  # its bytes moved so far
    while at < len(views):
        rest = [views[at][done:], *views[at + 1 :]]
        try:
            moved = transfer(fd, rest, offset + at * slot_bytes + done)
            if not moved:
                raise OSError(errno.ENODATA, "the file ends before the payload does")
        except OSError as exc:
            outcomes[at] = exc
            at += 1
            done = 0
            continue
        done += moved
        while at < len(views) and done >= len(views[at]):
            done -= len(views[at])
            at += 1
    return outcomes
