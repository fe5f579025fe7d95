"""The record of one block."""

from __future__ import annotations

import time
from collections.abc import Callable

from .types import BlockHash, BlockState


class LRUEntry:
    """One block: where it is, who holds it, and how it has been used.

    Attributes:
        block_hash: The block.
        slot: Slot in its tier.
        state: Ready, or pending until its bytes are complete.
        pin_count: Holders that protect it against eviction.
        access_count: Uses so far.
        access_time: Seconds, on the entry's clock, of the last use (or of the reservation).
        size_weight: What keeping the block is worth beside others; 1.0 for equal blocks.
    """

    __slots__ = (
        "_clock",
        "access_count",
        "access_time",
        "block_hash",
        "pin_count",
        "size_weight",
        "slot",
        "state",
    )

    def __init__(
        self,
        block_hash: BlockHash,
        slot: int,
        state: BlockState = BlockState.READY,
        pin_count: int = 0,
        access_count: int = 0,
        access_time: float | None = None,
        size_weight: float = 1.0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.block_hash = block_hash
        self.slot = slot
        self.state = state
        self.pin_count = pin_count
        self.access_count = access_count
        self.access_time = clock() if access_time is None else access_time
        self.size_weight = size_weight
        self._clock = clock

    @property
    def age_s(self) -> float:
        """Seconds since the last use."""
        return self._clock() - self.access_time

    @property
    def priority(self) -> float:
        """Uses per second of age, times the weight: higher is better worth keeping."""
        return self.access_count / max(1.0, self.age_s) * self.size_weight

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.block_hash!r} {self.state.value} slot={self.slot} "
            f"pins={self.pin_count} uses={self.access_count}>"
        )
