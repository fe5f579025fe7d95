"""Leases: pinned blocks, and views of them that end with the scope."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from .blocks import BlockEntry
from .core import Core
from .errors import ClosedError
from .movement.loading import Flight
from .types import BlockHash, Key, Lease
from .views import Lent, lend, take_back, warn_derived


class PinHolder(Protocol):
    """A scope that pins blocks, on which the leases inside of it may rely."""

    def lend(self, lease: LeaseScope, count: int) -> list[BlockEntry] | None:
        """Return its first so many blocks, pinned as `lend_pins` says; `None` if any left."""

    def lend_pins(self, lease: LeaseScope, entries: list[BlockEntry]) -> bool:
        """Return whether these stay pinned until the lease ended, or was told to pin them."""

    def take_pins_back(self, lease: LeaseScope) -> None:
        """Note that a lease ended."""


class LeaseScope:
    """The `async with` of one load."""

    __slots__ = (
        "_block_hashes",
        "_core",
        "_entries",
        "_flights",
        "_holder",
        "_is_use",
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
        holder: PinHolder | None = None,
    ) -> None:
        """Inside of a `holder`, which counts it too, a load is no use of its own."""
        self._core = core
        self._keys = keys
        self._block_hashes = block_hashes
        self._timeout_s = timeout_s
        self._holder = holder
        self._is_use = holder is None
        self._entries: list[BlockEntry] | None = None
        self._flights: dict[Key, Flight] = {}
        self._shown: list[BlockEntry] = []
        self._lent: list[Lent] = []
        self._lease: Lease | None = None

    async def __aenter__(self) -> Lease:
        """Pin the blocks, and read those that have no address of their own."""
        core = self._core
        core.check()
        if self._entries is not None:
            raise ClosedError("a lease is entered once: call load() again")
        if core.remote is None:
            holder = self._holder
            lent = None if holder is None else holder.lend(self, len(self._keys))
            self._entries = entries = core.find(self._keys) if lent is None else lent
            if lent is None:
                self.pin()
        else:
            entries = await self._fetch_and_pin()
        try:
            if self._is_use:
                core.index.use(list(dict.fromkeys(self._keys)))
            if not core.loading.show_hot(entries):
                await self._bring(entries)
        except BaseException:
            self._end()
            raise
        self._lease = lease = Lease(self._block_hashes, self._make_views)
        core.leases.add(self)
        return lease

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the views back and unpin."""
        derived = self._end()
        if derived:
            warn_derived(derived)

    def pin(self) -> None:
        """Hold pins of its own from now on."""
        self._holder = None
        self._core.index.pin(self._entries or ())

    def show(self) -> None:
        """Make the views; see `OpenLease`."""
        if self._lease is not None:
            iter(self._lease)  # the first access

    async def _fetch_and_pin(self) -> list[BlockEntry]:
        """Find and pin the blocks, and fetch those first that only the remote tier has."""
        core = self._core
        brought = await core.bring(self._keys, self._timeout_s)
        try:
            core.check()
            if self._entries is not None:
                raise ClosedError("a lease is entered once: call load() again")
            self._entries = entries = core.find(self._keys)
            if self._holder is None or not self._holder.lend_pins(self, entries):
                self.pin()
        finally:
            core.index.unpin(brought)
        return entries

    async def _bring(self, entries: list[BlockEntry]) -> None:
        loading = self._core.loading
        loading.count_hits(entries)
        if not loading.is_instant(entries):
            self._flights = await loading.bring(entries, self._timeout_s)
        shown = [entry for entry in entries if self._staged(entry) is None]
        for entry in shown:
            entry.shown += 1
        self._shown = shown
        loading.count_shown(shown)

    def _staged(self, entry: BlockEntry) -> Flight | None:
        """Return the flight with the staging buffer that a block is seen in, if it is in one."""
        flight = self._flights.get(entry.key)
        return None if flight is None or flight.staged is None else flight

    def _make_views(self) -> list[memoryview]:
        """Make the views; on whatever thread the lease is looked at."""
        levels = self._core.index.levels
        lent: list[Lent] = []
        for entry in self._entries or ():
            flight = self._staged(entry) if self._flights else None
            if flight is not None:
                place = self._core.loading.place_of(entry, flight)
                lent.append(lend(place.slots, place.show, place.slot, entry))
            else:
                level = levels[entry.level]
                lent.append(lend(level.slots, level.tier.view, entry.slot, entry))
        self._lent += lent
        if self._lease is None:  # the loop's thread ended it meanwhile
            take_back(lent)
            return []
        return [one[0] for one in lent]

    def _end(self) -> list[BlockHash]:
        entries, self._entries = self._entries, []
        if self._lease is not None:
            self._lease.end()
            self._lease = None
            self._core.leases.discard(self)
        derived = take_back(self._lent) if self._lent else []
        for entry in self._shown:
            entry.shown -= 1
        self._shown = []
        if self._flights:
            self._core.loading.leave(self._flights)
            self._flights = {}
        if self._holder is None:
            self._core.index.unpin(entries or ())
        else:
            self._holder.take_pins_back(self)
        return derived


class ObservedLeaseScope(LeaseScope):
    """The same where the manager has observers: a load lasts until the bytes are there."""

    __slots__ = ()

    async def __aenter__(self) -> Lease:
        """Enter, observed."""
        with self._core.observed("load", self._keys):
            return await super().__aenter__()
