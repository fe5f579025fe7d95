"""Quotas and reserves of namespaces, told as stories."""

from __future__ import annotations

from typing import Any

import pytest

from kvoffload import (
    AsyncLRUManager,
    ConfigError,
    CorruptBlockError,
    LRUManagerFactory,
    LRUPolicy,
    ManagerSettings,
    MemoryTier,
    NamespaceShare,
    OffloadingManager,
    RejectReason,
)
from kvoffload.testing import FaultyTier, ManualClock, RestartableTier, payload_for

BLOCK = 8
QUOTA = RejectReason.QUOTA
PINNED = RejectReason.PINNED


def blocks(count: int) -> int:
    return count * BLOCK


def quota(count: int) -> NamespaceShare:
    return NamespaceShare(max_bytes=blocks(count))


def reserve(count: int) -> NamespaceShare:
    return NamespaceShare(reserved_bytes=blocks(count))


def make(
    hot: int, warm: int = 0, *, clock: ManualClock | None = None, **options: Any
) -> AsyncLRUManager:
    options.setdefault("policy", "lru")
    return AsyncLRUManager(
        hot=MemoryTier(hot, BLOCK),
        warm=MemoryTier(warm, BLOCK, name="warm") if warm else None,
        clock=clock or ManualClock(),
        **options,
    )


async def store(kv: OffloadingManager, *hashes: str) -> Any:
    return await kv.store(hashes, [payload_for(each, BLOCK) for each in hashes])


async def there(kv: OffloadingManager, *hashes: str) -> str:
    """Return the names of those of the blocks that are ready."""
    return " ".join([each for each in hashes if await kv.lookup([each])])


def used(kv: AsyncLRUManager, name: str | None) -> int:
    assert kv._core.index.shares is not None
    kv.check_invariants()
    return kv._core.index.shares.used(name) // BLOCK


