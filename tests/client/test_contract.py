"""The contract of every manager, over a client and a real server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Self

import anyio
import pytest
from tests.client.hosting import Host, Hosted, MakeManager, ServedClock, SharedClock

from kvoffload import AsyncLRUManager, DiskTier, MemoryTier
from kvoffload.client import AsyncLRUClient
from kvoffload.testing import FaultyTier, ManagerContract, ManualClock, NamespaceContract


class ServedClient(AsyncLRUClient):
    """A client, and the manager that it speaks to, opened and closed together."""

    def __init__(self, host: Host, url: str, make_manager: MakeManager) -> None:
        super().__init__(url, all_namespaces=True, staging_bytes=1024 * 1024)
        self.host = host
        self.make_manager = make_manager
        self.hosted: Hosted | None = None

    async def __aenter__(self) -> Self:
        self.hosted = await self.host.host(self.make_manager)
        return await super().__aenter__()

    async def __aexit__(self, *exc: Any) -> None:
        try:
            await super().__aexit__(*exc)
        finally:
            hosted, self.hosted = self.hosted, None
            if hosted is not None:
                with anyio.CancelScope(shield=True):
                    await hosted.leave()


class OverAClient:
    """Where the contract's managers come from."""

    host: Host
    url: str

    @pytest.fixture(autouse=True)
    def hosted_by(self, host: Host, request: pytest.FixtureRequest) -> None:
        self.host = host
        # Both ways to the service and both loops, in half of the time of all combinations.
        self.url = host.unix if "uvloop" in request.node.name else host.tcp

    @pytest.fixture
    def clock(self) -> SharedClock:
        return SharedClock(start=1000.0)

    def served(self, make_manager: MakeManager) -> AsyncLRUClient:
        return ServedClient(self.host, self.url, make_manager)


def on_loop(clock: ManualClock, loop: asyncio.AbstractEventLoop) -> ServedClock:
    assert isinstance(clock, SharedClock)
    return ServedClock(clock, loop)


class TestClient(OverAClient, ManagerContract):
    """Of a manager with recency alone, in memory and on disk."""

    hot_blocks = 6
    lower_blocks = 2
    durable_blocks = 2
    is_remote = True

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> AsyncLRUClient:
        return self.served(
            lambda loop: AsyncLRUManager(
                hot=MemoryTier(hot_blocks, block_bytes),
                cold=DiskTier(tmp_path / "cold", 2, block_bytes),
                policy="lru",
                clock=on_loop(clock, loop),
            )
        )


class TestNamespacesOfClient(OverAClient, NamespaceContract):
    lower_blocks = 8

    def make_manager(
        self, tmp_path: Path, *, hot_blocks: int, block_bytes: int, clock: ManualClock
    ) -> AsyncLRUClient:
        return self.served(
            lambda loop: AsyncLRUManager(
                hot=MemoryTier(hot_blocks, block_bytes),
                cold=FaultyTier(MemoryTier(8, block_bytes, name="cold")),
                clock=on_loop(clock, loop),
            )
        )
