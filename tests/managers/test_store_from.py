"""`store_from`: payloads that arrive little by little are stored whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from kvoffload import (
    AsyncLRUManager,
    ConfigError,
    DiskTier,
    LRUPolicy,
    MemoryTier,
    RejectReason,
    StoreResult,
    streamed,
)
from kvoffload.testing import FaultyTier, eventually
from kvoffload.types import Key

SIZE = 4096


class Payloads:
    """A source of given payloads, that may do something before one of them."""

    def __init__(
        self,
        payloads: Sequence[bytes],
        at: int | None = None,
        what: Callable[[], object] = lambda: None,
    ) -> None:
        self._payloads = list(payloads)
        self._at = at
        self._what = what
        self._given = 0

    async def fill(self, views: Sequence[memoryview]) -> None:
        for view in views:
            if self._given == self._at:
                self._what()
            await anyio.lowlevel.checkpoint()
            view[:] = self._payloads[self._given]
            self._given += 1

    async def end(self) -> None:
        assert self._given == len(self._payloads)


def fail() -> None:
    raise ConnectionError("the client is gone")


@contextmanager
def small_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(streamed, "GROUP_BYTES", 2 * SIZE)
        yield


def chain(count: int) -> tuple[list[str], list[bytes]]:
    return [f"b{n}" for n in range(count)], [bytes([n]) * (SIZE - n) for n in range(count)]


async def store(kv: AsyncLRUManager, hashes: Sequence[str], source: Payloads) -> StoreResult:
    return await kv.store_from(hashes, [len(each) for each in source._payloads], source)


@pytest.mark.parametrize("hot", [3, 8, 20])
@pytest.mark.parametrize("lower", ["none", "memory", "disk"])
async def test_all_of_a_chain_comes_whole(
    hot: int, lower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into free slots, through buffers, and on to lower tiers."""
    hashes, payloads = chain(8)
    warm = MemoryTier(8, SIZE, name="warm") if lower == "memory" else None
    cold = DiskTier(tmp_path, 8, SIZE) if lower == "disk" else None
    with small_groups(monkeypatch):
        async with AsyncLRUManager(
            hot=MemoryTier(hot, SIZE), warm=warm, cold=cold, policy="lru"
        ) as kv:
            result = await store(kv, hashes, Payloads(payloads))
            room = hot + (8 if lower != "none" else 0)
            assert result.stored == tuple(hashes[: min(8, room)])
            assert set(result.rejected) == set(hashes[room:])
            async with kv.load(list(result.stored)) as lease:
                found = list(map(bytes, lease))
            assert found == payloads[: len(found)]
            again = await store(kv, hashes[:2], Payloads([b"x", b"y"]))
            assert again == StoreResult(present=tuple(hashes[:2]))
            kv.check_invariants()


