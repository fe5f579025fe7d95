"""Keeping namespaces within their quotas, and others away from what is reserved for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from .blocks import BlockEntry
from .index import Index
from .levels import Level
from .shares import Shares, Whom
from .types import Key, TierState


class Sharing:
    """Decides, on an index with shares, what may leave for whom; moves no byte."""

    def __init__(self, index: Index, shares: Shares) -> None:
        self._index = index
        self._shares = shares

    # Quotas

    def fitting(self, namespace: str | None, sizes: Sequence[int]) -> int:
        """Return how many new blocks of these sizes, from the first, fit a quota.

        Colder blocks of the namespace's own may give way. Changes nothing.
        """
        most = self._shares.max_bytes.get(namespace)
        if most is None:
            return len(sizes)
        left = most - self._shares.used(namespace)
        excess = sum(sizes) - left
        if excess > 0:
            left += sum(entry.size for entry in self._coldest(namespace, excess))
        return sum(size <= left for size in accumulate(sizes))

    def has_left(self, namespace: str | None, size: int) -> bool:
        """Tell whether so many bytes more fit a quota without anything giving way."""
        most = self._shares.max_bytes.get(namespace)
        return most is None or self._shares.used(namespace) + size <= most

    def can_let_in(self, entries: Sequence[BlockEntry]) -> bool:
        """Tell whether pending blocks of a namespace that were held back fit its quota."""
        held = self._shares.held_back(entries)
        sizes = [entry.size for entry in held]
        return not held or self.fitting(held[0].namespace, sizes) == len(sizes)

    def hold_back(self, entries: Sequence[BlockEntry]) -> None:
        """Don't count pending blocks that have no room, until they are let in."""
        self._shares.hold_back(entries)

    def let_in(self, entries: Sequence[BlockEntry], evicted: list[Key]) -> None:
        """Count those pending blocks of a namespace that were held back, and make way for them."""
        held = self._shares.held_back(entries)
        if held:
            self.make_way(held[0].namespace, sum(entry.size for entry in held), evicted)
            self._shares.let_in(held)

    def may_fit_soon(self, namespace: str | None) -> bool:
        """Tell whether blocks of a namespace are on their way down, and may give way after it."""
        ready = self._index.ready
        moving = (ready[key] for key in self._index.pinned)
        return any(entry.move is not None and entry.namespace == namespace for entry in moving)

    def make_way(self, namespace: str | None, size: int, evicted: list[Key]) -> None:
        """Evict the coldest blocks of a namespace until so many bytes more fit its quota.

        Or as many as there are without a pin. Their keys are appended to `evicted`.
        """
        most = self._shares.max_bytes.get(namespace)
        excess = 0 if most is None else self._shares.used(namespace) + size - most
        if excess <= 0:
            return
        index = self._index
        for level, group in index.by_level(self._coldest(namespace, excess)):
            keys = [entry.key for entry in group]
            level.slots.give_back(index.evict(level, keys))
            evicted += keys
        index.changed.fire()

    def trim(self) -> None:
        """Evict what a namespace has beyond its quota, the coldest first."""
        for namespace in self._shares.max_bytes:
            self.make_way(namespace, 0, [])

    # Reserves

    def guards(self, whom: Whom) -> bool:
        """Tell whether there is anything that may not be evicted for a namespace."""
        return self._shares.guards(whom)

    def protects(self, entry: BlockEntry, whom: Whom) -> bool:
        """Tell whether a block may not be evicted for a namespace."""
        return not self._shares.losable([entry], whom, None)

    def losable(self, entries: Iterable[BlockEntry], whom: Whom) -> list[BlockEntry]:
        """Return those of these blocks that may be evicted for a namespace, in their order."""
        return self._shares.losable(entries, whom, None)

    def victims(
        self,
        level: Level,
        count: int,
        whom: Whom,
        lost: dict[str | None, int] | None = None,
    ) -> list[Key]:
        """Return the coldest blocks of a level that may be evicted for a namespace.

        `lost` are bytes of each namespace that are to leave besides.
        """
        ready, held = self._index.ready, level.slots.held

        def allowed(keys: list[Key]) -> list[Key]:
            entries = [ready[key] for key in keys]
            if held:
                entries = [entry for entry in entries if not level.slots.is_held(entry.slot)]
            return [entry.key for entry in self._shares.losable(entries, whom, lost)]

        pinned = self._index.pinned
        keys = self._shares.policy.victims_among(level.number, count + held, pinned, allowed)
        return keys[:count]

    def available(self, count: int, whom: Whom) -> list[int]:
        """Return how many slots of each level are free or may be emptied for good.

        Not more than `count` in all need be counted.
        """
        found = [0] * len(self._index.levels)
        lost: dict[str | None, int] = {}
        left = count
        for level in reversed(self._index.levels):
            if left > 0 and level.state is not TierState.READ_ONLY:
                free = level.slots.free + len(level.copies)
                victims = self.victims(level, left - free, whom, lost) if left > free else []
                for key in victims:
                    entry = self._index.ready[key]
                    lost[entry.namespace] = lost.get(entry.namespace, 0) + entry.size
                found[level.number] = free + len(victims)
                left -= found[level.number]
        return found

    def hottest_reserved(self, entries: Iterable[BlockEntry]) -> set[BlockEntry]:
        """Return the blocks, given hottest first, that their namespaces' reserves are for."""
        reserved = dict(self._shares.reserved_bytes)
        found: set[BlockEntry] = set()
        for entry in entries:
            left = reserved.get(entry.namespace, 0)
            if left > 0:
                found.add(entry)
                reserved[entry.namespace] = left - entry.size
        return found

    # Inside

    def _coldest(self, namespace: str | None, size: int) -> list[BlockEntry]:
        """Return the coldest blocks of a namespace with so many bytes, the lowest tier first.

        All that have no pin, where those are fewer.
        """
        index = self._index
        count = -(-size // index.levels[0].tier.block_bytes)
        while True:
            found = index.coldest(count, namespace, everywhere=False)
            sizes = list(accumulate(entry.size for entry in found))
            needed = sum(total < size for total in sizes) + 1
            if needed <= len(found) or len(found) < count:
                return found[:needed]
            count *= 2  # of shorter ones it takes more
