"""The contracts are worth nothing if they pass what is broken: one broken thing for each rule."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from anyio.lowlevel import checkpoint

from kvoffload import (
    BlockHash,
    BlockLocation,
    BlockState,
    FlushResult,
    Key,
    Lease,
    LoadStoreSpec,
    LRUOffloadManager,
    LRUPolicy,
    MemoryTier,
    NotPinnedError,
    PrepareStoreOutput,
    Request,
    Retention,
    StoreResult,
    TierError,
)
from kvoffload.testing import ManagerContract, ManualClock, PolicyContract, TierContract
from kvoffload.testing.contracts.policy_machine import run_policy_machine
from kvoffload.types import ByteArray

failure = pytest.raises((AssertionError, pytest.fail.Exception))

# Policies


class HeadFirst(LRUPolicy):
    def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
        return super().victims(level, 10**6, pinned)[::-1][:count]


class OffersPinned(LRUPolicy):
    def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
        return super().victims(level, count, frozenset())


class Forgets(LRUPolicy):
    """What it stepped over once it never offers again."""

    def unpinned(self, keys: Sequence[Key]) -> None:
        pass


class RemovesWhatItOffers(LRUPolicy):
    def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
        victims = super().victims(level, count, pinned)
        self.remove(victims, level)
        return victims


class MixesLevels(LRUPolicy):
    def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
        return super().victims(0, count, pinned)


class MixesTypes(LRUPolicy):
    """A namespace is part of the key, and so is the type of the hash."""

    def remove(self, keys: Sequence[Key], level: int) -> None:
        names = {str(key[1] if isinstance(key, tuple) else key) for key in keys}
        residents = super().victims(level, 10**6, frozenset())
        super().remove([key for key in residents if str(key) in names], level)


class MixesUpPins(LRUPolicy):
    """Takes back what was unpinned long ago, though it is pinned again."""

    def __init__(self) -> None:
        super().__init__()
        self.free: set[Key] = set()

    def unpinned(self, keys: Sequence[Key]) -> None:
        super().unpinned(keys)
        self.free.update(keys)

    def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
        return super().victims(level, count, frozenset(pinned) - self.free)


class ServesAnybody(LRUPolicy):
    def attach(self, capacities: Sequence[int]) -> None:
        LRUPolicy.__init__(self)
        super().attach(capacities)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (HeadFirst, "test_tail_leaves_before_head_one_at_a_time"),
        (HeadFirst, "test_tail_leaves_first_after_many_uses"),
        (OffersPinned, "test_pinned_keys_are_no_victims"),
        (Forgets, "test_unpinned_keys_are_offered_again"),
        (RemovesWhatItOffers, "test_asking_removes_nothing"),
        (MixesLevels, "test_levels_are_independent"),
        (MixesTypes, "test_keys_of_every_type"),
        (ServesAnybody, "test_serves_one_manager_only"),
    ],
)
def test_a_broken_policy_is_found(broken: type[LRUPolicy], test: str) -> None:
    class Suite(PolicyContract):
        def make_policy(self) -> LRUPolicy:
            return broken()

    suite = Suite()
    policy = suite.make_policy()
    policy.attach(suite.capacities)
    with failure:
        getattr(suite, test)(policy)


@pytest.mark.parametrize(
    "broken", [OffersPinned, Forgets, RemovesWhatItOffers, MixesLevels, MixesUpPins]
)
def test_a_broken_policy_is_found_by_a_random_walk(broken: type[LRUPolicy]) -> None:
    with failure:
        run_policy_machine(broken, (8, 16), max_examples=60, shrink=False)


# Tiers


class SortsItsBatches(MemoryTier):
    async def read(
        self, slots: Sequence[int], into: Sequence[memoryview]
    ) -> list[TierError | None]:
        return await super().read(sorted(slots), into)


class IgnoresSizes(MemoryTier):
    """Reads a whole slot whatever the buffer, so a short buffer stays as it was."""

    async def read(
        self, slots: Sequence[int], into: Sequence[memoryview]
    ) -> list[TierError | None]:
        full = [at for at, buffer in enumerate(into) if len(buffer) == self.block_bytes]
        await super().read([slots[at] for at in full], [into[at] for at in full])
        return [None] * len(slots)


class ReturnsOneOutcome(MemoryTier):
    async def write(
        self, slots: Sequence[int], payloads: Sequence[memoryview], keys: Sequence[bytes]
    ) -> list[TierError | None]:
        return (await super().write(slots, payloads, keys))[:1]


class ErasesItsNeighbours(MemoryTier):
    async def erase(self, slots: Sequence[int]) -> None:
        await super().erase(slots)
        for slot in slots:
            self.view((slot + 1) % self.num_blocks, 8)[:] = 0


class ReusesItsViews(MemoryTier):
    def view(self, slot: int, size: int) -> ByteArray:
        if not hasattr(self, "views"):
            self.views: dict[tuple[int, int], ByteArray] = {}
        return self.views.setdefault((slot, size), super().view(slot, size))


class CopiesItsViews(MemoryTier):
    """Reads and writes are sound, but a view is no view."""

    def view(self, slot: int, size: int) -> ByteArray:
        view = super().view(slot, size)
        caller = sys._getframe(1).f_code.co_name
        return view if caller in ("read", "write", "<listcomp>", "erase", "flush") else view.copy()


class WorksWhileClosed(MemoryTier):
    async def flush(self) -> None:
        pass


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (SortsItsBatches, "test_batches_with_gaps_and_out_of_order"),
        (IgnoresSizes, "test_rewriting_a_slot"),
        (ReturnsOneOutcome, "test_round_trip"),
        (ErasesItsNeighbours, "test_slots_are_independent"),
        (ReusesItsViews, "test_each_view_is_a_new_object"),
        (CopiesItsViews, "test_view_shows_the_slot"),
        (WorksWhileClosed, "test_refuses_work_while_closed"),
    ],
)
async def test_a_broken_tier_is_found(broken: type[MemoryTier], test: str, tmp_path: Path) -> None:
    suite = TierContract()
    await getattr(suite, test)(MemoryTier(suite.num_blocks, suite.block_bytes))
    with failure:
        await getattr(suite, test)(broken(suite.num_blocks, suite.block_bytes))


# Managers


class LooksUpAnything(LRUOffloadManager):
    """Counts ready blocks behind a gap."""

    async def lookup(self, block_hashes: Sequence[BlockHash]) -> int:
        return sum(each.state is BlockState.READY for each in self.locate(block_hashes))


class LookupIsAUse(LRUOffloadManager):
    async def lookup(self, block_hashes: Sequence[BlockHash]) -> int:
        await self.touch(block_hashes)
        return await super().lookup(block_hashes)


class DropsInSilence(LRUOffloadManager):
    async def store(
        self, block_hashes: Sequence[BlockHash], payloads: Sequence[Any]
    ) -> StoreResult:
        room = ManagerContract.hot_blocks
        return await super().store(block_hashes[:room], payloads[:room])


class TouchesTheWrongWayRound(LRUOffloadManager):
    async def touch(self, block_hashes: Sequence[BlockHash]) -> None:
        await super().touch(block_hashes[::-1])


class TouchesUnknownBlocks(LRUOffloadManager):
    async def touch(self, block_hashes: Sequence[BlockHash]) -> None:
        for each, location in zip(block_hashes, self.locate(block_hashes), strict=True):
            if location.state is BlockState.ABSENT:
                await self.store([each], [b""])
        await super().touch(block_hashes)


class ClearsNothing(LRUOffloadManager):
    async def clear(self) -> None:
        pass


class PromisesDurability(LRUOffloadManager):
    async def flush(self) -> FlushResult:
        result = await super().flush()
        return FlushResult(result.durable + result.not_durable, 0)


class LoadsOutOfOrder(LRUOffloadManager):
    def load(
        self, block_hashes: Sequence[BlockHash], *, timeout_s: float | None = None
    ) -> AbstractAsyncContextManager[Lease]:
        return super().load(sorted(block_hashes, key=str), timeout_s=timeout_s)


class LeaksAPin(LRUOffloadManager):
    """Forgets to unpin when the body raises or is cancelled."""

    @asynccontextmanager
    async def load(
        self, block_hashes: Sequence[BlockHash], *, timeout_s: float | None = None
    ) -> AsyncIterator[Lease]:
        await self.prepare_load(block_hashes)
        async with super().load(block_hashes, timeout_s=timeout_s) as lease:
            yield lease
        await self.complete_load(block_hashes)


class RequestIsNoUse(LRUOffloadManager):
    @asynccontextmanager
    async def request(
        self,
        block_hashes: Sequence[BlockHash],
        *,
        wait_pending_s: float = 0.0,
        retention: Retention | float | None = None,
    ) -> AsyncIterator[Request]:
        async with super().request(block_hashes, wait_pending_s=wait_pending_s) as request:
            yield request
        await self.touch(block_hashes[::-1])


class ForgetsWhatIsShared(LRUOffloadManager):
    async def forget(self, block_hashes: Sequence[BlockHash]) -> list[BlockHash]:
        return await self.evict(block_hashes)


class ForgetsNothing(LRUOffloadManager):
    @asynccontextmanager
    async def request(
        self,
        block_hashes: Sequence[BlockHash],
        *,
        wait_pending_s: float = 0.0,
        retention: Retention | float | None = None,
    ) -> AsyncIterator[Request]:
        async with super().request(block_hashes, retention=retention) as request:
            yield request
            request.retention = None


class ForgetsWhatItReserved(LRUOffloadManager):
    """Cancelled after the reservation, it leaves the slots pending."""

    async def prepare_store(
        self, block_hashes: Sequence[BlockHash], *, sizes: Sequence[int] | None = None
    ) -> PrepareStoreOutput | None:
        output = await super().prepare_store(block_hashes, sizes=sizes)
        await checkpoint()
        return output


class ForgivesCompletions(LRUOffloadManager):
    async def complete_load(self, block_hashes: Sequence[BlockHash]) -> None:
        with suppress(NotPinnedError):
            await super().complete_load(block_hashes)


class PreparingALoadIsAUse(LRUOffloadManager):
    async def prepare_load(self, block_hashes: Sequence[BlockHash]) -> LoadStoreSpec:
        await self.touch(block_hashes)
        return await super().prepare_load(block_hashes)


class LocatesOneOnly(LRUOffloadManager):
    def locate(self, block_hashes: Sequence[BlockHash]) -> list[BlockLocation]:
        return super().locate(block_hashes)[:1]


@pytest.mark.parametrize(
    ("broken", "test", "arguments"),
    [
        (LooksUpAnything, "test_lookup_counts_leading_ready_blocks", ()),
        (LookupIsAUse, "test_lookup_changes_no_recency", ()),
        (DropsInSilence, "test_more_blocks_than_all_tiers_hold", ()),
        (TouchesTheWrongWayRound, "test_the_first_hash_of_a_call_is_the_most_recent", ()),
        (TouchesUnknownBlocks, "test_touch_is_a_use", ()),
        (ClearsNothing, "test_clear", ()),
        (PromisesDurability, "test_flush_evicts_nothing", ()),
        (LoadsOutOfOrder, "test_load_yields_the_bytes_in_the_order_asked", ()),
        (LeaksAPin, "test_an_error_in_the_body_unpins", ()),
        (LeaksAPin, "test_cancellation_in_the_body_unpins", ()),
        (RequestIsNoUse, "test_request_is_one_use_tail_first", ()),
        (ForgetsWhatIsShared, "test_forget_leaves_what_another_chain_shares", ()),
        (ForgetsWhatIsShared, "test_forget_a_chain_that_another_goes_on_from", ()),
        (ForgetsNothing, "test_a_session_that_is_over_is_freed", ("before",)),
        (ForgetsWhatItReserved, "test_cancelled_at_every_await", ("prepare_store", "scope")),
        (ForgetsWhatItReserved, "test_cancelled_at_every_await", ("prepare_store", "task")),
        (ForgivesCompletions, "test_complete_load_of_what_is_not_pinned", ()),
        (PreparingALoadIsAUse, "test_the_two_phase_form_is_no_use", ()),
        (LocatesOneOnly, "test_locate", ()),
    ],
)
async def test_a_broken_manager_is_found(
    broken: type[LRUOffloadManager], test: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """And the sound one it is made of passes the same test."""

    class Suite(ManagerContract):
        kind: type[LRUOffloadManager] = LRUOffloadManager
        settle_s = 0.1

        def make_manager(
            self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
        ) -> LRUOffloadManager:
            return self.kind(MemoryTier(hot_blocks, block_bytes), clock=clock)

    suite = Suite()
    check = getattr(suite, test)
    await check(suite.new_manager(tmp_path, ManualClock()), *arguments)
    suite.kind = broken
    with failure:
        await check(suite.new_manager(tmp_path, ManualClock()), *arguments)


# Somebody else's project


def test_a_third_party_subclasses_one_class(tmp_path: Path) -> None:
    """In pytest-asyncio's strict mode, with warnings as errors, and the base is not collected."""
    (tmp_path / "test_mine.py").write_text(
        """
from kvoffload import LRUOffloadManager, LRUPolicy, MemoryTier
from kvoffload.testing import ManagerContract, PolicyContract, TierContract

class TestMyPolicy(PolicyContract):
    def make_policy(self):
        return LRUPolicy()

class TestMyTier(TierContract):
    def make_tier(self, tmp_path, num_blocks, block_bytes):
        return MemoryTier(num_blocks, block_bytes)

class TestMyManager(ManagerContract):
    def make_manager(self, tmp_path, *, hot_blocks, block_bytes, clock):
        return LRUOffloadManager(MemoryTier(hot_blocks, block_bytes), clock=clock)
"""
    )
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nfilterwarnings = error\n"
        "asyncio_mode = strict\nasyncio_default_fixture_loop_scope = function\n"
    )
    chosen = "test_tail_leaves or test_round_trip or test_lookup"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:anyio", "-k", chosen, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout
    assert int(passed[1]) >= 9, run.stdout
