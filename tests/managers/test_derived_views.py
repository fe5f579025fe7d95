"""Arrays that outlive their lease: none may show, or write, another block's bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    DerivedViewWarning,
    LRUOffloadManager,
    MemoryTier,
    TieredLRUManager,
)
from kvoffload.testing import RestartableTier, payload_for

BLOCK_BYTES = 64


def payload(block_hash: BlockHash) -> bytes:
    return payload_for(block_hash, BLOCK_BYTES)


async def array_that_outlives_its_lease(
    kv: LRUOffloadManager | TieredLRUManager | AsyncLRUManager, block_hash: BlockHash
) -> npt.NDArray[np.uint8]:
    """Do what users do by mistake: keep an array over a leased view."""
    with pytest.warns(DerivedViewWarning):
        async with kv.load([block_hash]) as lease:
            array = np.frombuffer(lease[0], np.uint8)
    return array


async def test_a_store_does_not_evict_a_block_under_an_array() -> None:
    """A kept array showed the next block's bytes once a store had evicted its own block."""
    async with LRUOffloadManager(MemoryTier(1, BLOCK_BYTES)) as kv:
        await kv.store(["a"], [payload("a")])
        array = await array_that_outlives_its_lease(kv, "a")
        assert (await kv.store(["b"], [payload("b")])).stored == ()
        assert bytes(array) == payload("a")

        del array
        assert (await kv.store(["b"], [payload("b")])).stored == ("b",)


async def test_a_store_does_not_demote_a_block_under_an_array() -> None:
    """The same, where the block only went down a tier and its slot was given to another."""
    hot, warm = MemoryTier(1, BLOCK_BYTES), MemoryTier(4, BLOCK_BYTES, name="warm")
    async with TieredLRUManager(hot, warm) as kv:
        await kv.store(["a"], [payload("a")])
        array = await array_that_outlives_its_lease(kv, "a")
        await kv.store(["b"], [payload("b")])
        assert bytes(array) == payload("a")
        assert kv.locate(["a"])[0].tier == "hot"

        del array
        await kv.store(["c"], [payload("c")])
        assert kv.locate(["a"])[0].tier == "warm"


async def test_a_block_under_an_array_does_not_fall_back_on_its_copy() -> None:
    """The same, where the slot was given away at once, for the block had a flushed copy below."""
    hot, cold = MemoryTier(1, BLOCK_BYTES), RestartableTier(4, BLOCK_BYTES)
    async with AsyncLRUManager(hot=hot, cold=cold) as kv:
        await kv.store(["a"], [payload("a")])
        await kv.flush()
        array = await array_that_outlives_its_lease(kv, "a")
        await kv.store(["b"], [payload("b")])
        assert bytes(array) == payload("a")


async def store_in_warm_under_a_hot_tier_with_room(kv: TieredLRUManager) -> None:
    """Leave block a in warm, due for hot with its second load, and a free slot there."""
    chain = ["b", "c", "a"]
    await kv.store(chain, [payload(name) for name in chain])
    assert kv.locate(["a"])[0].tier == "warm"
    await kv.evict(["b"])


async def test_a_block_under_an_array_is_not_promoted() -> None:
    """A promotion left the array's slot to a mere copy, which gave way to the next block.

    So the block stays where it is shown, however often it is loaded.
    """
    hot, warm = MemoryTier(2, BLOCK_BYTES), MemoryTier(1, BLOCK_BYTES, name="warm")
    async with TieredLRUManager(hot, warm, promote_threshold=2) as kv:
        await store_in_warm_under_a_hot_tier_with_room(kv)
        array = await array_that_outlives_its_lease(kv, "a")
        for _ in range(2):
            async with kv.load(["a"]) as lease:
                assert bytes(lease[0]) == payload("a")
            assert kv.locate(["a"])[0].tier == "warm"
        for name in ("d", "e"):
            await kv.store([name], [payload(name)])
        assert bytes(array) == payload("a")
        assert kv.locate(["a"])[0].tier == "warm"


async def test_a_block_that_is_pinned_and_shown_counts_once() -> None:
    """It was taken off the room twice, so that a store was rejected beside a block to evict."""
    async with LRUOffloadManager(MemoryTier(2, BLOCK_BYTES)) as kv:
        await kv.store(["a", "b"], [b"a" * BLOCK_BYTES, b"b" * BLOCK_BYTES])
        async with kv.load(["a"]):
            array = await array_that_outlives_its_lease(kv, "a")
            assert (await kv.store(["c"], [b"c" * BLOCK_BYTES])).stored == ("c",)
            assert bytes(array) == b"a" * BLOCK_BYTES
        assert await kv.evict(["a"]) == ["a"]  # its slot is out of use, the other one is not
        assert (await kv.store(["d"], [b"d" * BLOCK_BYTES])).stored == ("d",)
        assert bytes(array) == b"a" * BLOCK_BYTES


async def test_a_block_is_promoted_once_the_array_over_it_is_gone() -> None:
    """A block that an array had once outlived stayed in the slow tier for good."""
    hot, warm = MemoryTier(2, BLOCK_BYTES), MemoryTier(1, BLOCK_BYTES, name="warm")
    async with TieredLRUManager(hot, warm, promote_threshold=2) as kv:
        await store_in_warm_under_a_hot_tier_with_room(kv)
        array = await array_that_outlives_its_lease(kv, "a")
        del array
        async with kv.load(["a"]) as lease:
            assert bytes(lease[0]) == payload("a")
        assert kv.locate(["a"])[0].tier == "hot"


async def test_a_late_writer_of_a_two_phase_store_writes_no_other_block() -> None:
    """An engine went on writing through its array after `complete_store`, into another's block."""
    async with LRUOffloadManager(MemoryTier(1, BLOCK_BYTES)) as kv:
        prepared = await kv.prepare_store(["a"])
        assert prepared is not None
        array = np.frombuffer(prepared.store_spec.entries[0].view, np.uint8)
        with pytest.warns(DerivedViewWarning):
            await kv.complete_store(["a"])
        assert (await kv.store(["b"], [payload("b")])).stored == ()
        array[:] = 0

        del array
        assert (await kv.store(["b"], [payload("b")])).stored == ("b",)
        async with kv.load(["b"]) as lease:
            assert bytes(lease[0]) == payload("b")
