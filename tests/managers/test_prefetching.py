"""Hints: what they fetch, what they cost, and that they never wait, break or mislead."""

from __future__ import annotations

import anyio
import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    BlockNotFoundError,
    ConfigError,
    EventKind,
    LRUOffloadManager,
    MemoryTier,
    PrefetchingLRUManager,
)
from kvoffload.prefetch import QUEUE_BLOCKS
from kvoffload.testing import DictSource, FaultyTier, RestartableTier, eventually, payload_for

SIZE = 64


class SlowSource:
    """A source that answers when it is told to, and knows how many reads are under way."""

    def __init__(self) -> None:
        self.reading: list[BlockHash] = []
        self.most = 0
        self.go = anyio.Event()

    async def read(self, block_hash: BlockHash) -> bytes:
        self.reading.append(block_hash)
        self.most = max(self.most, len(self.reading))
        await self.go.wait()
        self.reading.remove(block_hash)
        return payload_for(block_hash, SIZE)


class TestFromASource:
    async def test_hinted_blocks_come(self) -> None:
        """And are useful when they are used, wasted when they leave before."""
        source = DictSource.of(range(9), SIZE)
        async with PrefetchingLRUManager(MemoryTier(4, SIZE), source=source) as kv:
            assert kv.hint_prefetch(range(4)) == 4
            await eventually(lambda: kv.get_stats().stored == 4)
            async with kv.load([0, 1]) as lease:
                assert bytes(lease[1]) == payload_for(1, SIZE)
            assert kv.hint_prefetch([0, 1, 4, 5]) == 2
            await eventually(lambda: kv.get_stats().stored == 6)
            stats = kv.get_stats()
            assert (stats.prefetch_issued, stats.prefetch_useful) == (6, 2)
            assert (stats.prefetch_wasted, stats.prefetch_dropped) == (2, 0)
            kv.check_invariants()

    async def test_load_never_reads_through(self) -> None:
        """What was not fetched in time is a miss, for reading it may cost more than recomputing."""
        source = DictSource.of([1], SIZE)
        async with PrefetchingLRUManager(MemoryTier(4, SIZE), source=source) as kv:
            with pytest.raises(BlockNotFoundError):
                async with kv.load([1]):
                    pass
            assert await kv.lookup([1]) == 0

    async def test_from_another_manager(self) -> None:
        """Which its owner opens and closes; no view of it outlives its lease."""
        async with LRUOffloadManager(MemoryTier(4, SIZE)) as big:
            await big.store([1, 2], [payload_for(1, SIZE), payload_for(2, SIZE)])
            async with PrefetchingLRUManager(MemoryTier(2, SIZE), source=big) as kv:
                assert kv.hint_prefetch([1, 2, 3]) == 3
                await eventually(lambda: kv.get_stats().prefetch_dropped == 1)
                async with kv.load([1, 2]) as lease:
                    assert bytes(lease[1]) == payload_for(2, SIZE)
            assert await big.lookup([1, 2]) == 2
            assert big.get_stats().pinned == 0

    async def test_lookahead_bounds_reads_not_hints(self) -> None:
        """A hint of any length is taken, and so many blocks are read at a time."""
        source = SlowSource()
        async with PrefetchingLRUManager(
            MemoryTier(16, SIZE), source=source, prefetch_lookahead=3
        ) as kv:
            assert kv.hint_prefetch(range(16)) == 16
            await eventually(lambda: len(source.reading) == 3)
            assert kv.hint_prefetch(range(16)) <= 3  # only what is being read may be asked again
            source.go.set()
            await eventually(lambda: kv.get_stats().stored == 16)
            assert source.most == 3

    async def test_cancel(self) -> None:
        """What waits is forgotten and counted; what is being read comes."""
        source = SlowSource()
        async with PrefetchingLRUManager(
            MemoryTier(16, SIZE), source=source, prefetch_lookahead=1
        ) as kv:
            kv.hint_prefetch([1, 2, 3])
            await eventually(lambda: source.reading == [1])
            assert kv.cancel_prefetch([1, 2, 99]) == 1
            source.go.set()
            await eventually(lambda: kv.get_stats().stored == 2)
            assert await kv.lookup([1]) == await kv.lookup([3]) == 1
            assert await kv.lookup([2]) == 0
            assert kv.get_stats().prefetch_dropped == 1

    async def test_a_full_queue_drops_and_counts(self) -> None:
        """A hint never waits and never grows without bound."""
        source = SlowSource()
        async with PrefetchingLRUManager(
            MemoryTier(1, SIZE), source=source, prefetch_lookahead=1
        ) as kv:
            assert kv.hint_prefetch(range(QUEUE_BLOCKS + 10)) == QUEUE_BLOCKS
            assert kv.get_stats().prefetch_dropped == 10

    async def test_a_source_that_fails(self) -> None:
        """An event and a counter; the task that runs hints goes on."""

        class Failing(DictSource):
            async def read(self, block_hash: BlockHash) -> bytes:
                if block_hash == 1:
                    raise ConnectionResetError("gone")
                return bytes(await super().read(block_hash))

        source = Failing.of([1, 2], SIZE)
        async with PrefetchingLRUManager(MemoryTier(4, SIZE), source=source) as kv:
            events = kv.events()
            kv.hint_prefetch([1, 2])
            await eventually(lambda: kv.get_stats().stored == 1)
            await eventually(lambda: kv.get_stats().io_errors == 1)
            assert kv.get_stats().prefetch_dropped == 1
        told = [event async for event in events if event.kind is EventKind.FAILED]
        assert [event.block_hashes for event in told] == [(1,)]
        assert "gone" in told[0].detail

    async def test_a_source_with_too_long_a_payload(self) -> None:
        """Costs that block alone."""
        source = DictSource({1: b"x" * (SIZE + 1), 2: b"x"})
        async with PrefetchingLRUManager(MemoryTier(4, SIZE), source=source) as kv:
            kv.hint_prefetch([1, 2])
            await eventually(lambda: kv.get_stats().stored == 1)
            await eventually(lambda: kv.get_stats().prefetch_dropped == 1)

    async def test_closing_does_not_wait_for_a_source(self) -> None:
        """A source that never answers does not hang the close, and no task is left."""
        source = SlowSource()
        async with PrefetchingLRUManager(MemoryTier(4, SIZE), source=source) as kv:
            kv.hint_prefetch([1, 2])
            await eventually(lambda: len(source.reading) == 2)

    async def test_what_is_no_source(self) -> None:
        """Found when the manager is made."""
        with pytest.raises(ConfigError, match="source must have"):
            PrefetchingLRUManager(MemoryTier(4, SIZE), source={})  # type: ignore[arg-type]  # wrong
        with pytest.raises(ConfigError, match="prefetch_lookahead must be an integer"):
            PrefetchingLRUManager(MemoryTier(4, SIZE), source=DictSource(), prefetch_lookahead=0)


