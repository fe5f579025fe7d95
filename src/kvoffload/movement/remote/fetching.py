"""Blocks that others stored become blocks of one's own: fetched once, into the hot tier."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import anyio

from ...aligned import aligned_empty
from ...blocks import BlockEntry
from ...errors import (
    CapacityError,
    CorruptBlockError,
    LoadTimeoutError,
    OffloadError,
    TierError,
    TierUnavailableError,
)
from ...index import Index
from ...jobs import Jobs
from ...named import Named
from ...remote.protocol import RemoteOutcome
from ...shares import NOBODY, namespace_of
from ...types import BlockState, ByteArray, Key
from ..loading import Loading
from ..storing import Storing
from ..transfer import Transfer
from .engine import Engine, again
from .sightings import Sightings

BATCH_BYTES = 32 * 1024 * 1024
"""Most payload bytes asked of the engine at a time, and under one deadline."""
BATCH_BLOCKS = 256
"""Most blocks."""

ABSENT = BlockState.ABSENT

log = logging.getLogger("kvoffload")


class Fetch:
    """One block on its way here, for any number of callers.

    Attributes:
        entry: The block; pending until it is here.
        users: Callers that wait for it. Once it is here, it is pinned once for each.
        landed: Set when it is over.
        error: What went wrong; `None` where it is here, or turned out to be gone.
        is_hinted: Nobody waits for it, it was hinted.
    """

    __slots__ = ("entry", "error", "is_hinted", "landed", "users")

    def __init__(self, entry: BlockEntry, *, is_hinted: bool = False) -> None:
        self.entry = entry
        self.is_hinted = is_hinted
        self.users = 0
        self.landed = anyio.Event()
        self.error: OffloadError | None = None

    @property
    def is_here(self) -> bool:
        """Whether it landed, and is pinned for its users."""
        return self.landed.is_set() and self.entry.pin_count > 0


class Fetching:
    """Fetches blocks from the engine into slots of the hottest tier.

    From then on they are blocks like all others. Where that tier has no room for them, they can't
    be fetched.
    """

    def __init__(
        self,
        engine: Engine,
        sightings: Sightings,
        index: Index,
        transfer: Transfer,
        storing: Storing,
        loading: Loading,
        jobs: Jobs,
    ) -> None:
        self._loading = loading
        self._engine = engine
        self._sightings = sightings
        self._index = index
        self._transfer = transfer
        self._storing = storing
        self._jobs = jobs
        self.under_way: dict[Key, Fetch] = {}
        self.demand = 0
        """Blocks that somebody waited for from the start."""

    async def bring(self, keys: Sequence[Key], timeout_s: float | None) -> list[BlockEntry]:
        """Fetch blocks that are not here; return pinned entries, to be unpinned by the caller.

        Those are all of the blocks that are ready now. Some may be missing: gone, or being stored.
        Cancelled, or out of time, what is under way goes on for whoever else waits.

        Raises:
            CapacityError: The hottest tier has no room for them.
            LoadTimeoutError: `timeout_s` passed, or the engine did not answer in time.
            TierError: The engine could not read some.
        """
        index = self._index
        once = dict.fromkeys(keys)
        held = [index.ready[key] for key in once if key in index.ready]
        if len(held) == len(once):
            return []
        index.pin(held)
        mine: list[Fetch] = []
        try:
            with anyio.fail_after(timeout_s):
                missing = [key for key in once if key not in index.ready]
                coming = self.under_way.keys() | index.pending.keys()
                wanted = [key for key in missing if key not in coming]
                sizes = await self._sightings.sizes(wanted)
                self._board(missing, sizes, held, mine)
                for fetch in mine:
                    await fetch.landed.wait()
            for fetch in mine:
                if fetch.error is not None:
                    raise again(fetch.error)
        except BaseException as exc:
            self._leave(mine)
            index.unpin(held)
            if isinstance(exc, TimeoutError) and not isinstance(exc, OffloadError):
                raise LoadTimeoutError(
                    f"{len(once) - len(held)} blocks were not fetched from remote tier "
                    f"{self._engine.tier.name!r} within {timeout_s} s: recompute them"
                ) from exc
            raise
        return held + [fetch.entry for fetch in mine if fetch.is_here]

    async def bring_ahead(self, keys: Sequence[Key], named: Named) -> None:
        """Fetch blocks that nobody waits for, as far as they are there and there is room to spare.

        Those that the hint names are not pushed out for each other. Cancelled, it goes on.

        Raises:
            TierUnavailableError: The engine does not answer.
        """
        sizes = await self._sightings.sizes(keys)
        found = {key: size for key, size in sizes.items() if size is not None}
        if found:
            await self._jobs.start(lambda _: self._fetch_ahead(found, named)).result()

    # Inside

    def _board(
        self,
        missing: Sequence[Key],
        sizes: dict[Key, int | None],
        held: list[BlockEntry],
        mine: list[Fetch],
    ) -> None:
        """Join what is under way and start what is not, unless some can't be had at all."""
        index = self._index
        fresh: list[Key] = []
        joined: list[Fetch] = []
        for key in missing:
            entry, fetch = index.ready.get(key), self.under_way.get(key)
            if entry is not None:
                index.pin((entry,))
                held.append(entry)
            elif fetch is not None:
                joined.append(fetch)
            elif key in index.pending or sizes.get(key) is None:
                return  # of a load that fails nothing is fetched
            else:
                fresh.append(key)
        slots = index.levels[0].slots.capacity
        together = len(fresh) + len(joined) + sum(not entry.level for entry in held)
        if fresh and together > slots:  # before some are fetched in vain, and push out others
            raise CapacityError(
                f"{len(missing)} blocks to fetch, and the hottest tier, which has {slots} slots, "
                f"is to hold {together} at once: load fewer"
            )
        if fresh:
            entries = index.reserve(fresh, [sizes[key] or 0 for key in fresh], pins=1)
            self._storing.hold_back(entries)
            started = [Fetch(entry) for entry in entries]
            self.under_way |= zip(fresh, started, strict=True)
            joined += started
            self.demand += len(started)
            self._jobs.start(lambda _: self._fetch(started))
        self._loading.tell_demand(fresh + [fetch.entry.key for fetch in joined if fetch.is_hinted])
        for fetch in joined:
            fetch.users += 1
            fetch.is_hinted = False
        mine += joined
        self._engine.level.counters["hits"] += len(joined)

    def _leave(self, mine: Sequence[Fetch]) -> None:
        for fetch in mine:
            if fetch.is_here:
                self._index.unpin((fetch.entry,))
            fetch.users -= 1

    async def _fetch(self, fetches: Sequence[Fetch]) -> None:
        try:
            for batch in _batches(fetches):
                if await self._storing.take_room([fetch.entry for fetch in batch]):
                    await self._fill(batch)
                else:
                    self._land(
                        batch, "the hottest tier has no room for what is fetched: load fewer"
                    )
        except Exception:
            log.exception("fetching %d blocks failed", len(fetches))
            raise
        finally:
            self._land([one for one in fetches if not one.landed.is_set()], _CUT_OFF)
            self.demand -= len(fetches)
            self._index.changed.fire()

    async def _fetch_ahead(self, sizes: dict[Key, int], named: Named) -> None:
        """Fetch those blocks alone that there is room for, and nobody else has or fetches."""
        index = self._index
        namespaces = {namespace_of((key,)) for key in sizes}
        whom = namespaces.pop() if len(namespaces) == 1 else NOBODY
        grants = await self._loading.room_for_hint(len(sizes), whom, named)
        fetches: list[Fetch] = []
        for key, size in sizes.items():
            fits = grants and index.state(key) is ABSENT
            if fits and self._storing.has_left(namespace_of((key,)), size):
                (entry,) = index.reserve((key,), (size,), pins=1)
                entry.slot = grants.pop(0).slot
                fetches.append(Fetch(entry, is_hinted=True))
                self.under_way[key] = fetches[-1]
        self._loading.release(grants)
        try:
            for batch in _batches(fetches):
                await self._fill(batch)
        finally:
            self._land([one for one in fetches if not one.landed.is_set()], _CUT_OFF)

    async def _fill(self, fetches: Sequence[Fetch]) -> None:
        """Read blocks that have their slots, and publish them."""
        index, hot = self._index, self._index.levels[0]
        entries = [fetch.entry for fetch in fetches]
        keys = [entry.key for entry in entries]
        outcomes: Sequence[RemoteOutcome | TierError] = ()
        try:
            if hot.tier.addressable:
                into = [hot.tier.view(entry.slot, entry.size) for entry in entries]
            else:
                into = [aligned_empty(entry.size) for entry in entries]
            outcomes = await self._read(keys, into)
            good = [n for n, outcome in enumerate(outcomes) if outcome is RemoteOutcome.DONE]
            good = await self._place([entries[n] for n in good], [into[n] for n in good], good)
            index.commit([entries[number] for number in good])
        finally:
            index.abort([one for one in entries if index.pending.get(one.key) is one])
            errors = dict(zip(keys, outcomes, strict=False))
            for fetch in fetches:
                outcome = errors.get(fetch.entry.key)
                if isinstance(outcome, TierError) and not isinstance(outcome, CorruptBlockError):
                    fetch.error = outcome
            self._land(fetches, "" if outcomes else _CUT_OFF)

    async def _read(
        self, keys: Sequence[Key], into: Sequence[ByteArray]
    ) -> Sequence[RemoteOutcome | TierError]:
        index, engine, level = self._index, self._engine, self._engine.level
        names = [self._transfer.canonical_key(key) for key in keys]
        buffers = [array.data for array in into]
        outcomes: Sequence[RemoteOutcome | TierError]
        try:
            size = sum(array.nbytes for array in into)
            with level.call(len(keys), size, index.clock, reads=True):
                outcomes = await engine.call(lambda: engine.tier.get(names, buffers))
        except TierError as exc:
            outcomes = [exc] * len(keys)
        engine.note_failures(keys, outcomes)
        for key, array, outcome in zip(keys, into, outcomes, strict=True):
            if outcome is RemoteOutcome.DONE:
                self._transfer.count_read(level, 1, array.nbytes)
            elif outcome is RemoteOutcome.ABSENT:
                self._sightings.note(key, None)
            elif isinstance(outcome, CorruptBlockError):
                index.count("corrupt", [key])
                self._sightings.note(key, None)
        return outcomes

    async def _place(
        self, entries: Sequence[BlockEntry], payloads: Sequence[ByteArray], numbers: Sequence[int]
    ) -> list[int]:
        """Get what was read to where it belongs; return the numbers of what is there."""
        hot = self._index.levels[0]
        if hot.tier.addressable:
            size = sum(payload.nbytes for payload in payloads)
            self._transfer.count_written(hot, len(payloads), size)
            return list(numbers)
        if not entries:
            return []
        slots, keys = [entry.slot for entry in entries], [entry.key for entry in entries]
        written = await self._transfer.write(hot, slots, payloads, keys)
        return [number for number, error in zip(numbers, written, strict=True) if error is None]

    def _land(self, fetches: Sequence[Fetch], why: str = "") -> None:
        """End fetches: pin what is here for who waits, and wake them."""
        for fetch in fetches:
            entry = fetch.entry
            del self.under_way[entry.key]
            if self._index.ready.get(entry.key) is entry:
                if fetch.is_hinted:
                    self._index.prefetched.add(entry.key)
                for _ in range(fetch.users):
                    self._index.pin((entry,))
            elif why is _CUT_OFF:
                fetch.error = TierUnavailableError(why, tier=self._engine.tier.name)
            elif why:
                fetch.error = CapacityError(why)
            if self._index.pending.get(entry.key) is entry:
                self._index.abort([entry])
            fetch.landed.set()


_CUT_OFF = "fetching was cut off"


def _batches(fetches: Sequence[Fetch]) -> Iterator[list[Fetch]]:
    batch: list[Fetch] = []
    size = 0
    for fetch in fetches:
        if batch and (size + fetch.entry.size > BATCH_BYTES or len(batch) == BATCH_BLOCKS):
            yield batch
            batch, size = [], 0
        batch.append(fetch)
        size += fetch.entry.size
    if batch:
        yield batch
