"""How a project outside kvoffload tests what it builds on it."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest
from examples.testing_with_kvoffload.my_policy import UsedAgain
from examples.testing_with_kvoffload.my_service import Answer, MyService

from kvoffload import AsyncLRUManager, DiskTier, MemoryTier
from kvoffload.testing import (
    CountingTier,
    FaultyTier,
    ManagerContract,
    ManualClock,
    PolicyContract,
    RestartableTier,
    cancel_everywhere,
    eventually,
    small_manager,
)

PROMPT = list(range(16))  # four blocks


def compute(token_ids: Sequence[int], number: int) -> bytes:
    """Stand in for the model: 64 bytes that depend on the tokens so far."""
    return bytes(sum(token_ids[: 4 * (number + 1)]) % 256 for _ in range(64))


# The service on a small manager: no disk, no waiting, nothing to clean up.


async def test_the_second_answer_reuses_the_first() -> None:
    """The same prompt, and one that goes on differently."""
    async with small_manager("lru", hot=8) as kv:
        service = MyService(kv, compute)
        assert await service.answer(PROMPT) == Answer(reused=0, computed=4, kept=4)
        assert await service.answer(PROMPT) == Answer(reused=4, computed=0, kept=0)
        assert await service.answer(PROMPT[:8] + [9] * 8) == Answer(reused=2, computed=2, kept=2)


async def test_a_full_disk_costs_speed_and_nothing_else() -> None:
    """Every write fails with ENOSPC: the service computes, and tells that nothing was kept."""
    tier = FaultyTier(MemoryTier(8, 64))
    async with small_manager("lru", hot=tier) as kv:
        service = MyService(kv, compute)
        with tier.fail("write", OSError(errno.ENOSPC, "no space left on device"), times=None):
            assert await service.answer(PROMPT) == Answer(reused=0, computed=4, kept=0)
        assert await service.answer(PROMPT) == Answer(reused=0, computed=4, kept=4)


async def test_a_hanging_disk_costs_the_timeout_and_no_more() -> None:
    """The load is given up after its timeout; when the disk is back, so is the cache."""
    cold = FaultyTier(MemoryTier(8, 64, name="cold"))
    async with small_manager(hot=2, cold=cold) as kv:
        service = MyService(kv, compute, load_timeout_s=0.01)
        await service.answer(PROMPT)  # two of its blocks lie in the cold tier
        with cold.hang("read") as hang:
            assert await service.answer(PROMPT) == Answer(reused=0, computed=4, kept=0)
            assert hang.entered.is_set()
        await eventually(lambda: kv.get_stats().pinned == 0)
        service = MyService(kv, compute)
        assert await service.answer(PROMPT) == Answer(reused=4, computed=0, kept=0)


async def test_a_damaged_block_is_computed_anew() -> None:
    """A bit flips in every block on its way to the cold tier: nobody sees it."""
    cold = FaultyTier(MemoryTier(8, 64, name="cold"))
    async with small_manager(hot=2, cold=cold) as kv:
        service = MyService(kv, compute)
        cold.flip_byte("write", times=None)
        await service.answer(PROMPT)
        assert await service.answer(PROMPT) == Answer(reused=0, computed=4, kept=0)
        assert kv.get_stats().corrupt > 0


async def test_a_hundred_users_read_the_disk_once() -> None:
    """Two of the prompt's blocks lie cold: each is read once, not a hundred times."""
    cold = CountingTier(FaultyTier(MemoryTier(8, 64, name="cold")))
    async with small_manager(hot=2, cold=cold) as kv:
        service = MyService(kv, compute)
        await service.answer(PROMPT)
        cold.reset()
        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(service.answer, PROMPT)
        assert cold.blocks["read"] <= 2


async def test_the_cache_survives_a_restart() -> None:
    """A tier that keeps its blocks in this process stands in for a disk."""
    cold = RestartableTier(8, 64)
    async with small_manager(hot=2, cold=cold) as kv:
        await MyService(kv, compute).answer(PROMPT)
    async with small_manager(hot=2, cold=cold) as kv:
        assert (await MyService(kv, compute).answer(PROMPT)).reused == 4


@pytest.mark.parametrize("how", ["scope", "task"])
async def test_users_that_go_away_leave_nothing_behind(how: str) -> None:
    """Cancelled at every await in turn, by a timeout's scope or by the server."""
    cold = FaultyTier(MemoryTier(8, 64, name="cold"))
    async with small_manager(hot=2, cold=cold) as kv:
        service = MyService(kv, compute)

        async def answer() -> None:
            await service.answer(PROMPT)

        async def check() -> None:
            await eventually(lambda: kv.get_stats().pinned == kv.get_stats().pending == 0)

        visited = await cancel_everywhere(
            answer, check, how="scope" if how == "scope" else "task", prepare=kv.clear
        )
        assert visited > 0


async def test_an_engine_that_died_gives_its_slots_back() -> None:
    """Ten minutes pass in no time."""
    clock = ManualClock()
    async with small_manager("lru", hot=8, clock=clock) as kv:
        await kv.prepare_store([b"never completed"])
        clock.advance(601)
        await eventually(lambda: kv.get_stats().expired == 1)
        assert kv.get_stats().pending == 0


# A policy of your own keeps the promises that managers rely on...


class TestUsedAgain(PolicyContract):
    """Collects some twenty tests, one of them a random walk."""

    def make_policy(self) -> UsedAgain:
        """Return what is to be tested."""
        return UsedAgain()


# ...and so does a manager, the way you put it together.


class TestMyManager(ManagerContract):
    """Collects almost two hundred tests; the attributes say what to expect."""

    exact_lru = False
    lower_blocks = 8
    durable_blocks = 8

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> AsyncLRUManager:
        """Return what is to be tested; the suite opens it."""
        return AsyncLRUManager(
            hot=MemoryTier(hot_blocks, block_bytes),
            cold=DiskTier(tmp_path / "cold", 8, block_bytes),
            policy=UsedAgain(),
            clock=clock,
        )
