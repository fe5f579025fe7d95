"""Bare vectored calls on one file, by one thread or several, to compare the cold tier with."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from ..aligned import aligned_empty

KIB = 1024
MIB = 1024 * KIB

CALL_BYTES = (2 * MIB, 8 * MIB, 32 * MIB)
CALL_BUFFERS = 512

_sync = getattr(os, "fdatasync", os.fsync)


def make_blocks(count: int, block_bytes: int, *, seed: int | None = None) -> list[memoryview]:
    """Return page-aligned, touched buffers, one after the other: of random bytes, or of ones.

    It is such memory as the tiers have, of which NumPy asks for huge pages: the kernel moves bytes
    in and out of it faster than with pages of 4 KiB.
    """
    array = aligned_empty(count * block_bytes)
    rng = np.random.default_rng(seed)
    array[:] = 1 if seed is None else rng.integers(0, 256, len(array), dtype=np.uint8)
    view = array.data
    return [view[n * block_bytes : (n + 1) * block_bytes] for n in range(count)]


def same_bytes(blocks: Sequence[memoryview], others: Sequence[memoryview]) -> bool:
    """Compare buffers; faster than `==` of two views."""
    return all(
        np.array_equal(np.frombuffer(block, np.uint8), np.frombuffer(other, np.uint8))
        for block, other in zip(blocks, others, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Call:
    """One vectored call: buffers of neighbouring blocks, and where the first one lies."""

    offset: int
    buffers: list[memoryview]
    num_bytes: int


def plan_calls(blocks: Sequence[memoryview], blocks_per_call: int) -> list[Call]:
    """Lay blocks out one after the other from the start of a file."""
    calls = []
    offset = 0
    for first in range(0, len(blocks), blocks_per_call):
        buffers = list(blocks[first : first + blocks_per_call])
        calls.append(Call(offset, buffers, sum(map(len, buffers))))
        offset += calls[-1].num_bytes
    return calls


class Team:
    """Threads that run already, and take calls from one queue; of no threads, the caller alone."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads) if num_threads else None
        if self._pool is not None:
            barrier = threading.Barrier(num_threads)
            for future in [self._pool.submit(barrier.wait) for _ in range(num_threads)]:
                future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def __str__(self) -> str:
        if not self._num_threads:
            return "caller"
        return f"{self._num_threads} thread{'s' if self._num_threads > 1 else ''}"

    @property
    def size(self) -> int:
        """Return how many work at once."""
        return self._num_threads or 1

    def make(self, transfer: Callable[[Call], None], calls: Sequence[Call]) -> None:
        """Return when every call was made."""
        todo = deque(calls)
        if self._pool is None:
            _drain(transfer, todo)
            return
        for future in [self._pool.submit(_drain, transfer, todo) for _ in range(self._num_threads)]:
            future.result()


def _drain(transfer: Callable[[Call], None], todo: deque[Call]) -> None:
    while True:
        try:
            call = todo.popleft()
        except IndexError:
            return
        transfer(call)


@dataclass(frozen=True, slots=True)
class Way:
    """Which calls move the blocks, and who makes them."""

    team: Team
    calls: list[Call]

    def run(self, transfer: Callable[[Call], None]) -> None:
        """Make the calls."""
        self.team.make(transfer, self.calls)


def sensible_ways(
    blocks: Sequence[memoryview], teams: Sequence[Team], sizes: Sequence[int] = CALL_BYTES
) -> dict[str, Way]:
    """Return ways to move blocks by their names: every team with calls of each size in bytes."""
    ways = {}
    for team in teams:
        share = -(-len(blocks) // team.size)
        for size in sizes:
            count = max(1, min(share, CALL_BUFFERS, size // len(blocks[0])))
            ways[f"raw, {team}, {count} a call"] = Way(team, plan_calls(blocks, count))
    return ways


class RawFile:
    """One file, read and written with nothing around the calls."""

    def __init__(self, path: Path, *, direct: bool) -> None:
        """Open it, made if need be; raises `OSError` where there is no direct I/O."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        if direct:
            if not hasattr(os, "O_DIRECT"):
                raise OSError(errno.EINVAL, "this system has no direct I/O", str(path))
            flags |= os.O_DIRECT
        self.fd = os.open(path, flags, 0o600)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)

    def read(self, call: Call) -> None:
        """Fill the buffers of a call."""
        if os.preadv(self.fd, call.buffers, call.offset) != call.num_bytes:
            raise EOFError("the file is too short")

    def write(self, call: Call) -> None:
        """Write the buffers of a call."""
        if os.pwritev(self.fd, call.buffers, call.offset) != call.num_bytes:
            raise OSError("the call took only a part")

    def sync(self) -> None:
        """Make what was written survive a power loss."""
        _sync(self.fd)

    def fill(self, blocks: Sequence[memoryview]) -> None:
        """Write blocks durably; they are in the page cache then unless I/O is direct."""
        for call in plan_calls(blocks, max(1, 8 * MIB // len(blocks[0]))):
            self.write(call)
        self.sync()


def sync_names(directory: Path) -> None:
    """Make the names in a directory survive a power loss."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
