"""Whether blocks are worth loading from a service, reckoned from what it told of its tiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..meter import Meter
from ..metrics import TierStats
from ..types import BlockLocation, BlockState, LoadPlan, Medium

IN_MEMORY = (Medium.CPU, Medium.GPU)


def plan_load(
    tiers: Mapping[str, TierStats],
    places: Sequence[BlockLocation],
    block_bytes: int,
    wire: Meter,
    *,
    block_s: float,
    deadline_s: float | None,
) -> LoadPlan:
    """Return how many leading blocks to load so that loading and computing the rest ends soonest.

    Tiers are read one after the other, each as fast as its recent reads were, behind what is being
    read from it already; then the blocks come over the wire.

    Args:
        tiers: What each tier told of its reads.
        places: Where the hit blocks of a chain are, in order.
        block_bytes: Bytes of a block.
        wire: Of how long this client's recent loads took.
        block_s: Seconds that it takes to compute a block.
        deadline_s: Seconds that loading may take.
    """
    best = LoadPlan(0, 0.0, len(places) * block_s)
    counts = dict.fromkeys(tiers, 0)
    seconds = dict.fromkeys(tiers, 0.0)
    for count, place in enumerate(places, 1):
        if place.state is not BlockState.READY:
            break  # one turned out to be damaged
        tier = tiers.get(place.tier or "")
        if tier is not None and place.tier is not None and tier.medium not in IN_MEMORY:
            counts[place.tier] += 1
            size = tier.queue_bytes + counts[place.tier] * block_bytes
            if tier.read_bytes_per_s:
                seconds[place.tier] = tier.read_latency_s + size / tier.read_bytes_per_s
        load_s = sum(seconds.values()) + wire.expect(count * block_bytes)
        if deadline_s is not None and load_s > deadline_s:
            break
        plan = LoadPlan(count, load_s, (len(places) - count) * block_s)
        if plan.total_s <= best.total_s:
            best = plan
    return best
