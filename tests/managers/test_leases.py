"""Leases: views that are made when they are first looked at, and pins lent by a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import anyio
import pytest

from kvoffload import AsyncLRUManager, BlockHash, LRUOffloadManager, MemoryTier
from kvoffload.testing import FaultyTier, RestartableTier, payload_for
from kvoffload.types import ByteArray

BLOCK_BYTES = 64
CHAIN: list[BlockHash] = ["a", "b", "c"]


def payloads(hashes: list[BlockHash]) -> list[bytes]:
    return [payload_for(block_hash, BLOCK_BYTES) for block_hash in hashes]


class WatchedTier(MemoryTier):
    """Counts views, and calls back as one is made."""

    views = 0
    on_view: Callable[[], object] | None = None

    def view(self, slot: int, size: int) -> ByteArray:
        self.views += 1
        array = super().view(slot, size)
        if self.on_view is not None:
            call, self.on_view = self.on_view, None
            call()
        return array


async def test_views_are_made_once_and_only_if_looked_at() -> None:
    tier = WatchedTier(8, BLOCK_BYTES)
    async with LRUOffloadManager(tier) as kv:
        await kv.store(CHAIN, payloads(CHAIN))
        tier.views = 0
        async with kv.load(CHAIN) as lease:
            assert (len(lease), lease.block_hashes) == (3, tuple(CHAIN))
        assert (len(lease), tier.views) == (0, 0)
        with pytest.raises(IndexError):
            lease[0]
        assert list(lease) == []
        async with kv.load(CHAIN) as lease:
            assert [bytes(view) for view in lease] == payloads(CHAIN)
            assert lease[1] is lease[-2]
            assert [bytes(view) for view in lease[1:]] == payloads(CHAIN[1:])
            assert tier.views == 3


async def test_a_lease_that_nobody_looked_at_yet_keeps_its_blocks_in_place() -> None:
    """A block of the warm tier is not promoted under it, however often it is used."""
    hot, warm = MemoryTier(1, BLOCK_BYTES), MemoryTier(4, BLOCK_BYTES, name="warm")
    async with AsyncLRUManager(hot=hot, warm=warm, promote_threshold=2, policy="lru") as kv:
        await kv.store(CHAIN, payloads(CHAIN))
        async with kv.load(["b"]) as lease:
            for _ in range(3):
                async with kv.load(["b"]):
                    pass
            assert kv.locate(["b"])[0].tier == "warm"
            await kv.store(["x", "y", "z", "w"], payloads(["x", "y", "z", "w"]))
            assert bytes(lease[0]) == payload_for("b", BLOCK_BYTES)
        async with kv.load(["b"]):
            assert kv.locate(["b"])[0].tier == "hot"
        kv.check_invariants()


async def test_the_first_look_may_be_on_another_thread() -> None:
    async with LRUOffloadManager(MemoryTier(8, BLOCK_BYTES)) as kv:
        await kv.store(CHAIN, payloads(CHAIN))
        async with kv.load(CHAIN) as lease:
            seen = await asyncio.to_thread(lambda: [bytes(view) for view in lease])
            views = list(lease)
        assert seen == payloads(CHAIN)
        for view in views:
            with pytest.raises(ValueError, match="released"):
                view.tobytes()


async def test_a_lease_that_ends_while_another_thread_takes_its_first_look() -> None:
    """The thread gets nothing, and nothing of it shows a slot that is used anew."""
    tier = WatchedTier(3, BLOCK_BYTES)
    async with LRUOffloadManager(tier) as kv:
        await kv.store(CHAIN, payloads(CHAIN))
        loop = asyncio.get_running_loop()
        scope = kv.load(CHAIN)
        lease = await scope.__aenter__()

        def end() -> None:
            asyncio.run_coroutine_threadsafe(leave(), loop).result()

        async def leave() -> None:
            await scope.__aexit__(None, None, None)

        tier.on_view = end
        assert await asyncio.to_thread(lambda: list(lease)) == []
        assert await kv.evict(CHAIN) == CHAIN
        assert kv.get_stats().tiers["hot"].retired_blocks == 0
        assert kv.get_stats().tiers["hot"].free_blocks == 3
        kv.check_invariants()


@pytest.mark.parametrize("looked", [False, True])
async def test_a_lease_that_outlives_its_request_pins_for_itself(looked: bool) -> None:
    async with LRUOffloadManager(MemoryTier(3, BLOCK_BYTES)) as kv:
        await kv.store(CHAIN, payloads(CHAIN))
        async with kv.request(CHAIN) as request:
            scope = request.load(2)
            lease = await scope.__aenter__()
            if looked:
                assert bytes(lease[0]) == payload_for("a", BLOCK_BYTES)
        assert kv.get_stats().pinned == 2
        kv.check_invariants()
        assert await kv.evict(CHAIN) == ["c"]
        await kv.store(["x", "y"], payloads(["x", "y"]))
        assert [bytes(view) for view in lease] == payloads(CHAIN[:2])
        await scope.__aexit__(None, None, None)
        assert kv.get_stats().pinned == 0
        kv.check_invariants()
        assert await kv.evict(CHAIN[:2]) == CHAIN[:2]


async def test_leases_of_one_request_end_in_any_order() -> None:
    """Also one that is entered only when its request is over."""
    async with LRUOffloadManager(MemoryTier(3, BLOCK_BYTES)) as kv:
        await kv.store(CHAIN, payloads(CHAIN))
        async with kv.request(CHAIN) as request:
            first, second, late = request.load(), request.load(1), request.load()
            await first.__aenter__()
            lease = await second.__aenter__()
            await first.__aexit__(None, None, None)
            assert await kv.evict(CHAIN) == []
            assert bytes(lease[0]) == payload_for("a", BLOCK_BYTES)
        assert kv.get_stats().pinned == 1
        async with late as lease:
            assert kv.get_stats().pinned == 3
            assert [bytes(view) for view in lease] == payloads(CHAIN)
        assert kv.get_stats().pinned == 1
        await second.__aexit__(None, None, None)
        assert kv.get_stats().pinned == 0
        kv.check_invariants()


async def test_a_block_stored_anew_within_a_request_is_pinned_by_its_lease() -> None:
    """One that turned out to be damaged: the request still pins what it was before."""
    async with LRUOffloadManager(MemoryTier(8, BLOCK_BYTES)) as kv:
        await kv.store(CHAIN, payloads(CHAIN))
        async with kv.request(CHAIN) as request:
            index = kv._core.index
            index.condemn(index.ready["b"])
            await kv.store(["b"], [b"anew"])
            async with request.load() as lease:
                assert await kv.evict(["b"]) == []
                assert bytes(lease[1]) == b"anew"
                kv.check_invariants()
            assert await kv.evict(["b"]) == ["b"]
        assert kv.get_stats().pinned == 0
        kv.check_invariants()
        assert kv.get_stats().tiers["hot"].free_blocks == 6


async def test_hot_blocks_are_leased_at_once_while_others_are_read() -> None:
    """And those that are read are shown from their buffers, when they are first looked at."""
    cold = FaultyTier(RestartableTier(8, BLOCK_BYTES))
    async with AsyncLRUManager(hot=MemoryTier(1, BLOCK_BYTES), cold=cold, policy="lru") as kv:
        await kv.store(CHAIN, payloads(CHAIN))
        seen: list[bytes] = []

        async def look_at_cold() -> None:
            async with kv.load(CHAIN) as lease:
                await anyio.lowlevel.checkpoint()
                seen.extend(bytes(view) for view in lease)

        with cold.hang("read") as hang:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(look_at_cold)
                await hang.entered.wait()
                scope = kv.load(CHAIN[:1])
                with pytest.raises(StopIteration) as entered:
                    scope.__aenter__().send(None)
                assert bytes(entered.value.value[0]) == payload_for("a", BLOCK_BYTES)
                await scope.__aexit__(None, None, None)
                hang.release()
        assert seen == payloads(CHAIN)
        assert kv.get_stats().tiers["hot"].hits == 2
        assert kv.get_stats().pinned == 0
        kv.check_invariants()
