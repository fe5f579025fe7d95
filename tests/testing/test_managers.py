from __future__ import annotations

from pathlib import Path

import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    LRUOffloadManager,
    MemoryTier,
    PrefetchingLRUManager,
    TieredLRUManager,
    WeightedLRUManager,
)
from kvoffload.testing import (
    DictSource,
    FaultyTier,
    ManualClock,
    eventually,
    payload_for,
    small_manager,
)


def capacities(kv: AsyncLRUManager | TieredLRUManager | LRUOffloadManager) -> dict[str, int]:
    return {name: tier.capacity_blocks for name, tier in kv.get_stats().tiers.items()}


async def test_one_of_each_kind(tmp_path: Path) -> None:
    async with small_manager("lru") as lru:
        assert type(lru) is LRUOffloadManager
        assert capacities(lru) == {"hot": 8}
    async with small_manager("weighted", hot=3) as weighted:
        assert type(weighted) is WeightedLRUManager
    async with small_manager("tiered", hot=2, warm=3) as tiered:
        assert type(tiered) is TieredLRUManager
        assert capacities(tiered) == {"hot": 2, "warm": 3}
    async with small_manager("async", warm=4, cold_path=tmp_path / "cold") as front:
        assert type(front) is AsyncLRUManager
        assert capacities(front) == {"hot": 8, "warm": 4, "cold": 16}
    async with small_manager(hot=2, cold=FaultyTier(MemoryTier(5, 64, name="slow"))) as front:
        assert capacities(front) == {"hot": 2, "slow": 5}


async def test_a_prefetching_manager_has_a_source() -> None:
    source = DictSource.of(["a", "b"], 64)
    async with small_manager("prefetching", source=source) as kv:
        assert type(kv) is PrefetchingLRUManager
        assert kv.hint_prefetch(["a", "missing"]) == 2
        await eventually(lambda: len(source.reads) == 2)
        await eventually(lambda: kv.get_stats().stored == 1)
        async with kv.load(["a"]) as lease:
            assert lease[0] == payload_for("a", 64)
    assert sorted(map(str, source.reads)) == ["a", "missing"]
    async with small_manager("prefetching") as kv:
        assert kv.hint_prefetch(["a"]) == 1


async def test_block_bytes_and_clock() -> None:
    clock = ManualClock()
    async with small_manager("lru", block_bytes=10, clock=clock) as kv:
        assert (await kv.store(["a"], [bytes(10)])).stored == ("a",)
        await kv.prepare_store(["b"])
        clock.advance(601)
        await eventually(lambda: kv.get_stats().expired == 1)


def test_what_a_kind_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has one tier"):
        small_manager("lru", cold_path=tmp_path)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="no source"):
        small_manager("lru", source=DictSource())  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="needs a cold_path"):
        small_manager("async", cold=5)
    with pytest.raises(ValueError, match="one too many"):
        small_manager("async", cold=MemoryTier(5, 64), cold_path=tmp_path)
    with pytest.raises(ValueError, match="choose from"):
        small_manager("arc")  # type: ignore[call-overload]


def test_payloads_differ_and_stay_the_same() -> None:
    hashes: list[BlockHash] = [1, "1", b"1", -1, 2**70, "", b"", *range(2, 500)]
    payloads = {payload_for(block_hash, 16) for block_hash in hashes}
    assert len(payloads) == len(hashes)
    assert payload_for("a", 16, namespace="x") != payload_for("a", 16)
    assert payload_for("a", 16) == payload_for("a", 40)[:16]
    assert payload_for("a", 0) == b""
    assert payload_for("a", 8).hex() == "5bf68ca0aab72e29"


async def test_dict_source() -> None:
    source = DictSource({"a": b"x"})
    assert await source.read("a") == b"x"
    with pytest.raises(KeyError):
        await source.read("b")
    source.payloads["b"] = b"y"
    assert await source.read("b") == b"y"
    assert source.reads == ["a", "b", "b"]
