"""Buffers of our own for what is being sent, so that a caller's are never looked at too long."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..types import ByteArray


class SendBuffers:
    """Buffers that are used again: the first touch of fresh memory costs more than the copy.

    Args:
        most: Buffers kept for the next ones that need one.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._free: list[ByteArray] = []

    @contextmanager
    def take(self, size: int) -> Iterator[ByteArray]:
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
