"""What a manager makes of a remote tier, on one that does as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import anyio
import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    BlockNotFoundError,
    BlockState,
    CapacityError,
    ConfigError,
    EventKind,
    LoadTimeoutError,
    MemoryTier,
    RemoteTier,
    Request,
    Retention,
    TierError,
    TierState,
    TierUnavailableError,
)
from kvoffload.keys import encode_key
from kvoffload.slicing import SLICE_BLOCKS
from kvoffload.testing import (
    DictRemoteTier,
    FaultyTier,
    ManualClock,
    RestartableTier,
    eventually,
    payload_for,
)

SIZE = 64
SERVING = TierState.SERVING


def manager_of(remote: RemoteTier, *, hot_blocks: int = 8, **settings: Any) -> AsyncLRUManager:
    hot = settings.pop("hot", None) or MemoryTier(hot_blocks, SIZE)
    return AsyncLRUManager(hot=hot, remote=remote, policy="lru", **settings)


def payloads(hashes: Sequence[BlockHash]) -> list[bytes]:
    return [payload_for(each, SIZE) for each in hashes]


def chain(name: str, length: int) -> list[BlockHash]:
    return [f"{name}{number}" for number in range(length)]


def engine_with(hashes: Sequence[BlockHash], namespace: str = "") -> dict[bytes, bytes]:
    """Return what an engine has when another manager stored these blocks."""
    return {encode_key(each, namespace): payload_for(each, SIZE) for each in hashes}


async def settled(kv: AsyncLRUManager) -> None:
    await eventually(lambda: not kv.get_stats().pinned and not kv.get_stats().pending)
    kv.check_invariants()


async def time_passes(clock: ManualClock, until: Callable[[], bool]) -> None:
    def tick() -> bool:
        clock.advance(0.1)
        return until()

    await eventually(tick)


# Sharing


async def test_what_one_stores_is_a_hit_for_another() -> None:
    engine: dict[bytes, bytes] = {}
    hashes = chain("block", 5)
    async with (
        manager_of(DictRemoteTier(store=engine)) as here,
        manager_of(DictRemoteTier(store=engine)) as there,
    ):
        await here.store(hashes, payloads(hashes))
        await here.flush()
        assert engine == engine_with(hashes)
        assert await there.lookup([*hashes, "more"]) == 5
        assert [each.tier for each in there.locate(hashes)] == ["remote"] * 5
        async with there.load(hashes) as lease:
            assert list(lease) == payloads(hashes)
        assert [each.tier for each in there.locate(hashes)] == ["hot"] * 5
        stats = there.get_stats()
        assert (stats.hits, stats.misses) == (5, 1)
        assert stats.tiers["remote"].blocks_read == stats.tiers["remote"].hits == 5
        assert stats.tiers["remote"].bytes_read == 5 * SIZE
        await there.flush()
        assert there.get_stats().tiers["remote"].blocks_written == 0  # it has them from there
        await settled(there)


async def test_close_sends_what_is_queued() -> None:
    engine: dict[bytes, bytes] = {}
    hashes = chain("block", 5)
    async with manager_of(DictRemoteTier(store=engine)) as kv:
        await kv.store(hashes, payloads(hashes))
    assert engine == engine_with(hashes)


async def test_a_request_pins_what_it_fetched_and_stores_the_rest() -> None:
    hashes = chain("block", 6)
    remote = DictRemoteTier(store=engine_with(hashes[:4]))
    async with manager_of(remote) as kv:
        await kv.store(hashes[:1], payloads(hashes[:1]))
        async with kv.request(hashes) as request:
            assert request.hit == 4
            assert request.plan(tokens_per_s=1e-3).blocks == 4
            async with request.load(2) as lease:
                assert list(lease) == payloads(hashes[:2])
            async with request.load() as lease:
                assert list(lease) == payloads(hashes[:4])
            assert (await request.store(payloads(hashes[4:]))).stored == (*hashes[4:],)
            # The hit blocks are pinned, so no new ones get their slots.
            result = await kv.store(chain("new", 8), payloads(chain("new", 8)))
            assert len(result.stored) == 2
            async with request.load() as lease:
                assert list(lease) == payloads(hashes[:4])
        await settled(kv)


async def test_a_request_that_is_left_while_its_load_fetches() -> None:
    """The lease holds the pins, not the request, which was there no more to take them back."""
    hashes = chain("block", 3)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote) as kv, anyio.create_task_group() as tasks:

        async def load(request: Request) -> None:
            async with request.load() as lease:
                assert list(lease) == payloads(hashes)
                assert not await kv.evict(hashes)  # pinned

        with remote.hang("get") as hang:
            async with kv.request(hashes) as request:
                tasks.start_soon(load, request)
                await hang.entered.wait()
        await eventually(lambda: kv.get_stats().tiers["hot"].blocks == 3)
        await settled(kv)
        assert len(await kv.evict(hashes)) == 3


async def test_a_gap_that_only_the_engine_has() -> None:
    """Tail first is the order of eviction, but nobody promises it."""
    hashes = chain("block", 5)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote) as kv:
        await kv.store([hashes[3]], payloads([hashes[3]]))
        async with kv.request(hashes) as request:
            assert request.hit == 5
            await kv.evict(num_blocks=8)  # pinned: it is a hit
            async with request.load() as lease:
                assert list(lease) == payloads(hashes)
        await settled(kv)
        assert kv.get_stats().tiers["remote"].blocks_read == 4


async def test_two_phase_loads_fetch_too() -> None:
    hashes = chain("block", 3)
    async with manager_of(DictRemoteTier(store=engine_with(hashes))) as kv:
        spec = await kv.prepare_load(hashes)
        assert [bytes(entry.view) for entry in spec.entries] == payloads(hashes)
        await kv.complete_load(hashes)
        await settled(kv)


async def test_without_addresses_it_is_written_through_the_tier() -> None:
    hashes = chain("block", 3)
    engine = engine_with(hashes)
    hot = FaultyTier(MemoryTier(8, SIZE))
    async with manager_of(DictRemoteTier(store=engine), hot=hot) as kv:
        async with kv.load(hashes) as lease:
            assert list(lease) == payloads(hashes)
        await kv.store(["own"], payloads(["own"]))
        await kv.flush()
        assert engine == engine_with([*hashes, "own"])
        await settled(kv)


async def test_what_is_fetched_pushes_out_what_is_cold() -> None:
    hashes = chain("block", 6)
    async with manager_of(DictRemoteTier(store=engine_with(hashes))) as kv:
        old = chain("old", 8)
        await kv.store(old, payloads(old))
        async with kv.load(hashes) as lease:
            assert list(lease) == payloads(hashes)
        assert kv.get_stats().evictions == 6
        await settled(kv)


async def test_more_than_fits() -> None:
    hashes = chain("block", 9)
    async with manager_of(DictRemoteTier(store=engine_with(hashes))) as kv:
        assert await kv.lookup(hashes) == 9
        with pytest.raises(CapacityError, match="load fewer"):
            async with kv.load(hashes):
                pass
        await settled(kv)
        async with kv.load(hashes[:8]) as lease:
            assert list(lease) == payloads(hashes[:8])
        await settled(kv)


async def test_what_can_never_fit_is_not_begun() -> None:
    """A first part of it was fetched, and pushed out what was there."""
    hashes = chain("block", 400)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote, hot_blocks=300) as kv:
        await kv.store(hashes[:100], payloads(hashes[:100]))
        await kv.store(chain("own", 200), payloads(chain("own", 200)))
        with pytest.raises(CapacityError, match=r"300 blocks to fetch, .* hold 400 at once"):
            async with kv.load(hashes):
                pass
        assert remote.calls["get"] == 0
        assert kv.get_stats().evictions == 0
        await settled(kv)


async def test_namespaces_share_with_their_own_alone() -> None:
    engine = engine_with(["a"], "tenant")
    async with manager_of(DictRemoteTier(store=engine), namespace="model") as kv:
        assert await kv.lookup(["a"]) == 0
        tenant = kv.namespace("tenant")
        assert await tenant.lookup(["a"]) == 1
        async with tenant.load(["a"]) as lease:
            assert list(lease) == payloads(["a"])
        await kv.store(["b"], payloads(["b"]))
        await kv.flush()
        assert engine.keys() == {encode_key("a", "tenant"), encode_key("b", "model")}
        await tenant.clear()
        assert engine.keys() == {encode_key("b", "model")}


# Lookups


async def test_one_question_for_a_batch_and_for_all_callers() -> None:
    remote = DictRemoteTier(store=engine_with(chain("block", 300)))
    async with manager_of(remote) as kv:
        found: list[int] = []

        async def look() -> None:
            found.append(await kv.lookup(chain("block", 400)))

        with remote.hang("find") as hang:
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(look)
                await hang.entered.wait()
                hang.release()
        assert found == [300] * 5
        assert remote.calls["find"] == 1


async def test_answers_are_believed_for_a_moment() -> None:
    clock = ManualClock()
    engine: dict[bytes, bytes] = {}
    remote = DictRemoteTier(store=engine)
    async with manager_of(remote, clock=clock, remote_ttl_s=2.0) as kv:
        assert await kv.lookup(["a"]) == 0
        engine |= engine_with(["a"])
        assert await kv.lookup(["a"]) == 0
        clock.advance(2)
        assert await kv.lookup(["a"]) == 1
        engine.clear()
        assert await kv.lookup(["a"]) == 1
        with pytest.raises(BlockNotFoundError):
            async with kv.load(["a"]):
                pass
        assert await kv.lookup(["a"]) == 0  # it has found that out
        await settled(kv)
    assert remote.calls["find"] == 2


async def test_nothing_is_asked_where_all_is_here() -> None:
    remote = DictRemoteTier()
    async with manager_of(remote) as kv:
        await kv.store(["a", "b"], payloads(["a", "b"]))
        assert await kv.lookup(["a", "b"]) == 2
        async with kv.request(["a", "b"]) as request, request.load() as lease:
            assert len(lease) == 2
        assert remote.calls["find"] == 0


async def test_what_another_caller_fetches_is_a_hit_and_is_fetched_once() -> None:
    hashes = chain("block", 4)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote) as kv:
        leased: list[list[bytes]] = []

        async def load() -> None:
            async with kv.load(hashes) as lease:
                leased.append([bytes(view) for view in lease])

        with remote.hang("get") as hang:
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(load)
                await hang.entered.wait()
                assert await kv.lookup(hashes) == 4
                with anyio.CancelScope() as scope:
                    tasks.start_soon(_cancel_soon, scope)
                    async with kv.load(hashes):
                        pass
                hang.release()
        assert leased == [payloads(hashes)] * 3
        assert remote.calls["get"] == 1
        await settled(kv)


async def _cancel_soon(scope: anyio.CancelScope) -> None:
    await anyio.lowlevel.checkpoint()
    scope.cancel()


async def test_a_block_of_another_geometry_is_none() -> None:
    engine = {encode_key("a", ""): bytes(SIZE + 1)}
    async with manager_of(DictRemoteTier(store=engine)) as kv:
        assert await kv.lookup(["a"]) == 0


# What goes wrong


async def test_a_block_that_is_gone_is_named() -> None:
    hashes = chain("block", 4)
    engine = engine_with(hashes)
    async with manager_of(DictRemoteTier(store=engine)) as kv:
        async with kv.request(hashes) as request:
            assert request.hit == 4
            del engine[encode_key(hashes[2], "")]
            with pytest.raises(BlockNotFoundError) as caught:
                async with request.load():
                    pass
            assert caught.value.block_hashes == (hashes[2],)
            async with request.load(2) as lease:
                assert list(lease) == payloads(hashes[:2])
        await settled(kv)


async def test_a_damaged_block_is_a_miss_an_event_and_a_counter() -> None:
    hashes = chain("block", 3)
    remote = DictRemoteTier(store=engine_with(hashes))
    remote.corrupt.add(encode_key(hashes[1], ""))
    async with manager_of(remote) as kv:
        events = kv.events()
        with pytest.raises(BlockNotFoundError) as caught:
            async with kv.load(hashes):
                pass
        assert caught.value.block_hashes == (hashes[1],)
        assert kv.get_stats().corrupt == 1
        assert await kv.lookup(hashes) == 1
        await settled(kv)
    kinds = [(each.kind, each.block_hashes, each.tier) async for each in events]
    assert (EventKind.FAILED, (hashes[1],), "remote") in kinds


async def test_a_dead_engine_costs_nothing_until_a_probe_finds_it_well() -> None:
    clock = ManualClock()
    hashes = chain("block", 3)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote, clock=clock) as kv:
        events = kv.events()
        remote.is_dead = True
        assert await kv.lookup(hashes) == 0
        assert kv.get_stats().tiers["remote"].state is TierState.UNAVAILABLE
        assert kv.tier_states() == {"hot": SERVING, "remote": TierState.UNAVAILABLE}
        asked = remote.calls["find"]
        assert await kv.lookup(hashes) == 0
        with pytest.raises(TierUnavailableError):
            async with kv.load(hashes):
                pass
        await kv.store(["own"], payloads(["own"]))
        await kv.flush()
        assert remote.calls["find"] == asked
        assert remote.calls["put"] == 0
        await time_passes(clock, lambda: remote.calls["check"] > 1)
        remote.heal()
        await time_passes(clock, lambda: kv.get_stats().tiers["remote"].state is SERVING)
        assert await kv.lookup(hashes) == 3
        # What waited is sent now.
        await eventually(lambda: encode_key("own", "") in remote.store)
        await settled(kv)
    states = [each.detail async for each in events if each.kind is EventKind.STATE]
    assert states == ["unavailable", "serving"]


async def test_a_hung_engine_costs_one_deadline() -> None:
    hashes = chain("block", 3)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote, remote_timeout_s=0.02, clock=ManualClock()) as kv:
        await kv.store(hashes[:1], payloads(hashes[:1]))
        with remote.hang("find"):
            async with kv.request(hashes) as request:
                assert request.hit == 1
            assert kv.get_stats().tiers["remote"].state is TierState.UNAVAILABLE
            assert await kv.lookup(hashes) == 1
            assert remote.calls["find"] == 1
        await settled(kv)


async def test_a_hung_read_is_a_load_timeout() -> None:
    hashes = chain("block", 3)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote, remote_timeout_s=0.02, clock=ManualClock()) as kv:
        with remote.hang("get"):
            async with kv.request(hashes) as request:
                assert request.hit == 3
                with pytest.raises(LoadTimeoutError):
                    async with request.load():
                        pass
        await settled(kv)
        assert kv.get_stats().tiers["hot"].free_blocks == 8


async def test_a_callers_own_deadline() -> None:
    """The fetch goes on for others, and the engine is not to blame."""
    hashes = chain("block", 3)
    remote = DictRemoteTier(store=engine_with(hashes))
    async with manager_of(remote, remote_timeout_s=60) as kv:
        with remote.hang("get"), pytest.raises(LoadTimeoutError, match="recompute"):
            async with kv.load(hashes, timeout_s=0.01):
                pass
        await eventually(lambda: [each.tier for each in kv.locate(hashes)] == ["hot"] * 3)
        assert kv.get_stats().tiers["remote"].state is TierState.SERVING
        await settled(kv)


async def test_one_block_that_cannot_be_read() -> None:
    hashes = chain("block", 3)
    remote = DictRemoteTier(store=engine_with(hashes))
    remote.fail("get", keys=[encode_key(hashes[1], "")])
    async with manager_of(remote) as kv:
        with pytest.raises(TierError) as caught:
            async with kv.load(hashes):
                pass
        assert caught.value.block_hash == hashes[1]
        assert kv.get_stats().io_errors == 1
        await settled(kv)
        remote.heal()
        async with kv.load(hashes) as lease:
            assert list(lease) == payloads(hashes)


async def test_an_engine_that_is_dead_from_the_start() -> None:
    clock = ManualClock()
    remote = DictRemoteTier(store=engine_with(["a"]))
    remote.is_dead = True
    async with manager_of(remote, clock=clock) as kv:
        assert kv.get_stats().tiers["remote"].state is TierState.UNAVAILABLE
        await kv.store(["b"], payloads(["b"]))
        remote.heal()
        await time_passes(clock, lambda: kv.get_stats().tiers["remote"].state is SERVING)
        assert await kv.lookup(["b", "a"]) == 2


async def test_close_with_a_hung_engine() -> None:
    remote = DictRemoteTier()
    hang = remote.hang("put")
    with anyio.fail_after(10):
        async with manager_of(remote, remote_timeout_s=0.02) as kv:
            await kv.store(["a"], payloads(["a"]))
            await hang.entered.wait()
    assert kv.get_stats().pinned == 0
    assert kv.get_stats().tiers["remote"].dropped_blocks == 1


# Writes behind


async def test_flush_while_the_engine_goes_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup finds it dead between a flush's start of a batch and the batch: none is waited for.

    Nothing changes here then, and the flush waited for a change.
    """
    remote = DictRemoteTier()
    async with manager_of(remote) as kv, anyio.create_task_group() as tasks:
        part = kv._core.remote
        assert part is not None
        send_batch = part._sending._send_batch

        async def send_batch_too_late() -> bool:
            remote.is_dead = True
            part._engine.set_state(TierState.UNAVAILABLE, "a lookup got no answer")
            return await send_batch()

        with remote.hang("put") as hang:
            await kv.store(["a"], payloads(["a"]))
            await hang.entered.wait()
            await kv.store(["b"], payloads(["b"]))
            tasks.start_soon(kv.flush)
            await eventually(lambda: bool(kv._core.index.changed._waiters))
            monkeypatch.setattr(part._sending, "_send_batch", send_batch_too_late)
        with anyio.fail_after(5):
            await kv.flush()
        monkeypatch.undo()
        remote.heal()


