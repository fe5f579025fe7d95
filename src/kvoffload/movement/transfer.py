"""The one place where payload bytes are copied, read and written."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ..aligned import aligned_empty
from ..blocks import BlockEntry, Move
from ..copying import INLINE_COPY_BYTES, copy_now, copy_on_thread
from ..errors import CorruptBlockError, TierError, TierTimeoutError
from ..index import Index
from ..keys import encode_key
from ..levels import Level
from ..scheduling import step_aside
from ..signals import Signal
from ..types import BlockState, ByteArray, Key, Tier, TierState
from ..views import Staging

COPY_THREADS = max(1, min(2, (os.cpu_count() or 1) // 2))
"""Threads for copies in memory: two saturate it, and one of two cores is the event loop's."""


class Claim:
    """The right to write or erase slots of a tier, while the body runs.

    No generator: a call to a disk has one, and each object that a call has costs the loop's
    garbage collector.
    """

    __slots__ = ("_changed", "_level", "_slots")

    def __init__(self, level: Level, slots: Sequence[int], changed: Signal) -> None:
        self._level = level
        self._slots = slots
        self._changed = changed

    async def __aenter__(self) -> None:
        while not self._level.claimed.isdisjoint(self._slots):
            await self._changed.wait()
        self._level.claimed.update(self._slots)

    async def __aexit__(self, *_: object) -> None:
        self._level.claimed.difference_update(self._slots)
        self._changed.fire()


