"""Whether blocks are worth reading: a cold hit can be slower than computing them again."""

from __future__ import annotations

from collections.abc import Sequence

from ..levels import Level
from ..types import LoadPlan


def plan_load(
    levels: Sequence[Level],
    blocks: Sequence[tuple[int, int]],
    *,
    block_s: float,
    deadline_s: float | None,
) -> LoadPlan:
    """Return how many leading blocks to load so that loading and computing the rest ends soonest.

    Tiers are read one after the other, each as fast as its recent reads were, behind what is being
    read from it already. Blocks in memory cost nothing.

    Args:
        levels: The tiers.
        blocks: The level and the bytes of each of the hit blocks of a chain, in order.
        block_s: Seconds that it takes to compute a block.
        deadline_s: Seconds that loading may take.
    """
    best = LoadPlan(0, 0.0, len(blocks) * block_s)
    sizes = [0] * len(levels)
    seconds = [0.0] * len(levels)
    for count, (number, size) in enumerate(blocks, 1):
        level = levels[number]
        if not level.tier.addressable:
            sizes[level.number] += size
            seconds[level.number] = level.meter.expect(level.reading + sizes[level.number])
        load_s = sum(seconds)
        if deadline_s is not None and load_s > deadline_s:
            break
        plan = LoadPlan(count, load_s, (len(blocks) - count) * block_s)
        if plan.total_s <= best.total_s:
            best = plan
    return best