class TestQuota:
    async def test_own_coldest_blocks_give_way_though_there_is_room(self) -> None:
        """The tier has ten slots and two are in use: a quota is a quota."""
        async with make(10, shares={"a": quota(2)}) as kv:
            a = kv.namespace("a")
            await store(a, "a1")
            await store(a, "a2")
            result = await store(a, "a3")
            assert (result.stored, result.evicted) == (("a3",), ("a1",))
            assert await there(a, "a1", "a2", "a3") == "a2 a3"
            assert used(kv, "a") == 2
            assert a.get_stats().evictions == 1

    async def test_nobody_else_gives_way_for_it(self) -> None:
        """Nor do they count: others fill what is left of the tier."""
        async with make(6, shares={"a": quota(2)}) as kv:
            a, b = kv.namespace("a"), kv.namespace("b")
            await store(b, "b1", "b2", "b3", "b4")
            await store(a, "a1", "a2")
            assert (await store(a, "a3", "a4")).evicted == ("a2", "a1")
            assert await there(b, "b1", "b2", "b3", "b4") == "b1 b2 b3 b4"

    async def test_the_end_of_a_chain_that_is_too_long_is_rejected(self) -> None:
        """Its head is of use without its tail."""
        async with make(10, shares={"a": quota(3)}) as kv:
            a = kv.namespace("a")
            await store(a, "old")
            result = await store(a, "c0", "c1", "c2", "c3", "c4")
            assert result.stored == ("c0", "c1", "c2")
            assert result.rejected == {"c3": QUOTA, "c4": QUOTA}
            assert result.evicted == ("old",)
            assert a.get_stats().rejected == 2

    async def test_a_payload_larger_than_the_quota_costs_nothing(self) -> None:
        """What can't fit pushes nothing out."""
        async with make(10, shares={"a": NamespaceShare(max_bytes=5)}) as kv:
            a = kv.namespace("a")
            await a.store(["small"], [b"12345"])
            result = await store(a, "large")
            assert (result.rejected, result.evicted) == ({"large": QUOTA}, ())
            assert await there(a, "small") == "small"

    async def test_payload_bytes_count_not_slots(self) -> None:
        """Four blocks of a quarter are one."""
        async with make(10, shares={"a": quota(1)}) as kv:
            a = kv.namespace("a")
            names = [f"q{number}" for number in range(5)]
            result = await a.store(names, [b"12"] * 5)
            assert result.stored == tuple(names[:4])
            assert (await store(a, "whole")).evicted == ("q3", "q2", "q1", "q0")

    async def test_pinned_blocks_are_not_pushed_out(self) -> None:
        """They are in use; and what the call names itself is safe too."""
        async with make(10, shares={"a": quota(2)}) as kv:
            a = kv.namespace("a")
            await store(a, "a1", "a2")
            async with a.load(["a1", "a2"]):
                assert (await store(a, "a3")).rejected == {"a3": QUOTA}
            result = await store(a, "a1", "a3")
            assert (result.present, result.stored) == (("a1",), ("a3",))
            assert result.evicted == ("a2",)

    async def test_a_block_and_its_copy_count_once(self) -> None:
        """Promoted, its old slot keeps a copy."""
        shares = {"a": quota(2)}
        async with make(1, 4, shares=shares, promote_threshold=1) as kv:
            a = kv.namespace("a")
            await store(a, "a1", "a2")
            for _ in range(2):
                async with a.load(["a2"]):
                    pass
            tiers = kv.get_stats().tiers
            assert tiers["hot"].blocks + tiers["warm"].blocks == 3
            assert used(kv, "a") == 2
            assert (await store(a, "a3")).stored == ("a3",)
            assert used(kv, "a") == 2

    async def test_the_lowest_tier_gives_way_first(self) -> None:
        """As when anything else makes room."""
        clock = ManualClock()
        async with make(2, 4, clock=clock, shares={"a": quota(4)}) as kv:
            a = kv.namespace("a")
            for name in ("a1", "a2", "a3", "a4"):
                await store(a, name)
                clock.advance(1)
            assert (await store(a, "a5")).evicted == ("a1",)
            assert await there(a, "a1", "a2", "a3", "a4", "a5") == "a2 a3 a4 a5"

    async def test_the_manager_s_own_namespace(self) -> None:
        """It is one like the others, by its name or the empty one."""
        for name in ("", "own"):
            async with make(10, namespace=name, shares={name: quota(1)}) as kv:
                assert (await store(kv, "x", "y")).rejected == {"y": QUOTA}
                assert (await store(kv.namespace("b"), "x", "y")).stored == ("x", "y")
                assert used(kv, None) == 1

    async def test_reserved_blocks_count_while_they_are_pending(self) -> None:
        """An engine that fills its slots itself is held to the same."""
        async with make(10, shares={"a": quota(2)}) as kv:
            a = kv.namespace("a")
            await store(a, "a1")
            output = await a.prepare_store(["p1", "p2"])
            assert output is not None
            assert output.block_hashes_evicted == ("a1",)
            assert used(kv, "a") == 2
            assert await a.prepare_store(["p3"]) is None
            assert (await store(a, "a2")).rejected == {"a2": QUOTA}
            await a.complete_store(["p1"], success=False)
            assert (await store(a, "a2")).stored == ("a2",)
            await a.complete_store(["p2"])
            assert await there(a, "a2", "p2") == "a2 p2"

    async def test_what_cannot_be_prepared_changes_nothing(self) -> None:
        """Not even colder blocks of its own leave."""
        async with make(4, 4, shares={"a": quota(2)}) as kv:
            a = kv.namespace("a")
            await store(a, "a1", "a2")
            assert await a.prepare_store(["p1", "p2", "p3"]) is None
            assert await there(a, "a1", "a2") == "a1 a2"
            assert a.get_stats().evictions == 0

    async def test_evicting_gives_bytes_back(self) -> None:
        """Explicitly, by count, or all."""
        async with make(10, shares={"a": quota(2)}) as kv:
            a = kv.namespace("a")
            await store(a, "a1", "a2")
            await a.evict(["a1"])
            assert (await store(a, "a3")).evicted == ()
            await a.evict(num_blocks=1)
            assert used(kv, "a") == 1
            await a.clear()
            assert used(kv, "a") == 0

    async def test_a_quota_of_nothing_locks_out(self) -> None:
        """For a namespace that has to go."""
        async with make(10, shares={"a": quota(0)}) as kv:
            assert (await store(kv.namespace("a"), "x")).rejected == {"x": QUOTA}


