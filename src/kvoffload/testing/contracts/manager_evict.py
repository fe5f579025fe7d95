"""Part of `ManagerContract`: evict, clear, touch, and the order in which blocks leave."""

from __future__ import annotations

from typing import Any

import pytest

from ...types import OffloadingManager
from .manager_base import ABSENT, BAD_ARGUMENT, PENDING, READY, ManagerSuite, chain


class EvictSuite(ManagerSuite):
    """`evict`, `clear`, `touch` and recency."""

    async def test_evict_removes_from_every_tier(self, manager: OffloadingManager) -> None:
        """The answer names what left; it is absent, its slots are free, and it can come back."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            gone = [hashes[0], hashes[-1]]
            assert sorted(map(str, await kv.evict(gone))) == sorted(map(str, gone))
            assert self.states(kv, gone) == [ABSENT, ABSENT]
            assert await kv.lookup(gone) == 0
            await self.settled(kv)
            assert sum(tier.free_blocks for tier in kv.get_stats().tiers.values()) >= 2
            assert (await self.put(kv, gone)).evicted == ()
            await self.check_bytes(kv, hashes)

    async def test_evict_ignores_what_is_not_there(self, manager: OffloadingManager) -> None:
        """Unknown hashes are not in the answer, and each hash is there once."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a", "b"])
            assert await kv.evict(["unknown", "a", "a"]) == ["a"]
            assert await kv.evict(["a"]) == []
            assert await kv.evict([]) == []
            assert self.states(kv, ["a", "b"]) == [ABSENT, READY]

    async def test_evict_leaves_pinned_and_pending_blocks(self, manager: OffloadingManager) -> None:
        """They stay, whether they are named or merely the coldest."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["leased"])
            await self.put(kv, ["prepared"])
            await self.put(kv, ["free"])
            await kv.prepare_store(["pending"])
            await kv.prepare_load(["prepared"])
            async with kv.load(["leased"]) as lease:
                everything = ["leased", "prepared", "pending", "free"]
                assert await kv.evict(everything) == ["free"]
                await self.put(kv, ["free"])
                assert await kv.evict(num_blocks=4) == ["free"]
                await self.put(kv, ["free"])
                await kv.clear()
                assert self.states(kv, everything) == [READY, READY, PENDING, ABSENT]
                assert lease[0] == self.payload("leased")
            await kv.complete_load(["prepared"])
            await kv.complete_store(["pending"], success=False)
            assert sorted(map(str, await kv.evict(everything))) == ["leased", "prepared"]

    async def test_evict_num_blocks(self, manager: OffloadingManager) -> None:
        """That many, or all there are."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            assert await kv.evict(num_blocks=0) == []
            left = await kv.evict(num_blocks=3)
            assert len(set(left)) == len(left) == 3
            assert self.states(kv, left) == [ABSENT] * 3
            assert len(self.ready(kv, hashes)) == self.capacity - 3
            rest = await kv.evict(num_blocks=self.capacity + 5)
            assert {*left, *rest} == set(hashes)
            assert len(rest) == self.capacity - 3

    async def test_evict_num_blocks_takes_the_coldest(self, lru_manager: OffloadingManager) -> None:
        """Lowest tier first, least recently used first within it; that is recency over all."""
        async with self.opened(lru_manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            assert set(await kv.evict(num_blocks=2)) == set(hashes[:2])
            assert await self.evict_one_by_one(kv) == hashes[2:]

    async def test_evict_num_blocks_starts_at_the_bottom(self, manager: OffloadingManager) -> None:
        """Lowest tier first, in every policy: what lies hot was found worth it."""
        if not self.lower_blocks:
            pytest.skip("one tier")
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            await self.put(kv, [hashes[-1]])
            hot = kv.locate(hashes[-1:])[0].tier
            tiers = dict(zip(hashes, [each.tier for each in kv.locate(hashes)], strict=True))
            below = {each for each, tier in tiers.items() if tier != hot}
            assert len(below) == self.lower_blocks
            assert set(await kv.evict(num_blocks=self.lower_blocks)) == below

    async def test_explicit_eviction_is_not_counted_as_pressure(
        self, manager: OffloadingManager
    ) -> None:
        """`evictions` tells of blocks that had to make room."""
        async with self.opened(manager) as kv:
            await self.put(kv, chain("c", 4))
            await kv.evict(num_blocks=1)
            await kv.evict(chain("c", 2))
            await kv.clear()
            assert kv.get_stats().evictions == 0

    async def test_evict_of_an_impossible_number(self, manager: OffloadingManager) -> None:
        """A caller's mistake is told before anything changed."""
        mistakes: list[Any] = [-1, 1.5, "2"]
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, 4)
            before = self.snapshot(kv, hashes)
            for num_blocks in mistakes:
                with pytest.raises(BAD_ARGUMENT):
                    await kv.evict(num_blocks=num_blocks)
                assert self.snapshot(kv, hashes) == before, f"changed by {num_blocks!r}"

    async def test_clear(self, manager: OffloadingManager) -> None:
        """Everything leaves every tier."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            await kv.clear()
            assert self.states(kv, hashes) == [ABSENT] * self.capacity
            await self.settled(kv)
            for tier in kv.get_stats().tiers.values():
                assert tier.free_blocks == tier.capacity_blocks
                assert tier.bytes == 0
            await self.fill(kv, self.capacity, "new")

    # Order

    async def test_tail_leaves_before_head(self, manager: OffloadingManager) -> None:
        """A block is of no use without its prefix: of a chain stored at once, the deepest goes."""
        hashes = chain("c", 6)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes)
            assert await self.evict_one_by_one(kv) == hashes[::-1]

    async def test_tail_leaves_before_head_under_pressure(self, manager: OffloadingManager) -> None:
        """The same where room is made for another chain."""
        hashes = chain("c", self.capacity)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes)
            for count in (1, 3):
                result = await self.put(kv, chain(f"new{count}-", count))
                assert set(result.evicted) == set(hashes[-count:])
                del hashes[-count:]
            assert await kv.lookup(hashes) == len(hashes)

    async def test_tail_leaves_before_head_after_many_uses(
        self, manager: OffloadingManager
    ) -> None:
        """Whatever a policy learns, a chain used as a whole keeps its order."""
        hashes = chain("c", 6)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes)
            for _ in range(100):
                await kv.touch(hashes)
            for _ in range(20):
                async with kv.load(hashes):
                    pass
                async with kv.request(hashes):
                    pass
            assert await self.evict_one_by_one(kv) == hashes[::-1]

    async def test_touch_is_a_use(self, lru_manager: OffloadingManager) -> None:
        """Unknown hashes are ignored, not errors, and not remembered."""
        async with self.opened(lru_manager) as kv:
            hashes = await self.fill(kv, 4)
            await kv.touch(["unknown", hashes[1], "stranger"])
            await kv.touch([])
            await kv.touch([hashes[0]])
            assert self.states(kv, ["unknown", "stranger"]) == [ABSENT, ABSENT]
            assert await self.evict_one_by_one(kv) == [*hashes[2:], hashes[1], hashes[0]]

    async def test_the_first_hash_of_a_call_is_the_most_recent(
        self, lru_manager: OffloadingManager
    ) -> None:
        """Within one call of `touch`, `load` or `store`, whatever the order was before."""
        async with self.opened(lru_manager) as kv:
            a, b, c, d = await self.fill(kv, 4)
            await kv.touch([c, a, d, b])
            assert await self.evict_one_by_one(kv) == [b, d, a, c]
            await self.fill(kv, 4)
            async with kv.load([b, d, a, c]):
                pass
            assert await self.evict_one_by_one(kv) == [c, a, d, b]
            await self.fill(kv, 4)
            await self.put(kv, [d, "new", a, b, c])
            assert await self.evict_one_by_one(kv) == [c, b, a, "new", d]

    async def test_a_load_is_a_use(self, lru_manager: OffloadingManager) -> None:
        """Loaded blocks outlive others."""
        async with self.opened(lru_manager) as kv:
            hashes = await self.fill(kv, 4)
            async with kv.load(hashes[:1]):
                pass
            assert await self.evict_one_by_one(kv) == [*hashes[1:], hashes[0]]

    async def test_the_two_phase_form_is_no_use(self, lru_manager: OffloadingManager) -> None:
        """Neither preparing nor completing, of a load or of a store that finds its blocks."""
        async with self.opened(lru_manager) as kv:
            hashes = await self.fill(kv, 4)
            await kv.prepare_load(hashes[:2])
            await kv.complete_load(hashes[:2])
            await kv.prepare_store(hashes[:2])
            await kv.complete_store(hashes[:2])
            assert await self.evict_one_by_one(kv) == hashes

    async def test_a_pinned_block_keeps_its_place(self, lru_manager: OffloadingManager) -> None:
        """Stepped over while it was pinned, it is the first to leave afterwards."""
        async with self.opened(lru_manager) as kv:
            hashes = await self.fill(kv, 4)
            await kv.prepare_load(hashes[:1])
            assert await kv.evict(num_blocks=1) == [hashes[1]]
            await kv.complete_load(hashes[:1])
            assert await self.evict_one_by_one(kv) == [hashes[0], *hashes[2:]]
