"""Hints fetch from a remote tier: in the background, behind demand, into room that is to spare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    MemoryTier,
    NamespaceShare,
    ObjectStoreTier,
    RemoteTier,
    TierState,
    TierUnavailableError,
    ValkeyTier,
)
from kvoffload.keys import encode_key
from kvoffload.testing import (
    DictRemoteTier,
    FaultyTier,
    ManualClock,
    RestartableTier,
    eventually,
    payload_for,
)

from .servers import Server

SIZE = 64


def chain(name: str, length: int) -> list[BlockHash]:
    return [f"{name}{number}" for number in range(length)]


def payloads(hashes: Sequence[BlockHash]) -> list[bytes]:
    return [payload_for(each, SIZE) for each in hashes]


def engine_with(hashes: Sequence[BlockHash], namespace: str = "") -> dict[bytes, bytes]:
    return {encode_key(each, namespace): payload_for(each, SIZE) for each in hashes}


def manager_of(remote: RemoteTier, *, hot_blocks: int = 20, **settings: Any) -> AsyncLRUManager:
    settings = {"policy": "lru", **settings}
    return AsyncLRUManager(hot=MemoryTier(hot_blocks, SIZE), remote=remote, **settings)


def with_cold(remote: RemoteTier, **settings: Any) -> AsyncLRUManager:
    """Room is made ahead where fewer than 5 of 100 slots are free, until 10 are."""
    cold = settings.pop("cold", None) or RestartableTier(400, SIZE, name="cold")
    return manager_of(remote, hot_blocks=100, cold=cold, watermarks=(0.05, 0.1), **settings)


def tiers_of(kv: AsyncLRUManager, hashes: Sequence[BlockHash]) -> list[str | None]:
    return [each.tier for each in kv.locate(hashes)]


async def all_hot(kv: AsyncLRUManager, hashes: Sequence[BlockHash]) -> None:
    await eventually(lambda: tiers_of(kv, hashes) == ["hot"] * len(hashes))


async def settled(kv: AsyncLRUManager) -> None:
    await eventually(lambda: not (kv.get_stats().pinned or kv.get_stats().pending))
    kv.check_invariants()
    assert not kv.get_stats().tiers["hot"].pending_blocks


async def put(kv: AsyncLRUManager, hashes: Sequence[BlockHash]) -> None:
    assert not (await kv.store(hashes, payloads(hashes))).rejected


async def turn() -> None:
    for _ in range(50):
        await anyio.lowlevel.checkpoint()


async def test_a_hint_of_a_chain_that_nobody_stored_hides_no_other(tmp_path: Path) -> None:
    """An object store says nothing of what comes behind many blocks that it doesn't have.

    It was taken to say that those are not there, for as long as its answers are believed: what was
    hinted next was not fetched, nor found by a lookup.
    """
    url, nobodys, stored = f"file://{tmp_path}/blocks", chain("nobody's", 100), chain("a", 20)
    async with manager_of(ObjectStoreTier(url)) as kv:
        await put(kv, stored)
    async with manager_of(ObjectStoreTier(url), remote_ttl_s=60) as kv:
        assert kv.hint_prefetch(nobodys) == 100
        assert kv.hint_prefetch(stored) == 20
        await all_hot(kv, stored)
        assert await kv.lookup(nobodys) == 0


@pytest.mark.parametrize("sizes", [[], [SIZE] * 3])
async def test_an_engine_that_finds_too_little_or_too_much(sizes: list[int]) -> None:
    """It is taken for one that does not answer, and not asked for the same for ever."""

    class Wrong(DictRemoteTier):
        async def find(self, keys: Sequence[bytes]) -> list[int | None]:
            return [*sizes]

    async with manager_of(Wrong(), clock=ManualClock()) as kv:
        with anyio.fail_after(5), pytest.raises(TierUnavailableError, match=r"find\(\)"):
            async with kv.load(["a", "b"]):
                pass
        assert await kv.lookup(["a"]) == 0


async def test_hinted_blocks_come_into_the_hot_tier() -> None:
    """One question for the whole hint, then batch by batch; loads find them here."""
    hashes = chain("a", 10)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote) as kv:
        assert kv.hint_prefetch(hashes) == 10
        assert kv.hint_prefetch(hashes) == 0
        await all_hot(kv, hashes)
        assert remote.calls["find"] == 1
        assert remote.calls["get"] == 3
        assert kv.hint_prefetch(hashes) == 0
        async with kv.load(hashes[:6]) as lease:
            assert list(lease) == payloads(hashes[:6])
        assert remote.calls["get"] == 3
        await kv.evict(num_blocks=4)
        stats = kv.get_stats()
        assert (stats.prefetch_issued, stats.prefetch_dropped, stats.prefetch_late) == (10, 0, 0)
        assert (stats.prefetch_useful, stats.prefetch_wasted) == (6, 4)
        assert stats.tiers["remote"].blocks_read == 10
        await kv.flush()
        assert remote.calls["put"] == 0  # it has them from there
        await settled(kv)


@pytest.mark.parametrize("ttl_s", [0.0, 1.0])
async def test_what_is_nowhere_is_neither_fetched_nor_dropped(ttl_s: float) -> None:
    """The end of most chains that a router hints was never computed."""
    hashes = chain("a", 10)
    remote = DictRemoteTier(store=engine_with(hashes[:5]))
    async with manager_of(remote, remote_ttl_s=ttl_s, clock=ManualClock()) as kv:
        kv.hint_prefetch(hashes)
        await all_hot(kv, hashes[:5])
        await eventually(lambda: not kv._prefetcher.waiting(1))
        assert tiers_of(kv, hashes[5:]) == [None] * 5
        stats = kv.get_stats()
        assert (stats.prefetch_issued, stats.prefetch_dropped) == (5, 0)
        await settled(kv)


async def test_a_hint_over_all_tiers() -> None:
    """Some are in memory, some on disk, the rest elsewhere."""
    hashes = chain("a", 12)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with with_cold(remote) as kv:
        for some in (hashes[4:8], chain("new", 95), hashes[:4]):
            await put(kv, some)
        assert set(tiers_of(kv, hashes[:4])) == {"hot"}
        await eventually(lambda: set(tiers_of(kv, hashes[4:8])) == {"cold"})
        await kv.evict(chain("new", 20))
        assert kv.hint_prefetch(hashes) == 8
        await all_hot(kv, hashes)
        assert kv.get_stats().tiers["remote"].blocks_read == 4
        await settled(kv)


async def test_without_addresses_it_is_written_through_the_tier() -> None:
    hashes = chain("a", 6)
    hot = FaultyTier(MemoryTier(8, SIZE))
    remote = DictRemoteTier(store=engine_with(hashes))
    async with AsyncLRUManager(hot=hot, remote=remote) as kv:
        kv.hint_prefetch(hashes)
        await all_hot(kv, hashes)
        async with kv.load(hashes) as lease:
            assert list(lease) == payloads(hashes)
        await settled(kv)


async def test_cancelled_hints_are_not_fetched() -> None:
    hashes = chain("a", 10)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote) as kv:
        with remote.hang("get") as hang:
            kv.hint_prefetch(hashes)
            await hang.entered.wait()
            assert kv.cancel_prefetch(hashes) == 6
        await all_hot(kv, hashes[:4])
        await turn()
        assert remote.calls["get"] == 1
        stats = kv.get_stats()
        assert (stats.prefetch_issued, stats.prefetch_dropped) == (4, 6)
        await settled(kv)


# Behind demand


async def test_hints_wait_for_fetches_that_somebody_waits_for() -> None:
    hashes = chain("a", 4)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote) as kv:
        with remote.hang("get") as hang:
            async with anyio.create_task_group() as tasks:

                async def load() -> None:
                    async with kv.load(hashes[:2]) as lease:
                        assert list(lease) == payloads(hashes[:2])

                tasks.start_soon(load)
                await hang.entered.wait()
                kv.hint_prefetch(hashes)
                await turn()
                assert remote.calls["get"] == 1
                hang.release()
        await all_hot(kv, hashes)
        stats = kv.get_stats()
        assert (stats.prefetch_issued, stats.prefetch_late) == (2, 0)
        await settled(kv)


async def test_hints_on_disk_wait_for_fetches_too() -> None:
    remote = DictRemoteTier(store=engine_with(["far"]))
    cold = FaultyTier(RestartableTier(400, SIZE, name="cold"))
    async with with_cold(remote, cold=cold) as kv:
        await put(kv, chain("a", 300))
        last = chain("a", 300)[-1:]
        await kv.evict(chain("a", 20))
        with remote.hang("get") as hang:
            async with anyio.create_task_group() as tasks:

                async def load() -> None:
                    async with kv.load(["far"]):
                        pass

                tasks.start_soon(load)
                await hang.entered.wait()
                kv.hint_prefetch(last)
                await turn()
                assert kv.get_stats().prefetch_issued == 0
                hang.release()
        await all_hot(kv, last)
        await settled(kv)


async def test_what_comes_too_late_is_counted_and_fetched_once() -> None:
    """Wanted while it is fetched, and while it waits for its turn."""
    hashes = chain("a", 3)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote, prefetch_lookahead=1) as kv:
        with remote.hang("get") as hang:
            kv.hint_prefetch(hashes)
            await hang.entered.wait()
            async with anyio.create_task_group() as tasks:

                async def load() -> None:
                    async with kv.load(hashes[:2]) as lease:
                        assert list(lease) == payloads(hashes[:2])

                tasks.start_soon(load)
                await eventually(lambda: kv.get_stats().prefetch_late == 2)
                hang.release()
        await all_hot(kv, hashes)
        stats = kv.get_stats()
        assert stats.tiers["remote"].blocks_read == 3
        assert (stats.prefetch_issued, stats.prefetch_dropped) == (2, 0)
        assert (stats.prefetch_useful, stats.prefetch_late) == (0, 2)
        await settled(kv)


async def test_hints_take_no_room_that_stores_need() -> None:
    """A hundred are hinted into a full tier: the low watermark stays free, nothing is lost."""
    hashes = chain("a", 100)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with with_cold(remote, prefetch_lookahead=16, remote_queue_bytes=0) as kv:
        own = chain("own", 300)
        await put(kv, own)
        await eventually(lambda: kv.get_stats().tiers["hot"].free_blocks >= 10)
        kv.hint_prefetch(hashes)
        await eventually(lambda: not kv._prefetcher.waiting(1))
        await settled(kv)
        stats = kv.get_stats()
        came = tiers_of(kv, hashes).count("hot")
        assert 5 <= came < 100
        # What gives way for them has its bytes below.
        assert stats.evictions == 0
        assert stats.tiers["hot"].free_blocks >= 5
        assert await kv.lookup(own) == 300


async def test_hints_wait_for_no_room_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free above the low watermark they take, and the disk makes no more."""
    monkeypatch.setattr("kvoffload.movement.loading.HINT_PATIENCE_S", 0.01)
    hashes = chain("a", 100)
    remote = DictRemoteTier(store=engine_with(hashes))
    cold = FaultyTier(RestartableTier(400, SIZE, name="cold"))
    async with with_cold(remote, cold=cold, prefetch_lookahead=16) as kv:
        await put(kv, chain("own", 300))
        await eventually(lambda: kv.get_stats().tiers["hot"].free_blocks == 10)
        with cold.hang("write"):
            kv.hint_prefetch(hashes)
            await eventually(lambda: kv.get_stats().prefetch_dropped == 95)
            assert kv.get_stats().tiers["hot"].free_blocks == 5
            assert tiers_of(kv, hashes).count("hot") == 5
        await settled(kv)