class TestReserve:
    async def test_what_is_reserved_stays_however_old(self) -> None:
        """Another namespace's stores go round it."""
        clock = ManualClock()
        async with make(4, clock=clock, shares={"a": reserve(2)}) as kv:
            a, b = kv.namespace("a"), kv.namespace("b")
            await store(a, "a1", "a2")
            for number in range(6):
                clock.advance(1)
                assert (await store(b, f"b{number}")).rejected == {}
            assert await there(a, "a1", "a2") == "a1 a2"
            assert await there(b, *[f"b{number}" for number in range(6)]) == "b4 b5"

    async def test_what_is_beyond_the_reserve_gives_way(self) -> None:
        """Three blocks, two of them reserved: one leaves, by age, and no more."""
        clock = ManualClock()
        async with make(4, clock=clock, shares={"a": reserve(2)}) as kv:
            a, b = kv.namespace("a"), kv.namespace("b")
            await store(a, "a1", "a2", "a3")
            clock.advance(1)
            result = await store(b, "b1", "b2", "b3")
            assert result.stored == ("b1", "b2")
            assert result.rejected == {"b3": PINNED}
            assert await there(a, "a1", "a2", "a3") == "a1 a2"

    async def test_demoted_is_not_evicted(self) -> None:
        """Memory is for who uses it; the block moves down, and another leaves from there."""
        clock = ManualClock()
        async with make(2, 2, clock=clock, shares={"a": reserve(2)}) as kv:
            a, b = kv.namespace("a"), kv.namespace("b")
            await store(b, "b1", "b2")
            clock.advance(1)
            await store(a, "a1", "a2")
            clock.advance(1)
            result = await store(b, "b3", "b4")
            assert result.stored == ("b3", "b4")
            assert [at.tier for at in b.locate(["b3", "b4"])] == ["hot", "hot"]
            assert [at.tier for at in a.locate(["a1", "a2"])] == ["warm", "warm"]
            assert await there(b, "b1", "b2") == ""

    async def test_a_chain_that_finds_room_for_a_part_keeps_its_head(self) -> None:
        """In the hot tier, where it belongs; the rest is rejected from its end."""
        clock = ManualClock()
        async with make(2, 4, clock=clock, shares={"a": reserve(2)}) as kv:
            a, b = kv.namespace("a"), kv.namespace("b")
            await store(a, "a1", "a2")
            clock.advance(1)
            result = await store(b, *[f"b{number}" for number in range(6)])
            assert result.stored == ("b0", "b1", "b2", "b3")
            assert result.rejected == {"b4": PINNED, "b5": PINNED}
            assert [at.tier for at in b.locate(["b0", "b1", "b2", "b3"])] == [
                *["hot", "hot", "warm", "warm"]
            ]
            assert await there(a, "a1", "a2") == "a1 a2"

    async def test_what_is_kept_stays_where_nothing_can_be_moved(self) -> None:
        """Both tiers are full of reserved blocks."""
        async with make(1, 1, shares={"a": reserve(2)}) as kv:
            a, b = kv.namespace("a"), kv.namespace("b")
            await store(a, "a1", "a2")
            assert (await store(b, "b1")).rejected == {"b1": PINNED}
            assert await b.prepare_store(["b1"]) is None
            assert await there(a, "a1", "a2") == "a1 a2"
            result = await store(a, "a3")
            assert result.stored == ("a3",)
            assert len(result.evicted) == 1

    async def test_its_own_blocks_give_way_to_its_own(self) -> None:
        """They are kept from others, and not from itself."""
        for warm in (0, 1):
            async with make(2 - warm, warm, shares={"a": reserve(2)}) as kv:
                a = kv.namespace("a")
                await store(a, "a1", "a2")
                assert (await store(a, "a3", "a4")).stored == ("a3", "a4")
                assert await a.prepare_store(["a5"]) is not None

    async def test_below_its_reserve_it_may_still_push_out_its_own(self) -> None:
        """The rest is pinned by others."""
        async with make(2, shares={"a": reserve(2)}) as kv:
            a = kv.namespace("a")
            await store(a, "a1")
            await store(kv, "x")
            async with kv.load(["x"]):
                assert (await store(a, "a2")).evicted == ("a1",)

    async def test_what_is_newer_but_nobody_s_leaves_before_it(self) -> None:
        """With the hot tier's oldest reserved and no room below, a hotter block gives way."""
        clock = ManualClock()
        async with make(2, 1, clock=clock, shares={"a": reserve(2)}) as kv:
            a, b, c = (kv.namespace(name) for name in "abc")
            await store(a, "a1", "a2")
            clock.advance(1)
            await store(b, "b1")
            clock.advance(1)
            assert (await store(c, "c1")).stored == ("c1",)
            assert await there(a, "a1", "a2") == "a1 a2"
            assert await there(b, "b1") == ""

    async def test_empty_blocks_are_kept_too(self) -> None:
        """At the reserve not even a block without bytes leaves."""
        async with make(3, shares={"a": reserve(1)}) as kv:
            a, b = kv.namespace("a"), kv.namespace("b")
            await a.store(["a1", "empty"], [b"x" * BLOCK, b""])
            await store(b, "b1")
            assert (await store(b, "b2")).stored == ("b2",)
            assert await there(a, "a1", "empty") == "a1 empty"

    async def test_the_manager_may_evict_explicitly(self) -> None:
        """Shares hold namespaces off each other, and not who runs them."""
        async with make(4, shares={"a": reserve(2)}) as kv:
            await store(kv.namespace("a"), "a1", "a2")
            await kv.evict(num_blocks=1)
            assert used(kv, "a") == 1
            await kv.clear()
            assert used(kv, "a") == 0

    async def test_prepared_slots_come_from_others_too(self) -> None:
        """As far as they are not reserved."""
        clock = ManualClock()
        async with make(3, clock=clock, shares={"a": reserve(2)}) as kv:
            a, b = kv.namespace("a"), kv.namespace("b")
            await store(a, "a1", "a2", "a3")
            clock.advance(1)
            assert await b.prepare_store(["b1", "b2"]) is None
            assert await there(a, "a1", "a2", "a3") == "a1 a2 a3"
            assert await b.prepare_store(["b1"]) is not None
            assert await there(a, "a1", "a2", "a3") == "a1 a2"