@pytest.mark.parametrize("at", range(8))
async def test_what_breaks_off_leaves_nothing(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether blocks of it had been stored already or not; what was there before stays."""
    hashes, payloads = chain(8)
    with small_groups(monkeypatch):
        async with AsyncLRUManager(hot=MemoryTier(9, SIZE), policy="lru") as kv:
            await kv.store(["old"], [b"old"])
            with pytest.raises(ConnectionError):
                await store(kv, hashes, Payloads(payloads, at, fail))
            assert await kv.lookup(["old"]) == 1
            assert [each.tier for each in kv.locate(hashes)] == [None] * 8
            kv.check_invariants()
            assert kv.get_stats().pending == 0
            assert (await store(kv, hashes, Payloads(payloads))).stored == tuple(hashes)


@pytest.mark.parametrize("at", range(8))
async def test_cancelled_it_leaves_nothing(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes, payloads = chain(8)
    with small_groups(monkeypatch):
        async with AsyncLRUManager(hot=MemoryTier(9, SIZE), policy="lru") as kv:
            with anyio.CancelScope() as scope:
                await store(kv, hashes, Payloads(payloads, at, scope.cancel))
            assert scope.cancelled_caught
            assert [each.tier for each in kv.locate(hashes)] == [None] * 8
            kv.check_invariants()


async def test_a_hash_that_comes_twice_is_stored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its first payload, also where the second one comes in a later group."""
    with small_groups(monkeypatch):
        async with AsyncLRUManager(hot=MemoryTier(9, SIZE)) as kv:
            payloads = [bytes([n]) * SIZE for n in range(6)]
            result = await store(kv, ["a", "a", "b", "c", "a", "b"], Payloads(payloads))
            assert result == StoreResult(stored=("a", "b", "c"))
            async with kv.load(["a", "b", "c"]) as lease:
                assert [view[0] for view in lease] == [0, 2, 3]


async def test_wrong_lengths_change_nothing() -> None:
    async with AsyncLRUManager(hot=MemoryTier(2, SIZE)) as kv:
        for sizes in ([1], [1, -1], [1, SIZE + 1]):
            with pytest.raises(ConfigError):
                await kv.store_from(["a", "b"], sizes, Payloads([]))
        with pytest.raises(TypeError):
            await kv.store_from(["a"], ["1"], Payloads([]))  # type: ignore[list-item]  # the point
        assert kv.get_stats().stored == 0


class Declining(LRUPolicy):
    """Lets nothing into the hottest tier once it is told to."""

    declines = False

    def admit(self, keys: Sequence[Key], level: int, **said: object) -> Collection[Key]:
        return () if self.declines and level == 0 else keys


async def test_what_the_policy_declines_pushes_nothing_out_for_good(tmp_path: Path) -> None:
    """A plan that was given up once let what was to be moved down leave every tier instead."""
    policy = Declining()
    async with AsyncLRUManager(
        hot=MemoryTier(8, SIZE),
        warm=MemoryTier(4, SIZE, name="warm"),
        cold=DiskTier(tmp_path, 16, SIZE),
        policy=policy,
        watermarks=(0, 0),
    ) as kv:
        policy.declines = True
        old, payloads = chain(4)
        await kv.store(old, payloads)
        assert {each.tier for each in kv.locate(old)} == {"warm"}
        new = [f"new{number}" for number in range(4)]
        result = await store(kv, new, Payloads(payloads))
        assert result.stored == tuple(new)
        assert result.evicted == ()
        assert await kv.lookup(old) == 4


async def test_taken_back_while_it_is_written_through_it_leaves_too(tmp_path: Path) -> None:
    """The blocks were ready by then, and would have stayed."""
    cold = FaultyTier(DiskTier(tmp_path, 8, SIZE))
    async with AsyncLRUManager(
        hot=MemoryTier(8, SIZE), cold=cold, write_policy="through", policy="lru"
    ) as kv:
        hashes, payloads = chain(2)
        with anyio.CancelScope() as scope, cold.hang("write"):
            async with anyio.create_task_group() as group:

                async def cancel_when_written() -> None:
                    while await kv.lookup(hashes) < 2:
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()

                group.start_soon(cancel_when_written)
                await store(kv, hashes, Payloads(payloads))
        await eventually(lambda: {each.tier for each in kv.locate(hashes)} == {None})


async def test_in_a_request_a_rejection_ends_the_chain() -> None:
    """The rest is read, for it is on its way, and goes nowhere."""
    hashes, payloads = chain(4)
    async with AsyncLRUManager(hot=MemoryTier(2, SIZE), policy="lru") as kv:
        async with kv.request(hashes) as request:
            assert hasattr(request, "store_from")
            sizes = [len(each) for each in payloads]
            first = await request.store_from(sizes[:3], Payloads(payloads[:3]))
            assert first.stored == ("b0", "b1")
            assert set(first.rejected.values()) <= {RejectReason.PINNED, RejectReason.FULL}
            rest = await request.store_from(sizes[3:], Payloads(payloads[3:]))
            assert list(rest.rejected) == ["b3"]
        kv.check_invariants()
