"""Part of `ManagerContract`: the scope of one prompt's chain."""

from __future__ import annotations

import anyio
import pytest

from ...types import BlockHash, OffloadingManager, RejectReason, StoreResult
from ..clock import ManualClock, eventually
from .manager_base import (
    ABSENT,
    BAD_ARGUMENT,
    PENDING,
    READY,
    ManagerSuite,
    chain,
    time_passing,
)
from .manager_load import BodyError


class RequestSuite(ManagerSuite):
    """`request`."""

    async def test_request_hits_loads_and_stores(self, manager: OffloadingManager) -> None:
        """The whole story of a prompt: its prefix is there, the rest gets computed."""
        hashes = chain("c", 6)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes[:2])
            async with kv.request(hashes) as request:
                assert request.hit == 2
                async with request.load() as lease:
                    assert lease.block_hashes == tuple(hashes[:2])
                    assert [view.tobytes() for view in lease] == self.payloads(hashes[:2])
                result = await request.store(self.payloads(hashes[2:]))
                assert result == StoreResult(stored=tuple(hashes[2:]))
            assert await kv.lookup(hashes) == 6
            await self.check_bytes(kv, hashes)

    async def test_request_stores_in_pieces(self, manager: OffloadingManager) -> None:
        """Each call goes on where the one before stopped."""
        hashes = chain("c", 6)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes[:1])
            async with kv.request(hashes) as request:
                assert await request.store([]) == StoreResult()
                for piece in (hashes[1:3], hashes[3:4], hashes[4:]):
                    result = await request.store(self.payloads(piece))
                    assert result == StoreResult(stored=tuple(piece))
            assert await kv.lookup(hashes) == 6
            await self.check_bytes(kv, hashes)

    async def test_request_may_store_less_than_its_chain(self, manager: OffloadingManager) -> None:
        """The prompt was aborted half-way: what was stored stays, the rest is absent."""
        hashes = chain("c", 6)
        async with self.opened(manager) as kv:
            async with kv.request(hashes) as request:
                await request.store(self.payloads(hashes[:3]))
            assert self.states(kv, hashes) == [READY] * 3 + [ABSENT] * 3
            async with kv.request(hashes) as request:
                assert request.hit == 3

    async def test_request_of_an_empty_or_a_known_chain(self, manager: OffloadingManager) -> None:
        """No blocks, or no blocks left to store."""
        hashes = chain("c", 3)
        async with self.opened(manager) as kv:
            async with kv.request([]) as request, request.load() as lease:
                assert (request.hit, len(lease)) == (0, 0)
            async with kv.request(hashes) as request, request.load() as lease:
                assert (request.hit, len(lease)) == (0, 0)
            await self.put(kv, hashes)
            async with kv.request(hashes) as request:
                assert request.hit == 3
                assert await request.store([]) == StoreResult()

    async def test_request_counts_leading_blocks_only(self, manager: OffloadingManager) -> None:
        """Blocks behind a gap are no hit; storing over them finds them present."""
        hashes = chain("c", 4)
        async with self.opened(manager) as kv:
            await self.put(kv, [hashes[0], hashes[2]])
            async with kv.request(hashes) as request:
                assert request.hit == 1
                result = await request.store(self.payloads(hashes[1:]))
                assert result == StoreResult(stored=(hashes[1], hashes[3]), present=(hashes[2],))
            assert await kv.lookup(hashes) == 4

    async def test_request_pins_its_hits(self, manager: OffloadingManager) -> None:
        """From entry to exit, whether they are loaded or not."""
        hashes = chain("c", 3)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes)
            async with kv.request([*hashes, "rest"]) as request:
                assert await kv.evict(hashes) == []
                async with request.load():
                    pass
                for turn in range(2):
                    await self.fill(kv, self.capacity, f"turn{turn}-")
                await kv.clear()
                assert await kv.lookup(hashes) == 3
                async with request.load() as lease:
                    assert [view.tobytes() for view in lease] == self.payloads(hashes)
            assert kv.get_stats().pinned == 0
            assert len(await kv.evict(hashes)) == 3

    async def test_request_counts_hits_and_misses_once(self, manager: OffloadingManager) -> None:
        """On entry; loading and storing inside don't count again."""
        hashes = chain("c", 5)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes[:2])
            async with kv.request(hashes) as request:
                async with request.load():
                    pass
                await request.store(self.payloads(hashes[2:]))
            stats = kv.get_stats()
            assert (stats.hits, stats.misses) == (2, 3)

    async def test_request_is_one_use_tail_first(self, lru_manager: OffloadingManager) -> None:
        """The head was loaded and the tail stored at different moments; the order is right.

        Without the scope, the tail, stored last, would outlive the head without which it is
        of no use.
        """
        hashes = chain("c", 5)
        async with self.opened(lru_manager) as kv:
            await self.put(kv, hashes[:2])
            await self.put(kv, ["other"])
            async with kv.request(hashes) as request:
                async with request.load():
                    pass
                await request.store(self.payloads(hashes[2:4]))
                await request.store(self.payloads(hashes[4:]))
                await kv.touch(["other"])
            assert await self.evict_one_by_one(kv) == ["other", *hashes[::-1]]

    async def test_tail_leaves_first_after_requests(self, manager: OffloadingManager) -> None:
        """In every policy: also a chain that many requests made longer and longer."""
        hashes = chain("c", 6)
        async with self.opened(manager) as kv:
            for length in (2, 3, 5, 6):
                async with kv.request(hashes[:length]) as request:
                    async with request.load():
                        pass
                    await request.store(self.payloads(hashes[request.hit : length]))
            for _ in range(10):
                async with kv.request(hashes) as request, request.load():
                    pass
            assert await self.evict_one_by_one(kv) == hashes[::-1]

    async def test_too_many_payloads(self, manager: OffloadingManager) -> None:
        """More than the chain has left: told before anything changed, and the chain goes on."""
        hashes = chain("c", 3)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes[:1])
            async with kv.request(hashes) as request:
                before = self.snapshot(kv, hashes)
                with pytest.raises(BAD_ARGUMENT):
                    await request.store(self.payloads(hashes))
                with pytest.raises(BAD_ARGUMENT):
                    await request.store([self.payload(hashes[1]), bytes(self.block_bytes + 1)])
                assert self.snapshot(kv, hashes) == before
                assert (await request.store(self.payloads(hashes[1:]))).stored == tuple(hashes[1:])

    async def test_a_rejection_ends_the_chain(self, manager: OffloadingManager) -> None:
        """What comes behind a gap is of no use to a prefix, so it takes no room."""
        async with self.opened(manager) as kv:
            old = await self.fill(kv, self.capacity)
            held = old[:-2]
            await kv.prepare_load(held)
            hashes = chain("c", 5)
            async with kv.request(hashes) as request:
                result = await request.store(self.payloads(hashes[:3]))
                assert result.stored == tuple(hashes[:2])
                assert dict(result.rejected) == {hashes[2]: RejectReason.PINNED}
                await kv.complete_load(held)
                result = await request.store(self.payloads(hashes[3:]))
                assert result.stored == ()
                assert set(result.rejected) == set(hashes[3:])
            assert self.states(kv, hashes) == [READY] * 2 + [ABSENT] * 3

    async def test_two_requests_for_one_chain(self, manager: OffloadingManager) -> None:
        """Both compute the same tail: it is stored once, and each is told."""
        hashes = chain("c", 4)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes[:1])
            async with kv.request(hashes) as first, kv.request(hashes) as second:
                assert (first.hit, second.hit) == (1, 1)
                one = await first.store(self.payloads(hashes[1:]))
                two = await second.store(self.payloads(hashes[1:]))
                assert one == StoreResult(stored=tuple(hashes[1:]))
                assert two == StoreResult(present=tuple(hashes[1:]))
            assert await kv.lookup(hashes) == 4

    async def test_an_error_in_the_body_releases(self, manager: OffloadingManager) -> None:
        """Pins and reservations are gone, what was stored stays, the error comes out as it was."""
        hashes = chain("c", 4)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes[:2])

            async def fail() -> None:
                async with kv.request(hashes) as request:
                    await request.store(self.payloads(hashes[2:3]))
                    async with request.load():
                        raise BodyError

            with pytest.raises(BodyError):
                await fail()
            stats = kv.get_stats()
            assert (stats.pinned, stats.pending) == (0, 0)
            assert self.states(kv, hashes) == [READY] * 3 + [ABSENT]

    async def test_cancellation_in_the_body_releases(self, manager: OffloadingManager) -> None:
        """The client went away in the middle of its prompt."""
        hashes = chain("c", 4)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes[:2])
            with anyio.CancelScope() as scope:
                async with kv.request(hashes) as request, request.load():
                    await request.store(self.payloads(hashes[2:3]))
                    scope.cancel()
                    await anyio.sleep_forever()
            assert scope.cancelled_caught
            await self.settled(kv)
            assert self.states(kv, hashes) == [READY] * 3 + [ABSENT]

    # Blocks that another caller is storing

    async def test_pending_blocks_are_not_waited_for_unasked(
        self, manager: OffloadingManager
    ) -> None:
        """Without `wait_pending_s` a pending block is a miss, at once."""
        hashes = chain("c", 3)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes[:1])
            await kv.prepare_store(hashes[1:2])
            async with kv.request(hashes) as request:
                assert request.hit == 1
                result = await request.store(self.payloads(hashes[1:]))
                assert result == StoreResult(stored=(hashes[2],), present=(hashes[1],))
            await kv.complete_store(hashes[1:2], success=False)

    @pytest.mark.parametrize("success", [True, False])
    async def test_waiting_for_a_pending_block(
        self, manager: OffloadingManager, success: bool
    ) -> None:
        """The other caller completes it in time and it counts, or gives up and it does not."""
        hashes = chain("c", 3)
        hits: list[int] = []
        async with self.opened(manager) as kv:
            await self.put(kv, [hashes[0], hashes[2]])
            output = await kv.prepare_store(hashes[1:2])
            assert output is not None

            async def wait() -> None:
                async with kv.request(hashes, wait_pending_s=3600.0) as request:
                    hits.append(request.hit)
                    async with request.load() as lease:
                        assert [view.tobytes() for view in lease] == self.payloads(
                            hashes[: request.hit]
                        )

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                assert hits == []
                output.store_spec.entries[0].view[:] = self.payload(hashes[1])
                await kv.complete_store(hashes[1:2], success)
            assert hits == [3 if success else 1]

    async def test_waiting_has_a_deadline(
        self, manager: OffloadingManager, clock: ManualClock
    ) -> None:
        """The other caller never completes: after the time asked for it is a miss."""
        hashes = chain("c", 3)
        async with self.opened(manager) as kv:
            await self.put(kv, [hashes[0], hashes[2]])
            await kv.prepare_store(hashes[1:2])
            async with time_passing(clock), kv.request(hashes, wait_pending_s=0.05) as request:
                assert request.hit == 1
            assert self.states(kv, hashes) == [READY, PENDING, READY]
            await kv.complete_store(hashes[1:2], success=False)

    async def test_a_waiting_request_holds_its_prefix(self, manager: OffloadingManager) -> None:
        """What is evicted while a request waits is no hit; what it counts is there."""
        hashes: list[BlockHash] = chain("c", 3)
        hits: list[int] = []
        async with self.opened(manager) as kv:
            await self.put(kv, hashes[:1])
            output = await kv.prepare_store(hashes[1:2])
            assert output is not None

            async def wait() -> None:
                async with kv.request(hashes, wait_pending_s=3600.0) as request:
                    async with request.load() as lease:
                        assert [view.tobytes() for view in lease] == self.payloads(
                            hashes[: request.hit]
                        )
                    hits.append(request.hit)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                gone = await kv.evict(hashes[:1])
                output.store_spec.entries[0].view[:] = self.payload(hashes[1])
                await kv.complete_store(hashes[1:2])
            assert hits == [0 if gone else 2]

    async def test_cancelling_a_waiting_request(self, manager: OffloadingManager) -> None:
        """It leaves nothing behind, and the store it waited for goes on."""
        hashes = chain("c", 2)
        async with self.opened(manager) as kv:
            await self.put(kv, hashes[:1])
            output = await kv.prepare_store(hashes[1:])
            assert output is not None

            async def wait() -> None:
                async with kv.request(hashes, wait_pending_s=3600.0):
                    pytest.fail("nobody completed the block")

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            await eventually(lambda: kv.get_stats().pinned == 0)
            output.store_spec.entries[0].view[:] = self.payload(hashes[1])
            await kv.complete_store(hashes[1:])
            await self.check_bytes(kv, hashes)