class TestTrouble:
    async def test_a_reserved_block_that_can_t_be_moved_stays(self) -> None:
        """The disk below fails: the store is what fails, and not what was kept for another."""
        cold = FaultyTier(MemoryTier(4, BLOCK, name="cold"))
        async with AsyncLRUManager(
            hot=MemoryTier(2, BLOCK), cold=cold, policy="lru", shares={"a": reserve(2)}
        ) as kv:
            a, b = kv.namespace("a"), kv.namespace("b")
            await store(a, "a1", "a2")
            cold.fail("write", times=None)
            assert (await store(b, "b1")).rejected == {"b1": RejectReason.FAILED}
            assert await b.prepare_store(["b1"]) is None
            assert await there(a, "a1", "a2") == "a1 a2"
            cold.heal()
            assert (await store(b, "b1")).stored == ("b1",)
            assert await there(a, "a1", "a2") == "a1 a2"
            kv.check_invariants()

    async def test_what_waits_for_the_same_failing_move_is_rejected_too(self) -> None:
        """Behind the block that stays, another can't take its place."""
        cold = FaultyTier(MemoryTier(2, BLOCK, name="cold"))
        async with AsyncLRUManager(
            hot=MemoryTier(1, BLOCK),
            warm=MemoryTier(1, BLOCK, name="warm"),
            cold=cold,
            policy="lru",
            shares={"a": reserve(2)},
        ) as kv:
            a, b = kv.namespace("a"), kv.namespace("b")
            await store(a, "a1", "a2")
            cold.fail("write", times=None)
            result = await store(b, "b1")
            assert result.rejected == {"b1": RejectReason.FAILED}
            assert await there(a, "a1", "a2") == "a1 a2"

    async def test_a_damaged_block_counts_no_more(self) -> None:
        """It is dropped when it is read."""
        cold = FaultyTier(RestartableTier(4, BLOCK))
        async with AsyncLRUManager(
            hot=MemoryTier(1, BLOCK), cold=cold, policy="lru", shares={"a": quota(2)}
        ) as kv:
            a = kv.namespace("a")
            await store(a, "a1", "a2")
            cold.fail("read", CorruptBlockError)
            with pytest.raises(CorruptBlockError):
                async with a.load(["a1", "a2"]):
                    pass
            assert used(kv, "a") == 1


