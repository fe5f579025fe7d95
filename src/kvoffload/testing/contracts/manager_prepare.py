"""Part of `ManagerContract`: the two-phase form, for engines that move the bytes themselves."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import numpy as np
import pytest

from ...errors import BlockNotFoundError, DerivedViewWarning, NotPinnedError
from ...types import LoadStoreSpec, OffloadingManager, StoreResult
from ..clock import eventually
from .manager_base import ABSENT, BAD_ARGUMENT, PENDING, READY, ManagerSuite, chain


class PrepareSuite(ManagerSuite):
    """`prepare_store`, `complete_store`, `prepare_load`, `complete_load`."""

    def write_all(self, spec: LoadStoreSpec) -> None:
        """Write each block's own bytes through its view, as an engine does."""
        for block_hash, entry in zip(spec.block_hashes, spec.entries, strict=True):
            entry.view[:] = self.payload(block_hash)[: len(entry.view)]

    # Stores

    async def test_two_phase_store(self, manager: OffloadingManager) -> None:
        """Reserved and pending, then written through the views, then published."""
        a, b = chain("c", 2)
        async with self.opened(manager) as kv:
            output = await self.prepared(kv, [a, b])
            assert output.block_hashes_to_store == (a, b)
            assert output.store_spec.block_hashes == (a, b)
            assert output.block_hashes_evicted == ()
            tiers = kv.get_stats().tiers
            for entry in output.store_spec.entries:
                assert entry.medium is tiers[entry.tier].medium
                assert 0 <= entry.slot < tiers[entry.tier].capacity_blocks
                assert entry.view is entry.view
                assert len(entry.view) == self.block_bytes
                assert not entry.view.readonly
            assert len({(entry.tier, entry.slot) for entry in output.store_spec.entries}) == 2
            assert self.states(kv, [a, b]) == [PENDING, PENDING]
            assert kv.get_stats().pending == 2
            self.check_slots(kv)
            self.write_all(output.store_spec)
            await kv.complete_store([a])
            assert self.states(kv, [a, b]) == [READY, PENDING]
            await kv.complete_store([b])
            assert await kv.lookup([a, b]) == 2
            assert kv.get_stats().stored == 2
            await self.check_bytes(kv, [a, b])

    async def test_sizes(self, manager: OffloadingManager) -> None:
        """A shorter block has a shorter view, and keeps its length."""
        sizes = [1, self.block_bytes // 2, self.block_bytes]
        hashes = chain("c", 3)
        async with self.opened(manager) as kv:
            output = await kv.prepare_store(hashes, sizes=sizes)
            assert output is not None
            assert [len(entry.view) for entry in output.store_spec.entries] == sizes
            self.write_all(output.store_spec)
            await kv.complete_store(hashes)
            async with kv.load(hashes) as lease:
                assert [view.tobytes() for view in lease] == [
                    self.payload(each)[:size] for each, size in zip(hashes, sizes, strict=True)
                ]

    async def test_views_are_made_on_first_access(self, manager: OffloadingManager) -> None:
        """An engine that moves the bytes by slot number never needs them; completing works."""
        async with self.opened(manager) as kv:
            output = await self.prepared(kv, ["a", "b"])
            output.store_spec.entries[1].view[:] = self.payload("b")
            await kv.complete_store(["a", "b"])
            assert await kv.lookup(["a", "b"]) == 2
            await self.check_bytes(kv, ["b"])

    async def test_prepare_filters_what_is_there(self, manager: OffloadingManager) -> None:
        """Present or pending blocks, and repetitions, need no slot."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["present"])
            await self.prepared(kv, ["pending"])
            output = await self.prepared(kv, ["present", "new", "pending", "new", "more"])
            assert output.block_hashes_to_store == ("new", "more")
            assert len(output.store_spec.entries) == 2
            self.write_all(output.store_spec)
            await kv.complete_store(["present", "new", "pending", "new", "more"], success=True)
            assert await kv.lookup(["present", "new", "more"]) == 3
            await self.check_bytes(kv, ["present", "new", "more"])

    async def test_prepare_of_what_is_all_there(self, manager: OffloadingManager) -> None:
        """Nothing to do is an empty output, not `None`."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["present"])
            output = await self.prepared(kv, ["present"])
            assert output.block_hashes_to_store == ()
            assert list(output.store_spec.entries) == []
            empty = await self.prepared(kv, [])
            assert empty.block_hashes_to_store == ()

    async def test_prepare_makes_room(self, manager: OffloadingManager) -> None:
        """Colder blocks give way; the output names those that left every tier."""
        async with self.opened(manager) as kv:
            old = await self.fill(kv, self.capacity)
            output = await self.prepared(kv, ["new0", "new1"])
            assert len(output.block_hashes_evicted) == 2
            assert set(output.block_hashes_evicted) <= set(old)
            assert self.states(kv, output.block_hashes_evicted) == [ABSENT, ABSENT]
            self.write_all(output.store_spec)
            await kv.complete_store(["new0", "new1"])
            stay = [each for each in old if each not in output.block_hashes_evicted]
            await self.check_bytes(kv, ["new0", "new1", *stay])

    async def test_prepare_moves_blocks_down(self, manager: OffloadingManager) -> None:
        """The slots are those of the hot tier; where there is room below, nothing leaves."""
        if self.lower_blocks < self.hot_blocks:
            pytest.skip("too little room below")
        async with self.opened(manager) as kv:
            old = await self.fill(kv, self.hot_blocks)
            hot = kv.locate(old)[0].tier
            hashes = chain("c", self.hot_blocks)
            output = await self.prepared(kv, hashes)
            assert output.block_hashes_evicted == ()
            assert {entry.tier for entry in output.store_spec.entries} == {hot}
            assert self.ready(kv, old) == old
            self.write_all(output.store_spec)
            await kv.complete_store(hashes)
            await self.check_bytes(kv, [*old, *hashes])

    async def test_prepare_of_more_than_the_hot_tier_has(self, manager: OffloadingManager) -> None:
        """`None`, and nothing was changed: no block left, no slot is reserved."""
        async with self.opened(manager) as kv:
            old = await self.fill(kv, self.capacity)
            hashes = chain("c", self.hot_blocks + 1)
            before = self.snapshot(kv, [*old, *hashes])
            assert await kv.prepare_store(hashes) is None
            assert self.snapshot(kv, [*old, *hashes]) == before
            await self.check_bytes(kv, old)

    async def test_prepare_where_all_is_pinned(self, manager: OffloadingManager) -> None:
        """`None`, also where only the last of the blocks has no room; nothing was changed."""
        async with self.opened(manager) as kv:
            old = await self.fill(kv, self.capacity)
            held = old[:-1] if self.hot_blocks > 1 else old
            await kv.prepare_load(held)
            before = self.snapshot(kv, [*old, "new0", "new1"])
            assert await kv.prepare_store(["new0", "new1"]) is None
            assert self.snapshot(kv, [*old, "new0", "new1"]) == before
            await kv.complete_load(held)
            output = await self.prepared(kv, ["new0", "new1"])
            await kv.complete_store(output.block_hashes_to_store, success=False)

    async def test_giving_up(self, manager: OffloadingManager) -> None:
        """`success=False` frees the slots at once, and the blocks were never there."""
        async with self.opened(manager) as kv:
            free = sum(tier.free_blocks for tier in kv.get_stats().tiers.values())
            for _ in range(3):
                hashes = chain("c", self.hot_blocks)
                output = await self.prepared(kv, hashes)
                self.write_all(output.store_spec)
                await kv.complete_store(hashes, success=False)
                assert self.states(kv, hashes) == [ABSENT] * self.hot_blocks
            del output
            stats = kv.get_stats()
            assert sum(tier.free_blocks for tier in stats.tiers.values()) == free
            assert stats.stored == 0

    async def test_completing_what_is_unknown_or_ready(self, manager: OffloadingManager) -> None:
        """A late or repeated completion is a no-op, whatever it says of success."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["ready"])
            before = self.snapshot(kv, ["ready", "unknown"])
            for success in (True, False):
                await kv.complete_store(["unknown", "ready", "ready"], success)
                await kv.complete_store([], success)
            assert self.snapshot(kv, ["ready", "unknown"]) == before
            await self.check_bytes(kv, ["ready"])

    async def test_pending_blocks_are_not_evicted(self, manager: OffloadingManager) -> None:
        """Nor overwritten, whatever is stored while the engine still writes."""
        async with self.opened(manager) as kv:
            output = await self.prepared(kv, ["slow"])
            self.write_all(output.store_spec)
            for turn in range(3):
                await self.fill(kv, self.capacity, f"turn{turn}-")
                hashes = chain(f"chain{turn}-", self.capacity)
                await kv.store(hashes, self.payloads(hashes))
            await kv.evict(num_blocks=self.capacity)
            assert self.states(kv, ["slow"]) == [PENDING]
            await kv.complete_store(["slow"])
            await self.check_bytes(kv, ["slow"])

    async def test_the_tail_of_a_prepared_chain_leaves_first(
        self, manager: OffloadingManager
    ) -> None:
        """It is no use of the chain, but its order holds all the same."""
        hashes = chain("c", 5)
        async with self.opened(manager) as kv:
            output = await self.prepared(kv, hashes)
            self.write_all(output.store_spec)
            await kv.complete_store(hashes)
            assert await self.evict_one_by_one(kv) == hashes[::-1]

    async def test_impossible_sizes(self, manager: OffloadingManager) -> None:
        """Of another number or type, negative, too long: told before anything changed."""
        mistakes: list[Any] = [[1], [1, 2, 3], [1, -1], [1, None], [1, 1.5], [1, "1"]]
        async with self.opened(manager) as kv:
            before = self.snapshot(kv, ["a", "b"])
            for sizes in [*mistakes, [1, self.block_bytes + 1]]:
                with pytest.raises(BAD_ARGUMENT):
                    await kv.prepare_store(["a", "b"], sizes=sizes)
                assert self.snapshot(kv, ["a", "b"]) == before, f"changed by sizes={sizes!r}"

    async def test_a_late_write_through_a_view(self, manager: OffloadingManager) -> None:
        """Once completed, the view raises: what readers see can't change under them."""
        async with self.opened(manager) as kv:
            output = await self.prepared(kv, ["kept", "given up"])
            kept, given_up = (entry.view for entry in output.store_spec.entries)
            self.write_all(output.store_spec)
            await kv.complete_store(["kept"])
            await kv.complete_store(["given up"], success=False)
            for view in (kept, given_up):
                with pytest.raises(ValueError, match="released"):
                    view[:] = bytes(self.block_bytes)
            await self.check_bytes(kv, ["kept"])

    @pytest.mark.parametrize("success", [True, False])
    async def test_a_late_write_through_an_array_hits_nobody_else(
        self, manager: OffloadingManager, success: bool
    ) -> None:
        """An engine's array can't be revoked, so its slot stays out of reuse until it is gone."""
        async with self.opened(manager) as kv:
            output = await self.prepared(kv, ["early"])
            array = np.frombuffer(output.store_spec.entries[0].view, np.uint8)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DerivedViewWarning)
                await kv.complete_store(["early"], success)
                await kv.evict(["early"])
            assert self.states(kv, ["early"]) == [ABSENT]
            for turn in range(3):
                hashes = chain(f"turn{turn}-", self.capacity)
                result = await kv.store(hashes, self.payloads(hashes))
                array[:] = 0xEE
                await self.check_bytes(kv, result.stored)
                self.check_slots(kv)
            del array, output
            gc.collect()
            await kv.clear()
            await eventually(
                lambda: all(tier.retired_blocks == 0 for tier in kv.get_stats().tiers.values())
            )
            await self.fill(kv, self.capacity, "after")

    # Loads

    async def test_two_phase_load(self, manager: OffloadingManager) -> None:
        """One entry a block, in order, from whatever tier; pinned until completed."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            spec = await kv.prepare_load(hashes)
            assert spec.block_hashes == tuple(hashes)
            assert [entry.view.tobytes() for entry in spec.entries] == self.payloads(hashes)
            assert [entry.tier for entry in spec.entries] == [
                location.tier for location in kv.locate(hashes)
            ]
            for entry in spec.entries:
                assert entry.medium is kv.get_stats().tiers[entry.tier].medium
            assert kv.get_stats().pinned == self.capacity
            assert await kv.evict(hashes) == []
            await kv.complete_load(hashes)
            assert kv.get_stats().pinned == 0
            assert len(await kv.evict(hashes)) == self.capacity

    async def test_prepare_load_of_what_is_not_ready(self, manager: OffloadingManager) -> None:
        """Missing or pending: the error names both, and nothing is pinned."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a"])
            await self.prepared(kv, ["pending"])
            with pytest.raises(BlockNotFoundError) as caught:
                await kv.prepare_load(["a", "missing", "pending"])
            assert caught.value.block_hashes == ("missing", "pending")
            assert kv.get_stats().pinned == 0
            with pytest.raises(NotPinnedError):
                await kv.complete_load(["a"])
            await kv.complete_store(["pending"], success=False)

    async def test_prepared_pins_are_counted(self, manager: OffloadingManager) -> None:
        """Each `prepare_load` needs its own `complete_load`; one more is an error."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a"])
            await kv.prepare_load(["a"])
            await kv.prepare_load(["a"])
            await kv.complete_load(["a"])
            assert await kv.evict(["a"]) == []
            await kv.complete_load(["a"])
            with pytest.raises(NotPinnedError):
                await kv.complete_load(["a"])
            assert await kv.evict(["a"]) == ["a"]

    async def test_prepare_load_of_one_block_twice(self, manager: OffloadingManager) -> None:
        """The same list completes what it prepared."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a", "b"])
            spec = await kv.prepare_load(["a", "b", "a"])
            assert [entry.view.tobytes() for entry in spec.entries] == self.payloads(
                spec.block_hashes
            )
            await kv.complete_load(["a", "b", "a"])
            assert kv.get_stats().pinned == 0

    async def test_complete_load_of_what_is_not_pinned(self, manager: OffloadingManager) -> None:
        """Unknown, ready, pending, or held by a lease alone: `NotPinnedError`."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["ready", "leased"])
            await self.prepared(kv, ["pending"])
            async with kv.load(["leased"]) as lease:
                for block_hash in ("unknown", "ready", "pending", "leased"):
                    with pytest.raises(NotPinnedError):
                        await kv.complete_load([block_hash])
                assert await kv.evict(["leased"]) == []
                assert lease[0] == self.payload("leased")
            await kv.complete_store(["pending"], success=False)

    async def test_prepared_views_end_with_complete_load(self, manager: OffloadingManager) -> None:
        """A view used afterwards raises, like a lease's."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            spec = await kv.prepare_load(hashes)
            views = [entry.view for entry in spec.entries]
            await kv.complete_load(hashes)
            for view in views:
                with pytest.raises(ValueError, match="released"):
                    view.tobytes()

    async def test_store_while_prepared(self, manager: OffloadingManager) -> None:
        """Blocks that an engine reads just now are present for others, and stay."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a"])
            await kv.prepare_load(["a"])
            assert await self.put(kv, ["a"]) == StoreResult(present=("a",))
            async with kv.load(["a"]) as lease:
                assert lease[0] == self.payload("a")
            assert await kv.evict(["a"]) == []
            await kv.complete_load(["a"])