class TestFromLowerTiers:
    async def test_cold_blocks_come_up(self) -> None:
        """Hinted blocks are in hot when the request comes; absent ones are nobody's business."""
        cold = RestartableTier(8, SIZE, name="cold")
        async with AsyncLRUManager(hot=MemoryTier(2, SIZE), cold=cold) as kv:
            await kv.store(range(6), [payload_for(number, SIZE) for number in range(6)])
            assert kv.hint_prefetch([4, 5, 77]) == 2
            await eventually(lambda: kv.get_stats().promotions == 2)
            assert [location.tier for location in kv.locate([4, 5])] == ["hot", "hot"]
            async with kv.load([4]) as lease:
                assert bytes(lease[0]) == payload_for(4, SIZE)
            stats = kv.get_stats()
            assert (stats.prefetch_issued, stats.prefetch_useful) == (2, 1)
            kv.check_invariants()

    async def test_a_load_does_not_wait_for_a_hint(self) -> None:
        """A caller that needs a block that was hinted gets it, whichever comes first."""
        cold = FaultyTier(RestartableTier(8, SIZE, name="cold"))
        async with AsyncLRUManager(hot=MemoryTier(2, SIZE), cold=cold) as kv:
            await kv.store(range(6), [payload_for(number, SIZE) for number in range(6)])
            with cold.hang("read") as hang:
                kv.hint_prefetch([3, 4])
                await hang.entered.wait()
                async with anyio.create_task_group() as tasks:

                    async def look() -> None:
                        async with kv.load([3, 5]) as lease:
                            assert bytes(lease[0]) == payload_for(3, SIZE)

                    tasks.start_soon(look)
                    await anyio.lowlevel.checkpoint()
                    hang.release()
            await eventually(lambda: kv.get_stats().pinned == 0)
            kv.check_invariants()

    async def test_a_hint_does_not_push_out_what_it_names(self) -> None:
        """A chain longer than hot: its head stays, and what finds no room is dropped and counted.

        A prefix without its head is worth nothing.
        """
        cold = RestartableTier(16, SIZE, name="cold")
        async with AsyncLRUManager(hot=MemoryTier(4, SIZE), cold=cold, policy="lru") as kv:
            await kv.store(range(10), [payload_for(number, SIZE) for number in range(10)])
            await kv.store([99, 98], [payload_for(number, SIZE) for number in (99, 98)])
            assert [each.tier for each in kv.locate(range(4))] == ["hot", "hot", "cold", "cold"]
            kv.hint_prefetch(range(10))
            await eventually(lambda: kv.get_stats().prefetch_dropped == 6)
            assert [each.tier for each in kv.locate(range(4))] == ["hot"] * 4
            kv.check_invariants()

    async def test_no_room_above(self) -> None:
        """All of hot is pinned: the hint is dropped and counted, and nothing is evicted."""
        cold = RestartableTier(8, SIZE, name="cold")
        async with AsyncLRUManager(hot=MemoryTier(2, SIZE), cold=cold) as kv:
            await kv.store(range(4), [payload_for(number, SIZE) for number in range(4)])
            async with kv.load([0, 1]):
                kv.hint_prefetch([2])
                await eventually(lambda: kv.get_stats().prefetch_dropped == 1)
                assert [location.tier for location in kv.locate([0, 1, 2])] == ["hot"] * 2 + [
                    "cold"
                ]

    async def test_a_namespace_hints_its_own(self) -> None:
        """The same hash in another namespace stays where it is."""
        cold = RestartableTier(8, SIZE, name="cold")
        async with AsyncLRUManager(hot=MemoryTier(1, SIZE), cold=cold) as kv:
            view = kv.namespace("t")
            await view.store(["a", "x"], [b"1", b"2"])
            await kv.store(["b", "x"], [b"3", b"4"])
            assert view.hint_prefetch(["x"]) == 1
            await eventually(lambda: view.locate(["x"])[0].tier == "hot")
            assert kv.locate(["x"])[0].tier == "cold"
            assert view.get_stats().promotions == 1


