"""Part of `ManagerContract`: what a caller says of a chain's future, and sessions that are over."""

from __future__ import annotations

from typing import Any

import pytest

from ...errors import ConfigError
from ...retention import Retention
from ...types import BlockHash, OffloadingManager
from .manager_base import ABSENT, READY, ManagerSuite, chain

SYSTEM = chain("system", 2)
"""What two chats share."""


def _chat(name: str) -> list[BlockHash]:
    return [*SYSTEM, *chain(name, 2)]


class ForgetSuite(ManagerSuite):
    """`forget`, and `retention` of a request."""

    async def test_forget_leaves_what_another_chain_shares(
        self, manager: OffloadingManager
    ) -> None:
        """Of a chat that is over, all but the system prompt leaves every tier."""
        one, other = _chat("one"), _chat("other")
        async with self.opened(manager) as kv:
            for chat in (one, other):
                await self.put(kv, chat)
            assert sorted(map(str, await kv.forget(one))) == sorted(map(str, one[2:]))
            assert self.states(kv, one) == [READY, READY, ABSENT, ABSENT]
            assert await kv.lookup(other) == 4
            assert await kv.forget(one) == []
            await self.check_bytes(kv, other)

    async def test_forget_a_chain_that_another_goes_on_from(
        self, manager: OffloadingManager
    ) -> None:
        """An earlier turn of a chat is part of the later one, and nobody's own."""
        chat = chain("c", 4)
        async with self.opened(manager) as kv:
            await self.put(kv, chat[:2])
            await self.put(kv, chat)
            assert await kv.forget(chat[:2]) == []
            assert await kv.lookup(chat) == 4
            assert sorted(map(str, await kv.forget(chat))) == sorted(map(str, chat))
            assert await kv.forget(["unknown"]) == []
            assert await kv.forget([]) == []

    async def test_forget_leaves_pinned_blocks(self, manager: OffloadingManager) -> None:
        """Somebody reads them still."""
        hashes = chain("c", 3)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes)
            async with kv.load(hashes[:1]) as lease:
                assert sorted(map(str, await kv.forget(hashes))) == sorted(map(str, hashes[1:]))
                assert lease[0] == self.payload(hashes[0])
            assert self.states(kv, hashes) == [READY, ABSENT, ABSENT]

    @pytest.mark.parametrize("when", ["before", "inside"])
    async def test_a_session_that_is_over_is_freed(
        self, manager: OffloadingManager, when: str
    ) -> None:
        """On leaving its last request, whenever it was said."""
        one, other = _chat("one"), _chat("other")
        said = Retention.SESSION_OVER if when == "before" else None
        async with self.opened(manager) as kv:
            await self.put(kv, other)
            await self.put(kv, one[:3])
            async with kv.request(one, retention=said) as request:
                assert request.retention is said
                await request.store(self.payloads(one[3:]))
                request.retention = Retention.SESSION_OVER
                assert self.states(kv, one[:3]) == [READY] * 3
            await self.settled(kv)
            assert self.states(kv, one) == [READY, READY, ABSENT, ABSENT]
            await self.check_bytes(kv, other)

    async def test_a_session_that_is_over_leaves_what_others_read(
        self, manager: OffloadingManager
    ) -> None:
        """The same prompt twice at once: the other request goes on with its blocks."""
        hashes = chain("c", 3)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes)
            async with kv.request(hashes) as other:
                async with kv.request(hashes, retention=Retention.SESSION_OVER):
                    pass
                async with other.load() as lease:
                    assert [view.tobytes() for view in lease] == self.payloads(hashes)
            await self.check_bytes(kv, hashes)

    async def test_what_is_said_changes_no_result(self, manager: OffloadingManager) -> None:
        """A hint weighs in what is kept; it never makes a call fail or another byte come back."""
        said: list[Retention | float | None] = [
            *(None, 1, 0.25, 1e-9),
            *(Retention(0.9), Retention(within_s=5), Retention(0.5, 1e9)),
        ]
        async with self.opened(manager) as kv:
            for number, retention in enumerate(said):
                hashes = chain(f"c{number}-", 3)
                async with kv.request(hashes, retention=retention) as request:
                    await request.store(self.payloads(hashes))
                    request.retention = retention
                await self.check_bytes(kv, self.ready(kv, hashes))

    @pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), "high", True, [0.5]])
    async def test_a_retention_that_is_none(self, manager: OffloadingManager, wrong: Any) -> None:
        """Told at once, and what was said before counts still."""
        async with self.opened(manager) as kv:
            with pytest.raises(ConfigError):
                kv.request(["a"], retention=wrong)
            async with kv.request(["a"], retention=0.5) as request:
                await request.store([self.payload("a")])
                with pytest.raises(ConfigError):
                    request.retention = wrong
                assert request.retention == Retention(0.5)
            await self.check_bytes(kv, ["a"])