async def test_the_queue_is_bounded_and_counts() -> None:
    remote = DictRemoteTier()
    hashes = chain("block", 8)
    async with manager_of(remote, remote_queue_bytes=3 * SIZE) as kv:
        with remote.hang("put") as hang:
            await kv.store(hashes[:1], payloads(hashes[:1]))
            await hang.entered.wait()
            await kv.store(hashes[1:], payloads(hashes[1:]))
            stats = kv.get_stats()
            assert stats.tiers["remote"].backlog_bytes == 3 * SIZE
            assert stats.tiers["remote"].dropped_blocks == 4
            assert stats.pinned == 1  # the one that is being sent
        await kv.flush()
        assert len(remote.store) == 4
        assert kv.get_stats().tiers["remote"].backlog_bytes == 0
        await settled(kv)


async def test_what_leaves_before_its_turn_is_dropped() -> None:
    remote = DictRemoteTier()
    async with manager_of(remote) as kv:
        with remote.hang("put") as hang:
            await kv.store(["a"], payloads(["a"]))
            await hang.entered.wait()
            await kv.store(["b", "c"], payloads(["b", "c"]))
            assert await kv.evict(num_blocks=1) == ["c"]
        await kv.flush()
        assert remote.store.keys() == {encode_key("a", ""), encode_key("b", "")}
        assert kv.get_stats().tiers["remote"].dropped_blocks == 1


