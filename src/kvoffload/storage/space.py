"""Space on the file system: what the tier may still take, and what it has got."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .breaker import Breaker
from .files import FileLayer
from .os_errors import is_full


class Space:
    """Lets slots be written that have their space already, and new ones while there is some left.

    Threads may call at once.

    Attributes:
        growth: Open while there is no space for slots that were never written.
    """

    def __init__(
        self,
        layer: FileLayer,
        directory: Path,
        filled: NDArray[np.bool_],
        *,
        slot_bytes: int,
        min_free_bytes: int,
        growth: Breaker,
    ) -> None:
        """Say which slots have their space on the disk, and how much must stay free of it."""
        self.growth = growth
        self._layer = layer
        self._directory = directory
        self._filled = filled
        self._slot_bytes = slot_bytes
        self._min_free_bytes = min_free_bytes
        self._lock = threading.Lock()
        self._promised = 0  # slots let in, and not written yet

    def is_filled(self, slot: int) -> bool:
        """Tell whether a slot has its space on the disk."""
        return bool(self._filled[slot])

    def admit(self, slots: Sequence[int]) -> list[OSError | None]:
        """Return an outcome a slot: `None`, or that there is no space for it.

        `settle` must follow.
        """
        outcomes: list[OSError | None] = [None] * len(slots)
        fresh = np.flatnonzero(~self._filled[list(slots)]).tolist()
        if not fresh:
            return outcomes
        refusal = OSError(errno.ENOSPC, "no space left for more blocks", str(self._directory))
        left = len(fresh)
        if not self.growth.allows():
            left = 0
        elif self._min_free_bytes:
            with self._lock:
                free = self._layer.free_bytes(self._directory) - self._min_free_bytes
                left = min(left, max(0, free // self._slot_bytes - self._promised))
                self._promised += left
            refusal.strerror = f"only min_free_bytes={self._min_free_bytes} are left"
        for position in fresh[left:]:
            outcomes[position] = refusal
        return outcomes

    def settle(
        self,
        slots: Sequence[int],
        admitted: Sequence[OSError | None],
        written: Sequence[OSError | None],
    ) -> None:
        """Note what became of slots, of which some were admitted."""
        fresh = [n for n, slot in enumerate(slots) if not self._filled[slot]]
        if not fresh:
            return
        tried = [n for n in fresh if admitted[n] is None]
        if self._min_free_bytes:
            with self._lock:
                self._promised -= len(tried)
        good = [slots[n] for n in tried if written[n] is None]
        self._filled[good] = True
        if any(is_full(written[n]) for n in fresh):
            self.growth.failed()
        elif good:
            self.growth.succeeded()
