"""What is written to the cold tier: everything, or only what was used again, since disks wear."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kvoffload import (
    AsyncLRUManager,
    ConfigError,
    DiskTier,
    LRUManagerFactory,
    ManagerSettings,
    MemoryTier,
    RejectReason,
)

SIZE = 64


def manager(path: Path, admission: str = "reused", *, warm: int = 0) -> AsyncLRUManager:
    return AsyncLRUManager(
        hot=MemoryTier(2, SIZE),
        warm=MemoryTier(warm, SIZE, name="warm") if warm else None,
        cold=DiskTier(path, 8, SIZE),
        policy="lru",
        cold_admission=admission,
    )


async def put(kv: AsyncLRUManager, *names: int) -> None:
    result = await kv.store(names, [bytes([name]) * SIZE for name in names])
    assert not result.rejected


def on_disk(kv: AsyncLRUManager, names: Sequence[int]) -> list[int]:
    return [name for name, at in zip(names, kv.locate(names), strict=True) if at.tier == "cold"]


@pytest.mark.parametrize(("admission", "written"), [("all", [1, 2]), ("reused", [2])])
async def test_what_leaves_memory(tmp_path: Path, admission: str, written: list[int]) -> None:
    """Block 2 was used again, block 1 was not: only that is counted as spared."""
    async with manager(tmp_path / "cold", admission) as kv:
        await put(kv, 1)
        await put(kv, 2)
        async with kv.load([2]):
            pass
        await put(kv, 3)
        await put(kv, 4)
        assert on_disk(kv, [1, 2, 3, 4]) == written
        stats = kv.get_stats()
        assert stats.spared == stats.evictions == 2 - len(written)
        assert stats.tiers["cold"].blocks_written == len(written)


async def test_a_tier_in_memory_takes_everything(tmp_path: Path) -> None:
    """Memory does not wear; what falls out of it at the bottom is what is weighed."""
    async with manager(tmp_path / "cold", warm=2) as kv:
        for name in range(5):
            await put(kv, name)
        stats = kv.get_stats()
        assert stats.tiers["warm"].blocks == 2
        assert (stats.spared, stats.tiers["cold"].blocks) == (1, 0)


async def test_a_chain_that_memory_can_not_hold_is_not_spilled(tmp_path: Path) -> None:
    """Nobody has used it again yet; the caller is told."""
    async with manager(tmp_path / "cold") as kv:
        result = await kv.store([1, 2, 3], [bytes(SIZE)] * 3)
        assert result.stored == (1, 2)
        assert result.rejected == {3: RejectReason.NOT_ADMITTED}


async def test_flush_and_close_spare_the_disk_too(tmp_path: Path) -> None:
    """And say how much is not durable."""
    async with manager(tmp_path / "cold") as kv:
        await put(kv, 1, 2)
        async with kv.load([2]):
            pass
        flushed = await kv.flush()
        assert (flushed.durable, flushed.not_durable) == (1, 1)
    async with manager(tmp_path / "cold") as kv:
        assert on_disk(kv, [2]) == [2]
        assert await kv.lookup([1]) == 0


async def test_a_disk_alone_takes_everything(tmp_path: Path) -> None:
    """There is no tier above it in which a block could show that it is used."""
    cold = DiskTier(tmp_path / "cold", 8, SIZE)
    async with AsyncLRUManager(hot=cold, cold_admission="reused") as kv:
        await put(kv, 1)
        assert (await kv.flush()).durable == 1


def test_another_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'all' or 'reused', not 'some'"):
        manager(tmp_path, "some")
    with pytest.raises(ConfigError, match="'all' or 'reused'"):
        ManagerSettings(cold_admission="some")  # type: ignore[arg-type]  # what is tested


async def test_the_factory_passes_it_on(tmp_path: Path) -> None:
    settings = ManagerSettings(
        hot_blocks=1,
        cold_blocks=4,
        cold_path=tmp_path / "cold",
        block_bytes=SIZE,
        cold_admission="reused",
    )
    async with LRUManagerFactory.create_async(settings) as kv:
        await put(kv, 1)
        await put(kv, 2)
        assert kv.get_stats().spared == 1