class TestRestart:
    async def test_a_lowered_quota_trims_what_is_found(self) -> None:
        """The coldest leave, and count as evictions."""
        cold = RestartableTier(4, BLOCK)

        def manager(blocks: int) -> AsyncLRUManager:
            hot = MemoryTier(1, BLOCK)
            return AsyncLRUManager(hot=hot, cold=cold, policy="lru", shares={"a": quota(blocks)})

        async with manager(4) as kv:
            for name in ("a1", "a2", "a3"):
                await store(kv.namespace("a"), name)
            await store(kv, "x")
        async with manager(2) as kv:
            a = kv.namespace("a")
            assert used(kv, "a") == 2
            assert await there(a, "a1", "a2", "a3") == "a2 a3"
            assert a.get_stats().evictions == 1
            assert await there(kv, "x") == "x"

    async def test_the_order_of_what_is_found_goes_over_all_namespaces(self) -> None:
        """The disk tells it, and no use since."""
        cold = RestartableTier(4, BLOCK)
        shares = {"a": quota(4)}
        async with AsyncLRUManager(
            hot=MemoryTier(1, BLOCK), cold=cold, policy="lru", shares=shares
        ) as kv:
            for name in ("b1", "a1", "b2", "a2"):
                await store(kv.namespace(name[0]), name)
        async with AsyncLRUManager(
            hot=MemoryTier(1, BLOCK), cold=cold, policy="lru", shares=shares
        ) as kv:
            gone = []
            for _ in range(4):
                gone += await kv.namespace("b").evict(num_blocks=0)
                coldest = kv._core.index.coldest(1, None, everywhere=True)
                gone += [entry.block_hash for entry in coldest]
                kv._core.index.drop(coldest)
            assert gone == ["b1", "a1", "b2", "a2"]

    async def test_a_close_keeps_what_is_reserved(self) -> None:
        """Before hotter blocks of others, and before their copies."""
        cold = RestartableTier(2, BLOCK)
        shares = {"a": reserve(1)}
        clock = ManualClock()

        def manager() -> AsyncLRUManager:
            hot = MemoryTier(3, BLOCK)
            return AsyncLRUManager(
                hot=hot, cold=cold, policy="lru", shares=shares, clock=clock, promote_threshold=1
            )

        async with manager() as kv:
            await store(kv, "x1", "x2")
        async with manager() as kv:
            await store(kv.namespace("a"), "a1")
            clock.advance(1)
            async with kv.load(["x1", "x2"]):
                pass
        async with manager() as kv:
            assert await there(kv.namespace("a"), "a1") == "a1"
            assert len((await there(kv, "x1", "x2")).split()) == 1


class TestMovement:
    async def test_a_tight_chain_keeps_its_head(self) -> None:
        """The slot below was for its end, but the head finds none further up."""
        async with AsyncLRUManager(
            hot=MemoryTier(2, BLOCK),
            warm=MemoryTier(1, BLOCK, name="warm"),
            cold=FaultyTier(MemoryTier(4, BLOCK, name="cold")),
            policy="lru",
            when_full="reject",
            watermarks=(0, 0),
        ) as kv:
            await store(kv, "x1", "x2")
            result = await store(kv, "c1", "c2", "c3")
            assert result.stored == ("c1",)
            assert set(result.rejected) == {"c2", "c3"}

    async def test_room_is_made_ahead_for_nobody(self) -> None:
        """What is reserved may be moved down for it, and is not evicted for it."""
        clock = ManualClock()
        async with make(4, 2, clock=clock, shares={"a": reserve(2)}, watermarks=(0.5, 0.5)) as kv:
            a, b = kv.namespace("a"), kv.namespace("b")
            await store(a, "a1", "a2")
            clock.advance(1)
            for number in range(8):
                await store(b, f"b{number}")
                clock.advance(1)
                await kv._core.jobs.drain()
                assert await there(a, "a1", "a2") == "a1 a2"
                kv.check_invariants()

    @pytest.mark.parametrize("admission", ["reused", "likely"])
    async def test_reserved_blocks_are_not_spared(self, admission: str) -> None:
        """What nobody used again is not worth writing, but it is somebody's."""
        cold = FaultyTier(RestartableTier(4, BLOCK))
        async with AsyncLRUManager(
            hot=MemoryTier(2, BLOCK),
            cold=cold,
            cold_admission=admission,
            shares={"a": reserve(1)},
        ) as kv:
            a, b = kv.namespace("a"), kv.namespace("b")
            await store(a, "a1", "a2")
            await store(b, "b1", "b2")
            await store(b, "b3", "b4")
            assert await there(a, "a1", "a2") == "a1"
            assert await there(b, "b3", "b4") == "b3 b4"