def tiered(cold: FaultyTier, *, hot: int = 100, lookahead: int = 4) -> AsyncLRUManager:
    """Room is made ahead where fewer than 5 slots are free, until 10 are."""
    return AsyncLRUManager(
        hot=MemoryTier(hot, SIZE),
        cold=cold,
        policy="lru",
        prefetch_lookahead=lookahead,
        watermarks=(0.05, 0.1),
        promote_threshold=1000,
    )


def chain(name: str, count: int) -> list[str]:
    return [f"{name}{number}" for number in range(count)]


async def put(kv: AsyncLRUManager, hashes: list[str]) -> None:
    assert not (await kv.store(hashes, [payload_for(each, SIZE) for each in hashes])).rejected


def tier_of(kv: AsyncLRUManager, block_hash: BlockHash) -> str | None:
    return kv.locate([block_hash])[0].tier


class TestBehindDemand:
    async def test_newer_hints_push_out_older_ones(self) -> None:
        """What was hinted long ago is needed no more; the head of a hint comes before its end."""
        source = SlowSource()
        async with PrefetchingLRUManager(
            MemoryTier(1, SIZE), source=source, prefetch_lookahead=1
        ) as kv:
            kv.hint_prefetch(range(QUEUE_BLOCKS))
            assert kv.hint_prefetch([-1, -2]) == 2
            assert kv.get_stats().prefetch_dropped == 2
            assert kv.hint_prefetch([0, 1, 2]) == 2  # the first two were dropped; 2 waits
            assert kv.cancel_prefetch(range(-2, QUEUE_BLOCKS)) == QUEUE_BLOCKS

    async def test_hints_wait_for_reads_that_somebody_waits_for(self) -> None:
        cold = FaultyTier(RestartableTier(400, SIZE, name="cold"))
        async with tiered(cold) as kv:
            await put(kv, chain("a", 300))
            far, near = chain("a", 300)[-1], chain("a", 300)[-2]
            assert tier_of(kv, far) == tier_of(kv, near) == "cold"
            with cold.hang("read") as hang:
                async with anyio.create_task_group() as tasks:

                    async def load() -> None:
                        async with kv.load([near]):
                            pass

                    tasks.start_soon(load)
                    await hang.entered.wait()
                    await kv.evict(chain("a", 20))  # there is room
                    kv.hint_prefetch([far])
                    for _ in range(20):
                        await anyio.lowlevel.checkpoint()
                    assert kv.get_stats().tiers["cold"].queue_depth == 1
                    hang.release()
            await eventually(lambda: tier_of(kv, far) == "hot")

    async def test_hints_take_no_room_that_stores_need(self) -> None:
        """A hundred are hinted into a full tier: the low watermark stays free, nothing is lost."""
        cold = FaultyTier(RestartableTier(400, SIZE, name="cold"))
        async with tiered(cold, lookahead=16) as kv:
            await put(kv, chain("a", 300))
            hinted = chain("a", 300)[-100:]
            kv.hint_prefetch(hinted)

            def settled() -> bool:
                stats = kv.get_stats()
                came = sum(tier_of(kv, each) == "hot" for each in hinted)
                return came + stats.prefetch_dropped + stats.prefetch_wasted >= 100

            await eventually(settled)
            stats = kv.get_stats()
            assert stats.evictions == 0
            assert stats.tiers["hot"].free_blocks >= 5
            assert await kv.lookup(chain("a", 300)) == 300

    async def test_what_comes_too_late_is_counted(self) -> None:
        """Wanted while it still waits, and while it is being read; neither is read twice."""
        cold = FaultyTier(RestartableTier(400, SIZE, name="cold"))
        async with tiered(cold, lookahead=1) as kv:
            await put(kv, chain("a", 300))
            first, second = chain("a", 300)[-2:]
            await kv.evict(chain("a", 20))
            before = kv.get_stats().tiers["cold"].blocks_read
            with cold.hang("read", times=1) as hang:
                kv.hint_prefetch([first, second])
                await hang.entered.wait()  # the first is being read
                async with anyio.create_task_group() as tasks:

                    async def load() -> None:
                        async with kv.load([first, second]) as lease:
                            assert bytes(lease[1]) == payload_for(second, SIZE)

                    tasks.start_soon(load)
                    await eventually(lambda: kv.get_stats().prefetch_late == 2)
                    hang.release()
            stats = kv.get_stats()
            assert stats.tiers["cold"].blocks_read == before + 2
            assert (stats.prefetch_issued, stats.prefetch_dropped) == (1, 0)
            assert stats.prefetch_useful == stats.prefetch_wasted == 0

    async def test_a_request_reads_ahead_without_a_hint(self) -> None:
        """Its chain's head is in memory and the rest is not: so many blocks come by themselves."""
        cold = FaultyTier(RestartableTier(400, SIZE, name="cold"))
        async with tiered(cold) as kv:
            hashes = chain("a", 200)
            await put(kv, hashes)
            await eventually(lambda: kv.get_stats().tiers["hot"].free_blocks >= 10)
            at = [tier_of(kv, each) for each in hashes]
            first = at.index("cold")
            assert 0 < first < 190
            async with kv.request(hashes) as request:
                await eventually(lambda: tier_of(kv, hashes[first + 3]) == "hot")
                assert tier_of(kv, hashes[first + 4]) == "cold"
                async with request.load(first + 4) as lease:
                    assert bytes(lease[-1]) == payload_for(hashes[first + 3], SIZE)
            assert kv.get_stats().prefetch_useful == 4

    async def test_a_request_that_is_gone_reads_nothing_ahead(self) -> None:
        """It was cancelled before its turn came."""
        cold = FaultyTier(RestartableTier(400, SIZE, name="cold"))
        async with tiered(cold) as kv:
            hashes = chain("a", 200)
            await put(kv, hashes)
            await eventually(lambda: kv.get_stats().tiers["hot"].free_blocks >= 10)
            with cold.hang("read") as hang, anyio.CancelScope() as scope:
                kv.hint_prefetch(hashes[-1:])
                await hang.entered.wait()
                async with kv.request(hashes):
                    scope.cancel()
                    await anyio.lowlevel.checkpoint()
            await eventually(lambda: tier_of(kv, hashes[-1]) == "hot")
            stats = kv.get_stats()
            assert (stats.prefetch_issued, stats.prefetch_dropped) == (1, 4)

    async def test_a_request_cancels_no_hint_of_others(self) -> None:
        """A router had hinted the same blocks; the request only looked and left."""
        cold = FaultyTier(RestartableTier(400, SIZE, name="cold"))
        async with tiered(cold) as kv:
            hashes = chain("a", 200)
            await put(kv, hashes)
            await eventually(lambda: kv.get_stats().tiers["hot"].free_blocks >= 10)
            first = [tier_of(kv, each) for each in hashes].index("cold")
            kv.hint_prefetch(hashes[first : first + 2])
            async with kv.request(hashes):
                pass
            await eventually(lambda: tier_of(kv, hashes[first + 1]) == "hot")
            assert kv.get_stats().prefetch_late == 0

    async def test_hints_find_room_where_nothing_has_to_be_moved(self) -> None:
        """All in memory has copies below, so no room is made ahead, and none was found."""
        manager = AsyncLRUManager(
            hot=MemoryTier(100, SIZE),
            cold=RestartableTier(400, SIZE, name="cold"),
            policy="lru",
            watermarks=(0.05, 0.1),
            write_policy="through",
        )
        async with manager as kv:
            for name in "abc":
                await put(kv, chain(name, 90))
            hinted = chain("a", 8)
            assert {tier_of(kv, each) for each in hinted} == {"cold"}
            kv.hint_prefetch(hinted)
            await eventually(lambda: {tier_of(kv, each) for each in hinted} == {"hot"})
            assert kv.get_stats().evictions == 0

    async def test_a_hint_that_waits_for_room_pins_nothing(self) -> None:
        """It pinned all that was hinted, and so kept the very room from being made."""
        cold = FaultyTier(RestartableTier(1000, SIZE, name="cold"))
        async with tiered(cold) as kv:
            hashes = chain("a", 800)
            await put(kv, hashes)
            with cold.hang("write"):
                kv.hint_prefetch(hashes)
                for _ in range(30):
                    await anyio.lowlevel.checkpoint()
                assert kv.get_stats().pinned <= 16  # what is on its way
