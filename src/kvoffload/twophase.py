"""Blocks that an engine moves itself: reservations, pins and views between prepare and complete."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import anyio

from .blocks import BlockEntry
from .errors import NotPinnedError
from .index import Index
from .keys import show_hash
from .movement.loading import Flight, Loading
from .types import BlockHash, Clock, Key, Medium
from .views import Lent, Place, lend, take_back

log = logging.getLogger("kvoffload")


@dataclass(slots=True)
class Hold:
    """The two-phase loads of one block.

    Attributes:
        entries: What each load pins, oldest first. One whose bytes turned out to be bad leaves, and
            the block may have been stored anew since.
        deadlines: When each is taken back.
        flights: What it was read with; one a load.
    """

    entries: list[BlockEntry] = field(default_factory=list)
    deadlines: list[float] = field(default_factory=list)
    flights: list[dict[Key, Flight]] = field(default_factory=list)


class TwoPhase:
    """Keeps what was prepared until it is completed, or its holder's time is up."""

    def __init__(self, index: Index, loading: Loading, clock: Clock, ttl_s: float) -> None:
        self._index = index
        self._loading = loading
        self._clock = clock
        self._ttl_s = ttl_s
        self._held: dict[Key, Hold] = {}
        self._lent: dict[Key, list[Lent]] = {}
        self._staged: dict[Key, int] = {}
        # Blocks whose holder was given up, until when it may yet come back: a completion is of a
        # hash, and must not be taken for that of the next holder, which is still at work.
        self._late_stores: dict[Key, float] = {}
        self._late_loads: dict[Key, float] = {}
        self._unsure: set[Key] = set()
        self._unsure_loads: set[Key] = set()
        self._wake = anyio.Event()

    # Stores

    def reserved(self, keys: Sequence[Key]) -> list[BlockEntry]:
        """Return those of the keys that a `prepare_store` reserved."""
        found = map(self._index.pending.get, dict.fromkeys(self.not_late(keys)))
        return [entry for entry in found if entry is not None and not entry.pin_count]

    def not_late(self, keys: Sequence[Key]) -> Sequence[Key]:
        """Leave out those whose completion may be that of a holder that was given up before.

        Better the present holder's block is given up in its turn than published half written.
        """
        if not (self._late_stores or self._unsure):
            return keys
        now = self._clock()
        late = {key for key in keys if self._late_stores.pop(key, now) > now}
        self._unsure.difference_update(keys)
        self._unsure |= late & self._index.pending.keys()
        return [key for key in keys if key not in late]

    def watch(self) -> None:
        """Note that something was prepared, so that its time runs."""
        if not self._wake.is_set():
            self._wake.set()

    def stage(self, entries: Sequence[BlockEntry], buffers: Sequence[int]) -> None:
        """Take over a staging buffer for each reserved block, until it is completed."""
        self._staged.update(zip([entry.key for entry in entries], buffers, strict=True))

    def place_of_store(self, entry: BlockEntry) -> Place:
        """Return where the bytes of a reserved block go."""
        staging = self._loading.staging
        buffer = self._staged.get(entry.key)
        if buffer is not None:
            return Place(staging.slots, staging.show, buffer)
        return self._loading.place_of(entry)

    def end_store(self, entries: Sequence[BlockEntry]) -> list[BlockHash]:
        """Take the views of reserved blocks back; return what something derived outlived."""
        if not self._lent:
            return []
        return [one for entry in entries for one in take_back(self._lent.pop(entry.key, []))]

    def unstage(self, entries: Sequence[BlockEntry]) -> None:
        """Give the staging buffers of reserved blocks back."""
        if self._staged:
            staged = [self._staged.pop(entry.key, None) for entry in entries]
            self._loading.staging.slots.give_back([one for one in staged if one is not None])

    # Loads

    def hold(self, entries: Sequence[BlockEntry], flights: dict[Key, Flight]) -> None:
        """Take over pins, and the flights of what was read, until `end_load`."""
        deadline = self._clock() + self._ttl_s
        for entry in entries:
            hold = self._held.setdefault(entry.key, Hold())
            hold.entries.append(entry)
            hold.deadlines.append(deadline)
            flight = flights.pop(entry.key, None)
            hold.flights.append({} if flight is None else {entry.key: flight})
            entry.shown += 1
        self.watch()

    def place_of_load(self, entry: BlockEntry) -> Place:
        """Return where the bytes of a held block are."""
        for flights in self._held[entry.key].flights:
            for flight in flights.values():
                if flight.entry is entry:
                    return self._loading.place_of(entry, flight)
        return self._loading.place_of(entry)

    def end_load(self, keys: Sequence[Key]) -> list[BlockHash]:
        """Let one load of each block end; return what something derived outlived.

        Raises:
            NotPinnedError: Some are not held that often; then nothing was changed.
        """
        wanted: dict[Key, int] = {}
        for key in keys:
            wanted[key] = wanted.get(key, 0) + 1
        for key, count in wanted.items():
            hold = self._held.get(key)
            if hold is None or len(hold.deadlines) < count:
                self._late_loads.pop(key, None)  # this was the late one
                block_hash = key[1] if isinstance(key, tuple) else key
                raise NotPinnedError(
                    f"complete_load of block {show_hash(block_hash)}, which no prepare_load holds"
                    + (" that often" if hold is not None else " (any more)")
                )
        derived: list[BlockHash] = []
        now = self._clock()
        for key in keys:
            # As with stores: another holder's pin stays rather than being taken for the late one's.
            if self._late_loads and self._late_loads.pop(key, now) > now:
                self._unsure_loads.add(key)
            else:
                derived += self._release(self._held[key])
        return derived

    # Views, on their first access

    def is_prepared(self, entry: BlockEntry, *, writable: bool) -> bool:
        """Tell whether a block is still prepared for a store, or for a load."""
        if writable:
            return self._index.pending.get(entry.key) is entry and not entry.pin_count
        hold = self._held.get(entry.key)
        return hold is not None and any(held is entry for held in hold.entries)

    def lend(self, entry: BlockEntry, *, writable: bool) -> memoryview:
        """Make a view of a prepared block.

        Raises:
            NotPinnedError: It is not prepared any more.
        """
        if not self.is_prepared(entry, writable=writable):
            # Who learns it here won't complete any more.
            (self._late_stores if writable else self._late_loads).pop(entry.key, None)
            raise NotPinnedError(
                f"block {show_hash(entry.block_hash)} was completed, or taken back from its "
                "holder: prepare it again"
            )
        place = self.place_of_store(entry) if writable else self.place_of_load(entry)
        lent = lend(place.slots, place.show, place.slot, entry, writable=writable)
        self._lent.setdefault(entry.key, []).append(lent)
        return lent[0]

    # Holders that never come back

    async def reap(self) -> None:
        """Take back what was prepared longer ago than its time; runs until cancelled."""
        while True:
            now = self._clock()
            deadline = self._expire(now)
            if deadline is None:
                self._wake = anyio.Event()
                await self._wake.wait()
            else:
                await self._clock.sleep(max(0.0, deadline - now))

    # Inside

    def _expire(self, now: float) -> float | None:
        """Take back what is due; return when the next is, if any."""
        index = self._index
        due: list[BlockEntry] = []
        deadlines: list[float] = []
        for entry in index.pending.values():
            if not entry.pin_count:
                deadline = entry.access_time + self._ttl_s
                if deadline <= now:
                    due.append(entry)
                else:
                    deadlines.append(deadline)
        for entry in due:
            self.end_store([entry])
            self.unstage([entry])
            index.abort([entry])
            if entry.key in self._unsure:
                self._unsure.discard(entry.key)
            else:
                self._late_stores[entry.key] = now + self._ttl_s
            self._tell_expired(entry, "reservation")
        for key, hold in tuple(self._held.items()):
            while hold.deadlines and hold.deadlines[0] <= now:
                entry = hold.entries[0]
                self._release(hold)
                if key in self._unsure_loads:
                    self._unsure_loads.discard(key)  # it was completed, perhaps
                else:
                    self._late_loads[key] = now + self._ttl_s
                self._tell_expired(entry, "pin")
            deadlines += hold.deadlines[:1]
        for late in (self._late_stores, self._late_loads):
            for key in [key for key, until in late.items() if until <= now]:
                del late[key]
        return min(deadlines, default=None)

    def _tell_expired(self, entry: BlockEntry, what: str) -> None:
        self._index.expire([entry.key], self._index.levels[entry.level])
        log.warning(
            "a %s of block %s was not completed within %g s and was taken back",
            what,
            show_hash(entry.block_hash),
            self._ttl_s,
        )

    def _release(self, hold: Hold) -> list[BlockHash]:
        entry = hold.entries.pop(0)
        del hold.deadlines[0]
        derived: list[BlockHash] = []
        if not hold.deadlines:
            # Only now: another load's holder may be looking at the same view.
            del self._held[entry.key]
            self._unsure_loads.discard(entry.key)
            derived = take_back(self._lent.pop(entry.key, []))
            for flights in hold.flights:
                self._loading.leave(flights)
        entry.shown -= 1
        self._index.unpin([entry])
        return derived


