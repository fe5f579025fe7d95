"""Closing in the middle of everything: no caller hangs, no lock stays behind, nothing crashes."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

import anyio
import pytest

from kvoffload import (
    AsyncLRUManager,
    ClosedError,
    DiskTier,
    Key,
    LRUOffloadManager,
    LRUPolicy,
    MemoryTier,
)
from kvoffload.testing import FaultyTier, RestartableTier, eventually, payload_for

BLOCK_BYTES = 64


def small(cold: FaultyTier, *, close_timeout_s: float = 5.0) -> AsyncLRUManager:
    """A manager whose second block pushes the first one down."""
    return AsyncLRUManager(
        hot=MemoryTier(1, BLOCK_BYTES), cold=cold, policy="lru", close_timeout_s=close_timeout_s
    )


def payload(name: str) -> bytes:
    return payload_for(name, BLOCK_BYTES)


async def evict_until_closed(kv: AsyncLRUManager, name: str) -> None:
    with pytest.raises(ClosedError):
        await kv.evict([name])


async def test_evict_that_waits_for_a_move_ends_with_a_hard_close() -> None:
    """A service could not shut down: a caller waited for a demotion that the close had cut off.

    The disk hangs in the write of the demotion, and the close gives up on it.
    """
    before = asyncio.all_tasks()
    cold = FaultyTier(RestartableTier(4, BLOCK_BYTES))
    kv = small(cold, close_timeout_s=0.05)
    await kv.__aenter__()
    await kv.store(["a"], [payload("a")])
    hang = cold.hang("write")

    async def store_until_closed() -> None:
        with pytest.raises(ClosedError):
            await kv.store(["b"], [payload("b")])

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store_until_closed)
            await hang.entered.wait()
            tasks.start_soon(evict_until_closed, kv, "a")
            await anyio.wait_all_tasks_blocked()
            await kv.__aexit__(None, None, None)
    await eventually(lambda: asyncio.all_tasks() == before)


async def test_evict_that_waits_for_a_prefetch_s_demotion_ends_with_a_hard_close() -> None:
    """The same hang, where a prefetch needs the slot and nobody waits for the demotion itself."""
    before = asyncio.all_tasks()
    cold = FaultyTier(RestartableTier(4, BLOCK_BYTES))
    kv = small(cold, close_timeout_s=0.05)
    await kv.__aenter__()
    await kv.store(["a"], [payload("a")])
    await kv.store(["b"], [payload("b")])
    assert kv.locate(["a"])[0].tier == "cold"
    hang = cold.hang("write")
    kv.hint_prefetch(["a"])
    await hang.entered.wait()  # b is on its way down, to let a come up
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(evict_until_closed, kv, "b")
            await anyio.wait_all_tasks_blocked()
            await kv.__aexit__(None, None, None)
    await eventually(lambda: asyncio.all_tasks() == before)


async def test_hard_close_closes_every_tier(tmp_path: Path) -> None:
    """After a close that a hanging tier cut short, the next start met a locked directory."""
    warm = FaultyTier(RestartableTier(4, BLOCK_BYTES, name="warm"))
    cold = DiskTier(tmp_path, 4, BLOCK_BYTES, name="cold")
    kv = AsyncLRUManager(
        hot=MemoryTier(1, BLOCK_BYTES), warm=warm, cold=cold, policy="lru", close_timeout_s=0.1
    )
    async with kv:
        await kv.store(["a"], [payload("a")])
        hang = warm.hang("write")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kv.store, ["b"], [payload("b")])
            await hang.entered.wait()
            tasks.cancel_scope.cancel()
    async with LRUOffloadManager(DiskTier(tmp_path, 4, BLOCK_BYTES)):
        pass  # or this raises TierLockedError


async def test_two_closers_both_return() -> None:
    """A shutdown hook and the end of an `async with` closed at once, and one of them crashed.

    Both return, and only when everything is closed.
    """
    cold = FaultyTier(RestartableTier(4, BLOCK_BYTES))
    kv = small(cold)
    await kv.__aenter__()
    await kv.store(["a"], [payload("a")])
    hang = cold.hang("close")
    returned: list[str] = []

    async def close(name: str) -> None:
        await kv.__aexit__(None, None, None)
        returned.append(name)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(close, "first")
            tasks.start_soon(close, "second")
            await hang.entered.wait()
            await anyio.wait_all_tasks_blocked()
            assert not returned
            hang.release()
    assert sorted(returned) == ["first", "second"]
    async with LRUOffloadManager(cold) as again:
        assert await again.lookup(["a"]) == 1


async def test_close_while_opening() -> None:
    """A service stopped during its start got a manager that was open and closed at the same time.

    The opener is told, no task is left, and the tier can be opened again.
    """
    before = asyncio.all_tasks()
    cold = FaultyTier(RestartableTier(4, BLOCK_BYTES))
    hang = cold.hang("open")
    kv = small(cold)

    async def open_until_closed() -> None:
        with pytest.raises(ClosedError):
            await kv.__aenter__()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(open_until_closed)
            await hang.entered.wait()
            tasks.start_soon(kv.__aexit__, None, None, None)
            await anyio.wait_all_tasks_blocked()
            hang.release()
    with pytest.raises(ClosedError):
        await kv.lookup(["a"])
    assert asyncio.all_tasks() == before
    async with LRUOffloadManager(cold):
        pass


async def test_policy_that_raises_at_close(tmp_path: Path) -> None:
    """A defect of the user's own policy showed at close, and left the directory locked."""

    class Broken(LRUPolicy):
        def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
            if pinned == ():  # as the close asks
                raise ValueError("a bug in the policy")
            return super().victims(level, count, pinned)

    kv = AsyncLRUManager(
        hot=MemoryTier(1, BLOCK_BYTES), cold=DiskTier(tmp_path, 4, BLOCK_BYTES), policy=Broken()
    )
    with pytest.raises(ValueError, match="a bug in the policy"):
        async with kv:
            pass
    async with LRUOffloadManager(DiskTier(tmp_path, 4, BLOCK_BYTES)):
        pass  # or this raises TierLockedError
