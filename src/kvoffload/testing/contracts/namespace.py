"""What a manager with namespaces has to do, as tests: subclass and supply `make_manager`."""

from __future__ import annotations

from typing import Protocol

import pytest

from ...errors import ConfigError
from ...events import EventKind
from ...types import OffloadingManager, StoreResult
from ..clock import ManualClock, eventually
from ..payloads import payload_for
from .manager_base import ABSENT, READY, ManagerSuite, chain


class NamespacedManager(OffloadingManager, Protocol):
    """A manager that can be seen from inside one namespace."""

    def namespace(self, name: str) -> OffloadingManager:
        """Return the same manager, with blocks of this namespace alone."""


class NamespaceContract(ManagerSuite):
    """Tests of `namespace(name)`, beside those of `ManagerContract`.

    For instance::

        class TestNamespaces(NamespaceContract):
            def make_manager(self, tmp_path, *, hot_blocks, block_bytes, clock): ...

    The attributes are those of `ManagerContract`.
    """

    @pytest.fixture
    def shared(self, manager: OffloadingManager) -> NamespacedManager:
        """Return a new manager that has namespaces."""
        assert hasattr(manager, "namespace")
        return manager  # type: ignore[return-value]  # hasattr narrows no protocol

    async def store_in(self, kv: OffloadingManager, namespace: str, count: int) -> StoreResult:
        """Store blocks whose payloads tell the namespace they belong to."""
        hashes = chain("c", count)
        payloads = [payload_for(each, self.block_bytes, namespace=namespace) for each in hashes]
        return await kv.store(hashes, payloads)

    async def test_one_hash_in_two_namespaces(self, shared: NamespacedManager) -> None:
        """Two blocks, each with its own bytes; the manager's own namespace is a third."""
        hashes = chain("c", 2)
        async with self.opened(shared), shared.namespace("a") as a, shared.namespace("b") as b:
            for name, kv in (("", shared), ("a", a), ("b", b)):
                assert await kv.lookup(hashes) == 0
                assert await self.store_in(kv, name, 2) == StoreResult(stored=tuple(hashes))
            for name, kv in (("", shared), ("a", a), ("b", b)):
                async with kv.load(hashes) as lease:
                    assert [view.tobytes() for view in lease] == [
                        payload_for(each, self.block_bytes, namespace=name) for each in hashes
                    ]

    async def test_the_same_namespace_twice(self, shared: NamespacedManager) -> None:
        """Two views of one namespace show the same blocks."""
        async with self.opened(shared), shared.namespace("a") as a, shared.namespace("a") as again:
            await self.store_in(a, "a", 2)
            assert await again.lookup(chain("c", 2)) == 2

    async def test_evict_and_clear_see_their_namespace_alone(
        self, shared: NamespacedManager
    ) -> None:
        """Not even `evict(num_blocks=)` takes another tenant's blocks."""
        hashes = chain("c", 3)
        async with self.opened(shared), shared.namespace("a") as a, shared.namespace("b") as b:
            await self.store_in(b, "b", 3)
            await self.store_in(a, "a", 3)
            assert await a.evict(hashes[:1]) == hashes[:1]
            assert self.states(b, hashes) == [READY] * 3
            assert set(await b.evict(num_blocks=self.capacity)) == set(hashes)
            assert self.states(a, hashes) == [ABSENT, READY, READY]
            await self.store_in(b, "b", 3)
            await b.clear()
            assert self.states(b, hashes) == [ABSENT] * 3
            assert self.states(a, hashes) == [ABSENT, READY, READY]

    async def test_stats_see_their_namespace_alone(self, shared: NamespacedManager) -> None:
        """What each tenant stored, hit, pinned and occupies."""
        async with self.opened(shared), shared.namespace("a") as a, shared.namespace("b") as b:
            await self.store_in(a, "a", 3)
            await self.store_in(b, "b", 1)
            await a.lookup(chain("c", 4))
            async with b.load(["c0"]):
                assert (a.get_stats().pinned, b.get_stats().pinned) == (0, 1)
            assert (a.get_stats().stored, b.get_stats().stored) == (3, 1)
            assert (a.get_stats().hits, a.get_stats().misses) == (3, 1)
            assert (b.get_stats().hits, b.get_stats().misses) == (0, 0)
            for kv, blocks in ((a, 3), (b, 1)):
                tiers = kv.get_stats().tiers.values()
                assert sum(tier.blocks for tier in tiers) == blocks
                assert sum(tier.bytes for tier in tiers) == blocks * self.block_bytes

    async def test_events_see_their_namespace_alone(self, shared: NamespacedManager) -> None:
        """Numbered without a gap, and they end when the manager closes."""
        async with self.opened(shared), shared.namespace("a") as a, shared.namespace("b") as b:
            events = a.events()
            await self.store_in(b, "b", 2)
            await self.store_in(a, "a", 2)
            await b.evict(["c0"])
            await a.evict(["c1"])
        told = [event async for event in events]
        assert {event.namespace for event in told} == {"a"}
        assert [event.sequence for event in told] == list(range(len(told)))
        stored = [
            each for event in told if event.kind is EventKind.STORED for each in event.block_hashes
        ]
        assert sorted(map(str, stored)) == ["c0", "c1"]

    async def test_the_managers_own_namespace_seen_from_inside(
        self, shared: NamespacedManager
    ) -> None:
        """A tenant of that name is one like others: its view sees no other's blocks or events."""
        async with self.opened(shared), shared.namespace("") as own, shared.namespace("a") as a:
            events = own.events()
            await self.store_in(a, "a", 2)
            await self.store_in(own, "", 1)
            assert own.get_stats().stored == 1
            await own.clear()
            assert self.states(a, chain("c", 2)) == [READY] * 2
            assert self.states(own, ["c0"]) == [ABSENT]
        assert {event.namespace async for event in events} == {""}

    async def test_two_phases_in_a_namespace(self, shared: NamespacedManager) -> None:
        """Reservations and pins belong to the namespace too."""
        async with self.opened(shared), shared.namespace("a") as a, shared.namespace("b") as b:
            output = await a.prepare_store(["c0"])
            assert output is not None
            assert output.block_hashes_to_store == ("c0",)
            await b.complete_store(["c0"])
            assert await b.lookup(["c0"]) == 0
            output.store_spec.entries[0].view[:] = payload_for(
                "c0", self.block_bytes, namespace="a"
            )
            await a.complete_store(["c0"])
            spec = await a.prepare_load(["c0"])
            assert spec.block_hashes == ("c0",)
            await a.complete_load(["c0"])
            async with a.request(["c0", "c1"]) as request:
                assert request.hit == 1
            assert await b.lookup(["c0"]) == 0

    async def test_leaving_a_view_leaves_the_manager_open(self, shared: NamespacedManager) -> None:
        """A tenant goes, the others stay."""
        async with self.opened(shared):
            async with shared.namespace("a") as a:
                await self.store_in(a, "a", 1)
            await self.store_in(shared, "", 1)
            async with shared.namespace("a") as again:
                assert await again.lookup(["c0"]) == 1

    async def test_impossible_names(self, shared: NamespacedManager) -> None:
        """No string, or too long for a canonical key."""
        async with self.opened(shared):
            for name in (None, 5, b"a", "x" * 200):
                with pytest.raises(ConfigError):
                    shared.namespace(name)  # type: ignore[arg-type]

    async def test_clock_is_shared(self, shared: NamespacedManager, clock: ManualClock) -> None:
        """A reservation made in a namespace expires like any other."""
        async with self.opened(shared), shared.namespace("a") as a:
            await a.prepare_store(["c0"])
            clock.advance(self.reservation_ttl_s + 1)
            await self.settled(shared)
            await eventually(lambda: self.states(a, ["c0"]) == [ABSENT])
            assert a.get_stats().expired == 1
