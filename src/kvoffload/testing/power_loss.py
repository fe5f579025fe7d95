"""What a power loss may leave of a directory: every change is followed until it is synced."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeAlias, TypeVar

from ..storage.files import FileLayer

SECTOR_BYTES = 512
"""What a disk writes whole or not at all."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Unsynced:
    """One thing of which the disk may have an older state than the system when the power fails.

    Attributes:
        file: Name of the file.
        part: Its `"name"`, its `"length"`, or the number of one of its sectors.
        moments: When each of its states came to be, oldest first, as `PowerLoss.moment` counts.
            They are states 1, 2 and so on; state 0 is the one that was synced.
    """

    file: str
    part: str | int
    moments: tuple[int, ...]

    @property
    def newest(self) -> int:
        """The state that the system has."""
        return len(self.moments)


Keep: TypeAlias = Callable[[Unsynced], int]
"""Says which state the disk has, from 0 to `Unsynced.newest`."""


def keep_nothing(part: Unsynced) -> int:
    """Lose all that was not synced."""
    return 0


def keep_all(part: Unsynced) -> int:
    """Lose nothing, as where only the process is killed."""
    return part.newest


def keep_only(files: str, keep: Keep = keep_all) -> Keep:
    """Keep what belongs to files of this pattern, and lose what else was not synced."""
    return lambda part: keep(part) if fnmatchcase(part.file, files) else 0


def keep_sectors(seed: int) -> Keep:
    """Choose for each sector, length and name by itself, which tears most writes."""
    chance = random.Random(seed)
    return lambda part: chance.randint(0, part.newest)


def keep_changes(seed: int) -> Keep:
    """Choose for each write and other change as a whole: out of order, but not torn."""

    def survives(moment: int) -> bool:
        return random.Random(f"{seed} {moment}").random() < 0.5

    def keep(part: Unsynced) -> int:
        return max((at for at, moment in enumerate(part.moments, 1) if survives(moment)), default=0)

    return keep


class PowerLoss(FileLayer):
    """Real file calls, followed, so that whatever a power loss may leave can be built.

    What a `sync` returned for is there afterwards. Of the rest, each sector has any of the
    states that it went through since, each file any of its lengths, and each name leads to what
    it led to at any time since::

        tier = DiskTier(path, 16, 4096)
        tier.file_layer = disk = PowerLoss()
        ...  # open, write, flush, write
        await asyncio.to_thread(disk.surviving, path, after, keep_sectors(seed))
        survivor = DiskTier(after, 16, 4096)

    What is in the files when they are first opened is taken to be on the disk. All that is
    written is remembered, so it is for small tiers. A sync is noted and not made, for the power
    doesn't really fail, and tests have better things to do than to wait for the disk.

    A `FaultyFileLayer` around it has both: faults, and what the power leaves of what got through.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moment = 0
        self._directories: dict[Path, _Directory] = {}
        self._opened: dict[int, _File | _Directory] = {}

    def __repr__(self) -> str:
        return f"<PowerLoss after {self._moment} changes>"

    @property
    def moment(self) -> int:
        """How many changes and syncs there were so far."""
        return self._moment

    def surviving(
        self, directory: Path, target: Path, keep: Keep = keep_nothing, *, moment: int | None = None
    ) -> None:
        """Build what the power leaves of a directory; blocks.

        The same choices build the same files: `keep` is asked file by file in order of their
        names; of each for the name, the length, and then for the sectors in order.

        Args:
            directory: The directory.
            target: Where to build it.
            keep: Says what of the unsynced is there.
            moment: The power fails after so many changes; `None` for now.

        Raises:
            FileExistsError: There is something at the target.
            ValueError: `keep` chose a state that there is not.
        """
        target.mkdir(mode=0o700)
        with self._lock:
            known = self._directories.get(directory.absolute(), _Directory())
            others = {path.name for path in directory.iterdir() if path.is_file()}
            for name in sorted(others - known.names.keys()):
                known.add(directory / name)
            at = self._moment if moment is None else moment
            for name, file in known.surviving(at, keep):
                (target / name).touch(0o600)
                (target / name).write_bytes(file.surviving(name, at, keep))

    def open(self, path: Path, flags: int) -> int:
        """Open a file or directory; follow the file if that makes one."""
        with self._lock:
            if flags & os.O_DIRECTORY:
                fd = super().open(path, flags)
                self._opened[fd] = self._directory(path)
                return fd
            states = self._directory(path.parent).add(path)
            fd = super().open(path, flags)
            file = states[-1][1]
            if file is None:
                file = _File()
                states.append((self._next(), file))
            if flags & os.O_TRUNC:
                file.changes.append(_Truncation(self._next(), 0))
            self._opened[fd] = file
            return fd

    def close(self, fd: int) -> None:
        """Close a file, which syncs nothing."""
        # Not later: the number may be another file's as soon as it is closed.
        self._opened.pop(fd, None)
        super().close(fd)

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        """Write, and follow what was taken."""
        moved = super().pwritev(fd, buffers, offset)
        data = b"".join(buffers)[:moved]
        with self._lock:
            self._file(fd).changes.append(_Write(self._next(), offset, data))
        return moved

    def truncate(self, fd: int, size: int) -> None:
        """Set the bytes of a file, and follow that."""
        super().truncate(fd, size)
        with self._lock:
            self._file(fd).changes.append(_Truncation(self._next(), size))

    def sync(self, fd: int, *, names: bool = False) -> None:
        """Take what was done so far to be on the disk, and let the real one take its time."""
        with self._lock:
            opened = self._opened[fd]
            if names or isinstance(opened, _File):
                opened.syncs.append(self._next())

    def unlink(self, path: Path) -> None:
        """Remove a file, and follow that."""
        with self._lock:
            states = self._directory(path.parent).add(path)
            super().unlink(path)
            states.append((self._next(), None))

    def _next(self) -> int:
        self._moment += 1
        return self._moment - 1

    def _directory(self, path: Path) -> _Directory:
        return self._directories.setdefault(path.absolute(), _Directory())

    def _file(self, fd: int) -> _File:
        file = self._opened[fd]
        assert isinstance(file, _File), "directories are not written"
        return file


_States: TypeAlias = list[tuple[int, _T]]
"""What something was, and since which moment; what it was at first, since -1."""


@dataclass(slots=True)
class _Synced:
    """What can be synced.

    Attributes:
        syncs: The moments when it was.
    """

    syncs: list[int] = field(default_factory=list)

    def choose(self, file: str, part: str | int, states: _States[_T], at: int, keep: Keep) -> _T:
        """Return the state of a part of it that the power leaves at this moment."""
        synced = max((moment for moment in self.syncs if moment < at), default=0)
        sure = [state for moment, state in states if moment < synced][-1]
        unsynced = [(moment, state) for moment, state in states if synced <= moment < at]
        if not unsynced:
            return sure
        part_of = Unsynced(file, part, tuple(moment for moment, _ in unsynced))
        chosen = keep(part_of)
        if not 0 <= chosen <= part_of.newest:
            raise ValueError(f"the states of {part_of} are 0 to {part_of.newest}, not {chosen}")
        return [sure, *(state for _, state in unsynced)][chosen]


@dataclass(slots=True)
class _Directory(_Synced):
    """The names in a directory, and the files that they led to."""

    names: dict[str, _States[_File | None]] = field(default_factory=dict)

    def add(self, path: Path) -> _States[_File | None]:
        """Follow a name from now on, if it isn't yet."""
        states = self.names.get(path.name)
        if states is None:
            file = _File(base=path.read_bytes()) if path.is_file() else None
            states = self.names[path.name] = [(-1, file)]
        return states

    def surviving(self, at: int, keep: Keep) -> Iterator[tuple[str, _File]]:
        """Yield the names that the power leaves at this moment, and their files."""
        for name, states in sorted(self.names.items()):
            file = self.choose(name, "name", states, at, keep)
            if file is not None:
                yield name, file


