"""The synchronous heart of a manager: where each block is, who holds it, which slots are free.

Nothing here awaits and nothing here touches a payload. A caller decides with one method, moves the
bytes with `movement`, and publishes with another; in between the index already shows what was
decided, so that no other task can decide against it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import repeat
from operator import attrgetter

from .blocks import BlockEntry
from .events import EventHub, EventKind
from .levels import Level
from .metrics import new_counters
from .retention import Retention
from .shares import Shares
from .signals import Signal
from .types import (
    BlockState,
    Clock,
    EvictionPolicy,
    Key,
    StoredBlock,
    Tier,
    TierState,
)

_SIZE = attrgetter("size")
_PINS = attrgetter("pin_count")
READY, PENDING, ABSENT = BlockState.READY, BlockState.PENDING, BlockState.ABSENT
READ_ONLY = TierState.READ_ONLY

FOLLOWERS = 251
"""Of the block that follows another, no more is kept than this remainder: a small integer."""
SEVERAL = -1
"""Stands for more than one follower."""
RESTORED_AGE_S = 1e-6
"""Seconds by which a block that a tier still held counts as older than the next one."""


class Index:
    """State machine of one manager over its tiers, hottest first."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        policy: EvictionPolicy,
        clock: Clock,
        events: EventHub,
        shares: Shares | None = None,
    ) -> None:
        self.levels = [Level(number, tier) for number, tier in enumerate(tiers)]
        self.policy = policy
        self.clock = clock
        self.events = events
        self.ready: dict[Key, BlockEntry] = {}
        self.pending: dict[Key, BlockEntry] = {}
        self.pinned: set[Key] = set()
        """Ready blocks with a pin; they are nobody's victims."""
        self.pinned_of: Counter[str] = Counter()
        """How many of them are of each namespace but the manager's own."""
        self.pending_of: Counter[str] = Counter()
        """How many pending blocks are."""
        self.counters: dict[str | None, dict[str, int]] = {None: new_counters()}
        """Fields of `ManagerStats` by namespace; `None` is the manager's own."""
        self.strangers = new_counters()
        """The same of namespaces that never stored a block, all together: names come from outside,
        so that there may be any number of them."""
        self.namespaced = False
        """Whether there is any namespace but the manager's own."""
        self.prefetched: set[Key] = set()
        """Blocks that a hint brought and nobody has used since."""
        self.condemned = 0
        """Blocks that left though they were pinned, for they were damaged."""
        self.changed = Signal()
        self.short = Signal()
        """Fired when fewer slots of a level are free than its low watermark."""
        self.users: list[Callable[[Sequence[Key]], None]] = []
        """Are told of each use."""
        self.on_ready: Callable[[Sequence[BlockEntry]], None] | None = None
        """Is told of blocks that become ready, where there is somebody to tell."""
        self.shares = shares
        """What namespaces may have and have, where any has a share; its policy is this one."""
        if shares is not None:
            ready = self.ready
            shares.policy.time_of = lambda key: ready[key].access_time
        policy.attach([level.slots.capacity for level in self.levels])

    # What is where

    def prefix_hit(self, keys: Sequence[Key]) -> int:
        """Return how many leading blocks are ready."""
        hit = 0
        ready = self.ready
        for key in keys:
            if key not in ready:
                break
            hit += 1
        return hit

    def prefix(self, keys: Sequence[Key]) -> list[BlockEntry]:
        """Return the leading blocks that are ready."""
        ready = self.ready
        try:
            return [ready[key] for key in keys]
        except KeyError:
            return [ready[key] for key in keys[: self.prefix_hit(keys)]]

    def state(self, key: Key) -> BlockState:
        """Return what is known of a block."""
        if key in self.ready:
            return READY
        return PENDING if key in self.pending else ABSENT

    def present(self, keys: Iterable[Key]) -> list[Key]:
        """Return the blocks that are ready or pending."""
        ready, pending = self.ready, self.pending
        return [key for key in keys if key in ready or key in pending]

    # Pins and uses

    def pin(self, entries: Iterable[BlockEntry]) -> None:
        """Protect ready blocks against eviction; counted."""
        pinned, namespaced = self.pinned, self.namespaced
        levels = self.levels
        for entry in entries:
            if not entry.pin_count:
                key = entry.key
                pinned.add(key)
                levels[entry.level].stuck += 1
                if namespaced and type(key) is tuple:
                    self.pinned_of[key[0]] += 1
            entry.pin_count += 1

    def unpin(self, entries: Iterable[BlockEntry]) -> None:
        """Take one pin back from each block; a block dropped meanwhile gives its slots back."""
        released: list[Key] = []
        pinned, levels, namespaced = self.pinned, self.levels, self.namespaced
        for entry in entries:
            entry.pin_count = pins = entry.pin_count - 1
            if not pins:
                if entry.state is READY:
                    key = entry.key
                    pinned.discard(key)
                    levels[entry.level].stuck -= 1
                    if namespaced and type(key) is tuple:
                        self.pinned_of[key[0]] -= 1
                    released.append(key)
                else:
                    self._give_slots_back(entry)
        if released:
            self.policy.unpinned(released)

    def begin_transfer(self, entries: Iterable[BlockEntry]) -> None:
        """Note that their bytes are being read; pins them for as long."""
        for entry in entries:
            self.pin((entry,))
            entry.busy += 1

    def end_transfer(self, entries: Iterable[BlockEntry]) -> None:
        """Note that a transfer of each has ended."""
        for entry in entries:
            entry.busy -= 1
            self.unpin((entry,))
        self.changed.fire()

    def use(self, keys: Sequence[Key], retention: Retention | None = None) -> None:
        """Count one use of a chain, head first; keys that are not ready are passed over."""
        self.policy.use(keys, retention=retention)
        for tell in self.users:
            tell(keys)
        now = self.clock()
        get = self.ready.get
        above: BlockEntry | None = None
        for key in keys:
            entry = get(key)
            if above is not None:
                mark = hash(key) % FOLLOWERS
                if above.follower != mark:
                    above.follower = mark if above.follower is None else SEVERAL
            if entry is not None:
                entry.access_count += 1
                entry.access_time = now
                if entry.level:
                    entry.uses_below += 1
            above = entry
        if self.prefetched:
            useful = self.prefetched.intersection(keys) & self.ready.keys()
            self.prefetched -= useful
            self.count("prefetch_useful", useful)

    # Storing

    def reserve(
        self, keys: Sequence[Key], sizes: Sequence[int], *, pins: int = 0
    ) -> list[BlockEntry]:
        """Make blocks pending; they have no slot yet. With `pins`, their writer completes them."""
        now = self.clock()
        clock = self.clock
        if self.namespaced:
            for key in keys:
                if isinstance(key, tuple) and key[0] not in self.counters:
                    self.counters[key[0]] = new_counters()
        new = BlockEntry.__new__
        entries: list[BlockEntry] = []
        append = entries.append
        for key, size in zip(keys, sizes, strict=True):
            # A million of these are made at a time: no constructor in between.
            entry = new(BlockEntry)
            entry.block_hash = key[1] if type(key) is tuple else key  # type: ignore[assignment]  # a tuple is (namespace, hash)
            entry.key = key
            entry.slot = -1
            entry.state = PENDING
            entry.pin_count = pins
            entry.access_count = 0
            entry.access_time = now
            entry._clock = clock
            entry.size = size
            entry.level = 0
            entry.busy = 0
            entry.copies = None
            entry.move = None
            entry.shown = 0
            entry.uses_below = 0
            entry.follower = None
            append(entry)
        self.pending.update(zip(keys, entries, strict=True))
        self._count_pending(entries, 1)
        if self.shares is not None:
            self.shares.add(entries)
        return entries

    def take_reserved(self, keys: Iterable[Key]) -> list[BlockEntry]:
        """Take the reserved blocks among these out of the pending ones, to be published."""
        found = list(filter(None, map(self.pending.pop, keys, repeat(None))))
        if any(map(_PINS, found)):
            # Their writer completes those itself.
            written = [entry for entry in found if entry.pin_count]
            self.pending.update((entry.key, entry) for entry in written)
            found = [entry for entry in found if not entry.pin_count]
        self._count_pending(found, -1)
        return found

    def commit(self, entries: Sequence[BlockEntry]) -> None:
        """Publish pending blocks whose bytes are complete; their writer's pin ends."""
        for entry in entries:
            del self.pending[entry.key]
            entry.pin_count = 0
        self._count_pending(entries, -1)
        self.publish(entries)

    def publish(self, entries: Sequence[BlockEntry]) -> None:
        """Make blocks that are pending no more ready; one event a level."""
        for entry in entries:
            entry.state = READY
        for level, group in self.by_level(entries):
            keys = [entry.key for entry in group]
            self.ready.update(zip(keys, group, strict=True))
            self.policy.insert(keys, level.number)
            self._arrive(level, group)
            if level.number:
                for entry in group:
                    entry.uses_below = -1  # the use that stores it is still to be counted
            self.count("stored", keys)
            self.emit(EventKind.STORED, keys, level)
        if self.on_ready is not None:
            self.on_ready(entries)
        self.changed.fire()

    def abort(self, entries: Sequence[BlockEntry]) -> None:
        """Give up pending blocks, and the slots they have."""
        for entry in entries:
            del self.pending[entry.key]
            entry.state = ABSENT
            entry.pin_count = 0
            if entry.slot >= 0:
                self.levels[entry.level].slots.give_back([entry.slot])
        self._count_pending(entries, -1)
        if self.shares is not None:
            self.shares.drop(entries)
        self.changed.fire()

    def abort_pending(self, entries: Iterable[BlockEntry]) -> None:
        """Give up those of the blocks that are pending still."""
        pending = self.pending
        self.abort([entry for entry in entries if pending.get(entry.key) is entry])

    def restore(
        self, level: Level, found: Sequence[tuple[Key, StoredBlock]], hotter: int = 0
    ) -> None:
        """Take over blocks that a persistent tier still has, coldest first; their slots are taken.

        A block that a tier further up has too is a copy here. `hotter` ones are yet to come.
        """
        new: list[tuple[Key, StoredBlock]] = []
        for key, block in found:
            entry = self.ready.get(key)
            self.namespaced = self.namespaced or isinstance(key, tuple)
            if entry is None:
                new.append((key, block))
            elif entry.size == block.size:
                self.add_copy(entry, level, block.slot)
            else:
                level.free([block.slot], [key])
        keys = [key for key, _ in new]
        entries = self.reserve(keys, [block.size for _, block in new])
        for entry, (key, block) in zip(entries, new, strict=True):
            del self.pending[key]
            entry.slot, entry.level, entry.state = block.slot, level.number, READY
            self.ready[key] = entry
        self._count_pending(entries, -1)
        if self.shares is not None:
            # Their policies are compared by the time: so that it tells the order they came in.
            for age, entry in enumerate(reversed(entries), hotter):
                entry.access_time -= age * RESTORED_AGE_S
        self._arrive(level, entries)
        self.policy.insert(keys[::-1], level.number)

    # Between levels

    def relocate(self, entry: BlockEntry, level: Level, slot: int) -> None:
        """Make a block at home in a slot of another level, which has its bytes."""
        old = self.levels[entry.level]
        self.policy.remove([entry.key], old.number)
        self._depart(old, [entry])
        old.leave([entry.slot], [entry.key])
        entry.level, entry.slot, entry.uses_below = level.number, slot, 0
        self._arrive(level, [entry])
        self.policy.insert([entry.key], level.number)

    def fall_back(self, entry: BlockEntry) -> int:
        """Let a block fall back on its clean copy further down; return the slot it leaves."""
        if not entry.copies:
            raise RuntimeError(f"{entry!r} has no copies")
        number = min(entry.copies)
        level = self.levels[number]
        left = entry.slot
        level.drop_copy(entry)
        self.relocate(entry, level, entry.copies.pop(number))
        self.count("demotions", [entry.key])
        self.emit(EventKind.DEMOTED, [entry.key], level)
        return left

    def take_copies(self, level: Level, count: int) -> list[int]:
        """Drop up to so many clean copies of a level, the oldest; return their slots."""
        slots: list[int] = []
        for _ in range(min(count, len(level.copies))):
            entry = next(iter(level.copies.values()))
            if entry.copies is None:
                raise RuntimeError(f"{entry!r} has no copies")
            slot = entry.copies.pop(level.number)
            level.drop_copy(entry)
            level.leave([slot], [entry.key])
            slots.append(slot)
        return slots

    def give_up_copies(self, level: Level, entries: Iterable[BlockEntry]) -> None:
        """Free the slots of a level that hold clean copies of these blocks."""
        for entry in entries:
            if entry.copies is None:
                raise RuntimeError(f"{entry!r} has no copies")
            level.drop_copy(entry)
            level.free([entry.copies.pop(level.number)], [entry.key])

    def promote(self, entry: BlockEntry, number: int, slot: int) -> None:
        """Make a pinned block, whose bytes are in this slot now, at home there.

        Where it was, a clean copy stays behind.
        """
        old, new = self.levels[entry.level], self.levels[number]
        self.policy.remove([entry.key], old.number)
        self._depart(old, [entry])
        old.stuck -= 1
        self.add_copy(entry, old, entry.slot)
        entry.level, entry.slot, entry.uses_below = number, slot, 0
        self._arrive(new, [entry])
        new.stuck += 1
        self.policy.insert([entry.key], number)
        self.count("promotions", [entry.key])
        self.emit(EventKind.PROMOTED, [entry.key], new)

    def add_copy(self, entry: BlockEntry, level: Level, slot: int) -> None:
        """Note a clean copy of a block on a tier below the one it is at home in."""
        if entry.copies is None:
            entry.copies = {}
        entry.copies[level.number] = slot
        level.keep_copy(entry)

    # Leaving

    def evict(self, level: Level, keys: Sequence[Key]) -> list[int]:
        """Remove blocks of one level from every tier; return their slots, which stay in use."""
        if not keys:
            return []
        slots = self._remove(level, keys)
        level.leave(slots, keys)
        self.count("evictions", keys)
        self.emit(EventKind.REMOVED, keys, level)
        return slots

    def has_order_of(self, namespace: str | None, *, everywhere: bool) -> bool:
        """Whether the coldest blocks of a namespace are found without a look at all others."""
        alone = self.shares is not None and self.shares.policy.alone(namespace) is not None
        return everywhere or alone

    def coldest(self, count: int, namespace: str | None, *, everywhere: bool) -> list[BlockEntry]:
        """Return the `count` coldest blocks without a pin, lowest tier first.

        Of one namespace, unless `everywhere`.
        """
        found: list[BlockEntry] = []
        for level in reversed(self.levels):
            wanted = count - len(found)
            if wanted <= 0:
                break
            if not (everywhere or level.has_any(namespace)):
                continue
            alone = None
            if self.shares is not None and not everywhere:
                alone = self.shares.policy.alone(namespace)
            all_fit = everywhere or alone is not None
            limit = wanted if all_fit else level.blocks
            keys = (alone or self.policy).victims(level.number, limit, self.pinned)
            entries = [self.ready[key] for key in keys]
            if not all_fit:
                entries = [entry for entry in entries if entry.namespace == namespace][:wanted]
            found += entries
        return found

    def own_end(self, keys: Sequence[Key]) -> list[Key]:
        """Return the end of a chain that no other chain was seen to share, head first."""
        follower: int | None = None
        for number in range(len(keys) - 1, -1, -1):
            entry = self.ready.get(keys[number])
            if entry is not None and entry.follower not in (None, follower):
                return list(keys[number + 1 :])
            follower = hash(keys[number]) % FOLLOWERS
        return list(keys)

    def drop(self, entries: Sequence[BlockEntry]) -> None:
        """Remove blocks without a pin from every tier; what persists of them is stale."""
        for level, group in self.by_level(entries):
            keys = [entry.key for entry in group]
            level.free(self._remove(level, keys), keys)
            self.emit(EventKind.REMOVED, keys, level)
        self.changed.fire()

    def condemn(self, entry: BlockEntry) -> None:
        """Remove a pinned block whose bytes are bad; its slot is free with the last pin."""
        level = self.levels[entry.level]
        self.condemned += 1
        self._give_copies_back(entry)
        self.prefetched.discard(entry.key)
        self.pinned.discard(entry.key)
        if isinstance(entry.key, tuple):
            self.pinned_of[entry.key[0]] -= 1
        level.stuck -= 1
        del self.ready[entry.key]
        entry.state = ABSENT
        self.policy.remove([entry.key], level.number)
        self._depart(level, [entry])
        if self.shares is not None:
            self.shares.drop([entry])
        self.emit(EventKind.REMOVED, [entry.key], level)

    def stale(self, keys: Iterable[Key] | None) -> list[tuple[Level, list[int]]]:
        """Return the slots that still show these blocks (or any) after they left."""
        found: list[tuple[Level, list[int]]] = []
        for level in self.levels:
            if level.stale:
                left = level.stale if keys is None else [key for key in keys if key in level.stale]
                slots = [slot for key in left for slot in level.stale[key]]
                if slots:
                    found.append((level, slots))
        return found

    # Telling

    def emit(self, kind: EventKind, keys: Iterable[Key], level: Level, detail: str = "") -> None:
        """Tell who listens what happened to blocks at a level."""
        self.events.emit(kind, keys, tier=level.tier.name, medium=level.tier.medium, detail=detail)

    def count(self, name: str, keys: Collection[Key]) -> None:
        """Add blocks to a counter of their namespaces."""
        if not self.namespaced:
            self.counters[None][name] += len(keys)
            return
        for key in keys:
            self.counters_of(key[0] if isinstance(key, tuple) else None)[name] += 1

    def counters_of(self, namespace: str | None) -> dict[str, int]:
        """Return the counters of a namespace."""
        return self.counters.get(namespace, self.strangers)

    def fail(self, level: Level, keys: Sequence[Key], detail: str) -> None:
        """Note that a tier could not read, write or erase these blocks."""
        level.counters["errors"] += len(keys)
        self.count("io_errors", keys)
        self.emit(EventKind.FAILED, keys, level, detail)

    def expire(self, keys: Sequence[Key], level: Level) -> None:
        """Note that a holder's reservation or pins of these blocks were taken back."""
        self.count("expired", keys)
        self.emit(EventKind.EXPIRED, keys, level)

    def check_invariants(self) -> None:
        """Raise `AssertionError` where the books do not balance; for tests and debugging."""
        for counted, keys in ((self.pinned_of, self.pinned), (self.pending_of, self.pending)):
            assert +counted == Counter(key[0] for key in keys if isinstance(key, tuple))
        seen: dict[int, set[int]] = {level.number: set() for level in self.levels}

        def claim(number: int, slot: int) -> None:
            assert slot not in seen[number], f"slot {slot} of level {number} is used twice"
            seen[number].add(slot)

        assert not self.ready.keys() & self.pending.keys()
        for key, entry in self.ready.items():
            assert entry.key == key
            assert entry.state is READY
            assert entry.pin_count >= 0
            assert (entry.pin_count > 0) == (key in self.pinned), entry
            assert entry.pin_count >= entry.busy >= (entry.move is not None)
            claim(entry.level, entry.slot)
            for number, slot in (entry.copies or {}).items():
                assert number > entry.level
                assert self.levels[number].copies[key] is entry
                claim(number, slot)
        for entry in self.pending.values():
            assert entry.state is PENDING
            if entry.slot >= 0:
                claim(entry.level, entry.slot)
        for level in self.levels:
            slots = level.slots
            home = [entry for entry in self.ready.values() if entry.level == level.number]
            assert level.blocks == len(home)
            assert level.stuck == sum(entry.pin_count > 0 for entry in home)
            sizes = [entry.size for entry in [*home, *level.copies.values()]]
            assert level.bytes == sum(sizes)
            assert level.copied_bytes == sum(entry.size for entry in level.copies.values())
            assert slots.free + slots.in_use + slots.retired + slots.useless == slots.capacity
            assert len(seen[level.number]) <= slots.in_use
        if self.shares is not None:
            self.shares.check(self.ready.values(), self.pending.values(), len(self.levels))

    def by_level(
        self, entries: Sequence[BlockEntry]
    ) -> Iterable[tuple[Level, Sequence[BlockEntry]]]:
        """Return blocks by the level that they are at home in."""
        if len(self.levels) == 1:
            return ((self.levels[0], entries),) if entries else ()
        groups: dict[int, list[BlockEntry]] = {}
        for entry in entries:
            groups.setdefault(entry.level, []).append(entry)
        return [(self.levels[number], group) for number, group in groups.items()]

    # Inside

    def _count_pending(self, entries: Iterable[BlockEntry], by: int) -> None:
        if self.namespaced:
            for entry in entries:
                if isinstance(entry.key, tuple):
                    self.pending_of[entry.key[0]] += by

    def _arrive(self, level: Level, entries: Sequence[BlockEntry]) -> None:
        level.blocks += len(entries)
        if level.slots.free < level.low:
            self.short.fire()
        level.bytes += sum(map(_SIZE, entries))
        if self.namespaced:
            self._count_usage(level, entries, 1)

    def _depart(self, level: Level, entries: Sequence[BlockEntry]) -> None:
        level.blocks -= len(entries)
        level.bytes -= sum(map(_SIZE, entries))
        if self.namespaced:
            self._count_usage(level, entries, -1)

    def _count_usage(self, level: Level, entries: Sequence[BlockEntry], sign: int) -> None:
        for entry in entries:
            if isinstance(entry.key, tuple):
                usage = level.usage.setdefault(entry.key[0], [0, 0])
                usage[0] += sign
                usage[1] += sign * entry.size

    def _remove(self, level: Level, keys: Sequence[Key]) -> list[int]:
        entries = list(map(self.ready.pop, keys))
        self.policy.remove(keys, level.number)
        self._depart(level, entries)
        if self.shares is not None:
            self.shares.drop(entries)
        if level.number + 1 < len(self.levels):
            for entry in entries:
                if entry.copies:
                    self._give_copies_back(entry)
        if self.prefetched:
            wasted = self.prefetched.intersection(keys)
            self.prefetched -= wasted
            self.count("prefetch_wasted", wasted)
        return [entry.slot for entry in entries]

    def _give_slots_back(self, entry: BlockEntry) -> None:
        self.levels[entry.level].free([entry.slot], [entry.key])
        self.changed.fire()

    def _give_copies_back(self, entry: BlockEntry) -> None:
        for number, slot in (entry.copies or {}).items():
            level = self.levels[number]
            level.drop_copy(entry)
            level.free([slot], [entry.key])
        entry.copies = None