async def test_a_block_that_is_stored_while_a_hint_waits_for_room() -> None:
    """The hint leaves it alone, and gives its slot back."""
    remote = DictRemoteTier(store=engine_with(["a", "b"]))
    cold = FaultyTier(RestartableTier(10, SIZE, name="cold"))
    async with manager_of(remote, hot_blocks=3, cold=cold, watermarks=(0, 0)) as kv:
        await put(kv, chain("own", 3))
        with cold.hang("write") as hang:
            kv.hint_prefetch(["a", "b"])
            await hang.entered.wait()
            await kv.evict(["own0"])
            await put(kv, ["a"])
        await all_hot(kv, ["a", "b"])
        await eventually(lambda: kv.get_stats().prefetch_issued == 2)
        assert kv.get_stats().tiers["remote"].blocks_read == 1
        await settled(kv)


async def test_where_no_room_is_made_ahead_the_coldest_give_way() -> None:
    """But nothing that is pinned, and none of the hint for another; also if blocks are spared."""
    old, hashes = chain("old", 8), chain("a", 10)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote, hot_blocks=8, cold_admission="reused") as kv:
        await put(kv, old)
        async with kv.load(old[:3]) as lease:
            kv.hint_prefetch(hashes)
            await eventually(lambda: kv.get_stats().prefetch_dropped == 5)
            assert list(lease) == payloads(old[:3])
        assert tiers_of(kv, [*old[:3], *hashes[:5]]) == ["hot"] * 8
        assert kv.get_stats().prefetch_wasted == 0
        await settled(kv)


