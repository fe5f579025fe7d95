"""The whole manager in any order of calls: callers that are cancelled, tiers that fail and hang.

The driver below starts calls as tasks and lets the event loop turn a few times after each step, so
that the calls overlap in every way. Meanwhile the books balance, each lease and each array derived
from one shows its own block's bytes, and no call ends with an error that it must not end with. When
faults are healed and holders let go, everything is back at zero, each ready block has its bytes,
and a tier that persists has no record of other bytes, nor of what was evicted for good.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Executor, Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio
import numpy as np
import pytest
import uvloop
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from numpy.typing import NDArray

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    BlockNotFoundError,
    CapacityError,
    ClosedError,
    EvictionPolicy,
    LoadStoreSpec,
    LoadTimeoutError,
    LRUPolicy,
    MemoryTier,
    NamespaceShare,
    NotPinnedError,
    OffloadError,
    Retention,
    Tier,
    TierError,
)
from kvoffload.keys import decode_key
from kvoffload.levels import Level
from kvoffload.managers.contract import Contract
from kvoffload.slots import Slots
from kvoffload.testing import FaultyTier, ManualClock, RestartableTier, payload_for
from kvoffload.testing.faults import Operation
from kvoffload.types import Key

# The machine derives arrays from leases on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::kvoffload.DerivedViewWarning")

BLOCK_BYTES = 24
TTL_S = 10.0
OTHER = "other"
NAMESPACES = st.sampled_from(["", "", "", OTHER])
CHAINS = st.lists(st.integers(0, 9), min_size=1, max_size=5)  # duplicates too
TURNS = st.integers(0, 12)
MISSES = (BlockNotFoundError, CapacityError, LoadTimeoutError, TierError)


class Picky(LRUPolicy):
    """A policy that declines every third block on every level but the last, like a bypass."""

    def attach(self, capacities: Sequence[int]) -> None:
        super().attach(capacities)
        self.last = len(capacities) - 1

    def admit(self, keys: Sequence[Key], level: int, **_: object) -> Sequence[Key]:
        hashes = {key: int(key[1] if isinstance(key, tuple) else key) for key in keys}
        return [key for key in keys if level == self.last or hashes[key] % 3]


POLICIES: dict[str, Callable[[], str | EvictionPolicy]] = {
    "lru": lambda: "lru",
    "weighted": lambda: "weighted",
    "picky": Picky,
}


SHARES: dict[str, Callable[[int], dict[str, NamespaceShare]]] = {
    "none": lambda _: {},
    "quotas": lambda block: {
        "": NamespaceShare(max_bytes=3 * block),
        OTHER: NamespaceShare(max_bytes=2 * block),
    },
    "a reserve": lambda block: {OTHER: NamespaceShare(reserved_bytes=2 * block)},
    "both": lambda block: {
        "": NamespaceShare(max_bytes=2 * block, reserved_bytes=block),
        OTHER: NamespaceShare(max_bytes=2 * block, reserved_bytes=block),
    },
}
"""Shares by the size of a block; what is reserved fits every layout."""

ACTING: ContextVar[str] = ContextVar("acting")
"""The namespace of the call that a task works for; jobs inherit it. Nothing for hints."""
NOBODY = "nobody"

MOVEMENTS: dict[str, dict[str, Any]] = {
    "as needed": {"watermarks": (0.0, 0.0)},
    "ahead": {"watermarks": (0.4, 0.7)},
    "rejecting": {"watermarks": (0.4, 0.7), "when_full": "reject"},
    "through": {"watermarks": (0.4, 0.7), "write_policy": "through"},
}


def memory(blocks: int, name: str = "hot") -> Tier:
    return MemoryTier(blocks, BLOCK_BYTES, name=name)


def faulty(tier: Tier) -> FaultyTier:
    return FaultyTier(tier)


def disk(blocks: int, name: str = "cold") -> FaultyTier:
    return FaultyTier(RestartableTier(blocks, BLOCK_BYTES, name=name))


LAYOUTS: dict[str, Callable[[], list[Tier]]] = {
    "memory": lambda: [memory(3)],
    "memory without addresses": lambda: [faulty(memory(3))],
    "disk": lambda: [disk(3)],
    "hot and cold": lambda: [memory(2), disk(4)],
    "hot and warm": lambda: [memory(2), memory(3, "warm")],
    "three": lambda: [memory(2), memory(2, "warm"), disk(3)],
    "hot without addresses": lambda: [faulty(memory(2)), memory(2, "warm"), disk(3)],
    "four": lambda: [memory(1), memory(2, "warm"), disk(2), disk(3, "remote")],
    "two disks": lambda: [disk(2, "hot"), disk(3)],
}


class AtOnce(Executor):
    """Runs what it is given at once, so that every run of the machine is alike."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass(eq=False)
