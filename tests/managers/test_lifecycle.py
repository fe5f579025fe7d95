"""Opening, closing, and the loop, thread and process that a manager belongs to."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import warnings
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal

import anyio
import numpy as np
import pytest

from kvoffload import (
    AsyncLRUManager,
    ClosedError,
    ConfigError,
    DerivedViewWarning,
    DiskTier,
    LRUOffloadManager,
    MemoryTier,
    TierError,
    TierLockedError,
    WrongLoopError,
)
from kvoffload.testing import FaultyTier, RestartableTier, cancel_everywhere, small_manager


@pytest.fixture
async def entered() -> AsyncIterator[AsyncLRUManager]:
    """A manager that a fixture enters, and leaves in another task than it entered it in."""
    async with AsyncLRUManager(hot=MemoryTier(4, 64)) as manager:
        yield manager


async def test_a_fixture_may_hold_a_manager(entered: AsyncLRUManager) -> None:
    """Async test suites keep what they test in a yield fixture.

    A task group that leaves a cancel scope open in whoever enters it raises there at teardown.
    """
    await entered.store(["a"], [b"bytes"])
    assert await entered.lookup(["a"]) == 1


async def test_managers_may_be_left_in_any_order() -> None:
    """The one opened first is closed first, while the other goes on."""
    first, second = small_manager("lru"), small_manager("lru")
    await first.__aenter__()
    await second.__aenter__()
    await first.__aexit__(None, None, None)
    await second.store(["a"], [b"bytes"])
    assert await second.lookup(["a"]) == 1
    await second.__aexit__(None, None, None)


async def test_an_error_of_the_body_comes_out_as_it_is() -> None:
    """And not wrapped in a group, however the manager owns its tasks."""
    with pytest.raises(ZeroDivisionError):
        async with small_manager("async"):
            raise ZeroDivisionError


async def test_a_body_that_raises_keeps_its_blocks(tmp_path: Path) -> None:
    """A service that crashes in a handler must not lose what a clean close would have kept."""

    def make() -> AsyncLRUManager:
        return AsyncLRUManager(hot=MemoryTier(4, 64), cold=DiskTier(tmp_path, 4, 64))

    with pytest.raises(ZeroDivisionError):
        async with make() as kv:
            await kv.store(["a", "b"], [b"1", b"2"])
            raise ZeroDivisionError
    async with make() as kv:
        assert await kv.lookup(["a", "b"]) == 2


async def test_a_cancelled_body_keeps_its_blocks(tmp_path: Path) -> None:
    """By a scope and by task.cancel(): the close is not cut short."""

    def make() -> AsyncLRUManager:
        return AsyncLRUManager(hot=MemoryTier(4, 64), cold=DiskTier(tmp_path, 4, 64))

    async def body(stored: anyio.Event, name: str) -> None:
        async with make() as kv:
            await kv.store([name], [b"1"])
            stored.set()
            await anyio.sleep_forever()

    stored = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(body, stored, "a")
        await stored.wait()
        tasks.cancel_scope.cancel()
    stored = anyio.Event()
    task = asyncio.get_running_loop().create_task(body(stored, "b"))
    await stored.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with make() as kv:
        assert await kv.lookup(["a"]) == await kv.lookup(["b"]) == 1


@pytest.mark.parametrize("how", ["scope", "task"])
async def test_cancelled_anywhere_while_opening_and_closing(
    tmp_path: Path, how: Literal["scope", "task"]
) -> None:
    """Whatever the moment: the directory is unlocked, no task is left, and what was kept is there.

    The first round stores a block and closes; no cancelled open or close loses it.
    """

    def make() -> AsyncLRUManager:
        return AsyncLRUManager(hot=MemoryTier(4, 64), cold=DiskTier(tmp_path, 4, 64))

    async with make() as kv:
        await kv.store(["kept"], [b"bytes"])
    before = asyncio.all_tasks()

    async def open_and_close() -> None:
        async with make() as kv:
            await kv.store(["other"], [b"bytes"])

    async def check() -> None:
        assert asyncio.all_tasks() == before
        async with make() as kv:
            async with kv.load(["kept"]) as lease:
                assert bytes(lease[0]) == b"bytes"
            kv.check_invariants()
        gc.collect()  # a file left open would warn now

    visited = await cancel_everywhere(
        open_and_close, check, how="task" if how == "task" else "scope"
    )
    assert visited >= 3


async def test_a_tier_that_can_t_be_opened_closes_the_others(tmp_path: Path) -> None:
    """The first directory is unlocked again, and the error is the tier's own."""
    first, second = DiskTier(tmp_path / "a", 2, 64, name="a"), FaultyTier(MemoryTier(2, 64))
    second.fail("open", OSError("no"), times=1)
    with pytest.raises(TierError):
        async with AsyncLRUManager(hot=first, warm=second):
            pass
    async with LRUOffloadManager(DiskTier(tmp_path / "a", 2, 64)):
        pass


async def test_two_openers_of_one_directory(tmp_path: Path) -> None:
    """The second is told who holds it; the first is not disturbed."""
    async with LRUOffloadManager(DiskTier(tmp_path, 2, 64)) as kv:
        await kv.store(["a"], [b"1"])
        with pytest.raises(TierLockedError, match=str(os.getpid())):
            async with LRUOffloadManager(DiskTier(tmp_path, 2, 64)):
                pass
        assert await kv.lookup(["a"]) == 1


