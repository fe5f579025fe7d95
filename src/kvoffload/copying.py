"""Copies in memory: at once where they are little, else on a thread, and never twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, Future

import numpy as np

from .types import ByteArray

INLINE_COPY_BYTES = 256 * 1024
"""Copies up to this size run on the event loop, larger ones on a thread."""


def copy_now(targets: Sequence[ByteArray], sources: Sequence[ByteArray]) -> None:
    """Copy each source to its target on the event loop.

    It keeps the interpreter's lock: NumPy lets go of it, and getting it back from threads that are
    busy with I/O takes the loop a hundred times as long as the copy, or more.
    """
    for target, source in zip(targets, sources, strict=True):
        target.data[:] = source.data


def copy_apart(targets: Sequence[ByteArray], sources: Sequence[ByteArray]) -> None:
    """Copy each source to its target on a thread, without the interpreter's lock."""
    for target, source in zip(targets, sources, strict=True):
        np.copyto(target, source)


async def copy(targets: Sequence[ByteArray], sources: Sequence[ByteArray]) -> None:
    """Copy each source to its target, off the loop when it is much."""
    if sum([len(source) for source in sources]) <= INLINE_COPY_BYTES:
        copy_now(targets, sources)
    else:
        await copy_on_thread(None, targets, sources)


async def copy_in_slices(target: memoryview, source: memoryview) -> None:
    """Copy on the event loop, a little at a time: when this was cancelled, nothing goes on."""
    for start in range(0, len(source), INLINE_COPY_BYTES):
        if start:
            await asyncio.sleep(0)
        end = start + INLINE_COPY_BYTES
        target[start:end] = source[start:end]


async def copy_on_thread(
    executor: Executor | None, targets: Sequence[ByteArray], sources: Sequence[ByteArray]
) -> None:
    """Copy each source to its target on an executor's thread, by default on asyncio's.

    Where the system gives it no thread, an executor raises and keeps the call all the same: it
    would be made much later, into buffers that are others' by then. Here the loop makes it, a
    block at a time, and the one that is queued does nothing.
    """
    work = _Copy(targets, sources)
    try:
        future = asyncio.get_running_loop().run_in_executor(executor, work.run)
    except RuntimeError:
        if work.begin():
            for target, source in zip(targets, sources, strict=True):
                np.copyto(target, source)
                await asyncio.sleep(0)
        else:  # a thread that there was has begun it
            # `wait` leaves it alone when this is cancelled, for it is the thread's to finish.
            await asyncio.wait([asyncio.wrap_future(work.done)])
        return
    await future


class _Copy:
    """A copy that one thread makes, whichever begins it."""

    def __init__(self, targets: Sequence[ByteArray], sources: Sequence[ByteArray]) -> None:
        self.done: Future[None] = Future()
        self._buffers: tuple[Sequence[ByteArray], Sequence[ByteArray]] | None = (targets, sources)
        self._lock = threading.Lock()

    def begin(self) -> bool:
        """Take it from all others; return whether nobody had."""
        return self._take() is not None

    def run(self) -> None:
        """Make it, unless another began."""
        buffers = self._take()
        if buffers is not None:
            try:
                copy_apart(*buffers)
            finally:
                self.done.set_result(None)

    def _take(self) -> tuple[Sequence[ByteArray], Sequence[ByteArray]] | None:
        with self._lock:
            buffers, self._buffers = self._buffers, None
        return buffers