async def test_an_engine_that_is_full_is_left_alone_for_a_while() -> None:
    clock = ManualClock()
    remote = DictRemoteTier(store=engine_with(["old"]))
    async with manager_of(remote, clock=clock) as kv:
        remote.fail("put")
        await kv.store(["a"], payloads(["a"]))
        await eventually(lambda: kv.get_stats().tiers["remote"].state is TierState.READ_ONLY)
        assert await kv.lookup(["old"]) == 1
        await kv.store(["b"], payloads(["b"]))
        await kv.flush()  # does not wait for it
        assert remote.calls["put"] == 1
        remote.heal()
        await time_passes(clock, lambda: encode_key("b", "") in remote.store)
        stats = kv.get_stats().tiers["remote"]
        assert (stats.state, stats.dropped_blocks, stats.errors) == (TierState.SERVING, 1, 1)


async def test_only_what_is_used_again_is_sent() -> None:
    remote = DictRemoteTier()
    async with manager_of(remote, remote_admission="reused") as kv:
        await kv.store(["a", "b"], payloads(["a", "b"]))
        await kv.flush()
        assert not remote.store
        await kv.touch(["b"])
        await kv.flush()
        assert remote.store.keys() == {encode_key("b", "")}


async def test_likely_needs_a_policy_that_can_tell() -> None:
    with pytest.raises(ConfigError, match="remote_admission"):
        manager_of(DictRemoteTier(), remote_admission="likely")


