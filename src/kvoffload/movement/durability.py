"""What outlives the process: flushing, closing, and evicting for good."""

from __future__ import annotations

from collections.abc import Sequence

from ..blocks import BlockEntry
from ..errors import TierError
from ..index import Index
from ..jobs import Jobs
from ..levels import Level
from ..room import Room
from ..shares import whom_of
from ..slicing import slices
from ..types import BlockState, FlushResult, Key
from .transfer import Transfer

FLUSH_BATCH_BLOCKS = 64
"""Blocks written in one go, so that a flush holds but few pins at a time."""
ERASE_BLOCKS = 4096
"""Blocks erased in one go: few enough for the event loop, many for one call."""


class Durability:
    """Copies what lies only in memory to the persistent tier, and erases from it."""

    def __init__(self, index: Index, room: Room, transfer: Transfer, jobs: Jobs) -> None:
        self._index = index
        self._room = room
        self._transfer = transfer
        self._jobs = jobs

    async def flush(self, *, make_room: bool = False) -> FlushResult:
        """Make blocks durable, the hottest first, and evict nothing.

        With `make_room`, as a close does, the coldest blocks of the persistent tier give way to
        hotter ones.

        Raises:
            TierError: The tier could not make sure of what it has.
        """
        return await self._jobs.start(lambda _: self._flush(make_room)).result()

    async def write_through(self, entries: Sequence[BlockEntry], evicted: list[Key]) -> None:
        """Copy blocks that were just stored to the persistent tier, as far as it takes them.

        The keys of colder blocks that gave way are appended to `evicted`. Cancelled, it goes on.
        """
        levels = self._index.levels
        persistent = [level for level in levels if level.tier.persistent]
        if not persistent:
            return
        level = persistent[-1]
        if level.number and self._room.spares(level.number):
            worth = self._room.worth_writing(entries)
            entries = [entry for entry in entries if entry in worth]
        entries = [entry for entry in entries if not self._is_durable(entry)]
        if entries:
            await self._jobs.start(lambda _: self._write_through(level, entries, evicted)).result()

    async def erase(self, keys: Sequence[Key] | None) -> None:
        """Make persistent tiers forget what they still show of blocks (of any) that left.

        Raises:
            TierError: Some could not be erased and may come back after a restart.
        """
        stale = self._index.stale(keys)
        if stale:
            await self._jobs.start(lambda _: self._erase(stale)).result()

    # Inside

    async def _flush(self, make_room: bool) -> FlushResult:
        index = self._index
        persistent = [level for level in index.levels if level.tier.persistent]
        if not persistent:
            return FlushResult(durable=0, not_durable=len(index.ready))
        self._room.look()  # a disk that was full may have space again
        level = persistent[-1]
        level.slots.retry()  # of places that failed, the last to be taken
        volatile = await self._volatile(level)
        if make_room:
            volatile = await self._take_hottest(level, volatile)
        for start in range(0, len(volatile), FLUSH_BATCH_BLOCKS):
            await self._copy_down(level, volatile[start : start + FLUSH_BATCH_BLOCKS])
        for each in persistent:
            await self._transfer.flush(each)
        durable = not_durable = 0
        async for part in slices(list(index.ready.values())):
            there = [entry for entry in part if entry.state is BlockState.READY]
            count = sum(map(self._is_durable, there))
            durable, not_durable = durable + count, not_durable + len(there) - count
        return FlushResult(durable=durable, not_durable=not_durable)

    def _is_durable(self, entry: BlockEntry) -> bool:
        levels = self._index.levels
        numbers = [entry.level, *(entry.copies or ())]
        return any(levels[number].tier.persistent for number in numbers)

    async def _volatile(self, persistent: Level) -> list[BlockEntry]:
        """Return the blocks that lie in memory alone, hottest first."""
        index, ready = self._index, self._index.ready
        chooses = persistent.number > 0 and self._room.spares(persistent.number)
        found: list[BlockEntry] = []
        for level in index.levels:
            if level is persistent:
                continue
            keys = index.policy.victims(level.number, level.blocks, ())
            async for part in slices(keys[::-1]):
                there = [entry for key in part if (entry := ready.get(key)) is not None]
                worth = self._room.worth_writing(there) if chooses else there
                found += [
                    entry for entry in there if entry in worth and not self._is_durable(entry)
                ]
        return found

    async def _take_hottest(self, level: Level, volatile: list[BlockEntry]) -> list[BlockEntry]:
        """Evict from the persistent tier what must give way; return the blocks that fit then.

        What is reserved for a namespace, of its hottest blocks, comes before all others, also
        before copies of what is in memory.
        """
        index, sharing = self._index, self._room.sharing
        missing = len(volatile) - level.slots.free
        if missing > 0:
            count = missing if sharing is None else level.blocks
            keys = index.policy.victims(level.number, count, index.pinned)
            if sharing is not None:
                there = [index.ready[key] for key in reversed(keys)]
                copied = list(level.copies.values())
                reserved = sharing.hottest_reserved([*copied, *volatile, *there])
                keys = [key for key in keys if index.ready[key] not in reserved][:missing]
                volatile.sort(key=lambda entry: entry not in reserved)
            async for part in slices(keys):
                entries = [entry for key in part if (entry := index.ready.get(key)) is not None]
                entries = [entry for entry in entries if not entry.pin_count]
                index.drop(entries)
                index.count("evictions", [entry.key for entry in entries])
            if sharing is not None:
                short = sum(entry in reserved for entry in volatile) - level.slots.free
                given_up = [entry for entry in copied if entry not in reserved]
                index.give_up_copies(level, given_up[: max(0, short)])
        return volatile[: level.slots.free]

    async def _write_through(
        self, level: Level, entries: Sequence[BlockEntry], evicted: list[Key]
    ) -> None:
        for start in range(0, len(entries), FLUSH_BATCH_BLOCKS):
            await self._copy_down(level, entries[start : start + FLUSH_BATCH_BLOCKS], evicted)

    async def _copy_down(
        self, level: Level, entries: Sequence[BlockEntry], evicted: list[Key] | None = None
    ) -> None:
        """Copy blocks down to free slots, or with `evicted` to those of what gives way too."""
        index = self._index
        # Another task may have evicted or moved some while the batch before was written.
        entries = [
            entry
            for entry in entries
            if index.ready.get(entry.key) is entry
            and entry.move is None
            and not self._is_durable(entry)
        ]
        if evicted is None:
            slots = level.slots.take(len(entries))
        else:
            whom = whom_of(entries)
            slots = self._room.take_for_copies(level.number, len(entries), evicted, whom=whom)
        entries = entries[: len(slots)]
        index.begin_transfer(entries)
        for entry in entries:
            entry.shown += 1  # a promotion would let the slot that is read here give way
        written: set[int] = set()
        try:
            for source in index.levels:
                group = [
                    number for number, entry in enumerate(entries) if entry.level == source.number
                ]
                if group:
                    outcomes = await self._transfer.copy_down(
                        source,
                        level,
                        [entries[number] for number in group],
                        [slots[number] for number in group],
                    )
                    written.update(
                        number for number, good in zip(group, outcomes, strict=True) if good
                    )
        finally:
            for number, (entry, slot) in enumerate(zip(entries, slots, strict=True)):
                entry.shown -= 1
                kept = number in written and index.ready.get(entry.key) is entry
                # Another flush may have been faster.
                if kept and level.number not in (entry.copies or {}):
                    index.add_copy(entry, level, slot)
                elif number in written:
                    level.free([slot], [entry.key])
                else:
                    level.slots.give_back([slot])
            index.end_transfer(entries)

    async def _erase(self, stale: Sequence[tuple[Level, list[int]]]) -> None:
        failed: TierError | None = None
        for level, all_slots in stale:
            for start in range(0, len(all_slots), ERASE_BLOCKS):
                some = all_slots[start : start + ERASE_BLOCKS]
                async with self._transfer.claim(level, some):
                    # What was written meanwhile shows another block by now.
                    slots = [slot for slot in dict.fromkeys(some) if slot in level.stale_slots]
                    keys = [level.stale_slots[slot][0] for slot in slots]
                    try:
                        await self._transfer.erase(level, slots, keys)
                    except TierError as exc:
                        failed = exc
        if failed is not None:
            try:
                raise failed
            finally:
                del failed  # or the error and this frame would keep each other