@dataclass(slots=True)
class _File(_Synced):
    """A file, whatever its name; what is done to it, in order."""

    base: bytes = b""
    changes: list[_Write | _Truncation] = field(default_factory=list)

    def surviving(self, name: str, at: int, keep: Keep) -> bytes:
        """Return the bytes that the power leaves at this moment."""
        content = bytearray(self.base)
        lengths = [(-1, len(content))]
        sectors: dict[int, _States[bytes]] = {}
        for change in self.changes:
            start, stop = change.span(len(content))
            touched = range(start // SECTOR_BYTES, -(-stop // SECTOR_BYTES))
            for sector in touched:
                sectors.setdefault(sector, [(-1, _sector_of(content, sector))])
            change.apply(content)
            lengths.append((change.moment, len(content)))
            for sector in touched:
                sectors[sector].append((change.moment, _sector_of(content, sector)))
        length = self.choose(name, "length", lengths, at, keep)
        result = bytearray(self.base[:length].ljust(length, b"\0"))
        for sector, states in sorted(sectors.items()):
            start = sector * SECTOR_BYTES
            if start < length:
                chosen = self.choose(name, sector, states, at, keep)
                result[start : start + SECTOR_BYTES] = chosen[: length - start]
        return bytes(result)


@dataclass(frozen=True, slots=True)
class _Write:
    moment: int
    offset: int
    data: bytes

    def span(self, length: int) -> tuple[int, int]:
        """Return the start and end of what it changes, in a file of this length."""
        return self.offset, self.offset + len(self.data)

    def apply(self, content: bytearray) -> None:
        """Change the content of a file."""
        content.extend(bytes(max(0, self.offset - len(content))))
        content[self.offset : self.offset + len(self.data)] = self.data


@dataclass(frozen=True, slots=True)
class _Truncation:
    moment: int
    size: int

    def span(self, length: int) -> tuple[int, int]:
        """Return the start and end of what it changes, in a file of this length."""
        return min(self.size, length), max(self.size, length)

    def apply(self, content: bytearray) -> None:
        """Change the content of a file."""
        del content[self.size :]
        content.extend(bytes(self.size - len(content)))


def _sector_of(content: bytearray, sector: int) -> bytes:
    start = sector * SECTOR_BYTES
    return bytes(content[start : start + SECTOR_BYTES]).ljust(SECTOR_BYTES, b"\0")
