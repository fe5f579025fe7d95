"""Buffers of our own for what is being sent, so that a caller's are never looked at too long."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..copying import INLINE_COPY_BYTES
from ..types import ByteArray


class Staging:
    """Buffers that are used again: the first touch of fresh memory costs more than the copy.

    Args:
        most: Buffers kept for the next ones that need one.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._free: list[ByteArray] = []

    @contextmanager
    def buffer(self, size: int) -> Iterator[ByteArray]:
        """Have a buffer of so many bytes for oneself.

        Whoever it is given to may go on looking at it afterwards: then it is not used again.
        """
        whole = self._free.pop() if self._free else None
        if whole is None or len(whole) < size:
            whole = np.empty(size, np.uint8)
        view = whole[:size]
        watch = weakref.ref(view)
        try:
            yield view
        finally:
            del view
            if watch() is None and len(self._free) < self._most:
                self._free.append(whole)

    def close(self) -> None:
        """Let go of the buffers that nobody has."""
        self._free.clear()
        self._most = 0


async def copy_in_slices(target: memoryview, source: memoryview) -> None:
    """Copy on the event loop, a little at a time: when this was cancelled, nothing goes on."""
    for start in range(0, len(source), INLINE_COPY_BYTES):
        if start:
            await asyncio.sleep(0)
        end = start + INLINE_COPY_BYTES
        target[start:end] = source[start:end]