class Transfer:
    """Copies, reads and writes payloads, counts them, and turns every failure into an outcome."""

    def __init__(self, index: Index, staging: Staging, namespace: str) -> None:
        self.index = index
        self.staging = staging
        self._namespace = namespace
        self._executor = ThreadPoolExecutor(
            COPY_THREADS, thread_name_prefix="kvoffload-copy", initializer=step_aside
        )

    def canonical_key(self, key: Key) -> bytes:
        """Return a block's key as it leaves the process."""
        if isinstance(key, tuple):
            return encode_key(key[1], key[0])
        return encode_key(key, self._namespace)

    def stop(self) -> None:
        """Let the threads end; a copy under way keeps its buffers alive."""
        self._executor.shutdown(wait=False)

    # Into and between tiers in memory, without a hop where it is little

    def copy_in_now(
        self, level: Level, slots: Sequence[int], payloads: Sequence[ByteArray]
    ) -> None:
        """Copy payloads into slots of an addressable tier, at once."""
        copy_now(self._slots_of(level, slots, payloads), payloads)
        self.count_written(level, len(payloads), sum([data.nbytes for data in payloads]))

    async def copy_in(
        self, level: Level, slots: Sequence[int], payloads: Sequence[ByteArray]
    ) -> None:
        """Copy payloads into slots of an addressable tier, on threads where it is much."""
        if sum([payload.nbytes for payload in payloads]) <= INLINE_COPY_BYTES:
            self.copy_in_now(level, slots, payloads)
            return
        targets = self._slots_of(level, slots, payloads)
        size = sum([payload.nbytes for payload in payloads])
        with level.call(len(slots), size, self.index.clock, reads=False):
            await copy_on_thread(self._executor, targets, payloads)
        self.count_written(level, len(payloads), sum([data.nbytes for data in payloads]))

    def move_now(self, move: Move) -> None:
        """Copy a block between two addressable tiers, at once."""
        source, target = self._ends(move)
        payload = source.tier.view(move.source_slot, move.entry.size)
        self.copy_in_now(target, [move.target_slot], [payload])
        self.count_read(source, 1, move.entry.size)

    async def private_copies(self, payloads: Sequence[ByteArray]) -> list[ByteArray]:
        """Return copies of payloads, made on a thread where it is much."""
        copies = [aligned_empty(payload.nbytes) for payload in payloads]
        if sum([payload.nbytes for payload in payloads]) <= INLINE_COPY_BYTES:
            copy_now(copies, payloads)
        else:
            await copy_on_thread(self._executor, copies, payloads)
        return copies

    # Through tiers of any kind; what fails in a tier is an outcome, not an exception

    async def write(
        self,
        level: Level,
        slots: Sequence[int],
        payloads: Sequence[ByteArray],
        keys: Sequence[Key],
    ) -> list[TierError | None]:
        """Write payloads to a tier; an outcome each."""
        if level.tier.addressable:
            await self.copy_in(level, slots, payloads)
            return [None] * len(slots)
        # The tail of a chain first: what is written last counts as the most recent after a crash.
        names = [self.canonical_key(key) for key in reversed(keys)]
        data = [payload.data for payload in reversed(payloads)]
        size = sum([payload.nbytes for payload in payloads])
        try:
            with level.call(len(slots), size, self.index.clock, reads=False):
                async with self.claim(level, slots):
                    outcomes = (await level.tier.write(slots[::-1], data, names))[::-1]
        except Exception as exc:  # noqa: BLE001  # whatever a tier raises is its failure
            outcomes = _all_failed(exc, level.tier, "write", keys)
        self._note_written(level, slots, payloads, keys, outcomes)
        return outcomes

    def claim(self, level: Level, slots: Sequence[int]) -> Claim:
        """Be the only one that writes or erases these slots; waits for who does."""
        return Claim(level, slots, self.index.changed)

    async def read(
        self,
        level: Level,
        slots: Sequence[int],
        into: Sequence[ByteArray],
        keys: Sequence[Key],
    ) -> list[TierError | None]:
        """Read slots of a tier into buffers of the payloads' sizes; an outcome each."""
        outcomes: list[TierError | None]
        size = sum([buffer.nbytes for buffer in into])
        try:
            with level.call(len(slots), size, self.index.clock, reads=True):
                if level.tier.addressable:
                    sources = self._slots_of(level, slots, into)
                    await copy_on_thread(self._executor, into, sources)
                    outcomes = [None] * len(slots)
                else:
                    outcomes = await level.tier.read(slots, [buffer.data for buffer in into])
        except Exception as exc:  # noqa: BLE001  # whatever a tier raises is its failure
            outcomes = _all_failed(exc, level.tier, "read", keys)
        for slot, buffer, key, outcome in zip(slots, into, keys, outcomes, strict=True):
            if outcome is None:
                self.count_read(level, 1, buffer.nbytes)
            elif isinstance(outcome, TierTimeoutError):
                # The caller sees to the buffer, for it knows whose it is.
                level.slots.hold(slot, buffer, self.index.ready.get(key))
        self._count_failed(level, keys, outcomes)
        return outcomes

    async def erase(self, level: Level, slots: Sequence[int], keys: Sequence[Key]) -> None:
        """Make slots of a tier forget their blocks for good.

        Raises:
            TierError: Some could not be erased.
        """
        if not slots:
            return
        try:
            await level.tier.erase(slots)
        except Exception as exc:
            raise self._failed(exc, level, "erase", keys) from exc
        level.renew(slots)

    async def flush(self, level: Level) -> None:
        """Make what a tier completed survive a power loss.

        Raises:
            TierError: It could not make sure.
        """
        try:
            await level.tier.flush()
        except Exception as exc:
            raise self._failed(exc, level, "flush", ()) from exc

    async def move(self, moves: Sequence[Move]) -> list[bool]:
        """Write a batch of blocks from one tier to one other; say of each whether it is there."""
        source, target = self._ends(moves[0])
        entries = [move.entry for move in moves]
        return await self.copy_down(source, target, entries, [move.target_slot for move in moves])

    async def copy_down(
        self,
        source: Level,
        target: Level,
        entries: Sequence[BlockEntry],
        slots: Sequence[int],
    ) -> list[bool]:
        """Write blocks of one tier to slots of another; say of each whether it is there."""
        keys = [entry.key for entry in entries]
        if not source.tier.addressable:
            return await self._copy_through_staging(source, target, entries, slots)
        payloads = [source.tier.view(entry.slot, entry.size) for entry in entries]
        outcomes = await self.write(target, slots, payloads, keys)
        for entry, outcome in zip(entries, outcomes, strict=True):
            if outcome is None:
                self.count_read(source, 1, entry.size)
        return [outcome is None for outcome in outcomes]

    def count_read(self, level: Level, blocks: int, size: int) -> None:
        """Note that blocks of this many bytes in all were read or viewed."""
        level.counters["blocks_read"] += blocks
        level.counters["bytes_read"] += size

    def count_written(self, level: Level, blocks: int, size: int) -> None:
        """Note that blocks of this many bytes in all were written."""
        level.counters["blocks_written"] += blocks
        level.counters["bytes_written"] += size

    # Inside

    def _note_written(
        self,
        level: Level,
        slots: Sequence[int],
        payloads: Sequence[ByteArray],
        keys: Sequence[Key],
        outcomes: Sequence[TierError | None],
    ) -> None:
        good = [number for number, outcome in enumerate(outcomes) if outcome is None]
        for number, outcome in enumerate(outcomes):
            if outcome is not None:
                # It may show the block all the same, or still the one from before.
                level.doubt(slots[number], keys[number])
            if isinstance(outcome, TierTimeoutError):
                level.slots.hold(slots[number], payloads[number])
            if lacks_space(outcome):
                level.slots.lacks_space(slots[number])
            elif is_bad_place(outcome):
                level.slots.failed(slots[number])
        level.slots.tried(len(slots))
        if getattr(level.tier, "state", None) is TierState.READ_ONLY:
            level.slots.retry()  # it is not those places that are bad
        level.renew([slots[number] for number in good])
        written = [payloads[number].nbytes for number in good]
        self.count_written(level, len(good), sum(written))
        self._count_failed(level, keys, outcomes)

    def _ends(self, move: Move) -> tuple[Level, Level]:
        return self.index.levels[move.source_level], self.index.levels[move.target_level]

    def _slots_of(
        self, level: Level, slots: Sequence[int], payloads: Sequence[ByteArray]
    ) -> list[ByteArray]:
        view = level.tier.view
        return [view(slot, data.nbytes) for slot, data in zip(slots, payloads, strict=True)]

    async def _copy_through_staging(
        self,
        source: Level,
        target: Level,
        entries: Sequence[BlockEntry],
        slots: Sequence[int],
    ) -> list[bool]:
        written: list[bool] = []
        while len(written) < len(entries):
            buffers = self.staging.slots.take(len(entries) - len(written))
            group = entries[len(written) :][: len(buffers) or 1]
            targets = slots[len(written) :][: len(group)]
            try:
                into = [
                    self.staging.show(buffer, entry.size)
                    for buffer, entry in zip(buffers, group, strict=False)
                ] or [aligned_empty(group[0].size)]  # all are taken: one of its own, in turn
                keys = [entry.key for entry in group]
                read = await self.read(source, [entry.slot for entry in group], into, keys)
                for entry, outcome in zip(group, read, strict=True):
                    if isinstance(outcome, CorruptBlockError) and entry.state is BlockState.READY:
                        self.index.condemn(entry)
                        self.index.count("corrupt", [entry.key])
                for buffer, array, outcome in zip(buffers, into, read, strict=False):
                    if isinstance(outcome, TierTimeoutError):
                        self.staging.slots.hold(buffer, array)
                good = [number for number, outcome in enumerate(read) if outcome is None]
                outcomes = await self.write(
                    target,
                    [targets[number] for number in good],
                    [into[number] for number in good],
                    [keys[number] for number in good],
                )
            finally:
                self.staging.slots.give_back(buffers)
            there = {number for number, error in zip(good, outcomes, strict=True) if error is None}
            written += [number in there for number in range(len(group))]
        return written

    def _failed(self, exc: Exception, level: Level, what: str, keys: Sequence[Key]) -> TierError:
        # Returned and not kept in a local of who raises it: its traceback would hold that frame.
        error = _wrapped(exc, level.tier, what, keys[0] if keys else None)
        self.index.fail(level, keys, str(error))
        return error

    def _count_failed(
        self, level: Level, keys: Sequence[Key], outcomes: Sequence[TierError | None]
    ) -> None:
        for key, outcome in zip(keys, outcomes, strict=True):
            if outcome is not None:
                if outcome.block_hash is None:
                    outcome.block_hash = key[1] if isinstance(key, tuple) else key
                self.index.fail(level, [key], str(outcome))


def lacks_space(outcome: TierError | None) -> bool:
    """Tell whether a tier had no space for a block."""
    cause = None if outcome is None else outcome.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def is_bad_place(outcome: TierError | None) -> bool:
    """Tell whether a disk failed to write where a block was to lie, or did not answer."""
    cause = None if outcome is None else outcome.__cause__
    bad = (errno.EIO, errno.ENODATA, errno.ETIMEDOUT)
    return isinstance(cause, OSError) and cause.errno in bad


def _wrapped(exc: Exception, tier: Tier, what: str, key: Key | None) -> TierError:
    if isinstance(exc, TierError):
        return exc
    block_hash = key[1] if isinstance(key, tuple) else key
    error = TierError(f"{what} failed: {exc!r}", tier=tier.name, block_hash=block_hash)
    error.__cause__ = exc
    return error


def _all_failed(
    exc: Exception, tier: Tier, what: str, keys: Sequence[Key]
) -> list[TierError | None]:
    return [_wrapped(exc, tier, what, key) for key in keys]
