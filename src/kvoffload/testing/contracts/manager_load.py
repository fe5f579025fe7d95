"""Part of `ManagerContract`: load, leases, and views that are kept too long."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence

import anyio
import numpy as np
import pytest
from anyio.lowlevel import checkpoint

from ...errors import BlockNotFoundError, DerivedViewWarning
from ...types import BlockHash, ByteArray, OffloadingManager
from ..clock import eventually
from .manager_base import ABSENT, READY, ManagerSuite, chain


class BodyError(Exception):
    """What a test's body raises."""


def array_over(view: memoryview) -> ByteArray:
    """Return an array that shows a view's bytes, as engines make them."""
    return np.frombuffer(view, np.uint8)


class LoadSuite(ManagerSuite):
    """`load`."""

    async def test_load_yields_the_bytes_in_the_order_asked(
        self, manager: OffloadingManager
    ) -> None:
        """From all tiers, exact, and named by the lease."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            asked = [*hashes[::2], *hashes[1::2]]
            async with kv.load(asked) as lease:
                assert lease.block_hashes == tuple(asked)
                assert len(lease) == len(asked)
                assert [view.tobytes() for view in lease] == self.payloads(asked)
                assert [each.tobytes() for each in lease[1:3]] == self.payloads(asked[1:3])
                assert lease[-1] == self.payload(asked[-1])

    async def test_reading_again_and_again(self, manager: OffloadingManager) -> None:
        """All tiers are full, and blocks that are read often may move up.

        A block leaves for that at most for each that moved up, and what is there is sound.
        """
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            for _ in range(5):
                for block_hash in hashes:
                    await self.check_bytes(kv, self.ready(kv, [block_hash]))
            await self.settled(kv)
            stats = kv.get_stats()
            assert stats.evictions <= stats.promotions
            assert len(self.ready(kv, hashes)) == self.capacity - stats.evictions

    async def test_load_of_nothing(self, manager: OffloadingManager) -> None:
        """An empty lease."""
        async with self.opened(manager) as kv, kv.load([]) as lease:
            assert list(lease) == []

    async def test_load_of_one_block_twice(self, manager: OffloadingManager) -> None:
        """As often as it was asked for."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a", "b"])
            async with kv.load(["a", "b", "a"]) as lease:
                assert [view.tobytes() for view in lease] == self.payloads(["a", "b", "a"])
                assert await kv.evict(["a"]) == []
            assert await kv.evict(["a"]) == ["a"]

    async def test_views_are_read_only(self, manager: OffloadingManager) -> None:
        """A reader can't damage what others read."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a"])
            async with kv.load(["a"]) as lease:
                assert lease[0].readonly
                with pytest.raises(TypeError):
                    lease[0][0] = 1
                array = array_over(lease[0])
                assert not array.flags.writeable
                del array

    async def test_views_end_with_the_lease(self, manager: OffloadingManager) -> None:
        """Afterwards a view raises on use, and the lease is empty."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            async with kv.load(hashes) as lease:
                views = list(lease)
            for view in views:
                with pytest.raises(ValueError, match="released"):
                    view.tobytes()
                with pytest.raises(ValueError, match="released"):
                    view[0]
            assert len(lease) == 0

    async def test_load_of_a_missing_block(self, manager: OffloadingManager) -> None:
        """The error names exactly what is missing, and nothing stays pinned."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a", "b"])
            with pytest.raises(BlockNotFoundError) as caught:
                async with kv.load(["a", "missing", "b", "gone"]):
                    pytest.fail("a lease without its blocks")
            assert caught.value.block_hashes == ("missing", "gone")
            assert isinstance(caught.value, KeyError)
            assert "missing" in str(caught.value)
            assert kv.get_stats().pinned == 0
            assert sorted(map(str, await kv.evict(["a", "b"]))) == ["a", "b"]

    async def test_load_of_a_pending_block(self, manager: OffloadingManager) -> None:
        """It is not readable, so it is not found."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a"])
            await kv.prepare_store(["pending"])
            with pytest.raises(BlockNotFoundError) as caught:
                async with kv.load(["a", "pending"]):
                    pytest.fail("a lease on bytes that are not there yet")
            assert caught.value.block_hashes == ("pending",)
            await kv.complete_store(["pending"], success=False)

    async def test_pinned_blocks_are_never_evicted(self, manager: OffloadingManager) -> None:
        """Any number of stores later the lease still shows the same bytes."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a", "b"])
            async with kv.load(["a", "b"]) as lease:
                assert kv.get_stats().pinned == 2
                for turn in range(3):
                    await self.fill(kv, self.capacity, f"turn{turn}-")
                assert await kv.evict(num_blocks=self.capacity) != []
                assert await kv.evict(["a", "b"]) == []
                await kv.clear()
                assert [view.tobytes() for view in lease] == self.payloads(["a", "b"])
                assert await kv.lookup(["a", "b"]) == 2
            assert kv.get_stats().pinned == 0

    async def test_pins_are_counted(self, manager: OffloadingManager) -> None:
        """The block is protected until the last of its leases ends."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a"])
            async with kv.load(["a"]) as outer:
                async with kv.load(["a"]) as inner:
                    assert inner[0] == outer[0]
                assert await kv.evict(["a"]) == []
                assert outer[0] == self.payload("a")
                await kv.prepare_load(["a"])
            assert await kv.evict(["a"]) == []
            await kv.complete_load(["a"])
            assert await kv.evict(["a"]) == ["a"]

    async def test_leases_may_end_in_any_order(self, manager: OffloadingManager) -> None:
        """Two readers of one block: the views of each end with its own lease."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a"])
            first, second = kv.load(["a"]), kv.load(["a"])
            one, two = (await first.__aenter__())[0], (await second.__aenter__())[0]
            await first.__aexit__(None, None, None)
            with pytest.raises(ValueError, match="released"):
                one.tobytes()
            assert two == self.payload("a")
            await second.__aexit__(None, None, None)

    async def test_an_error_in_the_body_unpins(self, manager: OffloadingManager) -> None:
        """And comes out as it was raised."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            with pytest.raises(BodyError):
                async with kv.load(hashes):
                    raise BodyError
            assert kv.get_stats().pinned == 0
            assert len(await kv.evict(hashes)) == self.capacity

    async def test_cancellation_in_the_body_unpins(self, manager: OffloadingManager) -> None:
        """The reader's task is gone, so are its pins and its views."""
        views: list[memoryview] = []
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            with anyio.CancelScope() as scope:
                async with kv.load(hashes) as lease:
                    views += lease
                    scope.cancel()
                    await anyio.sleep_forever()
            assert scope.cancelled_caught
            assert kv.get_stats().pinned == 0
            assert len(await kv.evict(hashes)) == self.capacity
            for view in views:
                with pytest.raises(ValueError, match="released"):
                    view.tobytes()

    async def test_many_readers_of_the_same_blocks(self, manager: OffloadingManager) -> None:
        """All at once, each with its own lease; one of them gives up half-way."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            entered = 0

            async def read(asked: Sequence[BlockHash]) -> None:
                nonlocal entered
                async with kv.load(asked) as lease:
                    entered += 1
                    await checkpoint()
                    assert [view.tobytes() for view in lease] == self.payloads(asked)

            async def give_up() -> None:
                with anyio.CancelScope() as scope:
                    async with kv.load(hashes):
                        scope.cancel()
                        await checkpoint()

            async with anyio.create_task_group() as tasks:
                for start in range(4):
                    tasks.start_soon(read, hashes[start:])
                    tasks.start_soon(read, hashes[start::-1])
                    tasks.start_soon(give_up)
            assert entered == 8

    async def test_load_has_no_deadline_of_its_own(self, manager: OffloadingManager) -> None:
        """A generous `timeout_s` changes nothing, and none is none."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            async with kv.load(hashes, timeout_s=60.0) as lease:
                assert [view.tobytes() for view in lease] == self.payloads(hashes)
            async with kv.load(hashes, timeout_s=None) as lease:
                assert len(lease) == self.capacity

    # What outlives a lease

    async def test_a_derived_view_is_named_by_a_warning(self, manager: OffloadingManager) -> None:
        """An array over a leased view can't be revoked; whoever keeps one is told."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["kept-too-long"])
            with pytest.warns(DerivedViewWarning, match="kept-too-long"):
                async with kv.load(["kept-too-long"]) as lease:
                    array = array_over(lease[0])
            assert array.tobytes() == self.payload("kept-too-long")

    @pytest.mark.parametrize("kind", ["array", "array of a slice", "slice"])
    async def test_a_derived_view_never_shows_another_block(
        self, manager: OffloadingManager, kind: str
    ) -> None:
        """It stays readable; its slot stays out of reuse until it is gone, whatever is stored."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["kept"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DerivedViewWarning)
                async with kv.load(["kept"]) as lease:
                    expected = self.payload("kept")
                    derived: ByteArray | memoryview
                    if kind == "array":
                        derived = array_over(lease[0])
                    else:
                        expected = expected[3:11]
                        derived = lease[0][3:11]
                        if kind == "array of a slice":
                            derived = array_over(derived)
            await kv.evict(["kept"])
            self.check_slots(kv)
            for turn in range(3):
                hashes = chain(f"turn{turn}-", self.capacity + 1)
                result = await kv.store(hashes, self.payloads(hashes))
                assert derived.tobytes() == expected
                await self.check_bytes(kv, result.stored)
                self.check_slots(kv)
            await kv.clear()
            del derived, lease
            gc.collect()
            await eventually(
                lambda: all(tier.retired_blocks == 0 for tier in kv.get_stats().tiers.values())
            )
            await self.fill(kv, self.capacity, "after")

    async def test_damage_elsewhere_is_not_possible(self, manager: OffloadingManager) -> None:
        """Storing into the slots beside a leased block leaves its bytes alone."""
        async with self.opened(manager) as kv:
            hashes = await self.fill(kv, self.capacity)
            async with kv.load(hashes[1:2]) as lease:
                await kv.evict([hashes[0], hashes[2]])
                await self.put(kv, ["x", "y"])
                assert lease[0] == self.payload(hashes[1])
            assert self.states(kv, [hashes[0], hashes[1]]) == [ABSENT, READY]
