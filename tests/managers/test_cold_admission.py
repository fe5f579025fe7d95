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


def manager(
    path: Path,
    admission: str = "reused",
    *,
    hot: int = 2,
    warm: int = 0,
    policy: str = "lru",
) -> AsyncLRUManager:
    return AsyncLRUManager(
        hot=MemoryTier(hot, SIZE),
        warm=MemoryTier(warm, SIZE, name="warm") if warm else None,
        cold=DiskTier(path, 8, SIZE),
        policy=policy,
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
    with pytest.raises(ConfigError, match="'all', 'likely' or 'reused', not 'some'"):
        manager(tmp_path, "some")
    with pytest.raises(ConfigError, match="'all', 'likely' or"):
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


async def test_what_is_likely_to_be_used_again_is_written_too(tmp_path: Path) -> None:
    """Nobody has used either of two new chats again; what such callers said before was right."""
    async with manager(tmp_path / "cold", "likely", policy="weighted", hot=24) as kv:
        for number in range(400):
            chat = [f"{number} {block}" for block in range(4)]
            before = [f"{number - 2} {block}" for block in range(4)]
            for chain in [chat, before] if number % 2 else [chat]:
                async with kv.request(chain, retention=0.9 if number % 2 else 0.1) as request:
                    await request.store([bytes(SIZE)] * (len(chain) - request.hit))
        likely, unlikely = ([f"last {said} {block}" for block in range(4)] for said in (0.9, 0.1))
        for chain, said in ((likely, 0.9), (unlikely, 0.1)):
            async with kv.request(chain, retention=said) as request:
                await request.store([bytes(SIZE)] * 4)
        ready = {name for name in [*likely, *unlikely] if kv.locate([name])[0].tier}
        await kv.flush()
        stats = kv.get_stats()
        assert ready
    async with manager(tmp_path / "cold", "likely", policy="weighted", hot=24) as kv:
        durable = {name for name in ready if kv.locate([name])[0].tier}
        assert durable == ready & set(likely)
    assert stats.spared


async def test_only_a_policy_that_forecasts_can_tell_what_is_likely(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a policy that forecasts"):
        manager(tmp_path / "cold", "likely")
