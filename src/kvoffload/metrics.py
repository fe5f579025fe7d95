"""Counters, and the frozen snapshot of them that `get_stats()` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from .types import Medium, TierState


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier at one moment; counters run from the opening of the manager.

    Attributes:
        medium: Kind of the tier.
        capacity_blocks: Slots; 0 for a remote tier, which has none.
        blocks: Slots that hold a ready block, clean copies of blocks further up included.
        bytes: Payload bytes in those slots.
        blocks_read: Blocks read or viewed.
        blocks_written: Blocks written.
        bytes_read: Payload bytes read or viewed.
        bytes_written: Payload bytes written.
        hits: Blocks that a load found here.
        errors: Blocks that could not be read, written or erased.
        queue_depth: Blocks that are being read or written now.
        queue_bytes: Their payload bytes.
        wait_s: Seconds that the oldest call for them has taken so far.
        read_latency_s: Seconds of a read whatever its size, by the recent ones; 0 for none yet.
        read_bytes_per_s: Bytes a second of a read beyond that.
        free_blocks: Slots with nothing in them; while the tier is full, they can't be filled.
        pending_blocks: Slots reserved for a block that is not ready yet.
        retired_blocks: Slots out of use until a view derived from an ended lease is gone, or a
            call that the disk holds up is back.
        state: What the tier can do now.
        backlog_bytes: Payload bytes of blocks that wait to be sent to a remote tier.
        dropped_blocks: Blocks that were to be sent to a remote tier and were not: too many waited,
            they left the tiers above first, or the write failed.
    """

    medium: Medium
    capacity_blocks: int
    blocks: int = 0
    bytes: int = 0
    blocks_read: int = 0
    blocks_written: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    hits: int = 0
    errors: int = 0
    queue_depth: int = 0
    queue_bytes: int = 0
    wait_s: float = 0.0
    read_latency_s: float = 0.0
    read_bytes_per_s: float = 0.0
    free_blocks: int = 0
    pending_blocks: int = 0
    retired_blocks: int = 0
    state: TierState = TierState.SERVING
    backlog_bytes: int = 0
    dropped_blocks: int = 0


@dataclass(frozen=True, slots=True)
class ManagerStats:
    """A manager at one moment; all counts are blocks, from the opening of the manager.

    Attributes:
        hits: Leading ready blocks of each `lookup` and `request`.
        misses: The rest of them.
        stored: Blocks that became ready.
        rejected: Blocks that `store` did not take.
        evictions: Blocks that left every tier to make room.
        spared: Of those, the ones that `cold_admission` kept from being written to disk.
        promotions: Moves to a higher tier.
        demotions: Moves to a lower tier.
        pending: Blocks that are being stored now.
        pinned: Blocks that are pinned now.
        expired: Reservations and pins taken back from holders that never completed them.
        io_errors: Blocks that a tier could not read, write or erase.
        corrupt: Blocks that were dropped since their bytes did not check.
        prefetch_issued: Blocks that a hint made the manager fetch.
        prefetch_useful: Of those, the ones that were then used.
        prefetch_wasted: Of those, the ones that left before any use.
        prefetch_late: Hinted blocks that were wanted before they had been fetched.
        prefetch_dropped: Hinted blocks that were not fetched: queue full, cancelled, or failed.
        tiers: One `TierStats` for each tier, by name.
    """

    hits: int = 0
    misses: int = 0
    stored: int = 0
    rejected: int = 0
    evictions: int = 0
    spared: int = 0
    promotions: int = 0
    demotions: int = 0
    pending: int = 0
    pinned: int = 0
    expired: int = 0
    io_errors: int = 0
    corrupt: int = 0
    prefetch_issued: int = 0
    prefetch_useful: int = 0
    prefetch_wasted: int = 0
    prefetch_late: int = 0
    prefetch_dropped: int = 0
    tiers: Mapping[str, TierStats] = field(default_factory=dict)


TIER_COUNTERS = (
    "blocks_read",
    "blocks_written",
    "bytes_read",
    "bytes_written",
    "hits",
    "errors",
    "queue_depth",
)
"""Fields of `TierStats` that are counted; the others are derived from the index."""

_DERIVED = ("pending", "pinned", "tiers")


def new_counters() -> dict[str, int]:
    """Return zeroed counters for the fields of `ManagerStats` that are counted."""
    return {each.name: 0 for each in fields(ManagerStats) if each.name not in _DERIVED}
