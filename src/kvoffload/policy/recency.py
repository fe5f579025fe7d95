"""A recency queue that steps over pinned blocks in constant amortised time."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection, Sequence
from itertools import chain, islice

from ..types import Key


class RecencyQueue:
    """Keys from least to most recently used.

    A pinned key that comes up at the cold end is parked aside, so that it is stepped over once and
    not by every eviction while it is pinned; unpinned, it is offered again in its old place.
    """

    __slots__ = ("_offered", "_order", "_parked", "_returned", "_stamps", "_tickets")

    def __init__(self) -> None:
        self._order: OrderedDict[Key, int] = OrderedDict()  # with the stamp that each came with
        # Parked keys are older than all that is in the order; a lower ticket is the colder one.
        self._parked: dict[Key, int] = {}  # with their tickets
        self._stamps: dict[Key, int] = {}  # of parked ones, but for 0
        self._returned: list[tuple[int, Key]] = []
        self._offered: set[int] = set()  # the tickets in there, each once
        self._tickets = 0

    def __len__(self) -> int:
        return len(self._order) + len(self._parked)

    def __contains__(self, key: Key) -> bool:
        return key in self._order or key in self._parked

    def push(self, keys: Sequence[Key], stamp: int = 0) -> None:
        """Append keys that are not in the queue; the first becomes the most recent."""
        order = self._order
        for key in reversed(keys):
            order[key] = stamp

    def stamp_of(self, key: Key) -> int:
        """Return the stamp that a key of the queue was pushed with."""
        stamp = self._order.get(key)
        return self._stamps.get(key, 0) if stamp is None else stamp

    def use(self, keys: Sequence[Key]) -> None:
        """Make those of the keys that are in the queue the most recent; the first most of all."""
        order = self._order
        for key in reversed(keys):
            if key in order:
                order.move_to_end(key)
            elif self._parked and self._parked.pop(key, None) is not None:
                order[key] = self._stamps.pop(key, 0)

    def renew(self, keys: Sequence[Key]) -> None:
        """Make the keys the most recent, whether they are in the queue or not."""
        order = self._order
        for key in reversed(keys):
            if key in order:
                order.move_to_end(key)
            else:
                self._unpark(key)
                order[key] = 0

    def discard(self, keys: Sequence[Key]) -> None:
        """Remove those of the keys that are in the queue."""
        order = self._order
        parked = self._parked
        for key in keys:
            if key in order:
                del order[key]
            elif parked:
                self._unpark(key)

    def coldest(self, count: int, pinned: Collection[Key]) -> list[Key]:
        """Return up to `count` keys that are not pinned, coldest first."""
        if not pinned:
            return list(islice(chain(self._parked, self._order), count))
        found = self._returned_keys(count, pinned)
        head: list[Key] = []
        for key in self._order:
            if len(found) >= count:
                break
            if key not in pinned:
                found.append(key)
            elif not found:
                # Only what lies before the first key found: parked further on, it would overtake
                # that one when it returns.
                head.append(key)
        for key in head:
            self._parked[key] = self._tickets
            self._tickets += 1
            stamp = self._order.pop(key)
            if stamp:
                self._stamps[key] = stamp
        return found

    def unpinned(self, keys: Sequence[Key]) -> None:
        """Offer again those of the keys that were stepped over."""
        if self._parked:
            for key in keys:
                ticket = self._parked.get(key)
                if ticket is not None and ticket not in self._offered:
                    self._offered.add(ticket)
                    heapq.heappush(self._returned, (ticket, key))

    def _unpark(self, key: Key) -> None:
        self._parked.pop(key, None)
        self._stamps.pop(key, None)

    def _returned_keys(self, count: int, pinned: Collection[Key]) -> list[Key]:
        offered: list[tuple[int, Key]] = []
        heap = self._returned
        while heap and len(offered) < count:
            ticket, key = heapq.heappop(heap)
            # Stale when the key was used or removed since, or pinned again.
            if self._parked.get(key) == ticket and key not in pinned:
                offered.append((ticket, key))
            else:
                self._offered.discard(ticket)
        self._returned = offered + heap  # a sorted list before a heap of larger ones is a heap
        return [key for _, key in offered]
