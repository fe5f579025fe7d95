"""Work on thousands of blocks at once: the event loop goes on in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from kvoffload import AsyncLRUManager, DiskTier, MemoryTier
from kvoffload.slicing import SLICE_BLOCKS

BLOCK_BYTES = 512
MANY = 5 * SLICE_BLOCKS
BATCH = 64


@asynccontextmanager
async def manager(place: Path) -> AsyncIterator[AsyncLRUManager]:
    """Yield a manager with some blocks in memory and most on disk."""
    tiers = MemoryTier(BATCH, BLOCK_BYTES), DiskTier(place, MANY, BLOCK_BYTES)
    async with AsyncLRUManager(hot=tiers[0], cold=tiers[1]) as kv:
        yield kv


async def fill(kv: AsyncLRUManager) -> None:
    payload = bytes(BLOCK_BYTES)
    for start in range(0, MANY, BATCH):
        names = [f"b{number}" for number in range(start, start + BATCH)]
        result = await kv.store(names, [payload] * BATCH)
        assert not result.rejected


async def most_in_a_turn(kv: AsyncLRUManager, work: Awaitable[object]) -> int:
    """Return how many blocks came or left at most between two turns of the loop."""
    index = kv._core.index
    counts = [len(index.ready)]

    async def watch() -> None:
        while True:
            counts.append(len(index.ready))
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    try:
        await work
    finally:
        watching.cancel()
        await asyncio.wait([watching])
    counts.append(len(index.ready))
    return max(abs(one - other) for one, other in pairwise(counts))


WORKS: dict[str, Callable[[AsyncLRUManager], Awaitable[object]]] = {
    "evict the coldest": lambda kv: kv.evict(num_blocks=MANY),
    "evict by name": lambda kv: kv.evict([f"b{number}" for number in range(MANY)]),
    "clear": lambda kv: kv.clear(),
}


@pytest.mark.parametrize("name", WORKS)
async def test_thousands_of_blocks_leave_a_slice_at_a_time(tmp_path: Path, name: str) -> None:
    """40,000 blocks that left at once held the event loop for 0.4 s."""
    async with manager(tmp_path) as kv:
        await fill(kv)
        before = len(kv._core.index.ready)
        assert before > 4 * SLICE_BLOCKS
        assert await most_in_a_turn(kv, WORKS[name](kv)) <= SLICE_BLOCKS
        assert not kv._core.index.ready
        kv._core.index.check_invariants()
    async with manager(tmp_path) as kv:  # for good
        assert await kv.lookup(["b0"]) == 0
        assert not kv._core.index.ready


async def test_a_manager_opens_with_thousands_of_blocks_a_slice_at_a_time(tmp_path: Path) -> None:
    """Taking over 32,000 blocks held the loop of a server that was starting for 0.2 s."""
    async with manager(tmp_path) as kv:
        await fill(kv)
    kept = AsyncLRUManager(
        hot=MemoryTier(BATCH, BLOCK_BYTES), cold=DiskTier(tmp_path, MANY, BLOCK_BYTES)
    )
    assert await most_in_a_turn(kept, kept.__aenter__()) <= SLICE_BLOCKS
    assert len(kept._core.index.ready) > 4 * SLICE_BLOCKS
    kept._core.index.check_invariants()
    await kept.__aexit__(None, None, None)


@pytest.mark.parametrize("name", WORKS)
async def test_cancelled_in_between_what_has_left_does_not_come_back(
    tmp_path: Path, name: str
) -> None:
    """Between two slices the caller may go; what it had removed has to be erased all the same."""
    async with manager(tmp_path) as kv:
        await fill(kv)
        index = kv._core.index
        removing = asyncio.ensure_future(WORKS[name](kv))
        await index.changed.wait()
        assert index.ready  # and more are to leave
        removing.cancel()
        await asyncio.wait([removing])
        assert removing.cancelled()
        await kv._core.jobs.drain()
        left = set(index.ready)
        index.check_invariants()
        assert not any(level.stale for level in index.levels)
    async with manager(tmp_path) as kv:
        assert set(kv._core.index.ready) <= left
