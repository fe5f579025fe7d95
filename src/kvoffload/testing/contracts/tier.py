"""What every tier has to do, as tests: subclass and supply `make_tier`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from ...errors import ClosedError, TierError
from ...keys import encode_key
from ...types import BlockHash, Medium, StoredBlock, Tier
from ..cancellation import cancel_everywhere
from ..payloads import payload_for


def key_of(block_hash: BlockHash) -> bytes:
    """Return the canonical key under which the suite writes a block."""
    return encode_key(block_hash, "tests")


async def put(tier: Tier, blocks: dict[int, BlockHash], size: int) -> None:
    """Write blocks, by slot, with the payloads that belong to them."""
    payloads = [memoryview(payload_for(block_hash, size)) for block_hash in blocks.values()]
    outcomes = await tier.write(list(blocks), payloads, [key_of(each) for each in blocks.values()])
    assert outcomes == [None] * len(blocks)


async def get(tier: Tier, slots: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
    """Read slots that must be readable."""
    buffers = [bytearray(b"\xa5" * size) for size in sizes]
    outcomes = await tier.read(slots, [memoryview(buffer) for buffer in buffers])
    assert outcomes == [None] * len(slots)
    return [bytes(buffer) for buffer in buffers]


@asynccontextmanager
async def opened(tier: Tier) -> AsyncIterator[Sequence[StoredBlock]]:
    """Open a tier and close it; gives what `open` found."""
    found = await tier.open()
    try:
        yield found
    finally:
        await tier.close()


class TierContract:
    """Tests of the `Tier` protocol, collected where a subclass is named `Test...`.

    For instance::

        class TestMyTier(TierContract):
            def make_tier(self, tmp_path: Path, num_blocks: int, block_bytes: int) -> MyTier:
                return MyTier(tmp_path / "blocks", num_blocks, block_bytes)

    Needs pytest and pytest-asyncio. What the tier says of itself (`persistent`, `addressable`)
    decides which tests concern it; the others are skipped.

    Attributes:
        num_blocks: Slots that the suite asks for.
        block_bytes: Bytes of a slot that it asks for.
    """

    pytestmark = pytest.mark.asyncio

    num_blocks: int = 8
    block_bytes: int = 4096

    def make_tier(self, tmp_path: Path, num_blocks: int, block_bytes: int) -> Tier:
        """Return a tier that is not open.

        A test of a persistent tier calls it again with the same arguments after closing the first
        tier, and expects to find the blocks.
        """
        raise NotImplementedError

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Tier:
        """Return a new tier; tests open it."""
        return self.make_tier(tmp_path, self.num_blocks, self.block_bytes)

    async def test_describes_itself(self, tier: Tier) -> None:
        """A manager plans with these before it opens the tier."""
        assert isinstance(tier, Tier)
        assert isinstance(tier.name, str)
        assert tier.name
        assert isinstance(tier.medium, Medium)
        assert (tier.num_blocks, tier.block_bytes) == (self.num_blocks, self.block_bytes)
        assert tier.addressable in (True, False)
        assert tier.persistent in (True, False)

    async def test_opens_empty(self, tier: Tier) -> None:
        """A new tier has no blocks."""
        async with opened(tier) as found:
            assert list(found) == []

    async def test_round_trip(self, tier: Tier) -> None:
        """Every slot keeps its full payload."""
        blocks: dict[int, BlockHash] = {slot: slot for slot in range(self.num_blocks)}
        async with opened(tier):
            await put(tier, blocks, self.block_bytes)
            got = await get(tier, list(blocks), [self.block_bytes] * len(blocks))
            assert got == [payload_for(each, self.block_bytes) for each in blocks.values()]

    @pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 4095])
    async def test_partial_payloads(self, tier: Tier, size: int) -> None:
        """A payload may be shorter than a slot, by any number of bytes."""
        size = min(size, self.block_bytes)
        async with opened(tier):
            await put(tier, {2: "short"}, size)
            assert await get(tier, [2], [size]) == [payload_for("short", size)]

    async def test_empty_payload(self, tier: Tier) -> None:
        """A block without a byte is a block."""
        async with opened(tier):
            await put(tier, {2: "empty", 3: "beside it"}, 0)
            assert await get(tier, [2], [0]) == [b""]

    async def test_sizes_differ_in_one_batch(self, tier: Tier) -> None:
        """Each payload has its own."""
        sizes = [self.block_bytes, 1, self.block_bytes // 2]
        payloads = [payload_for(size, size) for size in sizes]
        async with opened(tier):
            outcomes = await tier.write(
                [4, 1, 2],
                [memoryview(payload) for payload in payloads],
                [key_of(size) for size in sizes],
            )
            assert outcomes == [None] * 3
            assert await get(tier, [4, 1, 2], sizes) == payloads

    async def test_batches_with_gaps_and_out_of_order(self, tier: Tier) -> None:
        """Slots of a batch come in any order; each buffer gets its own slot's bytes."""
        size = self.block_bytes
        async with opened(tier):
            await put(tier, {6: "six", 0: "zero", 5: "five", 2: "two"}, size)
            got = await get(tier, [0, 2, 6, 5], [size] * 4)
            assert got == [payload_for(name, size) for name in ("zero", "two", "six", "five")]
            assert await get(tier, [5], [size]) == [payload_for("five", size)]

    async def test_slots_are_independent(self, tier: Tier) -> None:
        """Writing and erasing one leaves its neighbours alone."""
        size = self.block_bytes
        async with opened(tier):
            await put(tier, {0: "a", 1: "b", 2: "c"}, size)
            await put(tier, {1: "new"}, size)
            await tier.erase([1])
            assert await get(tier, [0, 2], [size] * 2) == [
                payload_for("a", size),
                payload_for("c", size),
            ]

    async def test_rewriting_a_slot(self, tier: Tier) -> None:
        """The newest payload counts, also when it is shorter or longer than the one before."""
        async with opened(tier):
            for number, size in enumerate([self.block_bytes, 10, self.block_bytes, 1]):
                await put(tier, {3: f"version {number}"}, size)
                assert await get(tier, [3], [size]) == [payload_for(f"version {number}", size)]

    async def test_writing_after_erasing(self, tier: Tier) -> None:
        """An erased slot is as good as new."""
        async with opened(tier):
            await put(tier, {3: "old"}, 100)
            await tier.erase([3])
            await put(tier, {3: "new"}, 100)
            assert await get(tier, [3], [100]) == [payload_for("new", 100)]

    async def test_payload_is_copied(self, tier: Tier) -> None:
        """The caller's buffer is the caller's again once `write` returned."""
        payload = bytearray(payload_for("mine", 200))
        async with opened(tier):
            assert await tier.write([0], [memoryview(payload)], [key_of("mine")]) == [None]
            payload[:] = bytes(200)
            assert await get(tier, [0], [200]) == [payload_for("mine", 200)]

    async def test_empty_batches(self, tier: Tier) -> None:
        """No slots, no outcomes."""
        async with opened(tier):
            assert list(await tier.read([], [])) == []
            assert list(await tier.write([], [], [])) == []
            await tier.erase([])

    async def test_concurrent_batches(self, tier: Tier) -> None:
        """Batches over different slots run side by side without mixing up their bytes."""
        size = self.block_bytes
        async with opened(tier):
            for turn in range(4):
                async with anyio.create_task_group() as tasks:
                    for slot in range(self.num_blocks):
                        blocks: dict[int, BlockHash] = {slot: f"{turn}.{slot}"}
                        tasks.start_soon(put, tier, blocks, size)
                got: dict[int, bytes] = {}

                async def read(slot: int, into: dict[int, bytes]) -> None:
                    [into[slot]] = await get(tier, [slot], [size])

                async with anyio.create_task_group() as tasks:
                    for slot in range(self.num_blocks):
                        tasks.start_soon(read, slot, got)
                for slot in range(self.num_blocks):
                    assert got[slot] == payload_for(f"{turn}.{slot}", size)

    async def test_a_cancelled_call_leaves_the_tier_usable(self, tier: Tier) -> None:
        """Wherever a write or a read is cancelled, the other slots work, and so does `close`."""
        size = self.block_bytes
        buffer = bytearray(size)

        async def write() -> None:
            await put(tier, {0: "cancelled"}, size)

        async def read() -> None:
            await tier.read([1], [memoryview(buffer)])

        async def check() -> None:
            await put(tier, {2: "after"}, size)
            assert await get(tier, [1, 2], [size] * 2) == [
                payload_for("before", size),
                payload_for("after", size),
            ]

        async with opened(tier):
            await put(tier, {1: "before"}, size)
            await cancel_everywhere(write, check, how="scope")
            await cancel_everywhere(write, check, how="task")
            await cancel_everywhere(read, check, how="scope")
            await cancel_everywhere(read, check, how="task")

    async def test_flush(self, tier: Tier) -> None:
        """Flushing changes nothing that can be seen without a power cut."""
        async with opened(tier):
            await tier.flush()
            await put(tier, {1: "flushed"}, 100)
            await tier.flush()
            assert await get(tier, [1], [100]) == [payload_for("flushed", 100)]

    async def test_close_is_idempotent(self, tier: Tier) -> None:
        """Twice, and without ever having been open."""
        await tier.close()
        await tier.open()
        await tier.close()
        await tier.close()

    async def test_refuses_work_while_closed(self, tier: Tier) -> None:
        """Before `open` and after `close`."""
        for _ in range(2):
            with pytest.raises(ClosedError):
                await tier.read([0], [memoryview(bytearray(8))])
            with pytest.raises(ClosedError):
                await tier.write([0], [memoryview(b"too late")], [key_of("late")])
            with pytest.raises(ClosedError):
                await tier.erase([0])
            with pytest.raises(ClosedError):
                await tier.flush()
            async with opened(tier):
                pass

    # Persistent tiers

    @pytest.fixture
    def persistent(self, tier: Tier) -> Tier:
        """Return a new tier, if its blocks survive `close`."""
        if not tier.persistent:
            pytest.skip("not a persistent tier")
        return tier

    async def test_blocks_survive(self, persistent: Tier, tmp_path: Path) -> None:
        """With their keys, slots and sizes, whatever the type of the hash."""
        blocks: dict[int, BlockHash] = {5: "1", 0: 1, 3: b"1", 1: -(2**80)}
        await persistent.open()
        for slot, block_hash in blocks.items():
            await put(persistent, {slot: block_hash}, 100 + slot)
        await persistent.close()
        again = self.make_tier(tmp_path, self.num_blocks, self.block_bytes)
        async with opened(again) as found:
            assert {(each.key, each.slot, each.size) for each in found} == {
                (key_of(block_hash), slot, 100 + slot) for slot, block_hash in blocks.items()
            }
            got = await get(again, list(blocks), [100 + slot for slot in blocks])
            assert got == [payload_for(each, 100 + slot) for slot, each in blocks.items()]

    async def test_close_keeps_the_order(self, persistent: Tier, tmp_path: Path) -> None:
        """The next manager goes on with the recency that this one knew: coldest first."""
        await persistent.open()
        await put(persistent, {slot: slot for slot in range(5)}, 100)
        await persistent.close([3, 0, 4, 1, 2])
        again = self.make_tier(tmp_path, self.num_blocks, self.block_bytes)
        async with opened(again) as found:
            assert [each.slot for each in found] == [3, 0, 4, 1, 2]

    async def test_erased_and_rewritten_blocks_stay_away(
        self, persistent: Tier, tmp_path: Path
    ) -> None:
        """What was erased or replaced must not come back on reopening."""
        await persistent.open()
        await put(persistent, {0: "erased", 1: "replaced", 2: "kept"}, 100)
        await persistent.erase([0])
        await put(persistent, {1: "replacement"}, 50)
        await persistent.close()
        again = self.make_tier(tmp_path, self.num_blocks, self.block_bytes)
        async with opened(again) as found:
            assert {(each.key, each.slot, each.size) for each in found} == {
                (key_of("replacement"), 1, 50),
                (key_of("kept"), 2, 100),
            }
            assert await get(again, [1, 2], [50, 100]) == [
                payload_for("replacement", 50),
                payload_for("kept", 100),
            ]

    async def test_reopened_tier_is_writable(self, persistent: Tier, tmp_path: Path) -> None:
        """Three generations, each adding to the last."""
        await persistent.open()
        await persistent.close()
        for generation in range(3):
            tier = self.make_tier(tmp_path, self.num_blocks, self.block_bytes)
            async with opened(tier) as found:
                assert {each.slot for each in found} == set(range(generation))
                await put(tier, {generation: generation}, 100)

    async def test_has_one_opener(self, persistent: Tier, tmp_path: Path) -> None:
        """Two managers over the same blocks would overwrite each other's."""
        again = self.make_tier(tmp_path, self.num_blocks, self.block_bytes)
        async with opened(persistent):
            with pytest.raises(TierError):
                await again.open()
            await put(persistent, {0: "mine"}, 100)
        async with opened(again) as found:
            assert [each.slot for each in found] == [0]

    # Addressable tiers

    @pytest.fixture
    def addressable(self, tier: Tier) -> Tier:
        """Return a new tier, if its slots can be viewed."""
        if not tier.addressable:
            pytest.skip("not an addressable tier")
        return tier

    async def test_view_shows_the_slot(self, addressable: Tier) -> None:
        """Reads see what a view wrote, views see what `write` wrote, and no copy lies between."""
        size = self.block_bytes
        async with opened(addressable):
            view = addressable.view(2, size)
            assert view.dtype == "uint8"
            assert view.shape == (size,)
            view[:] = list(payload_for("viewed", size))
            assert await get(addressable, [2], [size]) == [payload_for("viewed", size)]
            await put(addressable, {2: "written"}, size)
            assert view.tobytes() == payload_for("written", size)
            assert addressable.view(2, size).tobytes() == payload_for("written", size)

    async def test_view_of_a_part(self, addressable: Tier) -> None:
        """The first bytes of the slot."""
        async with opened(addressable):
            await put(addressable, {2: "short"}, 10)
            assert addressable.view(2, 10).tobytes() == payload_for("short", 10)
            assert addressable.view(2, 0).tobytes() == b""
            assert addressable.view(2, 3).tobytes() == payload_for("short", 10)[:3]

    async def test_views_of_slots_do_not_overlap(self, addressable: Tier) -> None:
        """Each slot has its own bytes."""
        async with opened(addressable):
            views = [addressable.view(slot, self.block_bytes) for slot in range(self.num_blocks)]
            for slot, view in enumerate(views):
                view[:] = slot + 1
            for slot, view in enumerate(views):
                assert set(view.tolist()) == {slot + 1}

    async def test_each_view_is_a_new_object(self, addressable: Tier) -> None:
        """The manager sees by a weak reference when the last thing derived from a view is gone."""
        async with opened(addressable):
            first, second = addressable.view(2, 64), addressable.view(2, 64)
            assert first is not second
            gone = weakref.ref(first)
            derived = first.data[8:16]
            del first
            gc.collect()
            assert gone() is not None
            del derived
            gc.collect()
            assert gone() is None
            assert second.shape == (64,)

    async def test_a_view_outlives_close(self, addressable: Tier) -> None:
        """Memory that somebody still shows is not given back to the system."""
        await addressable.open()
        await put(addressable, {1: "kept"}, 64)
        view = addressable.view(1, 64)
        await addressable.close()
        assert view.tobytes() == payload_for("kept", 64)
