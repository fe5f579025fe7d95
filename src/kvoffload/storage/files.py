"""The file calls that the cold tier makes, which tests can make fail.

All of it blocks, and raises `OSError`.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path


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
        """Open a file, closed to others where it is made and never a link, or a directory.

        With `os.O_DIRECT` among the flags, calls bypass the page cache: addresses, offsets and
        lengths must be aligned then.
        """
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

    def links(self, fd: int) -> int:
        """Return how many names a file has; 0 once it was removed."""
        return os.fstat(fd).st_nlink

    def data_spans(self, fd: int) -> list[tuple[int, int]]:
        """Return where a file has space of its own: the start and end of each such span."""
        spans = []
        end = 0
        with suppress(OSError):  # ENXIO: nothing but a hole from here on
            while True:
                start = os.lseek(fd, end, os.SEEK_DATA)
                end = os.lseek(fd, start, os.SEEK_HOLE)
                spans.append((start, end))
        return spans

    def free_bytes(self, path: Path) -> int:
        """Return how many bytes this user may still fill on the file system of a path."""
        stats = os.statvfs(path)
        return stats.f_bavail * stats.f_frsize

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        """Read into the buffers; return how many bytes there were."""
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        """Write the buffers; return how many bytes were taken."""
        return os.pwritev(fd, buffers, offset)

    def truncate(self, fd: int, size: int) -> None:
        """Set the bytes of a file; more is a hole."""
        os.ftruncate(fd, size)

    def reserve(self, fd: int, size: int) -> None:
        """Give a file the space for so many of its bytes, where the file system can do that."""
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError as exc:
                if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise

    def sync(self, fd: int, *, names: bool = False) -> None:
        """Make a file's bytes and length, or the `names` in a directory, survive a power loss."""
        # macOS has no fdatasync; and names are metadata, which fdatasync may leave out.
        (os.fsync if names else getattr(os, "fdatasync", os.fsync))(fd)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()
