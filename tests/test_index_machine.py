"""The synchronous index against a naive model: what lies in each slot, and who holds what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvoffload import (
    BlockState,
    EvictionPolicy,
    LRUPolicy,
    Medium,
    RejectReason,
    TierError,
    WeightedPolicy,
)
from kvoffload.blocks import BlockEntry, Grant, Move
from kvoffload.events import EventHub
from kvoffload.index import Index
from kvoffload.room import Room
from kvoffload.testing import ManualClock
from kvoffload.types import ByteArray, StoredBlock

KEYS = st.integers(0, 15)
CHAINS = st.lists(KEYS, min_size=1, max_size=5, unique=True)


class Places:
    """A tier of slots without bytes; the machine keeps what would be in them."""

    medium = Medium.CPU
    block_bytes = 100
    addressable = True

    def __init__(self, name: str, num_blocks: int, *, persistent: bool) -> None:
        self.name = name
        self.num_blocks = num_blocks
        self.persistent = persistent

    async def open(self) -> Sequence[StoredBlock]:
        raise NotImplementedError

    async def close(self, order: Sequence[int] = ()) -> None:
        raise NotImplementedError

    def view(self, slot: int, size: int) -> ByteArray:
        raise NotImplementedError

    async def read(
        self, slots: Sequence[int], into: Sequence[memoryview]
    ) -> list[TierError | None]:
        raise NotImplementedError

    async def write(
        self, slots: Sequence[int], payloads: Sequence[memoryview], keys: Sequence[bytes]
    ) -> list[TierError | None]:
        raise NotImplementedError

    async def erase(self, slots: Sequence[int]) -> None:
        raise NotImplementedError

    async def flush(self) -> None:
        raise NotImplementedError


@dataclass
class Store:
    """A store whose moves are under way."""

    granted: list[tuple[BlockEntry, int, Grant]]
    moves: list[Move] = field(default_factory=list)


class IndexMachine(RuleBasedStateMachine):
    """Stores, moves, pins, promotions and evictions in any order, moves ending whenever.

    `content` is the naive model: which block's bytes lie in each slot. It is changed where a real
    manager would change the slot, and the index must never point at other bytes than the block's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tiers = [
            Places("hot", 3, persistent=False),
            Places("warm", 3, persistent=False),
            Places("cold", 4, persistent=True),
        ]
        self.index = Index(self.tiers, self.make_policy(), ManualClock(), EventHub(""))
        self.room = Room(self.index)
        self.content: dict[tuple[int, int], object] = {}
        self.stores: list[Store] = []
        self.pins: list[BlockEntry] = []
        self.reserved: list[BlockEntry] = []
        self.known: set[object] = set()

    def make_policy(self) -> EvictionPolicy:
        return LRUPolicy()

    @rule(chain=CHAINS)
    def begin_store(self, chain: list[int]) -> None:
        new = [key for key in chain if self.index.state(key) is BlockState.ABSENT]
        entries = self.index.reserve(new, [key + 1 for key in new], pins=1)
        store = Store([])
        evicted: list[object] = []
        wanted: dict[int, list[BlockEntry]] = {}
        for entry, place in zip(entries, self.room.place(new), strict=True):
            if isinstance(place, RejectReason):
                self.index.abort([entry])
            else:
                wanted.setdefault(place, []).append(entry)
        for number in sorted(wanted, reverse=True):
            group = wanted[number]
            grants = self.room.make_room(number, len(group), store.moves, evicted)  # type: ignore[arg-type]  # keys
            assert len(grants) == len(group)  # place() had counted the room
            store.granted += zip(group, [number] * len(group), grants, strict=True)
        self.known -= set(evicted)
        self.stores.append(store)
        self.settle()

    @precondition(lambda self: any(store.moves for store in self.stores))
    @rule(written=st.booleans(), pick=st.integers(0, 100))
    def end_move(self, written: bool, pick: int) -> None:
        """End one move that waits for no other one."""
        moves = [
            (store, move)
            for store in self.stores
            for move in store.moves
            if move.after is None or move.after.done is not None
        ]
        store, move = moves[pick % len(moves)]
        store.moves.remove(move)
        possible = move.after is None or bool(move.after.done)
        if possible:
            assert self.content[move.source_level, move.source_slot] == move.entry.key, (
                "read after it was given away"
            )
            self.content[move.target_level, move.target_slot] = (
                move.entry.key if written else "torn"
            )
        if self.room.finish_move(move, written and possible):
            self.known.discard(move.entry.key)
        self.settle()

    def settle(self) -> None:
        """Fill and publish, or give up, the stores whose moves have ended."""
        for store in [store for store in self.stores if not store.moves]:
            self.stores.remove(store)
            for entry, number, grant in store.granted:
                if grant.usable:
                    entry.level, entry.slot = number, grant.slot
                    self.content[number, grant.slot] = entry.key
                    self.index.commit([entry])
                    self.known.add(entry.key)
                else:
                    self.index.abort([entry])

    @rule(chain=CHAINS)
    def reserve_for_an_engine(self, chain: list[int]) -> None:
        new = [key for key in chain if self.index.state(key) is BlockState.ABSENT]
        hottest = self.index.levels[0]
        if len(new) <= hottest.slots.free + len(hottest.copies):
            slots = self.room.take_now(0, len(new), [])
            entries = self.index.reserve(new, [1] * len(new))
            for entry, slot in zip(entries, slots, strict=True):
                entry.slot = slot
                self.content[0, slot] = entry.key
            self.reserved += entries

    @precondition(lambda self: self.reserved)
    @rule(success=st.booleans())
    def complete_for_an_engine(self, success: bool) -> None:
        entry = self.reserved.pop()
        if success:
            self.index.commit([entry])
            self.known.add(entry.key)
        else:
            self.index.abort([entry])

    @rule(chain=CHAINS)
    def use(self, chain: list[int]) -> None:
        self.index.use(chain)

    @rule(key=KEYS)
    def pin(self, key: int) -> None:
        if key in self.index.ready:
            self.index.pin([self.index.ready[key]])
            self.pins.append(self.index.ready[key])

    @precondition(lambda self: self.pins)
    @rule(pick=st.integers(0, 100))
    def unpin(self, pick: int) -> None:
        self.index.unpin([self.pins.pop(pick % len(self.pins))])

    @rule(key=KEYS)
    def promote(self, key: int) -> None:
        entry = self.index.ready.get(key)
        hottest = self.index.levels[0]
        if entry and entry.level and entry.move is None and hottest.slots.free:
            self.index.pin([entry])
            slot = hottest.slots.take(1)[0]
            self.content[0, slot] = self.content[entry.level, entry.slot]
            self.index.promote(entry, 0, slot)
            self.index.unpin([entry])

    @rule(key=KEYS)
    def flush_one(self, key: int) -> None:
        entry = self.index.ready.get(key)
        cold = self.index.levels[2]
        if entry and entry.level < 2 and entry.move is None and 2 not in (entry.copies or {}):
            for slot in cold.slots.take(1):
                self.content[2, slot] = entry.key
                self.index.add_copy(entry, cold, slot)

    @rule(key=KEYS)
    def evict(self, key: int) -> None:
        entry = self.index.ready.get(key)
        if entry and not entry.pin_count:
            self.index.drop([entry])
            self.known.discard(key)
            assert self.index.state(key) is BlockState.ABSENT

    @rule(count=st.integers(0, 6))
    def evict_coldest(self, count: int) -> None:
        coldest = self.index.coldest(count, None, everywhere=True)
        evictable = [entry for entry in self.index.ready.values() if not entry.pin_count]
        assert len(coldest) == min(count, len(evictable))
        levels = [entry.level for entry in coldest]
        assert levels == sorted(levels, reverse=True)
        self.index.drop(coldest)
        self.known -= {entry.key for entry in coldest}

    @precondition(lambda self: self.pins)
    @rule()
    def condemn(self) -> None:
        entry = self.pins[-1]
        if entry.state is BlockState.READY:
            self.index.condemn(entry)
            self.known.discard(entry.key)

    @invariant()
    def the_books_balance(self) -> None:
        self.index.check_invariants()

    @invariant()
    def nothing_but_what_was_told_left(self) -> None:
        assert set(self.index.ready) == self.known

    @invariant()
    def every_block_has_its_own_bytes(self) -> None:
        for key, entry in self.index.ready.items():
            assert self.content[entry.level, entry.slot] == key
            for number, slot in (entry.copies or {}).items():
                assert self.content[number, slot] == key

    @invariant()
    def pinned_blocks_are_there(self) -> None:
        for entry in self.pins:
            if entry.state is BlockState.READY:
                assert self.index.ready[entry.key] is entry

    def teardown(self) -> None:
        """Everything ends: then every slot is free or holds a ready block."""
        while any(store.moves for store in self.stores):
            self.end_move(written=True, pick=0)
        while self.pins:
            self.unpin(0)
        while self.reserved:
            self.complete_for_an_engine(success=False)
        self.index.check_invariants()
        assert not self.index.pending
        assert not self.index.pinned
        for level in self.index.levels:
            stats = level.stats(0.0)
            assert stats.pending_blocks == stats.retired_blocks == 0
            assert stats.free_blocks + stats.blocks == stats.capacity_blocks


class WeightedIndexMachine(IndexMachine):
    """The same with the learned policy."""

    def make_policy(self) -> EvictionPolicy:
        return WeightedPolicy()


MANY = settings(max_examples=150, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("machine", [IndexMachine, WeightedIndexMachine])
def test_index_against_the_naive_model(machine: type[IndexMachine]) -> None:
    """No slot has two owners, no pinned block moves, no block shows another's bytes."""
    case = machine.TestCase
    case.settings = MANY
    case("runTest").runTest()
