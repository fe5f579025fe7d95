"""Who has the cold tier's directory: one opener at a time, and nobody else may look in."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError, TierLockedError
from .files import FileLayer
from .os_errors import naming

_CURE = (
    "one process at a time has a cold directory. For several workers, run one service, "
    "`kvoffload serve --uds SOCKET` with this directory, and open "
    "`kvoffload.client.AsyncLRUClient('unix:SOCKET')` in each worker; otherwise close the tier "
    "there, or give each one a path of its own"
)


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
                    + f"; {_CURE}",
                    tier=tier,
                ) from exc
            # Where a longer number was, its last digits stay, in a line of their own.
            self._layer.pwritev(fd, [memoryview(f"{pid}\n".encode())], 0)

    def check(self) -> None:
        """Make sure that the directory is there still.

        Raises:
            OSError: It was removed, and files that are open with it: they end with the process. Or
                it was renamed, and its path may lead into another tier.
        """
        if self._fd is None:
            return
        with suppress(FileNotFoundError):
            here = (self._directory / "lock").stat()
            if self._layer.links(self._fd) and os.path.samestat(here, os.fstat(self._fd)):
                return
        what = "it was moved or removed while it was open"
        raise FileNotFoundError(errno.ENOENT, what, str(self._directory))

    def release(self) -> None:
        """Let go, if it is held."""
        fd, self._fd = self._fd, None
        if fd is not None:
            # Closing and not unlocking: that would, in a forked child, take the parent's lock.
            with suppress(OSError):
                self._layer.close(fd)
