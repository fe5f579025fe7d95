"""What the parts of `ManagerContract` share: the settings, the fixtures and the checks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from ...metrics import ManagerStats
from ...types import (
    BlockHash,
    BlockLocation,
    BlockState,
    OffloadingManager,
    PrepareStoreOutput,
    StoreResult,
)
from ..clock import ManualClock, eventually
from ..payloads import payload_for

READY, PENDING, ABSENT = BlockState.READY, BlockState.PENDING, BlockState.ABSENT
BAD_ARGUMENT = (TypeError, ValueError)
"""What a caller's mistake raises; `ConfigError` is a `ValueError`."""


def chain(name: str, length: int) -> list[BlockHash]:
    """Return the hashes of a prefix chain, head first."""
    return [f"{name}{number}" for number in range(length)]


@dataclass(frozen=True)
class Snapshot:
    """All that a failed call must not have changed."""

    stats: ManagerStats
    locations: list[BlockLocation]


@asynccontextmanager
async def time_passing(clock: ManualClock) -> AsyncIterator[None]:
    """Let the clock run while the body waits for something.

    A hundredth of a second a turn of real time, so that deadlines on either clock arrive.
    """

    async def tick() -> None:
        while True:
            await anyio.sleep(0.001)
            clock.advance(0.01)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        yield
        tasks.cancel_scope.cancel()


class ManagerSuite:
    """Settings and helpers of `ManagerContract`, where they are described."""

    pytestmark = pytest.mark.asyncio

    hot_blocks: int = 8
    lower_blocks: int = 0
    durable_blocks: int = 0
    block_bytes: int = 64
    exact_lru: bool = True
    is_remote: bool = False
    reservation_ttl_s: float = 600.0
    settle_s: float = 5.0
    deadline_s: float = 20.0

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> OffloadingManager:
        """Return a manager that is not open.

        Args:
            tmp_path: Directory of the test. A test of restarts calls again with the same one, and
                expects to find the blocks.
            hot_blocks: Slots of the tier that `store` fills first.
            block_bytes: Bytes of a slot.
            clock: The time to go by.
        """
        raise NotImplementedError

    @property
    def capacity(self) -> int:
        """Distinct blocks that all tiers hold together."""
        return self.hot_blocks + self.lower_blocks

    @pytest.fixture
    def clock(self) -> ManualClock:
        """Return the clock of `manager`."""
        return ManualClock(start=1000.0)

    @pytest.fixture
    def manager(self, tmp_path: Path, clock: ManualClock) -> OffloadingManager:
        """Return a new manager; tests enter it."""
        return self.new_manager(tmp_path, clock)

    @pytest.fixture
    def lru_manager(self, manager: OffloadingManager) -> OffloadingManager:
        """Return a new manager, if the order of eviction is a matter of recency alone."""
        if not self.exact_lru:
            pytest.skip("the order of eviction is more than recency")
        return manager

    def new_manager(self, tmp_path: Path, clock: ManualClock) -> OffloadingManager:
        """Return a manager of the suite's size."""
        return self.make_manager(
            tmp_path, hot_blocks=self.hot_blocks, block_bytes=self.block_bytes, clock=clock
        )

    @asynccontextmanager
    async def opened(self, manager: OffloadingManager) -> AsyncIterator[OffloadingManager]:
        """Enter the manager, and at the end of a test make sure that nothing leaked."""
        with anyio.fail_after(self.deadline_s):
            async with manager as kv:
                yield kv
                await self.settled(kv)

    # Payloads

    def payload(self, block_hash: BlockHash) -> bytes:
        """Return the full payload that belongs to a block."""
        return payload_for(block_hash, self.block_bytes)

    def payloads(self, block_hashes: Sequence[BlockHash]) -> list[bytes]:
        """Return the full payloads that belong to blocks."""
        return list(map(self.payload, block_hashes))

    async def put(self, kv: OffloadingManager, block_hashes: Sequence[BlockHash]) -> StoreResult:
        """Store blocks that must all find room."""
        result = await kv.store(block_hashes, self.payloads(block_hashes))
        assert result.rejected == {}
        return result

    async def fill(self, kv: OffloadingManager, count: int, name: str = "old") -> list[BlockHash]:
        """Store single blocks, one a call: the first is the coldest afterwards."""
        block_hashes = chain(name, count)
        for block_hash in block_hashes:
            await self.put(kv, [block_hash])
        return block_hashes

    async def prepared(
        self, kv: OffloadingManager, block_hashes: Sequence[BlockHash]
    ) -> PrepareStoreOutput:
        """Reserve slots that must be there."""
        output = await kv.prepare_store(block_hashes)
        assert output is not None
        return output

    # Checks

    async def ask(self, kv: OffloadingManager, block_hashes: Sequence[BlockHash]) -> None:
        """Let a manager that is elsewhere learn of blocks which nobody named since it was opened.

        What `locate` tells without any I/O, it has to know.
        """
        if self.is_remote:
            await kv.lookup(block_hashes)

    def states(self, kv: OffloadingManager, block_hashes: Sequence[BlockHash]) -> list[BlockState]:
        """Return what the manager knows of each block."""
        return [location.state for location in kv.locate(block_hashes)]

    def ready(self, kv: OffloadingManager, block_hashes: Sequence[BlockHash]) -> list[BlockHash]:
        """Return those of the blocks that are ready."""
        states = self.states(kv, block_hashes)
        return [each for each, state in zip(block_hashes, states, strict=True) if state is READY]

    async def check_bytes(self, kv: OffloadingManager, block_hashes: Sequence[BlockHash]) -> None:
        """Load blocks that must be there, one at a time, and compare every byte."""
        for block_hash in block_hashes:
            async with kv.load([block_hash]) as lease:
                assert lease[0] == self.payload(block_hash), f"other bytes under {block_hash!r}"

    async def evict_one_by_one(self, kv: OffloadingManager) -> list[BlockHash]:
        """Evict all that can leave; return it, first to leave first."""
        order: list[BlockHash] = []
        while left := await kv.evict(num_blocks=1):
            assert len(left) == 1
            order += left
        return order

    def check_slots(self, kv: OffloadingManager) -> None:
        """Each slot of each tier is in exactly one state."""
        stats = kv.get_stats()
        assert sum(tier.capacity_blocks for tier in stats.tiers.values()) == self.capacity
        for name, tier in stats.tiers.items():
            parts = (tier.free_blocks, tier.pending_blocks, tier.blocks, tier.retired_blocks)
            assert min(parts) >= 0, f"{name}: {tier}"
            assert sum(parts) == tier.capacity_blocks, f"{name}: {tier}"
            assert 0 <= tier.bytes <= tier.blocks * self.block_bytes, f"{name}: {tier}"

    async def settled(self, kv: OffloadingManager) -> None:
        """Wait for background work to end; nothing may be left pinned or pending by then."""

        def quiet() -> bool:
            stats = kv.get_stats()
            return not (
                stats.pending
                or stats.pinned
                or any(tier.queue_depth or tier.pending_blocks for tier in stats.tiers.values())
            )

        try:
            await eventually(quiet, timeout_s=self.settle_s)
        except AssertionError:
            raise AssertionError(f"left pinned or pending: {kv.get_stats()}") from None
        self.check_slots(kv)

    def snapshot(self, kv: OffloadingManager, block_hashes: Sequence[BlockHash]) -> Snapshot:
        """Return what can be seen of the manager and of these blocks."""
        return Snapshot(kv.get_stats(), kv.locate(block_hashes))