class Lender(Protocol):
    """Whoever makes the views of prepared blocks."""

    def is_prepared(self, entry: BlockEntry, *, writable: bool) -> bool:
        """Tell whether a block is still prepared for a store, or for a load."""

    def lend(self, entry: BlockEntry, *, writable: bool) -> memoryview:
        """Make a view of a prepared block.

        Raises:
            NotPinnedError: It is not prepared any more.
        """


class SlotView:
    """One block of a spec; see `kvoffload.types.SlotEntry`."""

    __slots__ = ("_entry", "_two_phase", "_view", "_writable", "medium", "slot", "tier")

    def __init__(
        self,
        entry: BlockEntry,
        tier: str,
        medium: Medium,
        two_phase: Lender,
        *,
        writable: bool,
        slot: int | None = None,
    ) -> None:
        self.slot = entry.slot if slot is None else slot
        self.tier = tier
        self.medium = medium
        self._entry = entry
        self._two_phase = two_phase
        self._writable = writable
        self._view: memoryview | None = None

    @property
    def block_hash(self) -> BlockHash:
        """The block."""
        return self._entry.block_hash

    @property
    def is_prepared(self) -> bool:
        """Whether it is still prepared: not completed, nor taken back from its holder."""
        return self._two_phase.is_prepared(self._entry, writable=self._writable)

    @property
    def view(self) -> memoryview:
        """The bytes, writable for a store; made on first access.

        Raises:
            NotPinnedError: The block was completed before its first access.
        """
        if self._view is None:
            self._view = self._two_phase.lend(self._entry, writable=self._writable)
        return self._view

    def __repr__(self) -> str:
        return f"<block {self._entry.block_hash!r} in slot {self.slot} of {self.tier!r}>"


class Spec:
    """Where prepared blocks lie; see `kvoffload.types.LoadStoreSpec`."""

    __slots__ = ("_found", "_index", "_slots", "_two_phase", "_writable", "block_hashes")

    def __init__(
        self,
        block_hashes: tuple[BlockHash, ...],
        found: Sequence[BlockEntry],
        index: Index,
        two_phase: TwoPhase,
        *,
        writable: bool,
    ) -> None:
        self.block_hashes = block_hashes
        self._found = found
        self._index = index
        self._two_phase = two_phase
        self._writable = writable
        self._slots: tuple[SlotView, ...] | None = None

    @property
    def entries(self) -> Sequence[SlotView]:
        """One entry a block, in the order of `block_hashes`; made on first access."""
        if self._slots is None:
            levels = self._index.levels
            self._slots = tuple(
                SlotView(
                    entry,
                    levels[entry.level].tier.name,
                    levels[entry.level].tier.medium,
                    self._two_phase,
                    writable=self._writable,
                )
                for entry in self._found
            )
        return self._slots

    def __repr__(self) -> str:
        kind = "store" if self._writable else "load"
        return f"<Spec to {kind} {len(self.block_hashes)} blocks>"
