"""Least recently used, the tail of a chain before its head."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..errors import ConfigError
from ..types import Key
from .recency import RecencyQueue


class LRUPolicy:
    """Evict what was used longest ago; admits everything."""

    name = "lru"

    def __init__(self) -> None:
        self._levels: list[RecencyQueue] = []

    def attach(self, capacities: Sequence[int]) -> None:
        """Serve a manager with these levels; see `EvictionPolicy`."""
        if self._levels:
            raise ConfigError("this policy object serves another manager: make one for each")
        self._levels = [RecencyQueue() for _ in capacities]

    def admit(
        self,
        keys: Sequence[Key],
        level: int,
        *,
        chain: Sequence[Key] = (),
        pinned: Collection[Key] = (),
    ) -> Collection[Key]:
        """Admit everything."""
        return keys

    def insert(self, keys: Sequence[Key], level: int) -> None:
        """Add blocks at the recent end of a level."""
        self._levels[level].push(keys)

    def remove(self, keys: Sequence[Key], level: int) -> None:
        """Remove blocks from a level."""
        self._levels[level].discard(keys)

    def use(self, keys: Sequence[Key]) -> None:
        """Make the chain the most recent of each level, its head most of all."""
        for queue in self._levels:
            queue.use(keys)

    def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
        """Return the least recently used blocks of a level."""
        return self._levels[level].coldest(count, pinned)

    def unpinned(self, keys: Sequence[Key]) -> None:
        """Offer these again."""
        for queue in self._levels:
            queue.unpinned(keys)