async def test_likely_blocks_are_sent_when_they_are_used() -> None:
    remote = DictRemoteTier()
    async with AsyncLRUManager(
        hot=MemoryTier(8, SIZE), remote=remote, remote_admission="likely"
    ) as kv:
        await kv.store(["a", "b"], payloads(["a", "b"]))
        await kv.touch(["b"])
        await kv.flush()
        assert encode_key("b", "") in remote.store


# Leaving


async def test_evict_reaches_it() -> None:
    engine = engine_with(["a", "b"])
    async with manager_of(DictRemoteTier(store=engine)) as kv:
        await kv.store(["c"], payloads(["c"]))
        await kv.flush()
        assert await kv.evict(["c", "a", "nobody's"]) == ["c", "a"]
        assert engine.keys() == {encode_key("b", "")}
        assert await kv.lookup(["c"]) == await kv.lookup(["a"]) == 0
        async with kv.load(["b"]):
            assert await kv.evict(["b"]) == []
        assert engine.keys() == {encode_key("b", "")}
        assert await kv.evict(num_blocks=5) == ["b"]
        assert kv.locate(["b"])[0].state is BlockState.ABSENT or await kv.lookup(["b"]) == 1


async def test_evict_says_that_the_engine_was_not_reached() -> None:
    remote = DictRemoteTier(store=engine_with(["a"]))
    async with manager_of(remote, clock=ManualClock()) as kv:
        await kv.store(["b"], payloads(["b"]))
        await kv.flush()
        remote.is_dead = True
        with pytest.raises(TierUnavailableError):
            await kv.evict(["b"])
        assert kv.get_stats().tiers["hot"].blocks == 0