class Call:
    """One call under way; a holder stays inside its scope until it is told to let go."""

    what: str
    let_go: asyncio.Event = field(default_factory=asyncio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    task: asyncio.Task[None] | None = None
    cancelled: bool = False
    views: list[tuple[Any, bytes]] = field(default_factory=list)


@dataclass(eq=False)
class Prepared:
    """A two-phase store or load that was prepared and not completed yet."""

    namespace: str
    hashes: tuple[BlockHash, ...]
    spec: LoadStoreSpec


class WholeManager(RuleBasedStateMachine):
    """Every call of the contract, overlapping, on tiny tiers."""

    block_bytes = BLOCK_BYTES
    close_timeout_s = 0.05

    def __init__(self) -> None:
        super().__init__()
        self.loop = self.make_loop()
        self.clock = ManualClock()
        logging.disable(logging.CRITICAL)  # faults are told, a thousand times
        self.opened = False
        self.closed = False
        self.calls: list[Call] = []
        self.failures: list[BaseException] = []
        self.derived: list[tuple[NDArray[np.uint8], bytes]] = []
        self.stores: list[Prepared] = []
        self.loads: list[Prepared] = []
        # What was evicted for good, unless a store named it since.
        self.gone: set[tuple[str, BlockHash]] = set()
        self.storing: Counter[tuple[str, BlockHash]] = Counter()
        self.last_store: dict[tuple[str, BlockHash], int] = {}
        self.moment = 0

    @initialize(
        layout=st.sampled_from(sorted(LAYOUTS)),
        policy=st.sampled_from(sorted(POLICIES)),
        staging=st.integers(1, 6),
        threshold=st.integers(1, 2),
        movement=st.sampled_from(sorted(MOVEMENTS)),
        shares=st.sampled_from(["none", *sorted(SHARES)]),
    )
    def open(
        self, layout: str, policy: str, staging: int, threshold: int, movement: str, shares: str
    ) -> None:
        self.movement = movement
        self.shares = SHARES[shares](self.block_bytes)
        self.tiers = LAYOUTS[layout]()
        self.faulty = [tier for tier in self.tiers if isinstance(tier, FaultyTier)]
        self.staging_bytes, self.promote_threshold = staging * self.block_bytes, threshold
        self.policy = policy
        self.kv = self.make_manager()
        self.loop.run_until_complete(self.enter(self.kv))
        self.opened = True

    def make_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.new_event_loop()

    def payload(self, namespace: str, block_hash: BlockHash) -> bytes:
        """Bytes of a length that the block's number tells; those of block 0 are none."""
        return payload_for(block_hash, self.size_of(int(block_hash)), namespace=namespace)

    def size_of(self, number: int) -> int:
        return 5 * number % (self.block_bytes + 1)

    def make_manager(self) -> AsyncLRUManager:
        names = ("hot", "warm", "cold", "remote")
        policy: Any = POLICIES[self.policy]()
        if self.shares and not isinstance(policy, str):
            policy = type(policy)
        return AsyncLRUManager(
            **dict(zip(names, self.tiers, strict=False)),  # type: ignore[arg-type]  # by name
            **self.more_settings(),
            policy=policy,
            shares=self.shares,
            clock=self.clock,
            reservation_ttl_s=TTL_S,
            close_timeout_s=self.close_timeout_s,
            staging_bytes=self.staging_bytes,
            promote_threshold=self.promote_threshold,
            **MOVEMENTS[self.movement],
        )

    def more_settings(self) -> dict[str, Any]:
        return {}

    async def enter(self, kv: AsyncLRUManager) -> None:
        self.watch_reserves(kv)
        await kv.__aenter__()
        kv._core.transfer._executor.shutdown()
        kv._core.transfer._executor = AtOnce()  # type: ignore[assignment]  # see its docstring

    def watch_reserves(self, kv: AsyncLRUManager) -> None:
        """Keep it as a failure if a reserved block is evicted for another namespace's."""
        index, room = kv._core.index, kv._core.room
        shares = index.shares
        if shares is None:
            return
        evict, work_ahead = index.evict, room.work_ahead

        def watched(level: Level, keys: Sequence[Key]) -> list[int]:
            acting = ACTING.get(None)
            left = {name: shares.used(name) for name in shares.reserved_bytes}
            for key in keys if acting is not None else ():
                namespace = key[0] if isinstance(key, tuple) else None
                if namespace in left and (namespace or "") != acting:
                    was = left[namespace]
                    left[namespace] -= index.ready[key].size
                    reserved = shares.reserved_bytes[namespace]
                    if was <= reserved or left[namespace] < reserved:
                        self.failures.append(AssertionError(f"{key!r} left for {acting!r}"))
            return evict(level, keys)

        def for_nobody(*args: Any) -> list[Any]:
            token = ACTING.set(NOBODY)
            try:
                return work_ahead(*args)
            finally:
                ACTING.reset(token)

        index.evict = watched  # type: ignore[method-assign]  # see above
        room.work_ahead = for_nobody  # type: ignore[method-assign, assignment]

    # Calls

    @precondition(lambda self: not self.closed)
    @rule(chain=CHAINS, namespace=NAMESPACES, turns=TURNS)
    def store(self, chain: list[int], namespace: str, turns: int) -> None:
        async def call(me: Call) -> None:
            buffers = [bytearray(self.payload(namespace, one)) for one in chain]
            began = self.begin_store(namespace, chain)
            try:
                result = await self.view(namespace).store(chain, buffers)
            finally:
                self.end_store(namespace, chain)
                for buffer in buffers:  # the caller's own again
                    buffer[:] = bytes(len(buffer))
            parts = [*result.stored, *result.present, *result.rejected]
            assert sorted(map(int, parts)) == sorted(set(chain))
            assert list(result.stored) == [
                one for one in dict.fromkeys(chain) if one in result.stored
            ]
            assert not set(result.evicted) & set(chain)
            assert len(set(result.evicted)) == len(result.evicted)
            for one in result.evicted:
                key = (namespace, one)
                if not self.storing[key] and self.last_store.get(key, 0) < began:
                    assert self.view(namespace).locate([one])[0].tier in (None, "engine")

        self.start(f"store {chain}", call, turns)

    @precondition(lambda self: not self.closed)
    @rule(
        chain=CHAINS,
        namespace=NAMESPACES,
        timeout_s=st.sampled_from([None, None, 0.0]),
        derive=st.booleans(),
        turns=TURNS,
    )
    def load(
        self, chain: list[int], namespace: str, timeout_s: float | None, derive: bool, turns: int
    ) -> None:
        async def call(me: Call) -> None:
            async with self.view(namespace).load(chain, timeout_s=timeout_s) as lease:
                await self.look(me, namespace, chain, lease, derive)

        self.start(f"load {chain}", call, turns, MISSES)

    @precondition(lambda self: not self.closed)
    @rule(
        chain=CHAINS,
        namespace=NAMESPACES,
        retention=st.sampled_from([None, Retention(0.9), Retention.SESSION_OVER]),
        turns=TURNS,
    )
    def request(
        self, chain: list[int], namespace: str, retention: Retention | None, turns: int
    ) -> None:
        async def call(me: Call) -> None:
            async with self.view(namespace).request(chain, retention=retention) as request:
                if request.hit:
                    async with request.load() as lease:
                        await self.look(me, namespace, chain[: request.hit], lease, derive=False)
                rest = chain[request.hit :]
                self.begin_store(namespace, rest)
                try:
                    for one in rest:
                        await request.store([self.payload(namespace, one)])
                finally:
                    self.end_store(namespace, rest)
                await me.let_go.wait()

        self.start(f"request {chain}", call, turns, MISSES)

    @precondition(lambda self: not self.closed)
    @rule(chain=CHAINS, namespace=NAMESPACES, turns=TURNS)
    def evict(self, chain: list[int], namespace: str, turns: int) -> None:
        async def call(me: Call) -> None:
            began = self.moment
            self.note_gone(namespace, await self.view(namespace).evict(chain), began)

        self.start(f"evict {chain}", call, turns, (TierError,))

    @precondition(lambda self: not self.closed)
    @rule(chain=CHAINS, namespace=NAMESPACES, turns=TURNS)
    def forget(self, chain: list[int], namespace: str, turns: int) -> None:
        async def call(me: Call) -> None:
            began = self.moment
            forgotten = await self.view(namespace).forget(chain)
            assert set(forgotten) <= set(chain)
            assert len(set(forgotten)) == len(forgotten)
            self.note_gone(namespace, forgotten, began)

        self.start(f"forget {chain}", call, turns, (TierError,))

    @precondition(lambda self: not self.closed)
    @rule(count=st.integers(0, 4), namespace=NAMESPACES, turns=TURNS)
    def evict_coldest(self, count: int, namespace: str, turns: int) -> None:
        async def call(me: Call) -> None:
            began = self.moment
            evicted = await self.view(namespace).evict(num_blocks=count)
            assert len(evicted) <= count
            if namespace:  # the manager's own answer may name blocks of other namespaces
                self.note_gone(namespace, evicted, began)

        self.start(f"evict {count}", call, turns, (TierError,))

    @precondition(lambda self: not self.closed)
    @rule(namespace=NAMESPACES, what=st.sampled_from(["clear", "flush", "flush"]), turns=TURNS)
    def clear_or_flush(self, namespace: str, what: str, turns: int) -> None:
        async def call(me: Call) -> None:
            await getattr(self.view(namespace), what)()

        self.start(what, call, turns, (TierError,))

    @precondition(lambda self: not self.closed)
    @rule(chain=CHAINS, namespace=NAMESPACES)
    def look_around(self, chain: list[int], namespace: str) -> None:
        async def call() -> None:
            view = self.view(namespace)
            hit = await view.lookup(chain)
            states = [location.tier is not None for location in view.locate(chain)]
            assert states[:hit] == [True] * hit
            await view.touch(chain)
            view.get_stats()

        self.loop.run_until_complete(call())

    @precondition(lambda self: not self.closed)
    @rule(chain=CHAINS, cancel=st.booleans(), turns=TURNS)
    def hint(self, chain: list[int], cancel: bool, turns: int) -> None:
        async def call() -> None:
            self.kv.hint_prefetch(chain)
            await self.turn(turns)
            if cancel:
                self.kv.cancel_prefetch(chain)

        self.loop.run_until_complete(call())

    # Two phases

    @precondition(lambda self: not self.closed)
    @rule(chain=CHAINS, namespace=NAMESPACES, turns=TURNS)
    def prepare_store(self, chain: list[int], namespace: str, turns: int) -> None:
        async def call(me: Call) -> None:
            sizes = [len(self.payload(namespace, one)) for one in chain]
            self.begin_store(namespace, chain)
            try:
                output = await self.view(namespace).prepare_store(chain, sizes=sizes)
            finally:
                self.end_store(namespace, chain)
            if output is not None and not self.closed:
                assert not set(output.block_hashes_evicted) & set(chain)
                hashes = output.block_hashes_to_store
                self.stores.append(Prepared(namespace, hashes, output.store_spec))

        self.start(f"prepare_store {chain}", call, turns)

    @precondition(lambda self: not self.closed)
    @rule(which=st.integers(0, 9), success=st.booleans(), derive=st.booleans(), turns=TURNS)
    def complete_store(self, which: int, success: bool, derive: bool, turns: int) -> None:
        # Not a precondition: what there is depends on time too, and the rules' order must not.
        if not self.stores:
            return
        prepared = self.stores.pop(which % len(self.stores))
        namespace = prepared.namespace

        async def call(me: Call) -> None:
            mine: list[BlockHash] = []
            for one, entry in zip(prepared.hashes, prepared.spec.entries, strict=True):
                try:
                    entry.view[:] = self.payload(namespace, one)
                except NotPinnedError:
                    continue  # it took too long, and knows
                except ValueError:
                    mine.append(one)  # it took too long, and completes all the same
                    continue
                mine.append(one)
                if derive and len(entry.view):
                    array = np.frombuffer(entry.view, np.uint8)
                    self.derived.append((array, self.payload(namespace, one)))
            self.begin_store(namespace, mine)
            try:
                await self.view(namespace).complete_store(mine, success)
            finally:
                self.end_store(namespace, mine)

        self.start(f"complete_store {prepared.hashes}", call, turns, (TierError,))

    @precondition(lambda self: not self.closed)
    @rule(chain=CHAINS, namespace=NAMESPACES, turns=TURNS)
    def prepare_load(self, chain: list[int], namespace: str, turns: int) -> None:
        async def call(me: Call) -> None:
            spec = await self.view(namespace).prepare_load(chain)
            self.loads.append(Prepared(namespace, tuple(chain), spec))

        self.start(f"prepare_load {chain}", call, turns, MISSES)

    @precondition(lambda self: not self.closed)
    @rule(which=st.integers(0, 9), look=st.booleans(), derive=st.booleans())
    def complete_load(self, which: int, look: bool, derive: bool) -> None:
        if not self.loads:
            return
        prepared = self.loads.pop(which % len(self.loads))
        namespace = prepared.namespace

        async def call() -> None:
            for one, entry in zip(prepared.hashes, prepared.spec.entries, strict=True):
                if look:
                    assert bytes(entry.view) == self.payload(namespace, one)
                    if derive and len(entry.view):
                        array = np.frombuffer(entry.view, np.uint8)
                        self.derived.append((array, self.payload(namespace, one)))
            await self.view(namespace).complete_load(prepared.hashes)

        self.loop.run_until_complete(call())

    @precondition(lambda self: not self.closed)
    @rule(turns=TURNS)
    def time_is_up(self, turns: int) -> None:
        """What was prepared before is taken back; who prepared it never knows."""

        async def call() -> None:
            await self.turn(4)  # the reaper notes what was prepared
            self.clock.advance(TTL_S + 1)
            await self.turn(4)
            expired, self.loads = self.loads, []
            for prepared in expired:
                with pytest.raises(NotPinnedError):
                    await self.view(prepared.namespace).complete_load(prepared.hashes)
            await self.turn(turns)

        if not any(call.what.startswith("prepare_load") for call in self.calls):
            self.loop.run_until_complete(call())

    # Trouble

    @precondition(lambda self: not self.closed and self.faulty)
    @rule(
        which=st.integers(0, 3),
        operation=st.sampled_from(["read", "write", "erase", "flush"]),
        kind=st.sampled_from(["fail", "hang", "hang", "bug", "damage"]),
        times=st.integers(1, 3),
    )
    def trouble(self, which: int, operation: Operation, kind: str, times: int) -> None:
        tier = self.faulty[which % len(self.faulty)]
        if kind == "hang":
            tier.hang(operation, times=times)
        elif kind == "damage":
            tier.flip_byte("read", times=times)
        else:
            tier.fail(operation, OSError("no") if kind == "fail" else ZeroDivisionError())

    @precondition(lambda self: not self.closed and self.faulty)
    @rule(turns=TURNS)
    def heal(self, turns: int) -> None:
        async def call() -> None:
            self.heal_tiers()
            await self.turn(turns)

        self.loop.run_until_complete(call())

    @rule(
        which=st.integers(0, 99),
        how=st.sampled_from(["let go", "scope", "task"]),
        turns=TURNS,
    )
    def end_a_call(self, which: int, how: Literal["let go", "scope", "task"], turns: int) -> None:
        async def call() -> None:
            if not self.calls:
                return  # it ended just now
            chosen = self.calls[which % len(self.calls)]
            if how == "let go":
                chosen.let_go.set()
            elif chosen.task is not None:
                chosen.cancelled = True
                if how == "scope":
                    chosen.scope.cancel()
                else:
                    chosen.task.cancel()
            await self.turn(turns)

        self.loop.run_until_complete(call())

    @rule(which=st.integers(0, 9))
    def drop_derived(self, which: int) -> None:
        if self.derived:
            del self.derived[which % len(self.derived)]

    # What always holds, and what holds in the end

    @invariant()
    def all_is_well(self) -> None:
        if self.failures:
            raise self.failures[0]
        if not self.opened:
            return
        if not self.closed:
            self.kv.check_invariants()
        for array, expected in self.derived:
            assert array.tobytes() == expected
        for call in self.calls:
            for view, expected in call.views:
                assert bytes(view) == expected

    @precondition(lambda self: not self.closed)
    @rule()
    def settle(self) -> None:
        self.loop.run_until_complete(self.settled())

    @precondition(lambda self: not self.closed)
    @rule(hang=st.sampled_from([None, None, None, "read", "write", "flush", "close"]))
    def close(self, hang: Operation | None) -> None:
        """In the middle of everything; a tier that hangs holds nobody up for long."""

        async def call() -> None:
            clean = hang is None
            for tier in self.faulty:
                if hang is not None:
                    tier.hang(hang)
                else:
                    tier.heal()
            self.closed = True
            try:
                await self.kv.__aexit__(None, None, None)
            except OffloadError:
                clean = False
            self.heal_tiers()
            for one in self.calls:
                one.let_go.set()
            await self.until(lambda: not self.calls, "calls go on after the close")
            await self.turn(3)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            self.check_records()
            if clean:
                await self.check_reopened()

        self.loop.run_until_complete(call())

    @precondition(lambda self: self.closed)
    @rule()
    def nothing_more(self) -> None:
        """Closed is closed; a run may end here."""

    def teardown(self) -> None:
        try:
            if self.opened and not self.closed and not self.failures:
                self.settle()
                self.close(hang=None)
            if self.failures:
                raise self.failures[0]
        finally:
            logging.disable(logging.NOTSET)
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()

    async def settled(self) -> None:
        """Heal the tiers, let everybody go, and find everything back at zero."""
        kv, core = self.kv, self.kv._core
        self.heal_tiers()
        await self.turn(3)
        for call in self.calls:
            call.let_go.set()
        await self.until(lambda: not self.calls, "calls go on")
        for prepared in self.stores:
            await self.view(prepared.namespace).complete_store(prepared.hashes, success=False)
        self.stores.clear()
        for prepared in self.loads:
            await self.view(prepared.namespace).complete_load(prepared.hashes)
        self.loads.clear()
        self.derived.clear()
        await self.until(lambda: not core.jobs.running, "jobs go on")
        await self.until(lambda: not self.prefetcher_works(), "a hint is worked on for ever")
        kv.check_invariants()
        if any(slots.retired for slots in self.all_slots()):
            gc.collect()  # an error that was caught may still hold the frame that held an array
        stats = kv.get_stats()
        assert (stats.pinned, stats.pending) == (0, 0)
        for tier_stats in stats.tiers.values():
            assert tier_stats.retired_blocks == tier_stats.pending_blocks == 0
            assert tier_stats.queue_depth == 0
            assert tier_stats.free_blocks + tier_stats.blocks == tier_stats.capacity_blocks
        staging = core.transfer.staging.slots
        assert (staging.in_use, staging.retired) == (0, 0)
        two_phase = core.two_phase
        assert not two_phase._held
        assert not two_phase._lent
        assert not two_phase._staged
        assert not core.loading._flights
        assert not core.moves.under_way
        for entry in core.index.ready.values():
            assert (entry.pin_count, entry.shown, entry.move) == (0, 0, None)
        self.check_records()
        await self.check_bytes(kv)

    def all_slots(self) -> list[Slots]:
        core = self.kv._core
        return [core.transfer.staging.slots, *(level.slots for level in core.index.levels)]

    def prefetcher_works(self) -> bool:
        return bool(self.kv._prefetcher._queue) or bool(self.kv._core.jobs.running)

    def heal_tiers(self) -> None:
        for tier in self.faulty:
            tier.heal()

    async def check_bytes(self, kv: AsyncLRUManager) -> None:
        """Each block that is ready can be loaded and has its own bytes."""
        for namespace in ("", OTHER):
            view = self.view(namespace, kv)
            for one in range(10):
                if await view.lookup([one]):
                    async with view.load([one]) as lease:
                        assert bytes(lease[0]) == self.payload(namespace, one)

    def check_records(self) -> None:
        """What a crash would leave are the right bytes, and nothing that was evicted for good."""
        for tier in self.faulty:
            if isinstance(tier.inner, RestartableTier):
                for record in tier.inner._records.values():
                    namespace, block_hash = decode_key(record.key)
                    assert record.payload == self.payload(namespace, block_hash)
                    assert (namespace, block_hash) not in self.gone

    async def check_reopened(self) -> None:
        kv = self.make_manager()
        await self.enter(kv)
        try:
            kv.check_invariants()
            await self.check_bytes(kv)
        finally:
            await kv.__aexit__(None, None, None)

    # Inside

    def view(self, namespace: str, kv: AsyncLRUManager | None = None) -> Contract:
        ACTING.set(namespace)
        kv = self.kv if kv is None else kv
        return kv.namespace(namespace) if namespace else kv

    def start(
        self,
        what: str,
        work: Callable[[Call], Coroutine[Any, Any, None]],
        turns: int,
        expected: tuple[type[Exception], ...] = (),
    ) -> None:
        """Start a call as a task, and let the loop turn; what it must not raise is kept."""

        async def call(me: Call) -> None:
            try:
                with me.scope:
                    await work(me)
            except asyncio.CancelledError as exc:
                if not me.cancelled:
                    self.failures.append(exc)
            except ClosedError as exc:
                if not self.closed:
                    self.failures.append(exc)
            except expected:
                pass
            except BaseException as exc:  # noqa: BLE001  # raised by the invariant
                self.failures.append(exc)
            finally:
                self.calls.remove(me)

        async def begin() -> None:
            me = Call(what)
            self.calls.append(me)
            me.task = self.loop.create_task(call(me))
            await self.turn(turns)

        self.loop.run_until_complete(begin())

    async def look(
        self, me: Call, namespace: str, chain: Sequence[int], lease: Iterable[Any], derive: bool
    ) -> None:
        """Stay inside a lease until told to go; its bytes are the blocks' own all the time."""
        for one, view in zip(chain, lease, strict=True):
            me.views.append((view, self.payload(namespace, one)))
            if derive and len(view):
                self.derived.append((np.frombuffer(view, np.uint8), self.payload(namespace, one)))
        try:
            for view, expected in me.views:
                assert bytes(view) == expected
            await me.let_go.wait()
            for view, expected in me.views:
                assert bytes(view) == expected
        finally:
            me.views.clear()

    def begin_store(self, namespace: str, chain: Iterable[BlockHash]) -> int:
        self.moment += 1
        for one in chain:
            self.storing[namespace, one] += 1
            self.last_store[namespace, one] = self.moment
            self.gone.discard((namespace, one))
        return self.moment

    def end_store(self, namespace: str, chain: Iterable[BlockHash]) -> None:
        self.moment += 1
        for one in chain:
            self.storing[namespace, one] -= 1
            self.last_store[namespace, one] = self.moment

    def note_gone(self, namespace: str, evicted: Iterable[BlockHash], began: int) -> None:
        for one in evicted:
            key = (namespace, one)
            if not self.storing[key] and self.last_store.get(key, 0) <= began:
                self.gone.add(key)

    async def turn(self, turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)

    async def until(self, done: Callable[[], bool], otherwise: str) -> None:
        for _ in range(3000):
            if done():
                return
            await self.turn(1)
        raise AssertionError(f"{otherwise}: {[call.what for call in self.calls]}")


class WholeManagerOnUvloop(WholeManager):
    def make_loop(self) -> asyncio.AbstractEventLoop:
        return uvloop.new_event_loop()


SETTINGS = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestOnAsyncio = WholeManager.TestCase
TestOnAsyncio.settings = SETTINGS
TestOnUvloop = WholeManagerOnUvloop.TestCase
TestOnUvloop.settings = SETTINGS
