"""Every tier, policy and manager of the library, checked by the contracts that it publishes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvoffload import (
    ARCPolicy,
    AsyncLRUManager,
    DiskTier,
    FIFOPolicy,
    LRUOffloadManager,
    LRUPolicy,
    ManagerStats,
    MemoryTier,
    NamespaceShare,
    OffloadingManager,
    PrefetchingLRUManager,
    RemoteTier,
    S3FIFOPolicy,
    Tier,
    TieredLRUManager,
    WeightedLRUManager,
    WeightedPolicy,
)
from kvoffload.policy.partitions import PartitionedPolicy, make_partitions
from kvoffload.testing import (
    CountingTier,
    DictRemoteTier,
    DictSource,
    FaultyTier,
    ManagerContract,
    ManualClock,
    NamespaceContract,
    PolicyContract,
    RemoteTierContract,
    RestartableTier,
    TierContract,
)

# Tiers


class TestMemoryTier(TierContract):
    def make_tier(self, tmp_path: Path, num_blocks: int, block_bytes: int) -> Tier:
        return MemoryTier(num_blocks, block_bytes)


class TestDiskTier(TierContract):
    def make_tier(self, tmp_path: Path, num_blocks: int, block_bytes: int) -> Tier:
        return DiskTier(tmp_path / "cold", num_blocks, block_bytes)


class TestDiskTierOfOddBlocks(TierContract):
    """Blocks that are no multiple of a page or a sector."""

    block_bytes = 1000

    def make_tier(self, tmp_path: Path, num_blocks: int, block_bytes: int) -> Tier:
        return DiskTier(tmp_path / "cold", num_blocks, block_bytes)


class TestDiskTierWithoutDirectIO(TierContract):
    def make_tier(self, tmp_path: Path, num_blocks: int, block_bytes: int) -> Tier:
        return DiskTier(tmp_path / "cold", num_blocks, block_bytes, direct_io="off", io_threads=1)


class TestEncryptedDiskTier(TierContract):
    def make_tier(self, tmp_path: Path, num_blocks: int, block_bytes: int) -> Tier:
        key = bytes(range(32))
        return DiskTier(tmp_path / "cold", num_blocks, block_bytes, encryption_key=key)


class TestEncryptedDiskTierOfOddBlocks(TierContract):
    """What is sealed goes through memory that direct I/O takes, and then through a file's slots."""

    block_bytes = 33000

    def make_tier(self, tmp_path: Path, num_blocks: int, block_bytes: int) -> Tier:
        key = bytes(range(32))
        return DiskTier(tmp_path / "cold", num_blocks, block_bytes, encryption_key=key)


class TestFaultyTier(TierContract):
    """Healthy, a wrapper is as good as what it wraps."""

    def make_tier(self, tmp_path: Path, num_blocks: int, block_bytes: int) -> Tier:
        return FaultyTier(DiskTier(tmp_path / "cold", num_blocks, block_bytes))


class TestAddressableFaultyTier(TierContract):
    def make_tier(self, tmp_path: Path, num_blocks: int, block_bytes: int) -> Tier:
        return FaultyTier(MemoryTier(num_blocks, block_bytes), addressable=True)


class TestCountingTier(TierContract):
    def make_tier(self, tmp_path: Path, num_blocks: int, block_bytes: int) -> Tier:
        return CountingTier(MemoryTier(num_blocks, block_bytes))


class TestRestartableTier(TierContract):
    def make_tier(self, tmp_path: Path, num_blocks: int, block_bytes: int) -> Tier:
        if not hasattr(self, "tier_of_this_test"):
            self.tier_of_this_test = RestartableTier(num_blocks, block_bytes)
        return self.tier_of_this_test


# Remote tiers; those of engines are in tests/remote


class TestDictRemoteTier(RemoteTierContract):
    has_layouts = False

    @pytest.fixture(autouse=True)
    def engine(self) -> None:
        self.store: dict[bytes, bytes] = {}

    def make_tier(self, tmp_path: Path, *, layout: str = "") -> RemoteTier:
        return DictRemoteTier(store=self.store)


# Policies


