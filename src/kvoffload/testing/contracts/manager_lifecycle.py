"""Part of `ManagerContract`: opening, closing, loops, wrong arguments, and restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from ...errors import ClosedError, ConfigError, WrongLoopError
from ...types import BlockHash, FlushResult, OffloadingManager
from ..cancellation import count_suspensions
from ..clock import ManualClock
from .manager_base import ABSENT, BAD_ARGUMENT, READY, ManagerSuite, chain
from .manager_load import BodyError

Call = Callable[[OffloadingManager, Any], Awaitable[object]]


async def _load(kv: OffloadingManager, block_hashes: Any) -> None:
    async with kv.load(block_hashes):
        pass


async def _request(kv: OffloadingManager, block_hashes: Any) -> None:
    async with kv.request(block_hashes):
        pass


async def _locate(kv: OffloadingManager, block_hashes: Any) -> None:
    kv.locate(block_hashes)


async def _store(kv: OffloadingManager, block_hashes: Any) -> None:
    count = len(block_hashes) if hasattr(block_hashes, "__len__") else 1
    await kv.store(block_hashes, [b"payload"] * count)


CALLS: dict[str, Call] = {
    "lookup": lambda kv, block_hashes: kv.lookup(block_hashes),
    "store": _store,
    "load": _load,
    "evict": lambda kv, block_hashes: kv.evict(block_hashes),
    "forget": lambda kv, block_hashes: kv.forget(block_hashes),
    "touch": lambda kv, block_hashes: kv.touch(block_hashes),
    "prepare_store": lambda kv, block_hashes: kv.prepare_store(block_hashes),
    "complete_store": lambda kv, block_hashes: kv.complete_store(block_hashes),
    "prepare_load": lambda kv, block_hashes: kv.prepare_load(block_hashes),
    "complete_load": lambda kv, block_hashes: kv.complete_load(block_hashes),
    "request": _request,
    "locate": _locate,
}
"""The methods that take hashes."""

MORE_CALLS: dict[str, Call] = {
    **CALLS,
    "evict num_blocks": lambda kv, _: kv.evict(num_blocks=1),
    "clear": lambda kv, _: kv.clear(),
    "flush": lambda kv, _: kv.flush(),
}
"""All that belong to the event loop."""

BAD_HASHES: tuple[object, ...] = (
    ["c0", None],
    ["c0", True],
    ["c0", 1.5],
    ["c0", bytearray(b"c0")],
    ["c0", ["c0"]],
    ["c0", ("", "c0")],
    b"c0",
    "c0",
    5,
)
"""No sequences of hashes, or not of hashes alone."""


class LifecycleSuite(ManagerSuite):
    """A manager's life, and its callers' mistakes."""

    # Opening and closing

    @pytest.mark.parametrize("call", MORE_CALLS)
    async def test_refuses_work_while_closed(self, manager: OffloadingManager, call: str) -> None:
        """Before it was entered, and after it was left."""
        with pytest.raises(ClosedError):
            await MORE_CALLS[call](manager, ["c0"])
        async with self.opened(manager) as kv:
            await self.put(kv, ["c0"])
        with pytest.raises(ClosedError):
            await MORE_CALLS[call](manager, ["c0"])

    async def test_closing_twice(self, manager: OffloadingManager) -> None:
        """The second time does nothing."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a"])
        await manager.__aexit__(None, None, None)
        with pytest.raises(ClosedError):
            await manager.lookup(["a"])

    async def test_an_error_in_the_body_comes_out(self, manager: OffloadingManager) -> None:
        """As it was raised, in no group of exceptions, and the manager is closed."""

        async def fail() -> None:
            async with manager as kv:
                await self.put(kv, ["a"])
                raise BodyError

        with pytest.raises(BodyError):
            await fail()
        with pytest.raises(ClosedError):
            await manager.lookup(["a"])

    async def test_cancellation_closes(self, manager: OffloadingManager) -> None:
        """A server that is cancelled leaves a closed manager behind."""
        with anyio.fail_after(self.deadline_s), anyio.CancelScope() as scope:
            async with manager as kv:
                await self.put(kv, ["a"])
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught
        with pytest.raises(ClosedError):
            await manager.lookup(["a"])

    async def test_leaves_no_task_behind(self, manager: OffloadingManager) -> None:
        """Every task has an owner that awaits it, also those of calls that were cancelled."""
        before = asyncio.all_tasks()
        async with self.opened(manager) as kv:
            await self.fill(kv, self.capacity + 1)
            with anyio.CancelScope() as scope:
                scope.cancel()
                await kv.store(chain("c", 4), self.payloads(chain("c", 4)))
            await kv.prepare_store(["c0"])
            await kv.complete_store(["c0"], success=False)
        assert asyncio.all_tasks() == before

    # Loops and threads

    @pytest.mark.parametrize("call", MORE_CALLS)
    async def test_refuses_another_loop(self, manager: OffloadingManager, call: str) -> None:
        """A thread with a loop of its own gets an error, and nothing changed."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, 4)
            before = self.snapshot(kv, [*hashes, "c0"])

            def elsewhere() -> None:
                asyncio.run(_awaited(MORE_CALLS[call](kv, [hashes[0], "c0"])))

            with pytest.raises(WrongLoopError):
                await anyio.to_thread.run_sync(elsewhere)
            assert self.snapshot(kv, [*hashes, "c0"]) == before

    async def test_refuses_another_thread(self, manager: OffloadingManager) -> None:
        """A thread without a loop can't call what is no coroutine either."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, 2)
            with pytest.raises(WrongLoopError):
                await anyio.to_thread.run_sync(kv.locate, hashes)

    async def test_threads_call_through_the_loop(self, manager: OffloadingManager) -> None:
        """`run_coroutine_threadsafe` is the way in for a threaded engine."""
        async with self.opened(manager) as kv:
            loop = asyncio.get_running_loop()

            def elsewhere() -> int:
                store = self.put(kv, ["a", "b"])
                asyncio.run_coroutine_threadsafe(store, loop).result(timeout=self.deadline_s)
                lookup = kv.lookup(["a", "b", "c"])
                return asyncio.run_coroutine_threadsafe(lookup, loop).result(self.deadline_s)

            assert await anyio.to_thread.run_sync(elsewhere) == 2

    async def test_bookkeeping_never_leaves_the_loop(self, manager: OffloadingManager) -> None:
        """`lookup` and `touch` decide nothing that needs a tier, so no other task runs between."""
        if self.is_remote:
            pytest.skip("the books are elsewhere")
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            assert await count_suspensions(kv.lookup(hashes)) == (self.capacity, 0)
            assert await count_suspensions(kv.touch(hashes)) == (None, 0)

    # Arguments

    @pytest.mark.parametrize("call", CALLS)
    async def test_wrong_hashes(self, manager: OffloadingManager, call: str) -> None:
        """A caller's mistake raises before anything changed, also where the first hash is fine."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, 2, "c")
            before = self.snapshot(kv, hashes)
            for bad in BAD_HASHES:
                with pytest.raises(BAD_ARGUMENT):
                    await CALLS[call](kv, bad)
                assert self.snapshot(kv, hashes) == before, f"changed by {bad!r}"

    async def test_wrong_payloads(self, manager: OffloadingManager) -> None:
        """Of another number or type, or too long: nothing is stored, not even the good ones."""
        too_long = bytes(self.block_bytes + 1)
        mistakes: list[tuple[list[BlockHash], Any]] = [
            (["a", "b"], [b"x"]),
            (["a"], [b"x", b"y"]),
            ([], [b"x"]),
            (["a", "b"], [b"x", None]),
            (["a", "b"], [b"x", "text"]),
            (["a", "b"], [b"x", 5]),
            (["a"], b"x"),
            (["a"], None),
            (["a", "b"], [b"x", too_long]),
            (["c0", "b"], [b"x", too_long]),
            (["a", "c0"], [b"x", too_long]),
        ]
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, 2, "c")
            before = self.snapshot(kv, [*hashes, "a", "b"])
            for new, payloads in mistakes:
                with pytest.raises(BAD_ARGUMENT):
                    await kv.store(new, payloads)
                after = self.snapshot(kv, [*hashes, "a", "b"])
                assert after == before, f"changed by {new!r}, {payloads!r}"

    async def test_a_hash_too_long_for_its_canonical_key(self, manager: OffloadingManager) -> None:
        """No tier on disk could keep it, so no tier takes it."""
        async with self.opened(manager) as kv:
            before = self.snapshot(kv, ["a"])
            with pytest.raises(ConfigError):
                await kv.store(["a", b"x" * 256], [b"x", b"y"])
            with pytest.raises(ConfigError):
                await kv.prepare_store(["a", b"x" * 256])
            assert self.snapshot(kv, ["a"]) == before

    # Durability

    async def test_flush_evicts_nothing(self, manager: OffloadingManager) -> None:
        """It counts what is safe now, and what has no place on a durable tier."""
        async with self.opened(manager) as kv:
            assert await kv.flush() == FlushResult(0, 0)
            for count in (1, self.hot_blocks, self.capacity):
                hashes = await self.fill(kv, count)
                durable = min(count, self.durable_blocks)
                for _ in range(2):
                    assert await kv.flush() == FlushResult(durable, count - durable)
                assert self.states(kv, hashes) == [READY] * count
            assert kv.get_stats().evictions == 0
            await self.check_bytes(kv, hashes)

    @pytest.fixture
    def durable_manager(self, manager: OffloadingManager) -> OffloadingManager:
        """Return a new manager, if some of its blocks survive a restart."""
        if not self.durable_blocks:
            pytest.skip("memory alone")
        return manager

    @pytest.mark.parametrize("how", ["closed", "body raised"])
    async def test_blocks_survive_a_restart(
        self, durable_manager: OffloadingManager, tmp_path: Path, clock: ManualClock, how: str
    ) -> None:
        """A clean close saves what there is room for, also when the body raised."""
        hashes = chain("c", self.durable_blocks)
        try:
            async with self.opened(durable_manager) as kv:
                await self.put(kv, hashes)
                if how == "body raised":
                    raise BodyError
        except BodyError:
            pass
        async with self.opened(self.new_manager(tmp_path, clock)) as kv:
            assert await kv.lookup(hashes) == len(hashes)
            await self.check_bytes(kv, hashes)

    async def test_the_hottest_survive(
        self, durable_manager: OffloadingManager, tmp_path: Path, clock: ManualClock
    ) -> None:
        """More than the durable tier holds: colder blocks give way to hotter ones on closing."""
        if not self.exact_lru:
            pytest.skip("heat is more than recency")
        async with self.opened(durable_manager) as kv:
            hashes = await self.fill(kv, self.capacity)
        async with self.opened(self.new_manager(tmp_path, clock)) as kv:
            await self.ask(kv, hashes)
            assert self.ready(kv, hashes) == hashes[-self.durable_blocks :]
            await self.check_bytes(kv, hashes[-self.durable_blocks :])
            assert await self.evict_one_by_one(kv) == hashes[-self.durable_blocks :]

    async def test_evicted_blocks_stay_away(
        self, durable_manager: OffloadingManager, tmp_path: Path, clock: ManualClock
    ) -> None:
        """An explicit eviction is for good, on every tier and in every run to come."""
        async with self.opened(durable_manager) as kv:
            hashes = await self.fill(kv, self.durable_blocks)
            await kv.flush()
            gone = await kv.evict([hashes[0], hashes[-1]])
            assert len(gone) == 2
        for _ in range(2):
            async with self.opened(self.new_manager(tmp_path, clock)) as kv:
                await self.ask(kv, hashes)
                assert self.states(kv, gone) == [ABSENT, ABSENT]
                assert self.ready(kv, hashes) == hashes[1:-1]
                await self.check_bytes(kv, hashes[1:-1])

    async def test_hashes_survive_with_their_types(
        self, durable_manager: OffloadingManager, tmp_path: Path, clock: ManualClock
    ) -> None:
        """After a restart `1`, `"1"` and `b"1"` are still three blocks."""
        every_type: list[BlockHash] = [1, "1", b"1", -(2**70)]
        hashes = every_type[: self.durable_blocks]
        async with self.opened(durable_manager) as kv:
            await self.put(kv, hashes)
        async with self.opened(self.new_manager(tmp_path, clock)) as kv:
            assert await kv.lookup(hashes) == len(hashes)
            await self.check_bytes(kv, hashes)


async def _awaited(awaitable: Awaitable[object]) -> None:
    await awaitable