async def test_a_quota_holds_for_hints() -> None:
    """What a namespace has makes no way for what it might want."""
    hashes = chain("a", 4)
    remote = DictRemoteTier(store=engine_with(hashes, "tenant"))
    shares = {"tenant": NamespaceShare(max_bytes=3 * SIZE)}
    async with manager_of(remote, shares=shares) as kv:
        tenant = kv.namespace("tenant")
        await tenant.store(["own", "other"], payloads(["own", "other"]))
        assert tenant.hint_prefetch(hashes) == 4
        await eventually(lambda: tenant.get_stats().prefetch_dropped == 3)
        assert await tenant.lookup(["own", "other", hashes[0]]) == 3
        assert tenant.locate([hashes[0]])[0].tier == "hot"
        await settled(kv)


# Trouble


async def test_hints_for_a_dead_engine_are_dropped() -> None:
    hashes = chain("a", 10)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote, clock=ManualClock()) as kv:
        remote.is_dead = True
        kv.hint_prefetch(hashes)
        await eventually(lambda: kv.get_stats().prefetch_dropped == 10)
        assert kv.get_stats().tiers["remote"].state is TierState.UNAVAILABLE
        assert remote.calls["find"] == 1
        stats = kv.get_stats()
        assert stats.prefetch_issued == 0
        await settled(kv)