class TestLRUPolicy(PolicyContract):
    def make_policy(self) -> LRUPolicy:
        return LRUPolicy()


class TestFIFOPolicy(PolicyContract):
    def make_policy(self) -> FIFOPolicy:
        return FIFOPolicy()


class TestS3FIFOPolicy(PolicyContract):
    def make_policy(self) -> S3FIFOPolicy:
        return S3FIFOPolicy()


class TestARCPolicy(PolicyContract):
    def make_policy(self) -> ARCPolicy:
        return ARCPolicy()


class TestWeightedPolicy(PolicyContract):
    def make_policy(self) -> WeightedPolicy:
        return WeightedPolicy()


class TestUnweightedPolicy(PolicyContract):
    def make_policy(self) -> WeightedPolicy:
        return WeightedPolicy(frequency_weight=0.0)


class TestHeavilyWeightedPolicy(PolicyContract):
    def make_policy(self) -> WeightedPolicy:
        return WeightedPolicy(frequency_weight=50.0)


class TestPartitionedPolicy(PolicyContract):
    """Most keys of the contract are of one partition; another is empty, or has a few."""

    def make_policy(self) -> PartitionedPolicy:
        return make_partitions(LRUPolicy, {"tenant": None, "clipped": 4, None: None})


class TestPartitionedWeightedPolicy(PolicyContract):
    """The keys are of the partition of those without one of their own."""

    def make_policy(self) -> PartitionedPolicy:
        return make_partitions(WeightedPolicy, {"tenant": 2})


# Managers of one tier


class TestLRUOffloadManager(ManagerContract):
    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> LRUOffloadManager:
        return LRUOffloadManager(MemoryTier(hot_blocks, block_bytes), clock=clock)


class TestLRUOffloadManagerOnDisk(ManagerContract):
    """The only tier has no address and survives."""

    durable_blocks = ManagerContract.hot_blocks

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> LRUOffloadManager:
        return LRUOffloadManager(DiskTier(tmp_path / "cold", hot_blocks, block_bytes), clock=clock)


class TestWeightedLRUManager(ManagerContract):
    exact_lru = False

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> WeightedLRUManager:
        return WeightedLRUManager(MemoryTier(hot_blocks, block_bytes), clock=clock)


class TestUnweightedLRUManager(ManagerContract):
    """At weight 0 it is plain LRU, exactly; every byte passes through reads and writes."""

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> WeightedLRUManager:
        tier = FaultyTier(MemoryTier(hot_blocks, block_bytes))
        return WeightedLRUManager(tier, frequency_weight=0.0, clock=clock)


class TestPrefetchingLRUManager(ManagerContract):
    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> PrefetchingLRUManager:
        tier = MemoryTier(hot_blocks, block_bytes)
        return PrefetchingLRUManager(tier, source=DictSource(), clock=clock)


# Managers of several tiers


class TestTieredLRUManager(ManagerContract):
    lower_blocks = 6

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> TieredLRUManager:
        return TieredLRUManager(
            MemoryTier(hot_blocks, block_bytes),
            MemoryTier(self.lower_blocks, block_bytes, name="warm"),
            clock=clock,
        )


class TestTieredLRUManagerWithColdTier(ManagerContract):
    lower_blocks = 4 + 8
    durable_blocks = 8

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> TieredLRUManager:
        return TieredLRUManager(
            MemoryTier(hot_blocks, block_bytes),
            MemoryTier(4, block_bytes, name="warm"),
            DiskTier(tmp_path / "cold", 8, block_bytes),
            clock=clock,
        )


class TestAsyncLRUManager(ManagerContract):
    lower_blocks = 10
    durable_blocks = 10
    exact_lru = False

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> AsyncLRUManager:
        return AsyncLRUManager(
            hot=MemoryTier(hot_blocks, block_bytes),
            cold=DiskTier(tmp_path / "cold", 10, block_bytes),
            clock=clock,
        )