class TestOrder:
    @pytest.mark.parametrize("policy", ["lru", "weighted"])
    async def test_the_oldest_of_all_namespaces_leaves_first(self, policy: str) -> None:
        """Partitions don't make one namespace pay for the others."""
        clock = ManualClock()
        async with make(6, clock=clock, policy=policy, shares={"a": quota(4)}) as kv:
            views = {name: kv.namespace(name) for name in "abc"}
            for number in range(2):
                for name, view in views.items():
                    await store(view, f"{name}{number}")
                    clock.advance(1)
            gone = []
            for number in range(3):
                before = [await there(views[name], f"{name}0", f"{name}1") for name in "abc"]
                await store(kv, f"x{number}")
                clock.advance(1)
                after = [await there(views[name], f"{name}0", f"{name}1") for name in "abc"]
                gone += [n for n, (x, y) in enumerate(zip(before, after, strict=True)) if x != y]
            assert gone == [0, 1, 2]

    async def test_the_coldest_of_one_namespace(self) -> None:
        """Asked of a namespace with a share, and of one without."""
        clock = ManualClock()
        async with make(8, clock=clock, shares={"a": quota(4)}) as kv:
            for number in range(3):
                for name in "ab":
                    await store(kv.namespace(name), f"{name}{number}")
                    clock.advance(1)
            assert await kv.namespace("a").evict(num_blocks=2) == ["a0", "a1"]
            assert await kv.namespace("b").evict(num_blocks=2) == ["b0", "b1"]
            assert await kv.evict(num_blocks=2) == ["a2", "b2"]


class TestSettings:
    def test_wrong_shares(self) -> None:
        """Found before anything is opened, and told by name."""
        with pytest.raises(ConfigError, match="max_bytes must be an integer of at least 0"):
            NamespaceShare(max_bytes=-1)
        with pytest.raises(ConfigError, match="reserved_bytes must be an integer of at least 0"):
            NamespaceShare(reserved_bytes=-1)
        with pytest.raises(ConfigError, match="reserved_bytes=3 is more than max_bytes=2"):
            NamespaceShare(max_bytes=2, reserved_bytes=3)
        with pytest.raises(ConfigError, match=r"reserve 4 blocks of 8 bytes.* have 3 slots"):
            make(
                2,
                1,
                shares={"a": reserve(2), "b": reserve(1), "c": NamespaceShare(reserved_bytes=1)},
            )
        with pytest.raises(ConfigError, match="at most 128 bytes"):
            make(2, shares={"x" * 200: quota(1)})
        with pytest.raises(ConfigError, match="the share of 'a' must be a NamespaceShare"):
            make(2, shares={"a": 5})
        with pytest.raises(ConfigError, match="shares must map namespaces"):
            make(2, shares=["a"])

    def test_all_slots_may_be_reserved(self) -> None:
        """Then whoever has no share lives on what the others leave unused."""
        make(2, 1, shares={"a": reserve(2), "b": reserve(1)})

    def test_policies(self) -> None:
        """A name, a class or a function; an object would mix the namespaces up."""
        with pytest.raises(ConfigError, match=r"instead of the object .* pass a name"):
            make(2, shares={"a": quota(1)}, policy=LRUPolicy())
        with pytest.raises(ConfigError, match="unknown policy 'mru'"):
            make(2, shares={"a": quota(1)}, policy="mru")
        with pytest.raises(ConfigError, match="was to make an EvictionPolicy, and made 5"):
            make(2, shares={"a": quota(1)}, policy=lambda: 5)
        with pytest.raises(ConfigError, match="policy must be a name"):
            make(2, policy=5)
        one = LRUPolicy()
        with pytest.raises(ConfigError, match="serves another manager"):
            make(2, shares={"a": quota(1)}, policy=lambda: one)
        make(2, shares={"a": quota(1)}, policy=LRUPolicy)
        make(2, policy=LRUPolicy)
        make(2, policy=LRUPolicy())

    def test_forecasts(self) -> None:
        """A policy of partitions can tell what its parts can."""
        make(2, shares={"a": quota(1)}, policy="weighted", cold_admission="likely")
        with pytest.raises(ConfigError, match="needs a policy that forecasts"):
            make(2, shares={"a": quota(1)}, policy="lru", cold_admission="likely")

    def test_they_can_be_read(self) -> None:
        """And not changed."""
        shares = {"a": quota(1)}
        kv = LRUManagerFactory.create_async(ManagerSettings(shares=shares))
        shares["b"] = quota(1)
        assert kv.shares == {"a": quota(1)}
        with pytest.raises(TypeError):
            kv.shares["b"] = quota(1)  # type: ignore[index]  # the point of the test
        assert make(1).shares == {}
