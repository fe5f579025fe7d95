"""Closing, in the middle of everything: each story was a hang, a lock left behind or a crash."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

import anyio
import anyio.lowlevel
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
from kvoffload.testing import FaultyTier, RestartableTier, eventually


async def test_evict_that_waits_for_a_move_ends_with_a_hard_close() -> None:
    """Evict that waits for a move ends with a hard close."""
    cold = FaultyTier(RestartableTier(4, 64))
    kv = AsyncLRUManager(hot=MemoryTier(1, 64), cold=cold, policy="lru", close_timeout_s=0.05)
    await kv.__aenter__()
    await kv.store(["a"], [b"a"])
    hang = cold.hang("write")
    async with anyio.create_task_group() as tasks:

        async def store() -> None:
            with pytest.raises(ClosedError):
                await kv.store(["b"], [b"b"])

        async def evict() -> None:
            with pytest.raises(ClosedError):
                await kv.evict(["a"])

        tasks.start_soon(store)
        await hang.entered.wait()
        tasks.start_soon(evict)
        await anyio.lowlevel.checkpoint()
        await kv.__aexit__(None, None, None)
        await eventually(lambda: len(asyncio.all_tasks()) == 1)


async def test_hard_close_closes_every_tier(tmp_path: Path) -> None:
    """Hard close closes every tier."""
    a, b = FaultyTier(RestartableTier(4, 64, name="a")), DiskTier(tmp_path, 4, 64, name="b")
    kv = AsyncLRUManager(hot=MemoryTier(1, 64), warm=a, cold=b, policy="lru", close_timeout_s=0.1)
    async with kv:
        await kv.store(["a"], [b"a"])
        hang = a.hang("write")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kv.store, ["b"], [b"b"])
            await hang.entered.wait()
            tasks.cancel_scope.cancel()
    async with LRUOffloadManager(DiskTier(tmp_path, 4, 64)):
        pass


async def test_two_closers() -> None:
    """Two closers."""
    cold = FaultyTier(RestartableTier(4, 64))
    kv = AsyncLRUManager(hot=MemoryTier(1, 64), cold=cold)
    await kv.__aenter__()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(kv.__aexit__, None, None, None)
        tasks.start_soon(kv.__aexit__, None, None, None)


async def test_close_while_opening() -> None:
    """Close while opening."""
    cold = FaultyTier(RestartableTier(4, 64))
    hang = cold.hang("open")
    kv = AsyncLRUManager(hot=MemoryTier(1, 64), cold=cold)
    async with anyio.create_task_group() as tasks:

        async def enter() -> None:
            with pytest.raises(ClosedError):
                await kv.__aenter__()

        tasks.start_soon(enter)
        await hang.entered.wait()
        tasks.start_soon(kv.__aexit__, None, None, None)
        await anyio.lowlevel.checkpoint()
        hang.release()
    with pytest.raises(ClosedError):
        await kv.lookup(["a"])


async def test_policy_that_raises_at_close(tmp_path: Path) -> None:
    """A policy's defect must not leave the directory locked."""

    class Bad(LRUPolicy):
        def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
            if pinned == ():
                raise ValueError("bug")
            return super().victims(level, count, pinned)

    with pytest.raises(ValueError, match="bug"):
        async with AsyncLRUManager(
            hot=MemoryTier(1, 64), cold=DiskTier(tmp_path, 4, 64), policy=Bad()
        ):
            pass
    async with LRUOffloadManager(DiskTier(tmp_path, 4, 64)):
        pass


async def test_evict_that_waits_for_a_prefetch_s_demotion_ends_with_a_hard_close() -> None:
    """Evict that waits for a prefetch's demotion ends with a hard close."""
    cold = FaultyTier(RestartableTier(4, 64))
    kv = AsyncLRUManager(hot=MemoryTier(1, 64), cold=cold, policy="lru", close_timeout_s=0.05)
    await kv.__aenter__()
    await kv.store(["a"], [b"a"])
    await kv.store(["b"], [b"b"])  # a is cold
    hang = cold.hang("write")
    kv.hint_prefetch(["a"])  # b has to go down
    await hang.entered.wait()
    with anyio.fail_after(3):
        async with anyio.create_task_group() as tasks:

            async def evict() -> None:
                with pytest.raises(ClosedError):
                    await kv.evict(["b"])

            tasks.start_soon(evict)
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            await kv.__aexit__(None, None, None)