async def test_opens_only_once() -> None:
    """What was closed stays closed; closing again, or what was never opened, is nothing."""
    manager = small_manager("async")
    await manager.__aexit__(None, None, None)
    with pytest.raises(ClosedError):
        await manager.__aenter__()
    manager = small_manager("async")
    async with manager:
        with pytest.raises(ClosedError, match="open"):
            await manager.__aenter__()
    await manager.__aexit__(None, None, None)
    with pytest.raises(ClosedError, match="opens only once"):
        await manager.__aenter__()
    with pytest.raises(ClosedError, match="async with"):
        await manager.lookup(["a"])
    with pytest.raises(ClosedError):
        manager.hint_prefetch(["a"])


async def test_close_goes_on_when_a_tier_fails() -> None:
    """The cold tier can't flush: the error comes out, and the other tiers are closed."""
    cold = FaultyTier(RestartableTier(4, 64, name="cold"))
    hot = MemoryTier(4, 64)
    with pytest.raises(TierError):
        async with AsyncLRUManager(hot=hot, cold=cold) as kv:
            await kv.store(["a"], [b"1"])
            cold.fail("flush", OSError("no"))
    with pytest.raises(ClosedError):
        hot.view(0, 1)


async def test_close_is_bounded_when_a_tier_hangs() -> None:
    """A hung disk does not hang the service that wants to end."""
    cold = FaultyTier(RestartableTier(4, 64, name="cold"))
    manager = AsyncLRUManager(hot=MemoryTier(4, 64), cold=cold, close_timeout_s=0.05)
    with anyio.fail_after(30):
        async with manager as kv:
            await kv.store(["a"], [b"1"])
            hang = cold.hang("write")
        assert hang.entered.is_set()
    assert len(asyncio.all_tasks()) == 1


async def test_another_thread() -> None:
    """Refused, with the cure, and nothing changed."""
    async with small_manager("lru") as kv:
        await kv.store(["a"], [b"1"])
        errors: list[BaseException] = []

        def elsewhere() -> None:
            for call in (kv.lookup(["a"]), kv.evict(["a"]), kv.store(["b"], [b"2"])):
                try:
                    asyncio.run(call)
                except WrongLoopError as exc:
                    errors.append(exc)
            try:
                kv.locate(["a"])
            except WrongLoopError as exc:
                errors.append(exc)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert [type(error) for error in errors] == [WrongLoopError] * 4
        assert "run_coroutine_threadsafe" in str(errors[0])
        assert await kv.lookup(["a"]) == 1
        assert await kv.lookup(["b"]) == 0


async def test_a_threaded_engine_calls_in() -> None:
    """The cure that the error names."""
    async with small_manager("lru") as kv:
        loop = asyncio.get_running_loop()

        def engine() -> int:
            store = asyncio.run_coroutine_threadsafe(kv.store(["a"], [b"1"]), loop)
            assert store.result(30).stored == ("a",)
            return asyncio.run_coroutine_threadsafe(kv.lookup(["a"]), loop).result(30)

        assert await asyncio.to_thread(engine) == 1


def test_another_loop_of_the_same_thread() -> None:
    """The manager of a loop that stopped is not used from the next one, not even to close it."""
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    manager = small_manager("lru")
    first.run_until_complete(manager.__aenter__())
    with pytest.raises(WrongLoopError):
        second.run_until_complete(manager.lookup(["a"]))
    with pytest.raises(WrongLoopError):
        second.run_until_complete(manager.__aexit__(None, None, None))
    assert first.run_until_complete(manager.lookup(["a"])) == 0
    first.run_until_complete(manager.__aexit__(None, None, None))
    for loop in (first, second):
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
async def test_a_forked_child() -> None:
    """A worker forked from a server must not use the parent's manager: its threads stayed there."""
    async with small_manager("lru") as kv:
        await kv.store(["a"], [b"1"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads
            child = os.fork()
        if child == 0:
            # In the child: no test machinery, only an exit status.
            status = 1
            try:
                kv.lookup(["a"]).send(None)
            except WrongLoopError:
                status = 0
            finally:
                os._exit(status)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert await kv.lookup(["a"]) == 1


async def test_leases_outlive_a_close() -> None:
    """Another task looks at blocks while the manager closes: it goes on seeing its bytes."""
    async with AsyncExitStack() as later:
        async with small_manager("async") as kv:
            await kv.store(["a"], [b"bytes"])
            lease = await later.enter_async_context(kv.load(["a"]))
        assert bytes(lease[0]) == b"bytes"
    with pytest.raises(IndexError):
        lease[0]


async def test_memory_that_there_is_not() -> None:
    """An arena larger than the address space: an error that says so, and nothing is left."""
    with pytest.raises(ConfigError, match=r"no \d+ bytes of memory"):
        async with LRUOffloadManager(MemoryTier(2**30, 2**30)):
            pass


async def test_a_derived_view_keeps_its_slot_out_of_reuse() -> None:
    """An array over a leased view goes on showing its block's bytes, whatever is stored after.

    The warning names the block; the slot comes back when the array is gone, on whatever thread.
    """
    async with LRUOffloadManager(MemoryTier(2, 64)) as kv:
        await kv.store(["a"], [b"a" * 64])
        with pytest.warns(DerivedViewWarning, match="'a'"):
            async with kv.load(["a"]) as lease:
                array = np.frombuffer(lease[0], np.uint8)
        await kv.evict(["a"])
        assert kv.get_stats().tiers["hot"].retired_blocks == 1
        result = await kv.store(["b", "c"], [b"b" * 64, b"c" * 64])
        assert (len(result.stored), len(result.rejected)) == (1, 1)
        assert bytes(array) == b"a" * 64
        held = [array]
        del array
        await asyncio.to_thread(held.clear)
        gc.collect()
        stats = kv.get_stats().tiers["hot"]
        assert (stats.retired_blocks, stats.free_blocks) == (0, 1)
        assert (await kv.store(["d"], [b"d" * 64])).stored == ("d",)
        kv.check_invariants()