async def test_a_disk_that_erases_nothing_keeps_nothing_on_the_engine() -> None:
    """Which would have shown at once what the caller wanted gone, again and again."""
    engine: dict[bytes, bytes] = {}
    hashes, others = chain("block", 4), chain("other", 2)
    cold = FaultyTier(RestartableTier(16, SIZE, name="cold"))
    async with manager_of(DictRemoteTier(store=engine), cold=cold) as kv:
        await kv.store(hashes, payloads(hashes))
        await kv.store(others, payloads(others))
        await kv.flush()
        cold.fail("erase", times=None)
        for remove, left in (
            (lambda: kv.evict(hashes[:2]), 4),
            (lambda: kv.forget(hashes), 2),
            (kv.clear, 0),
        ):
            with pytest.raises(TierError):
                await remove()
            assert len(engine) == left
        assert await kv.lookup(hashes) == await kv.lookup(others) == 0
        cold.heal()


async def test_an_engine_that_deletes_nothing_serves_all_the_same() -> None:
    """As a bucket that its users may write to, but not delete from; each eviction stopped it."""

    class NothingLeaves(DictRemoteTier):
        async def delete(self, keys: Sequence[bytes]) -> list[bool]:
            raise TierError("the engine refused: AccessDenied", tier=self.name)

        async def clear(self, namespace: str) -> AsyncIterator[int]:
            await self.delete([])
            yield 0

    async with manager_of(NothingLeaves(store=engine_with(["b"]))) as kv:
        await kv.store(["a", "c"], payloads(["a", "c"]))
        for remove in (lambda: kv.evict(["a"]), lambda: kv.forget(["c"]), kv.clear):
            with pytest.raises(TierError, match=r"^the engine refused: AccessDenied"):
                await remove()
        assert kv.get_stats().tiers["remote"].state is SERVING
        assert await kv.lookup(["b"]) == 1


