"""Leases: pinned blocks, and views of them that end with the scope."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from .blocks import BlockEntry
from .core import Core
from .errors import ClosedError
from .movement.loading import Flight
from .types import BlockHash, Key, Lease
from .views import LentView, take_back, warn_derived


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
        self._lent: list[LentView] = []
        self._lease: Lease | None = None

    async def __aenter__(self) -> Lease:
        """Pin the blocks, read those that have no address of their own, and make the views."""
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
        place_of = self._core.loading.place_of
        flights = self._flights
        lent = self._lent
        for entry in entries:
            flight = flights.get(entry.key) if flights else None
            if flight is None or flight.staged is None:
                entry.shown += 1
                self._shown.append(entry)
            lent.append(LentView(place_of(entry, flight), entry, writable=False))
        self._core.loading.count_shown(self._shown)
        self._lease = Lease(self._block_hashes, [one.view for one in lent])
        return self._lease

    def _end(self) -> list[BlockHash]:
        entries, self._entries = self._entries, []
        if self._lease is not None:
            self._lease.end()
            self._lease = None
        derived = take_back(self._lent)
        self._lent = []
        for entry in self._shown:
            entry.shown -= 1
        self._shown = []
        self._core.loading.leave(self._flights)
        self._flights = {}
        self._core.index.unpin(entries or ())
        return derived
