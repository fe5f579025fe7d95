"""Space on the file system: what the tier may still take, and what it has got."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..aligned import round_up
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
        filled: NDArray[np.int64],
        *,
        slot_bytes: int,
        min_free_bytes: int,
        growth: Breaker,
    ) -> None:
        """Say how many bytes of each slot have space on the disk, and how much must stay free."""
        self.growth = growth
        self._layer = layer
        self._directory = directory
        self._filled = filled
        self._slot_bytes = slot_bytes
        self._min_free_bytes = min_free_bytes
        self._lock = threading.Lock()
        self._promised = 0  # bytes that slots which were let in, and not written yet, may take

    def is_filled(self, slot: int) -> bool:
        """Tell whether a slot has all its space on the disk."""
        return bool(self._filled[slot] >= self._slot_bytes)

    def admit(self, slots: Sequence[int], sizes: Sequence[int]) -> list[OSError | None]:
        """Return an outcome a slot: `None`, or that there is no space for so many bytes in it.

        `settle` must follow.
        """
        outcomes: list[OSError | None] = [None] * len(slots)
        filled = self._filled[list(slots)]
        growing = np.flatnonzero(filled < sizes)
        if not len(growing):
            return outcomes
        refusal = OSError(errno.ENOSPC, "no space left for more blocks", str(self._directory))
        left = len(growing)
        if not self.growth.allows():
            left = 0
        elif self._min_free_bytes:
            # Gaps between neighbours are written too, so each may take its whole slot.
            needed = np.cumsum(self._slot_bytes - filled[growing])
            with self._lock:
                free = self._layer.free_bytes(self._directory) - self._min_free_bytes
                left = int(np.searchsorted(needed, free - self._promised, side="right"))
                self._promised += int(needed[left - 1]) if left else 0
            refusal.strerror = f"only min_free_bytes={self._min_free_bytes} are left"
            if left < len(growing):
                self.growth.failed()
        for position in growing[left:].tolist():
            outcomes[position] = refusal
        return outcomes

    def settle(
        self,
        slots: Sequence[int],
        sizes: Sequence[int],
        admitted: Sequence[OSError | None],
        written: Sequence[OSError | None],
    ) -> None:
        """Note what became of slots, of which those that were admitted were tried."""
        tried = [n for n, refusal in enumerate(admitted) if refusal is None]
        places = [slots[n] for n in tried]
        filled = self._filled[places]
        growing = filled < [sizes[n] for n in tried]
        if self._min_free_bytes:
            with self._lock:
                self._promised -= int((self._slot_bytes - filled[growing]).sum())
        good = np.array([written[n] is None for n in tried], np.bool_)
        full = np.array([is_full(written[n]) for n in tried], np.bool_)
        full &= filled < self._slot_bytes
        takes = [min(round_up(sizes[n]), self._slot_bytes) for n in tried]
        self._filled[places] = np.where(good, np.maximum(filled, takes), filled)
        if full.any():
            self.growth.failed()
        elif (good & growing).any() and not any(admitted):
            self.growth.succeeded()
