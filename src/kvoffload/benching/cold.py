"""A manager whose blocks lie on disk, and how many blocks a disk can take."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter

from ..managers.async_lru_manager import AsyncLRUManager
from ..managers.contract import STAGING_BYTES
from ..tiers.disk import DiskTier
from ..tiers.memory import MemoryTier
from .raw_io import RawFile
from .rows import chain_of, expect
from .timing import apart

_WRITES = 25
"""About how often all blocks are written, in as few rounds as there are."""
_FEWEST_BLOCKS = 16
_NEVER = 1 << 30


async def affordable(place: Path, payloads: Sequence[memoryview], seconds: float) -> int:
    """Return how many of the blocks this disk can write often enough in so many seconds."""
    count = max(1, len(payloads) // 8)

    def write() -> float:
        path = place / "trial"
        started = perf_counter()
        with RawFile(path, direct=False) as file:
            file.fill(payloads[:count])
        took = perf_counter() - started
        path.unlink()
        return took

    a_block = await apart(write) / count
    return min(len(payloads), max(_FEWEST_BLOCKS, int(seconds / (_WRITES * a_block))))


@asynccontextmanager
async def cold_manager(
    path: Path, payloads: Sequence[memoryview], direct_io: str
) -> AsyncIterator[AsyncLRUManager]:
    """Open a manager whose blocks lie on disk alone, and are never promoted."""
    count, block_bytes = len(payloads), len(payloads[0])
    chain = chain_of("cold", count)
    async with AsyncLRUManager(
        hot=MemoryTier(1, block_bytes),
        cold=DiskTier(path, count + 1, block_bytes, direct_io=direct_io),
        policy="lru",
        promote_threshold=_NEVER,
        staging_bytes=max(STAGING_BYTES, count * block_bytes),
    ) as kv:
        if await kv.lookup(chain) < count:
            # With the one hot slot pinned, the others go straight to the disk.
            await kv.store(["pinned"], payloads[:1])
            async with kv.load(["pinned"]):
                expect("stored on disk", len((await kv.store(chain, payloads)).stored), count)
            await kv.flush()
        expect("on disk", [place.tier for place in kv.locate(chain)].count("cold"), count)
        yield kv
