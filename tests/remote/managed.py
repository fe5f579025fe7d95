"""A manager over an engine that goes wrong: however that ends, nothing may be pinned or lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias

import anyio

from kvoffload import AsyncLRUManager, MemoryTier, RemoteTier, TierState
from kvoffload.testing import eventually

MOST_S = 90
Managed: TypeAlias = AbstractAsyncContextManager[AsyncLRUManager]


@asynccontextmanager
async def manager_of(
    tier: RemoteTier, block_bytes: int, **settings: Any
) -> AsyncIterator[AsyncLRUManager]:
    """Open a manager; when it is left, nothing may be pinned or lost."""
    kv = AsyncLRUManager(
        hot=MemoryTier(16, block_bytes),
        remote=tier,
        policy="lru",
        **{"remote_timeout_s": 10.0, "remote_ttl_s": 0.0, **settings},
    )
    with anyio.fail_after(MOST_S):
        async with kv:
            yield kv
            await eventually(lambda: not kv.get_stats().pinned and not kv.get_stats().pending)
            kv.check_invariants()


def state_of(kv: AsyncLRUManager) -> TierState:
    return kv.get_stats().tiers["remote"].state