async def test_blocks_that_do_not_come_are_dropped() -> None:
    """One is gone, one damaged, one can't be read; the others are not disturbed."""
    hashes = chain("a", 5)
    keys = [encode_key(each, "") for each in hashes]
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote, prefetch_lookahead=8) as kv:
        assert await kv.lookup(hashes) == 5
        del remote.store[keys[0]]
        remote.corrupt.add(keys[1])
        remote.fail("get", keys=[keys[2]])
        kv.hint_prefetch(hashes)
        await all_hot(kv, hashes[3:])
        await eventually(lambda: kv.get_stats().prefetch_dropped == 3)
        stats = kv.get_stats()
        assert (stats.prefetch_issued, stats.corrupt, stats.io_errors) == (5, 1, 2)
        assert stats.tiers["hot"].free_blocks == 18
        await settled(kv)


async def test_close_in_the_middle_of_a_hint() -> None:
    hashes = chain("a", 5)
    remote = DictRemoteTier(store=engine_with(hashes))
    hang = remote.hang("get")
    with anyio.fail_after(10):
        async with manager_of(remote, remote_timeout_s=0.02) as kv:
            kv.hint_prefetch(hashes)
            await hang.entered.wait()
    stats = kv.get_stats()
    assert (stats.pinned, stats.pending, stats.tiers["hot"].free_blocks) == (0, 0, 20)


# Without a hint


async def test_a_request_reads_ahead_what_only_the_engine_has() -> None:
    hashes = chain("a", 20)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with with_cold(remote) as kv:
        await put(kv, hashes[:3])
        async with kv.request(hashes) as request:
            assert request.hit == 20
            await all_hot(kv, hashes[:7])
            await turn()
            assert set(tiers_of(kv, hashes[7:])) == {"remote"}
            async with request.load() as lease:
                assert list(lease) == payloads(hashes)
        stats = kv.get_stats()
        assert (stats.prefetch_useful, stats.prefetch_late) == (4, 0)
        assert stats.tiers["remote"].blocks_read == 17
        await settled(kv)


async def test_a_request_that_loads_at_once_fetches_all_at_once() -> None:
    """Reading ahead would only have split it."""
    hashes = chain("a", 20)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with with_cold(remote) as kv:
        await put(kv, hashes[:3])
        async with kv.request(hashes) as request, request.load() as lease:
            assert list(lease) == payloads(hashes)
        assert remote.calls["get"] == 1
        await settled(kv)


# On a real server


async def test_hints_from_a_server(server: Server) -> None:
    hashes = chain("a", 50)
    async with manager_of(ValkeyTier(server.url), hot_blocks=100) as here:
        await put(here, hashes)
        await here.flush()
    async with manager_of(ValkeyTier(server.url), hot_blocks=100) as there:
        assert there.hint_prefetch([*hashes, "more"]) == 51
        await all_hot(there, hashes)
        async with there.load(hashes) as lease:
            assert list(lease) == payloads(hashes)
        stats = there.get_stats()
        assert (stats.prefetch_useful, stats.prefetch_dropped) == (50, 0)
        assert stats.tiers["remote"].blocks_read == 50
        await settled(there)