class TestAsyncLRUManagerWithShares(TestAsyncLRUManager):
    """What it may have is all there is: then it can't tell."""

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> AsyncLRUManager:
        slots = hot_blocks + self.lower_blocks
        return AsyncLRUManager(
            hot=MemoryTier(hot_blocks, block_bytes),
            cold=DiskTier(tmp_path / "cold", 10, block_bytes),
            shares={
                "": NamespaceShare(max_bytes=slots * block_bytes, reserved_bytes=block_bytes),
                "nobody": NamespaceShare(reserved_bytes=block_bytes),
            },
            clock=clock,
        )


class TestAsyncLRUManagerOfFourTiers(ManagerContract):
    """Recency alone, and no tier but the hot one has an address."""

    hot_blocks = 6
    lower_blocks = 2 + 6 + 3

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> AsyncLRUManager:
        return AsyncLRUManager(
            hot=MemoryTier(hot_blocks, block_bytes),
            warm=FaultyTier(MemoryTier(2, block_bytes, name="warm")),
            cold=FaultyTier(MemoryTier(6, block_bytes, name="cold")),
            remote=FaultyTier(MemoryTier(3, block_bytes, name="remote")),
            policy="lru",
            clock=clock,
        )


class TestAsyncLRUManagerWithRemoteTier(ManagerContract):
    """Nothing is sent, so that it has nothing: then it can only be seen in what it costs."""

    lower_blocks = 6
    durable_blocks = 6

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> AsyncLRUManager:
        return AsyncLRUManager(
            hot=MemoryTier(hot_blocks, block_bytes),
            cold=DiskTier(tmp_path / "cold", 6, block_bytes),
            remote=DictRemoteTier(),
            remote_ttl_s=0,
            remote_queue_bytes=0,  # what is being sent is pinned after a call has ended
            policy="lru",
            clock=clock,
        )


class TestNamespacesWithRemoteTier(NamespaceContract):
    """Of an engine that evicts everything at once."""

    lower_blocks = 8

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> AsyncLRUManager:
        return AsyncLRUManager(
            hot=MemoryTier(hot_blocks, block_bytes),
            cold=FaultyTier(MemoryTier(8, block_bytes, name="cold")),
            remote=DictRemoteTier(most_blocks=0),
            remote_ttl_s=0,
            clock=clock,
        )


class TestNamespacesOfAsyncLRUManager(NamespaceContract):
    lower_blocks = 8

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> AsyncLRUManager:
        return AsyncLRUManager(
            hot=MemoryTier(hot_blocks, block_bytes),
            cold=FaultyTier(MemoryTier(8, block_bytes, name="cold")),
            clock=clock,
        )


class TestNamespacesWithShares(TestNamespacesOfAsyncLRUManager):
    """One tenant with a share, the others without."""

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> AsyncLRUManager:
        return AsyncLRUManager(
            hot=MemoryTier(hot_blocks, block_bytes),
            cold=FaultyTier(MemoryTier(8, block_bytes, name="cold")),
            shares={"a": NamespaceShare(max_bytes=6 * block_bytes, reserved_bytes=block_bytes)},
            clock=clock,
        )


class InsideOneNamespace:
    """A manager and a view of one namespace of it, opened and closed together."""

    def __init__(self, manager: AsyncLRUManager) -> None:
        self.manager = manager
        self.view = manager.namespace("tenant")

    async def __aenter__(self) -> InsideOneNamespace:
        await self.manager.__aenter__()
        await self.view.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.view.__aexit__(None, None, None)
        await self.manager.__aexit__(None, None, None)

    def get_stats(self) -> ManagerStats:
        # Slots that are free belong to nobody, so a view does not count them.
        return replace(self.view.get_stats(), tiers=self.manager.get_stats().tiers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.view, name)


class TestNamespaceViewOfAsyncLRUManager(ManagerContract):
    """Alone in its manager, a namespace can't tell that it is one."""

    lower_blocks = 10
    durable_blocks = 10
    exact_lru = False

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> OffloadingManager:
        manager: Any = InsideOneNamespace(
            AsyncLRUManager(
                hot=MemoryTier(hot_blocks, block_bytes),
                cold=DiskTier(tmp_path / "cold", 10, block_bytes),
                clock=clock,
            )
        )
        kept: OffloadingManager = manager
        return kept
