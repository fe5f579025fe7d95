"""All rows, one after the other, within the time that there is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

from ..sizes import BOOKKEEPING_BYTES
from .cold import affordable
from .disk import measure_cached_loads, measure_direct_loads, measure_durable_store
from .latency import measure_hop
from .memory import (
    LEASED_BLOCKS,
    measure_checksum,
    measure_lease,
    measure_promotion,
    measure_store,
)
from .raw_io import make_blocks
from .rows import NotMeasured, Row, Setup
from .timing import apart

LEAST_BLOCKS = LEASED_BLOCKS
LEAST_BLOCK_BYTES = 4096
MEMORY_COPIES = 5
"""How often the blocks are in memory at once: twice as buffers, and in two tiers and a copy."""
DISK_COPIES = 3
"""How often they are on disk: in files for bare calls, of two kinds, and in the cold tier."""
ROWS = (
    "store in memory",
    "lease of hot blocks",
    "promotion",
    "durable store",
    "cold load, cached",
    "cold load, checked",
    "cold load, direct",
    "one cold block",
    "hop to a thread",
    "event loop lag",
    "checksum",
)
"""Names of all rows, in their order."""
_DISK_SLACK = 32 * 1024 * 1024
_RECORD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _Step:
    what: str
    weight: int
    measure: Callable[[float], Coroutine[None, None, Sequence[Row | NotMeasured]]]


def memory_for(block_bytes: int, num_blocks: int) -> int:
    """Return the bytes of memory that it all takes, about."""
    return MEMORY_COPIES * num_blocks * (block_bytes + BOOKKEEPING_BYTES)


def disk_for(block_bytes: int, num_blocks: int) -> int:
    """Return the bytes on disk that it all takes, about."""
    return DISK_COPIES * num_blocks * (block_bytes + _RECORD_BYTES) + _DISK_SLACK


async def measure(
    setup: Setup, on_step: Callable[[str, int, int], None]
) -> list[Row | NotMeasured]:
    """Measure everything.

    Args:
        setup: What with.
        on_step: Is told what is measured next, its number, and how many there are.

    Raises:
        BenchError: Something didn't do what it should.
        OffloadError: A tier failed.
        OSError: A bare call did.
    """
    count, block_bytes, place = setup.num_blocks, setup.block_bytes, setup.place
    payloads = await apart(lambda: make_blocks(count, block_bytes, seed=1))
    into = await apart(lambda: make_blocks(count, block_bytes))
    # What a service does once it has started, or else collections would hold every thread.
    gc.collect()
    gc.freeze()
    on_disk = await affordable(place, payloads, setup.seconds)
    stored, room = payloads[:on_disk], into[:on_disk]
    steps = [
        _Step("store in memory", 2, lambda s: measure_store(payloads, into, s)),
        _Step("lease", 1, lambda s: measure_lease(payloads, s)),
        _Step("promotion", 2, lambda s: measure_promotion(payloads, into, s)),
        _Step("checksum", 1, lambda s: measure_checksum(payloads, into, s)),
        _Step("durable store", 5, lambda s: measure_durable_store(place, stored, s)),
        _Step("cold loads, cached", 8, lambda s: measure_cached_loads(place, stored, room, s)),
        _Step("cold loads, direct", 4, lambda s: measure_direct_loads(place, stored, room, s)),
        _Step("hop to a thread", 1, lambda s: measure_hop(place, s)),
    ]
    a_weight = setup.seconds / sum(step.weight for step in steps)
    found: list[Row | NotMeasured] = []
    for number, step in enumerate(steps):
        on_step(step.what, number, len(steps))
        found += await step.measure(step.weight * a_weight)
    return sorted(found, key=lambda row: ROWS.index(row.name))
