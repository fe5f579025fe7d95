"""Part of `ManagerContract`: events, stats and locate."""

from __future__ import annotations

import anyio

from ...events import EventKind, OffloadingEvent
from ...types import BlockHash, OffloadingManager
from .manager_base import ABSENT, READY, ManagerSuite, chain


class ObserveSuite(ManagerSuite):
    """What can be seen from outside."""

    # Events

    async def test_events(self, manager: OffloadingManager) -> None:
        """Told from the call of `events` on, to each subscriber, numbered; they end at close."""
        hashes = chain("c", 3)
        async with self.opened(manager) as kv:
            first = kv.events()
            await self.put(kv, hashes)
            second = kv.events()
            await kv.evict(hashes[:1])
            await kv.evict(num_blocks=1)
        told = [event async for event in first]
        assert self._blocks(told, EventKind.STORED) == set(hashes)
        assert self._blocks(told, EventKind.REMOVED) == {hashes[0], hashes[2]}
        later = [event async for event in second]
        assert self._blocks(later, EventKind.STORED) == set()
        assert self._blocks(later, EventKind.REMOVED) == {hashes[0], hashes[2]}
        for events in (told, later):
            assert [event.sequence for event in events] == list(range(len(events)))
            assert {event.missed for event in events} <= {0}

    async def test_events_name_where_it_happened(self, manager: OffloadingManager) -> None:
        """Tier and medium, as in the stats."""
        async with self.opened(manager) as kv:
            events = kv.events()
            await self.put(kv, ["a"])
            event = await anext(events)
            assert event.kind is EventKind.STORED
            assert event.tier == kv.locate(["a"])[0].tier
            assert event.medium is kv.get_stats().tiers[event.tier].medium

    async def test_events_of_eviction_under_pressure(self, manager: OffloadingManager) -> None:
        """Every block that left every tier is told as removed, once, and none that did not."""
        async with self.opened(manager) as kv:
            events = kv.events()
            old = await self.fill(kv, self.capacity)
            evicted = (await self.put(kv, chain("new", 3))).evicted
        told = [event async for event in events]
        removed = [
            each for event in told if event.kind is EventKind.REMOVED for each in event.block_hashes
        ]
        # Closing may let more go: what lies in memory alone.
        assert removed[:3] == sorted(removed[:3], key=evicted.index)
        assert set(removed[:3]) == set(evicted) <= set(old)
        assert len(removed) == len(set(removed))

    async def test_waiting_for_an_event(self, manager: OffloadingManager) -> None:
        """A subscriber wakes when something happens; cancelling its wait loses nothing."""
        async with self.opened(manager) as kv:
            events = kv.events()
            with anyio.move_on_after(0):
                await anext(events)
            got: list[OffloadingEvent] = []

            async def wait() -> None:
                got.append(await anext(events))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                await self.put(kv, ["a"])
            assert [event.block_hashes for event in got] == [("a",)]
            assert got[0].sequence == 0

    # Stats

    async def test_stats_count_hits_and_misses(self, manager: OffloadingManager) -> None:
        """At `lookup`, leading ready blocks and the rest; a tier's hits at `load`."""
        hashes = chain("c", 4)
        async with self.opened(manager) as kv:
            assert kv.get_stats().hits == 0
            await self.put(kv, [hashes[0], hashes[1], hashes[3]])
            await kv.lookup(hashes)
            stats = kv.get_stats()
            assert (stats.hits, stats.misses, stats.stored) == (2, 2, 3)
            assert sum(tier.hits for tier in stats.tiers.values()) == 0
            async with kv.load(hashes[:2]):
                assert kv.get_stats().pinned == 2
            stats = kv.get_stats()
            assert (stats.hits, stats.misses) == (2, 2)
            assert sum(tier.hits for tier in stats.tiers.values()) == 2

    async def test_stats_are_a_snapshot(self, manager: OffloadingManager) -> None:
        """What was taken does not change any more."""
        async with self.opened(manager) as kv:
            before = kv.get_stats()
            await self.put(kv, ["a"])
            assert before.stored == 0
            assert all(tier.blocks == 0 for tier in before.tiers.values())
            assert kv.get_stats().stored == 1

    async def test_stats_of_each_tier(self, manager: OffloadingManager) -> None:
        """Blocks and bytes of what is there, and all slots accounted for."""
        async with self.opened(manager) as kv:
            tiers = kv.get_stats().tiers.values()
            assert sum(tier.capacity_blocks for tier in tiers) == self.capacity
            assert all(tier.free_blocks == tier.capacity_blocks for tier in tiers)
            for count in (1, self.hot_blocks, self.capacity, self.capacity + 2):
                await self.fill(kv, count)
                self.check_slots(kv)
            tiers = kv.get_stats().tiers.values()
            assert sum(tier.blocks for tier in tiers) == self.capacity
            assert sum(tier.bytes for tier in tiers) == self.capacity * self.block_bytes

    async def test_locate(self, manager: OffloadingManager) -> None:
        """State and tier of each, in order; no use, and nothing is read."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            before = kv.get_stats()
            locations = kv.locate([*hashes, "absent", hashes[0]])
            assert [each.state for each in locations] == [READY] * self.capacity + [ABSENT, READY]
            assert locations[-2].tier is None
            assert locations[-1] == locations[0]
            assert {each.tier for each in locations[:-2]} <= set(before.tiers)
            assert kv.get_stats() == before

    @staticmethod
    def _blocks(events: list[OffloadingEvent], kind: EventKind) -> set[BlockHash]:
        return {each for event in events if event.kind is kind for each in event.block_hashes}
