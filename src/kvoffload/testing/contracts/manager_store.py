"""Part of `ManagerContract`: lookup and store."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ...types import BlockHash, OffloadingManager, RejectReason, StoreResult
from .manager_base import ABSENT, PENDING, READY, ManagerSuite, chain


class StoreSuite(ManagerSuite):
    """`lookup` and `store`."""

    # lookup

    async def test_lookup_counts_leading_ready_blocks(self, manager: OffloadingManager) -> None:
        """What lies behind a gap is of no use to a prefix."""
        a, b, c, d = chain("c", 4)
        async with self.opened(manager) as kv:
            await self.put(kv, [a, b, d])
            assert await kv.lookup([a, b, c, d]) == 2
            assert await kv.lookup([a, b]) == 2
            assert await kv.lookup([c, a, b]) == 0
            assert await kv.lookup([d, b, a]) == 3
            assert await kv.lookup([]) == 0

    async def test_lookup_counts_across_tiers(self, manager: OffloadingManager) -> None:
        """A prefix is ready wherever its blocks lie."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            assert await kv.lookup(hashes) == self.capacity
            assert await kv.lookup(hashes[::-1]) == self.capacity

    async def test_lookup_does_not_count_pending_blocks(self, manager: OffloadingManager) -> None:
        """Being written is not a hit."""
        a, b, c = chain("c", 3)
        async with self.opened(manager) as kv:
            await self.put(kv, [a, c])
            await kv.prepare_store([b])
            assert await kv.lookup([a, b, c]) == 1
            await kv.complete_store([b], success=False)

    async def test_lookup_changes_no_recency(self, lru_manager: OffloadingManager) -> None:
        """Asking is no use: what was only asked for leaves in its turn."""
        async with self.opened(lru_manager) as kv:
            hashes = await self.fill(kv, 4)
            for _ in range(3):
                await kv.lookup(hashes[:2])
                kv.locate(hashes[:2])
                kv.get_stats()
            assert await self.evict_one_by_one(kv) == hashes

    async def test_hash_types_are_distinct(self, manager: OffloadingManager) -> None:
        """`1`, `"1"` and `b"1"` are three blocks; integers of any size and sign are hashes."""
        hashes: list[BlockHash] = [1, "1", b"1", -1, 0, 2**70, "", b""]
        async with self.opened(manager) as kv:
            result = await self.put(kv, hashes[: self.capacity])
            assert result.stored == tuple(hashes[: self.capacity])
            await self.check_bytes(kv, hashes[: self.capacity])
            assert await kv.evict([1]) == [1]
            assert self.states(kv, hashes[:3]) == [ABSENT, READY, READY]

    # store

    async def test_store_says_what_became_of_each_hash(self, manager: OffloadingManager) -> None:
        """Stored or present; in the order asked; nothing was evicted, for there was room."""
        a, b, c, d = chain("c", 4)
        async with self.opened(manager) as kv:
            assert await self.put(kv, [a, b]) == StoreResult(stored=(a, b))
            assert await self.put(kv, [a, c, b, d]) == StoreResult(stored=(c, d), present=(a, b))
            assert await self.put(kv, [a, b, c, d]) == StoreResult(present=(a, b, c, d))
            await self.check_bytes(kv, [a, b, c, d])

    async def test_store_of_nothing(self, manager: OffloadingManager) -> None:
        """No blocks, an empty result."""
        async with self.opened(manager) as kv:
            assert await kv.store([], []) == StoreResult()

    async def test_duplicates_in_one_call_are_stored_once(self, manager: OffloadingManager) -> None:
        """Each hash appears once in the result, and takes one slot."""
        a, b = chain("c", 2)
        async with self.opened(manager) as kv:
            result = await self.put(kv, [a, b, a, a, b])
            assert result == StoreResult(stored=(a, b))
            assert sum(tier.blocks for tier in kv.get_stats().tiers.values()) == 2
            assert await self.put(kv, [b, b]) == StoreResult(present=(b,))

    async def test_pending_by_another_caller_counts_as_present(
        self, manager: OffloadingManager
    ) -> None:
        """The other caller stores it; this one neither waits nor interferes."""
        a, b = chain("c", 2)
        async with self.opened(manager) as kv:
            await kv.prepare_store([a])
            assert await self.put(kv, [a, b]) == StoreResult(stored=(b,), present=(a,))
            assert self.states(kv, [a, b]) == [PENDING, READY]
            await kv.complete_store([a], success=False)
            assert self.states(kv, [a, b]) == [ABSENT, READY]

    async def test_payloads_of_any_length(self, manager: OffloadingManager) -> None:
        """From no byte to a full block, each comes back with its own length."""
        sizes = [0, 1, self.block_bytes // 2, self.block_bytes - 1, self.block_bytes]
        hashes = chain("c", len(sizes))
        payloads = [
            self.payload(block_hash)[:size] for block_hash, size in zip(hashes, sizes, strict=True)
        ]
        async with self.opened(manager) as kv:
            await kv.store(hashes, payloads)
            async with kv.load(hashes) as lease:
                assert [view.tobytes() for view in lease] == payloads
            assert sum(tier.bytes for tier in kv.get_stats().tiers.values()) == sum(sizes)

    async def test_payloads_of_any_type(self, manager: OffloadingManager) -> None:
        """Whatever exports contiguous bytes: its bytes count, not its items or its shape."""
        bits = np.arange(self.block_bytes // 4, dtype=np.uint16)
        payload = bytes(range(self.block_bytes))
        payloads: list[Any] = [
            payload,
            bytearray(payload),
            memoryview(payload),
            memoryview(payload + payload)[1 : 1 + self.block_bytes],
            bits,
            bits.reshape(2, -1),
            np.float32(1.5).reshape(1),
        ]
        hashes = chain("c", len(payloads))
        async with self.opened(manager) as kv:
            await kv.store(hashes, payloads)
            async with kv.load(hashes) as lease:
                for view, given in zip(lease, payloads, strict=True):
                    assert view.tobytes() == memoryview(given).tobytes()
                    assert view.nbytes == len(view)

    async def test_store_copies(self, manager: OffloadingManager) -> None:
        """The caller's buffer is the caller's again as soon as `store` returned."""
        payload = bytearray(self.payload("c0"))
        async with self.opened(manager) as kv:
            await kv.store(["c0"], [payload])
            payload[:] = bytes(self.block_bytes)
            await self.check_bytes(kv, ["c0"])
            payload.append(0)  # nobody holds the buffer any more

    async def test_all_tiers_together_hold_the_sum_of_their_slots(
        self, manager: OffloadingManager
    ) -> None:
        """Distinct blocks: copies further down give way before anything is lost."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            stats = kv.get_stats()
            assert stats.evictions == 0
            assert stats.stored == self.capacity
            assert self.states(kv, hashes) == [READY] * self.capacity
            await self.check_bytes(kv, hashes)
            assert self.states(kv, hashes) == [READY] * self.capacity

    async def test_copies_give_way_before_blocks(self, manager: OffloadingManager) -> None:
        """What a flush copied down takes no room from blocks that lie nowhere else."""
        if not self.durable_blocks:
            pytest.skip("memory alone")
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, min(self.hot_blocks, self.durable_blocks))
            await kv.flush()
            hashes += await self.fill(kv, self.capacity - len(hashes), "more")
            assert kv.get_stats().evictions == 0
            assert self.ready(kv, hashes) == hashes
            self.check_slots(kv)
            await self.check_bytes(kv, hashes)

    async def test_what_exceeds_the_hot_tier_spills_down(self, manager: OffloadingManager) -> None:
        """In the same call, and the head of the chain is the hottest."""
        if not self.lower_blocks:
            pytest.skip("one tier")
        async with self.opened(manager) as kv:
            await self.put(kv, ["probe"])
            [hot] = kv.locate(["probe"])
            await kv.evict(["probe"])
            hashes = chain("c", self.hot_blocks + 2)
            assert (await self.put(kv, hashes)).stored == tuple(hashes)
            tiers = [location.tier for location in kv.locate(hashes)]
            assert tiers[: self.hot_blocks] == [hot.tier] * self.hot_blocks
            assert hot.tier not in tiers[self.hot_blocks :]
            await self.check_bytes(kv, hashes)

    async def test_a_pinned_hot_tier_spills_down(self, manager: OffloadingManager) -> None:
        """Pins are never waited for; the block goes where there is room."""
        if not self.lower_blocks:
            pytest.skip("one tier")
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.hot_blocks)
            async with kv.load(hashes):
                assert (await self.put(kv, ["new"])).stored == ("new",)
                assert kv.locate(["new"])[0].tier != kv.locate(hashes)[0].tier
                await self.check_bytes(kv, ["new"])

    async def test_store_makes_room(self, manager: OffloadingManager) -> None:
        """Full, the coldest leave, and the result names them: absent, in no tier."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            result = await self.put(kv, ["new0", "new1"])
            assert result.stored == ("new0", "new1")
            assert len(result.evicted) == 2
            assert set(result.evicted) <= set(hashes)
            assert self.states(kv, result.evicted) == [ABSENT, ABSENT]
            stay = [each for each in hashes if each not in result.evicted]
            assert self.states(kv, stay) == [READY] * len(stay)
            assert kv.get_stats().evictions == 2
            await self.check_bytes(kv, [*stay, "new0", "new1"])

    async def test_the_least_recently_used_leaves(self, lru_manager: OffloadingManager) -> None:
        """Over all tiers together, the coldest block is the one that is lost."""
        async with self.opened(lru_manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            assert set((await self.put(kv, ["new0"])).evicted) == {hashes[0]}
            assert set((await self.put(kv, ["new1", "new2"])).evicted) == set(hashes[1:3])

    async def test_more_blocks_than_all_tiers_hold(self, manager: OffloadingManager) -> None:
        """The head of the chain is kept, the rest rejected: it could not be there at once."""
        hashes = chain("c", self.capacity + 3)
        async with self.opened(manager) as kv:
            result = await kv.store(hashes, self.payloads(hashes))
            assert result.stored == tuple(hashes[: self.capacity])
            assert result.rejected == dict.fromkeys(hashes[self.capacity :], RejectReason.FULL)
            assert result.present == ()
            assert result.evicted == ()
            assert await kv.lookup(hashes) == self.capacity
            await self.check_bytes(kv, hashes[: self.capacity])
            assert kv.get_stats().rejected == 3

    async def test_more_blocks_than_fit_beside_strangers(self, manager: OffloadingManager) -> None:
        """Everybody else's blocks leave first, then the tail of the chain is rejected."""
        hashes = chain("c", self.capacity + 1)
        async with self.opened(manager) as kv:
            old = await self.fill(kv, self.capacity)
            result = await kv.store(hashes, self.payloads(hashes))
            assert result.stored == tuple(hashes[:-1])
            assert result.rejected == {hashes[-1]: RejectReason.FULL}
            assert sorted(map(str, result.evicted)) == sorted(map(str, old))

    async def test_a_block_that_the_call_names_is_never_its_victim(
        self, manager: OffloadingManager
    ) -> None:
        """The oldest block there is, and the call needs all other slots: it stays."""
        async with self.opened(manager) as kv:
            old = await self.fill(kv, self.capacity)
            new = chain("new", self.capacity)
            hashes = [*new[:2], old[0], *new[2:]]
            result = await kv.store(hashes, self.payloads(hashes))
            assert result.present == (old[0],)
            assert result.stored == tuple(new[:-1])
            assert result.rejected == {new[-1]: RejectReason.FULL}
            assert set(result.evicted) == set(old[1:])
            await self.check_bytes(kv, hashes[:-1])

    async def test_all_pinned(self, manager: OffloadingManager) -> None:
        """Nothing can give way: rejected at once, and the pinned blocks are untouched."""
        async with self.opened(manager) as kv:
            old = await self.fill(kv, self.capacity)
            await kv.prepare_load(old)
            result = await kv.store(["new0", old[0]], self.payloads(["new0", old[0]]))
            assert result == StoreResult(present=(old[0],), rejected={"new0": RejectReason.PINNED})
            assert self.states(kv, ["new0", *old]) == [ABSENT] + [READY] * self.capacity
            await kv.complete_load(old)
            assert (await self.put(kv, ["new0"])).stored == ("new0",)
            await self.check_bytes(kv, ["new0"])

    async def test_all_pending(self, manager: OffloadingManager) -> None:
        """Reserved slots can't give way either."""
        if self.lower_blocks:
            pytest.skip("reservations fill the hot tier alone")
        async with self.opened(manager) as kv:
            hashes = chain("c", self.hot_blocks)
            assert await kv.prepare_store(hashes) is not None
            result = await kv.store(["new"], self.payloads(["new"]))
            assert result == StoreResult(rejected={"new": RejectReason.PINNED})
            await kv.complete_store(hashes, success=False)

    async def test_pinned_blocks_stay_while_others_leave(self, manager: OffloadingManager) -> None:
        """Pinning the coldest makes the next ones leave."""
        async with self.opened(manager) as kv:
            old = await self.fill(kv, self.capacity)
            await kv.prepare_load(old[:3])
            new = chain("new", self.capacity - 3)
            result = await self.put(kv, new)
            assert set(result.evicted) == set(old[3:])
            await self.check_bytes(kv, [*old[:3], *new])
            await kv.complete_load(old[:3])

    async def test_store_touches_what_is_present(self, lru_manager: OffloadingManager) -> None:
        """Storing a block that is there is a use of it."""
        async with self.opened(lru_manager) as kv:
            hashes = await self.fill(kv, 4)
            await self.put(kv, [hashes[0]])
            assert await self.evict_one_by_one(kv) == [*hashes[1:], hashes[0]]
