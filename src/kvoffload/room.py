"""Room: where new blocks go, and which ones give way for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .blocks import BlockEntry, Grant, Move
from .events import EventKind
from .index import Index
from .levels import Level
from .retention import Retention
from .shares import NOBODY, Whom, namespace_of
from .sharing import Sharing
from .types import BlockState, ForecastingPolicy, Key, RejectReason, TierState

READY = BlockState.READY
READ_ONLY = TierState.READ_ONLY


class Room:
    """Decides, on an index, what goes where and what has to leave; moves no byte.

    Attributes:
        cold_admission: What is written to a persistent tier below another; see `AsyncLRUManager`.
        sharing: What may leave for whom, where namespaces have shares.

    Room is made for the namespace of `whom`: none of its own blocks, but of others' what is
    reserved for them, is kept from being evicted for it.
    """

    def __init__(
        self,
        index: Index,
        *,
        cold_admission: str = "all",
        watermarks: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Take the index, and of each level but the last the shares of slots to keep free."""
        self.cold_admission = cold_admission
        self.sharing = None if index.shares is None else Sharing(index, index.shares)
        self._index = index
        for level in index.levels[:-1]:
            level.low, level.high = (int(level.slots.capacity * share) for share in watermarks)

    def place(
        self,
        keys: Sequence[Key],
        held: int = 0,
        chain: Sequence[Key] = (),
        retention: Retention | None = None,
    ) -> list[int | RejectReason]:
        """Return the level for each block of a new chain, head hottest, or why there is none.

        Room is counted before anything gives way, so that blocks of the chain come before what
        they push down. `held` blocks that are there already belong to the same call, and `chain`
        is all that the blocks are part of, where that is known, with what its caller says of it.
        All are of one namespace.
        """
        self.look()
        available = self._available(len(keys), namespace_of(keys)) if keys else None
        pushed = 0  # into the levels from here on, by what the chain takes above
        placed: list[int | RejectReason] = [RejectReason.FULL] * len(keys)
        waiting: Sequence[int] = range(len(keys))
        capacity = 0
        for level in self._index.levels:
            capacity += level.slots.capacity - level.slots.useless
            if not waiting:
                break
            offered = [keys[number] for number in waiting]
            admitted = self._index.policy.admit(
                offered, level.number, chain=chain, pinned=self._index.pinned, retention=retention
            )
            enter = waiting
            if admitted is not offered:
                enter = [number for number in waiting if keys[number] in admitted]
            if level.number and self.spares(level.number):
                admitted = enter = ()  # nobody has used these again yet
            room = level.room
            if available is not None:
                room = max(0, min(room, sum(available[level.number :]) - pushed))
            enter = enter[:room]
            if available is not None:
                pushed = max(0, pushed + len(enter) - available[level.number])
            for number in enter:
                placed[number] = level.number
            taken = set(enter)
            left = [number for number in waiting if number not in taken]
            for number in left:
                declined = admitted is not offered and keys[number] not in admitted
                placed[number] = RejectReason.NOT_ADMITTED if declined else RejectReason.PINNED
            waiting = left
        failing = any(level.state is READ_ONLY for level in self._index.levels)
        for number, place in enumerate(placed):
            if place is RejectReason.PINNED:
                if held + number >= capacity:
                    placed[number] = RejectReason.FULL
                elif failing:
                    placed[number] = RejectReason.FAILED
        return placed

    def look(self) -> None:
        """See what each tier can do now, and tell of changes."""
        for level in self._index.levels:
            if level.look():
                self._index.short.fire()  # what it could not take a moment ago, it may take now
                tier = level.tier
                self._index.events.tell_state(level.state.value, tier=tier.name, medium=tier.medium)

    def most(self, count: int, whom: Whom) -> int:
        """Return how many slots of the hottest level `make_room` finds, if asked for so many.

        It may be more than so many.
        """
        room = self._index.levels[0].room
        available = self._available(count, whom)
        return room if available is None else min(room, sum(available))

    def take_now(
        self, number: int, count: int, evicted: list[Key], *, whom: Whom = NOBODY
    ) -> list[int]:
        """Get up to `count` slots of a level without moving a byte.

        Free ones first, then those of clean copies, then in the last level those of the coldest
        blocks, whose keys are appended to `evicted`.
        """
        level = self._index.levels[number]
        if level.state is READ_ONLY:
            return []
        slots = level.slots.take(count)
        if len(slots) < count and level.copies:
            slots += self._index.take_copies(level, count - len(slots))
        if len(slots) < count and number + 1 == len(self._index.levels):
            slots += self._evict_coldest(level, slots, count - len(slots), evicted, whom)
        return slots

    def take_for_copies(
        self, number: int, count: int, evicted: list[Key], *, whom: Whom = NOBODY
    ) -> list[int]:
        """Get up to `count` slots of a level for copies of blocks that stay further up.

        Those are hotter than what is at home here: so first this gives way, then older copies.
        """
        level = self._index.levels[number]
        if level.state is READ_ONLY:
            return []
        slots = level.slots.take(count)
        if len(slots) < count and number + 1 == len(self._index.levels):
            slots += self._evict_coldest(level, slots, count - len(slots), evicted, whom)
        if len(slots) < count:
            slots += self._index.take_copies(level, count - len(slots))
        return slots

    def make_room(
        self,
        number: int,
        count: int,
        moves: list[Move],
        evicted: list[Key],
        *,
        may_wait: bool = True,
        whom: Whom = NOBODY,
    ) -> list[Grant]:
        """Get up to `count` slots of a level, the coldest blocks giving way.

        What gives way goes further down where there is room (its move is appended to `moves`,
        behind the moves that it waits for), and else leaves every tier (its key is appended to
        `evicted`). Unless it `may_wait`, nothing is moved to a tier that is no memory, and what
        would have to be stays.
        """
        self.look()
        level = self._index.levels[number]
        grants = [Grant(slot) for slot in self.take_now(number, count, evicted, whom=whom)]
        if (
            len(grants) == count
            or number + 1 == len(self._index.levels)
            or level.state is READ_ONLY
        ):
            return grants
        try:
            victims = self._victims(level, count - len(grants))
        except BaseException:
            self.release(number, grants)
            raise
        cold = [self._index.ready[key] for key in victims]
        down = self._to_be_moved(number, cold, whom)
        grants += [Grant(slot) for slot in self._let_give_way(level, cold, down, evicted)]
        below = self._room_below(number, len(down), moves, evicted, may_wait=may_wait, whom=whom)
        # The hottest go to the highest tier; where room is short, the coldest are lost.
        short = len(down) - len(below)
        if may_wait and short:
            if self.sharing is not None and self.sharing.guards(whom):
                grants += [Grant(slot) for slot in self._lose(level, short, evicted, whom)]
                down = [entry for entry in down if self._index.ready.get(entry.key) is entry]
            else:
                lost = [entry.key for entry in down[:short]]
                evicted += lost
                grants += [Grant(slot) for slot in self._index.evict(level, lost)]
                down = down[short:]
        return grants + self._begin_moves(down[: len(below)], below, moves, whom=whom)

    def has_now(self, number: int, count: int, *, whom: Whom = NOBODY) -> bool:
        """Tell whether `make_room` finds so many slots without waiting; changes nothing."""
        level = self._index.levels[number]
        missing = count - level.slots.free - len(level.copies)
        if missing <= 0 or number + 1 == len(self._index.levels):
            return True
        victims = self._victims(level, missing)
        cold = [self._index.ready[key] for key in victims]
        moved = len(self._to_be_moved(number, cold, whom))
        below = [lower for lower in self._index.levels[number + 1 :] if lower.tier.addressable]
        free = sum(lower.slots.free + len(lower.copies) for lower in below)
        return len(victims) == missing and moved <= free

    def has_spare(self, number: int) -> bool:
        """Tell whether `take_spare` finds a slot; changes nothing."""
        level = self._index.levels[number]
        if level.slots.free + len(level.copies) > level.low:
            return True
        coldest = [self._index.ready[key] for key in self._victims(level, 1)]
        return len(self._to_be_moved(number, coldest, NOBODY)) < len(coldest)

    def take_spare(
        self, number: int, count: int, evicted: list[Key], *, whom: Whom = NOBODY
    ) -> list[int]:
        """Get up to `count` slots of a level that nobody has to wait for, and stores can spare.

        Free ones above the low watermark, and those of its coldest blocks that give way at once.
        """
        level = self._index.levels[number]
        spare = level.slots.free + len(level.copies) - level.low
        slots = self.take_now(number, max(0, min(count, spare)), evicted, whom=whom)
        try:
            victims = self._victims(level, count - len(slots))
        except BaseException:
            level.slots.give_back(slots)
            raise
        cold = [self._index.ready[key] for key in victims]
        moved = self._to_be_moved(number, cold, whom)
        return slots + self._let_give_way(level, cold, moved, evicted)

    def work_ahead(
        self, number: int, most: int, moves: list[Move], evicted: list[Key]
    ) -> list[Grant]:
        """Begin to move the coldest blocks of a level down, so that slots of it become free.

        Where fewer slots are free than the low watermark, until as many are as the high one; at
        most so many at a time. Only those that somebody would have to wait for later, and to where
        there is room: nothing but the last level's coldest blocks is lost for it.
        """
        self.look()
        level = self._index.levels[number]
        free = level.slots.free + len(level.copies)
        level.is_short = free < (level.high if level.is_short else level.low)
        if not level.is_short or level.state is READ_ONLY:
            return []
        victims = self._victims(level, min(most, level.high - free))
        down = self._to_be_moved(number, [self._index.ready[key] for key in victims], NOBODY)
        below: list[tuple[int, Grant]] = []
        for lower in self._index.levels[number + 1 :]:
            if lower.state is not READ_ONLY and lower.room:
                slots = self.take_now(lower.number, len(down), evicted)
                below = [(lower.number, Grant(slot)) for slot in slots]
                break
        return self._begin_moves(down[: len(below)], below, moves, are_ahead=True)

    def finish_move(self, move: Move, written: bool) -> bool:
        """Publish a move whose bytes were written, or undo it; say whether the block is lost.

        A block that was pinned meanwhile stays where it is, and what was written is a clean copy;
        the slot it was to leave is then not free, and a grant of it stays unusable. A block that
        could not be written leaves every tier, as if the lower tier were not there; one that is
        reserved for another namespace stays, and then nobody gets its slot.
        """
        entry, number, slot = move.entry, move.target_level, move.target_slot
        level = self._index.levels[number]
        entry.move = None
        self._index.end_transfer([entry])
        shown_on = self._index.levels[move.source_level].slots.is_held(move.source_slot)
        stays = entry.pin_count > 0 or entry.state is not READY or shown_on
        stays = stays or (move.is_ahead and not written)
        if not (written or stays) and self.sharing is not None:
            move.is_stuck = stays = self.sharing.protects(entry, move.whom)
        if written and not stays:
            self._index.relocate(entry, level, slot)
            self._index.count("demotions", [entry.key])
            self._index.emit(EventKind.DEMOTED, [entry.key], level)
        elif written and entry.state is READY:
            self._index.add_copy(entry, level, slot)
        elif move.after is None or move.after.done:
            if written:
                level.leave([slot], [entry.key])
            level.slots.give_back([slot])
            if not stays:
                self._index.evict(self._index.levels[entry.level], [entry.key])
        else:
            stays = True
            move.is_stuck = move.after.is_stuck
        move.done = not stays
        self._index.changed.fire()
        return not (stays or written)

    def spares(self, number: int) -> bool:
        """Tell whether a level takes only blocks that are worth writing."""
        return self.cold_admission != "all" and self._index.levels[number].tier.persistent

    def worth_writing(self, entries: Sequence[BlockEntry]) -> set[BlockEntry]:
        """Return those of the blocks that such a level takes."""
        worth = {entry for entry in entries if entry.access_count > 1}  # beyond the one that stores
        if self.cold_admission == "likely":
            assert isinstance(self._index.policy, ForecastingPolicy)
            rest = [entry.key for entry in entries if entry not in worth]
            worth.update(map(self._index.ready.__getitem__, self._index.policy.likely(rest)))
        return worth

    def release(self, number: int, grants: Iterable[Grant]) -> None:
        """Give granted slots back that nobody took."""
        slots = [grant.slot for grant in grants if grant.usable]
        self._index.levels[number].slots.give_back(slots)
        self._index.changed.fire()

    # Inside

    def _available(self, count: int, whom: Whom) -> list[int] | None:
        """Return how many slots of each level a namespace finds, where others have reserves."""
        if self.sharing is None or not self.sharing.guards(whom):
            return None
        return self.sharing.available(count, whom)

    def _to_be_moved(
        self, number: int, entries: Sequence[BlockEntry], whom: Whom
    ) -> list[BlockEntry]:
        """Return those of a level's blocks that can't give way without being written below."""
        down = [entry for entry in entries if not entry.copies]
        if number + 1 < len(self._index.levels) and self.spares(number + 1):
            spared = set(down) - self.worth_writing(down)
            if self.sharing is not None:
                spared &= set(self.sharing.losable([e for e in down if e in spared], whom))
            down = [entry for entry in down if entry not in spared]
        return down

    def _let_give_way(
        self,
        level: Level,
        cold: Sequence[BlockEntry],
        moved: Sequence[BlockEntry],
        evicted: list[Key],
    ) -> list[int]:
        """Free the slots of those cold blocks that need not be moved: to a copy, or for good."""
        left = set(moved)
        slots: list[int] = []
        spared: list[Key] = []
        for entry in cold:
            if entry.copies:
                slots.append(self._index.fall_back(entry))
            elif entry not in left:
                spared.append(entry.key)
        self._index.count("spared", spared)
        evicted += spared
        return slots + self._index.evict(level, spared)

    def _evict_coldest(
        self, level: Level, held: list[int], count: int, evicted: list[Key], whom: Whom
    ) -> list[int]:
        """Evict blocks of the last level; if the policy raises, `held` slots are given back."""
        try:
            if self.sharing is not None and self.sharing.guards(whom):
                victims = self.sharing.victims(level, count, whom)
            else:
                victims = self._victims(level, count)
        except BaseException:
            level.slots.give_back(held)
            raise
        evicted += victims
        return self._index.evict(level, victims)

    def _lose(self, level: Level, count: int, evicted: list[Key], whom: Whom) -> list[int]:
        """Free slots of the coldest blocks that may be evicted, or have a copy further down."""
        slots: list[int] = []
        assert self.sharing is not None
        for key in self.sharing.victims(level, count, whom):
            entry = self._index.ready[key]
            if entry.copies:
                slots.append(self._index.fall_back(entry))
            else:
                evicted.append(key)
                slots += self._index.evict(level, [key])
        return slots

    def _room_below(
        self,
        number: int,
        count: int,
        moves: list[Move],
        evicted: list[Key],
        *,
        may_wait: bool,
        whom: Whom,
    ) -> list[tuple[int, Grant]]:
        """Get up to `count` slots of the levels below, the highest first."""
        below: list[tuple[int, Grant]] = []
        for level in self._index.levels[number + 1 :]:
            if len(below) == count:
                break
            if may_wait or level.tier.addressable:
                wanted = count - len(below)
                got = self.make_room(
                    level.number, wanted, moves, evicted, may_wait=may_wait, whom=whom
                )
                below += [(level.number, grant) for grant in got]
        return below

    def _begin_moves(
        self,
        entries: Sequence[BlockEntry],
        below: Sequence[tuple[int, Grant]],
        moves: list[Move],
        *,
        are_ahead: bool = False,
        whom: Whom = NOBODY,
    ) -> list[Grant]:
        """Promise to empty the slots of blocks of one level, coldest first; return the promises."""
        leaving: list[Move] = []
        for entry, (lower, grant) in zip(reversed(entries), below, strict=True):
            move = Move(
                entry,
                entry.level,
                entry.slot,
                lower,
                grant.slot,
                grant.after,
                is_ahead=are_ahead,
                whom=whom,
            )
            entry.move = move
            self._index.begin_transfer([entry])
            leaving.append(move)
        # The coldest arrive first, so that they are the coldest there too.
        moves += reversed(leaving)
        return [Grant(move.source_slot, move) for move in leaving]

    def _victims(self, level: Level, count: int) -> list[Key]:
        """Return the coldest blocks of a level whose slots can be used again at once."""
        held = level.slots.held
        keys = self._index.policy.victims(level.number, count + held, self._index.pinned)
        if held:
            is_held, ready = level.slots.is_held, self._index.ready
            keys = [key for key in keys if not is_held(ready[key].slot)][:count]
        return keys
