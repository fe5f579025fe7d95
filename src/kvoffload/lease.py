"""Leases: pinned blocks, and views of them that end with the scope."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from .blocks import BlockEntry
from .core import Core
from .errors import ClosedError
from .movement.loading import Flight
from .types import BlockHash, Key, Lease
from .views import Lent, lend, take_back, warn_derived


class LeaseScope:
    """The `async with` of one load."""

    __slots__ = (
        "_block_hashes",
        "_core",
        "_count_use",
        "_entries",
        "_flights",
        "_keys",
        "_lease",
        "_lent",
        "_shown",
        "_timeout_s",
    )

    def __init__(
        self,
        core: Core,
        keys: Sequence[Key],
        block_hashes: Sequence[BlockHash],
        timeout_s: float | None,
        *,
        count_use: bool,
    ) -> None:
        self._core = core
        self._keys = keys
        self._block_hashes = block_hashes
        self._timeout_s = timeout_s
        self._count_use = count_use
        self._entries: list[BlockEntry] | None = None
        self._flights: dict[Key, Flight] = {}
        self._shown: list[BlockEntry] = []
        self._lent: list[Lent] = []
        self._lease: Lease | None = None

    async def __aenter__(self) -> Lease:
        """Pin the blocks, read those that have no address of their own, and make the views."""
        core = self._core
        if core.observers:
            with core.observed("load", self._keys):
                return await self._enter()
        return await self._enter()

    async def _enter(self) -> Lease:
        core = self._core
        core.check()
        if self._entries is not None:
            raise ClosedError("a lease is entered once: call load() again")
        entries = core.find(self._keys)
        core.index.pin(entries)
        self._entries = entries
        try:
            if self._count_use:
                core.index.use(list(dict.fromkeys(self._keys)))
            core.loading.count_hits(entries)
            if not core.loading.is_instant(entries):
                self._flights = await core.loading.bring(entries, self._timeout_s)
            return self._show(entries)
        except BaseException:
            self._end()
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the views back and unpin."""
        warn_derived(self._end())

    def _show(self, entries: Sequence[BlockEntry]) -> Lease:
        levels = self._core.index.levels
        flights, lent, shown = self._flights, self._lent, self._shown
        for entry in entries:
            flight = flights.get(entry.key) if flights else None
            if flight is not None and flight.staged is not None:
                place = self._core.loading.place_of(entry, flight)
                lent.append(lend(place.slots, place.show, place.slot, entry))
            else:
                entry.shown += 1
                shown.append(entry)
                level = levels[entry.level]
                lent.append(lend(level.slots, level.tier.view, entry.slot, entry))
        self._core.loading.count_shown(shown)
        self._lease = Lease(self._block_hashes, [one[0] for one in lent])
        return self._lease

    def _end(self) -> list[BlockHash]:
        entries, self._entries = self._entries, []
        if self._lease is not None:
            self._lease.end()
            self._lease = None
        derived = take_back(self._lent)
        for entry in self._shown:
            entry.shown -= 1
        self._shown = []
        self._core.loading.leave(self._flights)
        self._flights = {}
        self._core.index.unpin(entries or ())
        return derived