async def test_a_clear_that_is_cancelled_reaches_it_nevertheless() -> None:
    engine: dict[bytes, bytes] = {}
    hashes = chain("block", 2 * SLICE_BLOCKS)
    async with manager_of(DictRemoteTier(store=engine), hot_blocks=len(hashes)) as kv:
        await kv.store(hashes, payloads(hashes))
        await kv.flush()
        assert len(engine) == len(hashes)
        clearing = asyncio.create_task(kv.clear())
        await eventually(lambda: kv.get_stats().tiers["hot"].blocks < len(hashes))
        clearing.cancel()
        await eventually(lambda: not engine)
        assert await kv.lookup(hashes) == 0


async def test_clear_drops_the_managers_namespaces_and_no_others() -> None:
    engine = engine_with(["a", "b"], "model") | engine_with(["a"], "other")
    async with manager_of(DictRemoteTier(store=engine), namespace="model") as kv:
        tenant = kv.namespace("tenant")
        await tenant.store(["c"], payloads(["c"]))
        await kv.flush()
        assert len(engine) == 4
        await kv.clear()
        assert engine.keys() == {encode_key("a", "other")}
        assert await kv.lookup(["a"]) == 0


async def test_a_session_that_is_over_leaves_it_too() -> None:
    engine: dict[bytes, bytes] = {}
    hashes = chain("block", 3)
    async with manager_of(DictRemoteTier(store=engine)) as kv:
        async with kv.request(hashes) as request:
            await request.store(payloads(hashes))
            await kv.flush()
            assert len(engine) == 3
            request.retention = Retention.SESSION_OVER
        await eventually(lambda: not engine)
        await kv.store(hashes, payloads(hashes))
        await kv.flush()
        assert await kv.forget(hashes) == hashes
        assert not engine


# Settings


@pytest.mark.parametrize(
    "settings",
    [
        {"remote_timeout_s": 0},
        {"remote_timeout_s": float("inf")},
        {"remote_ttl_s": -1},
        {"remote_queue_bytes": -1},
        {"remote_admission": "some"},
    ],
)
async def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        manager_of(DictRemoteTier(), **settings)


async def test_names_differ() -> None:
    with pytest.raises(ConfigError, match="different names"):
        manager_of(DictRemoteTier(name="hot"))
