"""Many concurrent callers on tiny tiers: every byte read is the one that was stored."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockNotFoundError,
    CapacityError,
    DiskTier,
    LoadTimeoutError,
    LRUOffloadManager,
    MemoryTier,
    TieredLRUManager,
)
from kvoffload.managers.contract import Manager

BLOCK_BYTES = 96
CALLERS = 12
CALLS = 60


def payload(block_hash: int) -> bytes:
    """Bytes, and a length, that only this block has."""
    seed = hashlib.sha256(str(block_hash).encode()).digest()
    return (seed * 3)[: 40 + block_hash % 50]


def one_tier(path: Path) -> Manager:
    return LRUOffloadManager(MemoryTier(7, BLOCK_BYTES))


def one_disk(path: Path) -> Manager:
    return LRUOffloadManager(DiskTier(path, 7, BLOCK_BYTES), staging_bytes=6 * BLOCK_BYTES)


def three_tiers(path: Path) -> Manager:
    return TieredLRUManager(
        MemoryTier(3, BLOCK_BYTES),
        MemoryTier(4, BLOCK_BYTES, name="warm"),
        DiskTier(path, 8, BLOCK_BYTES),
        promote_threshold=2,
        staging_bytes=12 * BLOCK_BYTES,
    )


def front_door(path: Path) -> Manager:
    return AsyncLRUManager(
        hot=MemoryTier(4, BLOCK_BYTES),
        cold=DiskTier(path, 9, BLOCK_BYTES),
        promote_threshold=1,
        staging_bytes=8 * BLOCK_BYTES,
    )


class Caller:
    """One of many who call a manager at random, and check what they get."""

    def __init__(self, kv: Manager, rng: random.Random) -> None:
        self.kv = kv
        self.rng = rng

    async def run(self, tasks: anyio.abc.TaskGroup) -> None:
        for _ in range(CALLS):
            with anyio.CancelScope() as scope:
                if self.rng.random() < 0.25:
                    tasks.start_soon(self.cancel_soon, scope)
                with suppress(BlockNotFoundError, CapacityError, LoadTimeoutError):
                    await self.call()
            self.kv.check_invariants()
            await anyio.lowlevel.checkpoint()

    async def cancel_soon(self, scope: anyio.CancelScope) -> None:
        for _ in range(self.rng.randrange(12)):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    async def call(self) -> None:
        kv, rng = self.kv, self.rng
        start = rng.randrange(24)
        chain = list(range(start, start + rng.randint(1, 6)))
        kind = rng.choice(["store", "load", "load", "request", "request", "evict", "two", "hint"])
        if kind == "store":
            result = await kv.store(chain, [payload(one) for one in chain])
            parts = [*result.stored, *result.present, *result.rejected]
            assert sorted(map(int, parts)) == chain
        elif kind == "load":
            async with kv.load(chain, timeout_s=rng.choice([None, 5.0, 0.0])) as lease:
                await self.look(lease, chain)
        elif kind == "request":
            async with kv.request(chain, wait_pending_s=rng.choice([0.0, 0.01])) as request:
                async with request.load() as lease:
                    await self.look(lease, chain[: request.hit])
                for one in chain[request.hit :]:
                    await request.store([payload(one)])
        elif kind == "evict":
            await (kv.evict(chain[:2]) if rng.random() < 0.5 else kv.evict(num_blocks=2))
        elif kind == "two":
            await self.two_phases(chain)
        elif isinstance(kv, AsyncLRUManager):
            kv.hint_prefetch(chain)
        else:
            await kv.flush()

    async def look(self, lease: object, chain: list[int]) -> None:
        for _ in range(self.rng.randrange(4)):
            await anyio.lowlevel.checkpoint()
        assert [bytes(view) for view in lease] == [payload(one) for one in chain]  # type: ignore[attr-defined]  # a Lease

    async def two_phases(self, chain: list[int]) -> None:
        kv = self.kv
        sizes = [len(payload(one)) for one in chain]
        output = await kv.prepare_store(chain, sizes=sizes)
        if output is not None:
            try:
                for one, entry in zip(
                    output.block_hashes_to_store, output.store_spec.entries, strict=True
                ):
                    entry.view[:] = payload(int(one))
                await anyio.lowlevel.checkpoint()
            finally:
                with anyio.CancelScope(shield=True):
                    await kv.complete_store(output.block_hashes_to_store, self.rng.random() < 0.7)
        spec = await kv.prepare_load(chain)
        try:
            views = [entry.view for entry in spec.entries]
            await self.look(views, chain)
            del views
        finally:
            with anyio.CancelScope(shield=True):
                await kv.complete_load(chain)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [one_tier, one_disk, three_tiers, front_door])
async def test_every_byte_is_right_under_concurrency(
    tmp_path: Path, make: Callable[[Path], Manager], seed: int
) -> None:
    """Callers store, load, cancel, evict, prepare and hint at random, and check what they read.

    Afterwards nothing is pinned, pending or retired, and a reopened cold tier has no wrong byte.
    """
    rng = random.Random(seed)
    async with make(tmp_path) as kv:
        async with anyio.create_task_group() as tasks:
            for _ in range(CALLERS):
                tasks.start_soon(Caller(kv, rng).run, tasks)
        while kv._core.jobs.running:
            await anyio.lowlevel.checkpoint()
        kv.check_invariants()
        stats = kv.get_stats()
        assert (stats.pinned, stats.pending, stats.io_errors, stats.corrupt) == (0, 0, 0, 0)
        assert stats.stored > 50
        for tier in stats.tiers.values():
            assert tier.retired_blocks == tier.pending_blocks == tier.queue_depth == 0
            assert tier.free_blocks + tier.blocks == tier.capacity_blocks
        assert kv._core.transfer.staging.slots.in_use == 0
    async with make(tmp_path) as kv:
        for one in range(30):
            if await kv.lookup([one]):
                async with kv.load([one]) as lease:
                    assert bytes(lease[0]) == payload(one)
