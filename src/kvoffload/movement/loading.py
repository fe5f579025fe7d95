"""Bringing blocks to where they can be seen: one read for many callers, promotion on use."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from operator import attrgetter

import anyio

from ..blocks import BlockEntry, Grant, Move
from ..copying import INLINE_COPY_BYTES
from ..errors import (
    CapacityError,
    CorruptBlockError,
    LoadTimeoutError,
    TierError,
    TierTimeoutError,
    TierUnavailableError,
)
from ..index import Index
from ..jobs import Jobs
from ..keys import show_hash
from ..named import Named
from ..room import Room
from ..shares import Whom, whom_of
from ..types import BlockState, ByteArray, Key
from ..views import Place, Staging
from .moves import Moves
from .transfer import Transfer

_LEVEL = attrgetter("level")
_SIZE = attrgetter("size")

log = logging.getLogger("kvoffload")

HINT_PATIENCE_S = 1.0
"""Seconds that a hint waits for room to be made ahead, until it is dropped."""


class Flight:
    """One read under way, or its bytes in a staging buffer, for any number of callers.

    Attributes:
        entry: The block; the flight pins it while it reads.
        users: Callers that wait for it or look at it.
        staged: The staging buffer with the bytes, unless they go straight to a tier.
        grant: Level and slot that the block is promoted to, where it is.
        landed: Set when the read is over.
        is_read: Whether the bytes are where they are wanted.
        error: What went wrong, as far as that is known.
        is_hinted: Nobody waits for it, it was hinted.
    """

    __slots__ = ("entry", "error", "grant", "is_hinted", "is_read", "landed", "staged", "users")

    def __init__(self, entry: BlockEntry, landed: anyio.Event, users: int) -> None:
        self.entry = entry
        self.users = users
        self.is_hinted = not users
        self.staged: int | None = None
        self.grant: tuple[int, Grant] | None = None
        self.landed = landed
        self.is_read = False
        self.error: TierError | None = None

    @property
    def is_bad(self) -> bool:
        """Whether what was read did not check, so that the block was dropped."""
        return isinstance(self.error, CorruptBlockError) and self.entry.state is BlockState.ABSENT


class Loading:
    """Makes pinned blocks visible, reading those that have no address of their own."""

    def __init__(
        self,
        index: Index,
        room: Room,
        transfer: Transfer,
        moves: Moves,
        jobs: Jobs,
        *,
        promote_threshold: int | None,
    ) -> None:
        self._index = index
        self._room = room
        self._transfer = transfer
        self._moves = moves
        self._jobs = jobs
        self._promote_threshold = promote_threshold
        self._flights: dict[Key, Flight] = {}
        self.demand = 0
        """Flights that somebody waited for from the start."""
        self.on_demand: list[Callable[[Sequence[Key]], None]] = []
        """Are told what somebody waits for, as its read begins."""

    @property
    def staging(self) -> Staging:
        """The buffers that blocks are read into."""
        return self._transfer.staging

    def show_hot(self, entries: Sequence[BlockEntry]) -> bool:
        """Show blocks that all lie in a hottest tier in memory, as most do; else change nothing.

        They stay where they are for as long as they are pinned.
        """
        hottest = self._index.levels[0]
        if not hottest.tier.addressable:
            return False
        flights = self._flights
        if flights and any(entry.key in flights for entry in entries):
            return False
        size = 0
        for entry in entries:
            if entry.level:
                return False
            size += entry.size
        counters = hottest.counters
        counters["hits"] += len(entries)
        counters["blocks_read"] += len(entries)
        counters["bytes_read"] += size
        return True

    def is_instant(self, entries: Sequence[BlockEntry]) -> bool:
        """Whether all of them can be seen now; promotes at once what takes but a small copy."""
        levels = self._index.levels
        if len(levels) == 1 and levels[0].tier.addressable:
            return True
        flights = self._flights
        if not flights and levels[0].tier.addressable and not any(map(_LEVEL, entries)):
            return True
        rising = [entry for entry in dict.fromkeys(entries) if entry.level and self._rises(entry)]
        if rising and not self._rise_now(rising):
            return False
        visible = [
            levels[entry.level].tier.addressable
            and (entry.key not in flights or flights[entry.key].entry is not entry)
            for entry in entries
        ]
        return all(visible)

    def place_of(self, entry: BlockEntry, flight: Flight | None = None) -> Place:
        """Return where a visible block can be seen."""
        if flight is not None and flight.staged is not None:
            return Place(self.staging.slots, self.staging.show, flight.staged)
        level = self._index.levels[entry.level]
        return Place(level.slots, level.tier.view, entry.slot)

    def count_hits(self, entries: Sequence[BlockEntry]) -> None:
        """Count a hit of its tier for each block that a load found."""
        levels = self._index.levels
        if not any(map(_LEVEL, entries)):
            levels[0].counters["hits"] += len(entries)
        else:
            for entry in entries:
                levels[entry.level].counters["hits"] += 1

    def count_shown(self, entries: Sequence[BlockEntry]) -> None:
        """Count what is viewed in place as read from its tier."""
        levels = self._index.levels
        if not any(map(_LEVEL, entries)):
            self._transfer.count_read(levels[0], len(entries), sum(map(_SIZE, entries)))
        else:
            for entry in entries:
                self._transfer.count_read(levels[entry.level], 1, entry.size)

    async def bring(
        self, entries: Sequence[BlockEntry], timeout_s: float | None
    ) -> dict[Key, Flight]:
        """Make pinned blocks visible; return the flights that must be left with `leave`.

        Cancelled, or out of time, the reads go on for whoever else waits.

        Raises:
            CapacityError: They don't fit the memory that could hold them at once.
            LoadTimeoutError: `timeout_s` passed.
            TierError: A tier could not read some.
        """
        mine = self._board(entries)
        if not mine:
            return mine
        try:
            with anyio.fail_after(timeout_s):
                for flight in mine.values():
                    if not flight.landed.is_set():
                        await flight.landed.wait()
            for flight in mine.values():
                if not flight.is_read:
                    raise self._why_not(flight)
        except TimeoutError as exc:
            self.leave(mine)
            raise LoadTimeoutError(
                f"{len(mine)} blocks were not read within {timeout_s} s: recompute them"
            ) from exc
        except BaseException:
            self.leave(mine)
            raise
        return mine

    def leave(self, flights: dict[Key, Flight]) -> None:
        """Give up what `bring` returned; the last user of a staging buffer frees it."""
        for flight in flights.values():
            flight.users -= 1
            if not flight.users and flight.landed.is_set():
                self._retire(flight)

    async def spare_room(self) -> bool:
        """Wait until the hottest tier has room that stores can spare, but not for long.

        Where none is made ahead, hints push out what is colder, and there always is.
        """
        level = self._index.levels[0]
        if self._room.has_spare(0):
            return True
        level.is_short = True  # make it up to the high watermark
        self._index.short.fire()
        with anyio.move_on_after(HINT_PATIENCE_S):
            while level.low and not self._room.has_spare(0):
                await self._index.changed.wait()
            return True
        return False

    async def room_for_hint(self, count: int, whom: Whom, named: Named) -> list[Grant]:
        """Get up to so many slots of the hottest tier for blocks that nobody waits for.

        Those that stores can spare; or where none are made ahead, also those of what is colder,
        but not of what the hint names.
        """
        if self._index.levels[0].low:
            slots = self._room.take_spare(0, count, [], whom=whom)
            return [Grant(slot) for slot in slots]
        named.hold()
        try:
            return await self._room_above(count, whom)
        finally:
            named.release()

    def tell_demand(self, keys: Sequence[Key]) -> None:
        """Tell that somebody waits for these from now on."""
        if keys:
            for tell in self.on_demand:
                tell(keys)

    def release(self, grants: Sequence[Grant]) -> None:
        """Give slots for hints back that nothing came for."""
        self._room.release(0, grants)

    async def promote(self, entries: Sequence[BlockEntry], named: Named) -> None:
        """Bring blocks up into the hottest tier, as far as there is room; nobody waits for them.

        Those that the hint names are not pushed out for each other.

        Cancelled, it goes on.
        """
        self._index.begin_transfer(entries)
        await self._jobs.start(lambda _: self._promote(entries, named)).result()

    # Inside

    def _board(self, entries: Sequence[BlockEntry]) -> dict[Key, Flight]:
        """Join the flights that there are for these blocks, and open those that are missing."""
        mine: dict[Key, Flight] = {}
        fresh: list[Flight] = []
        rising: list[Flight] = []
        landed = anyio.Event()
        for entry in entries:
            if entry.key in mine:
                continue
            flight = self._flights.get(entry.key)
            # A flight of another entry is of one that did not check and was stored anew.
            if flight is not None and flight.entry is entry:
                flight.users += 1
                mine[entry.key] = flight
                if flight.is_hinted:
                    flight.is_hinted = False
                    self.tell_demand([entry.key])
                continue
            rises = self._rises(entry)
            if rises or not self._index.levels[entry.level].tier.addressable:
                flight = mine[entry.key] = self._open(entry, landed, users=1)
                fresh.append(flight)
                if rises:
                    rising.append(flight)
        try:
            self._find_buffers([flight for flight in fresh if not self._in_memory(flight)])
        except CapacityError:
            landed.set()
            self.leave(mine)
            raise
        if fresh:
            self.demand += len(fresh)
            self.tell_demand([flight.entry.key for flight in fresh])
            self._index.begin_transfer([flight.entry for flight in fresh])
            rising = [flight for flight in rising if flight.grant is None]
            self._jobs.start(lambda _: self._fly(fresh, rising))
        return mine

    def _rises(self, entry: BlockEntry) -> bool:
        """Whether a block is due for the hottest tier."""
        threshold = self._promote_threshold
        return bool(threshold and entry.uses_below >= threshold and self._may_rise(entry))

    def _may_rise(self, entry: BlockEntry) -> bool:
        """Whether the slot of a block can become that of a mere copy, which may give way.

        Not while someone looks at it there, and not while a move down still reads it.
        """
        return (
            entry.state is BlockState.READY
            and entry.level > 0
            and not entry.shown
            and entry.move is None
            and not self._index.levels[entry.level].slots.is_held(entry.slot)
        )

    def _rise_now(self, entries: Sequence[BlockEntry]) -> bool:
        """Promote blocks at once, if it takes but a small copy in memory; say whether it was."""
        index, levels = self._index, self._index.levels
        total = sum([entry.size for entry in entries])
        hottest = levels[0]
        if (
            total > INLINE_COPY_BYTES
            or len(entries) > hottest.slots.free + len(hottest.copies)
            or not hottest.tier.addressable
            or any(
                not levels[entry.level].tier.addressable or entry.key in self._flights
                for entry in entries
            )
        ):
            return False
        for entry, slot in zip(entries, self._room.take_now(0, len(entries), []), strict=True):
            source = levels[entry.level]
            payload = source.tier.view(entry.slot, entry.size)
            self._transfer.copy_in_now(hottest, [slot], [payload])
            self._transfer.count_read(source, 1, entry.size)
            index.promote(entry, 0, slot)
        return True

    def _in_memory(self, flight: Flight) -> bool:
        return self._index.levels[flight.entry.level].tier.addressable

    def _why_not(self, flight: Flight) -> TierError:
        """Return an error for one of those who waited for a read."""
        if flight.error is not None:
            return _again(flight.error)
        block_hash = flight.entry.block_hash
        return TierUnavailableError(
            f"the read of block {show_hash(block_hash)} was cut off",
            tier=self._index.levels[flight.entry.level].tier.name,
            block_hash=block_hash,
        )

    def _open(self, entry: BlockEntry, landed: anyio.Event, *, users: int) -> Flight:
        flight = self._flights[entry.key] = Flight(entry, landed, users)
        return flight

    def _find_buffers(self, flights: Sequence[Flight]) -> None:
        """Give each flight a staging buffer, or where those run out a free slot further up."""
        buffers = self.staging.slots.take(len(flights))
        for flight, buffer in zip(flights, buffers, strict=False):
            flight.staged = buffer
        early = list(flights[len(buffers) :])
        for level in self._index.levels:
            if early and level.tier.addressable:
                able = [
                    flight
                    for flight in early
                    if flight.entry.level > level.number and self._may_rise(flight.entry)
                ]
                slots = level.slots.take(len(able))
                for flight, slot in zip(able, slots, strict=False):
                    flight.grant = (level.number, Grant(slot))
                early = [flight for flight in early if flight.grant is None]
        if early:
            for flight in flights:
                self._give_grant_back(flight)
            raise CapacityError(
                f"{len(flights)} blocks to read at once, but only {len(flights) - len(early)} fit "
                f"the memory that is free: load fewer at a time, or give the manager more than "
                f"staging_bytes={self.staging.budget_bytes}"
            )

    async def _fly(self, flights: Sequence[Flight], rising: Sequence[Flight]) -> None:
        try:
            await self._read_and_land(flights, rising)
        except Exception:  # a policy of the user's may raise
            log.exception("reading %d blocks failed", len(flights))
            await self._erase_bad(flights)
            raise
        await self._erase_bad(flights)

    async def _read_and_land(self, flights: Sequence[Flight], rising: Sequence[Flight]) -> None:
        try:
            if rising:
                entries = [flight.entry for flight in rising]
                grants = await self._room_above(len(entries), whom_of(entries))
                for flight, grant in zip(rising, grants, strict=False):
                    flight.grant = (0, grant)
            await self._read_all(flights)
        finally:
            self.demand -= len(flights)
            self._land(flights)

    async def _promote(self, entries: Sequence[BlockEntry], named: Named) -> None:
        """Open flights for those blocks alone that there is room for, and nobody else fetches."""
        flights: list[Flight] = []
        try:
            await self._read_hinted(entries, named, flights)
        except Exception:
            await self._erase_bad(flights)
            raise
        await self._erase_bad(flights)

    async def _read_hinted(
        self, entries: Sequence[BlockEntry], named: Named, flights: list[Flight]
    ) -> None:
        try:
            grants = await self.room_for_hint(len(entries), whom_of(entries), named)
            landed = anyio.Event()
            for entry in entries:
                if grants and self._may_rise(entry) and entry.key not in self._flights:
                    flight = self._open(entry, landed, users=0)
                    flight.grant = (0, grants.pop())
                    flights.append(flight)
            self._room.release(0, grants)
            self._index.begin_transfer([flight.entry for flight in flights])
            await self._read_all(flights)
            # What somebody joined meanwhile came too late to be useful.
            came = [one.entry.key for one in flights if one.is_hinted and not one.entry.level]
            self._index.prefetched.update(came)
        finally:
            self._land(flights)
            self._index.end_transfer(entries)

    async def _room_above(self, count: int, whom: Whom) -> list[Grant]:
        """Get slots of the hottest tier for blocks on their way up, as far as there are any."""
        moves: list[Move] = []
        grants = self._room.make_room(0, count, moves, [], whom=whom)
        await self._moves.run(moves, [])
        return [grant for grant in grants if grant.usable]

    async def _read_all(self, flights: Sequence[Flight]) -> None:
        levels = self._index.levels
        groups: dict[int, list[Flight]] = {}
        for flight in flights:
            unseen = flight.grant is not None and not levels[flight.grant[0]].tier.addressable
            if unseen and flight.staged is None:
                flight.staged = next(iter(self.staging.slots.take(1)), None)
                if flight.staged is None:
                    self._give_grant_back(flight)
            if flight.staged is not None or flight.grant is not None:
                groups.setdefault(flight.entry.level, []).append(flight)
            elif self._in_memory(flight):
                flight.is_read = True  # no room further up: it is seen where it is
        for number, group in groups.items():
            await self._read(number, group)

    async def _read(self, number: int, flights: Sequence[Flight]) -> None:
        index, transfer = self._index, self._transfer
        level = index.levels[number]
        into = [self._target(flight) for flight in flights]
        slots = [flight.entry.slot for flight in flights]
        outcomes = await transfer.read(level, slots, into, [one.entry.key for one in flights])
        for flight, buffer, error in zip(flights, into, outcomes, strict=True):
            flight.error, flight.is_read = error, error is None
            if isinstance(error, TierTimeoutError):
                self._hold_buffer(flight, buffer)
            if isinstance(error, CorruptBlockError) and flight.entry.state is BlockState.READY:
                index.condemn(flight.entry)
                index.count("corrupt", [flight.entry.key])
        for flight, buffer in zip(flights, into, strict=True):
            if flight.is_read and flight.grant is not None:
                await self._rise(flight, *flight.grant, buffer)

    def _hold_buffer(self, flight: Flight, buffer: ByteArray) -> None:
        """Keep what a stuck read may still write to out of reuse until it is back."""
        if flight.grant is not None and self._index.levels[flight.grant[0]].tier.addressable:
            number, grant = flight.grant
            self._index.levels[number].slots.hold(grant.slot, buffer)
        elif flight.staged is not None:
            self.staging.slots.hold(flight.staged, buffer)

    async def _erase_bad(self, flights: Sequence[Flight]) -> None:
        """Make the tiers forget what did not check; those who wait for it know by now."""
        for entry in [flight.entry for flight in flights if flight.is_bad]:
            level = self._index.levels[entry.level]
            try:
                # Where this fails it was counted and told, and the next read finds it out again.
                with contextlib.suppress(TierError):
                    await self._transfer.erase(level, [entry.slot], [entry.key])
            finally:
                self._index.end_transfer([entry])  # only now may the slot be used again

    def _target(self, flight: Flight) -> ByteArray:
        """Return the array to read into: the slot that the block rises to, where it can be seen."""
        size = flight.entry.size
        if flight.grant is not None:
            number, grant = flight.grant
            tier = self._index.levels[number].tier
            if tier.addressable:
                return tier.view(grant.slot, size)
        if flight.staged is None:
            raise RuntimeError(f"no buffer for {flight.entry!r}")
        return self.staging.show(flight.staged, size)

    async def _rise(self, flight: Flight, number: int, grant: Grant, buffer: ByteArray) -> None:
        """Publish a block that was read into a higher tier, or write it there."""
        entry = flight.entry
        level = self._index.levels[number]
        if not self._may_rise(entry) and self._in_memory(flight):
            return  # someone began to look at it, or it is moved, where it was
        if not level.tier.addressable:
            outcomes = await self._transfer.write(level, [grant.slot], [buffer], [entry.key])
            if outcomes[0] is not None:
                return
        elif flight.staged is not None:
            self.staging.slots.give_back([flight.staged])
            flight.staged = None
        if level.tier.addressable:
            self._transfer.count_written(level, 1, entry.size)
        flight.grant = None
        self._index.promote(entry, number, grant.slot)

    def _land(self, flights: Sequence[Flight]) -> None:
        """End the reads: wake who waits, and free what nobody waits for."""
        for flight in flights:
            self._give_grant_back(flight)
            flight.landed.set()
            if not flight.users:
                self._retire(flight)
            elif not flight.is_read and self._flights.get(flight.entry.key) is flight:
                del self._flights[flight.entry.key]  # the next caller tries again
        self._index.end_transfer([flight.entry for flight in flights if not flight.is_bad])

    def _retire(self, flight: Flight) -> None:
        if self._flights.get(flight.entry.key) is flight:
            del self._flights[flight.entry.key]
        if flight.staged is not None:
            self.staging.slots.give_back([flight.staged])
            flight.staged = None

    def _give_grant_back(self, flight: Flight) -> None:
        if flight.grant is not None:
            number, grant = flight.grant
            flight.grant = None
            self._room.release(number, [grant])


def _again(error: TierError) -> TierError:
    """Return a new error like one that others get too."""
    known = (CorruptBlockError, TierTimeoutError, TierUnavailableError, TierError)
    kind = next(kind for kind in known if isinstance(error, kind))
    fresh = kind(str(error), tier=error.tier, block_hash=error.block_hash)
    fresh.__cause__ = error
    return fresh
