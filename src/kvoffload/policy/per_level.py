"""A policy that orders each level by itself, and admits everything."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from ..errors import ConfigError
from ..retention import Retention
from ..types import Key


class Queue(Protocol):
    """The order of one level's blocks; keys of one call are a chain, head first."""

    def push(self, keys: Sequence[Key]) -> None:
        """Add blocks that are not in it."""

    def discard(self, keys: Sequence[Key]) -> None:
        """Remove those of the blocks that are in it."""

    def use(self, keys: Sequence[Key]) -> None:
        """Note one use of those that are in it."""

    def coldest(self, count: int, pinned: Collection[Key]) -> list[Key]:
        """Return up to `count` blocks that are not pinned, coldest first."""

    def unpinned(self, keys: Sequence[Key]) -> None:
        """Offer again those that were stepped over."""


class PerLevelPolicy:
    """Keeps a queue for each level; see `EvictionPolicy` for the calls.

    Args:
        make_queue: Makes the queue of a level, given its capacity.
    """

    def __init__(self, make_queue: Callable[[int], Queue]) -> None:
        self._make_queue = make_queue
        self._levels: list[Queue] = []

    def attach(self, capacities: Sequence[int]) -> None:
        """Serve a manager with these levels; see `EvictionPolicy`."""
        if self._levels:
            raise ConfigError("this policy object serves another manager: make one for each")
        self._levels = [self._make_queue(capacity) for capacity in capacities]

    def admit(
        self,
        keys: Sequence[Key],
        level: int,
        *,
        chain: Sequence[Key] = (),
        pinned: Collection[Key] = (),
        retention: Retention | None = None,
    ) -> Collection[Key]:
        """Admit everything."""
        return keys

    def insert(self, keys: Sequence[Key], level: int) -> None:
        """Add blocks to a level."""
        self._levels[level].push(keys)

    def remove(self, keys: Sequence[Key], level: int) -> None:
        """Remove blocks from a level."""
        self._levels[level].discard(keys)

    def use(self, keys: Sequence[Key], *, retention: Retention | None = None) -> None:
        """Note one use of a chain on each level; what its caller says is not looked at."""
        for queue in self._levels:
            queue.use(keys)

    def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
        """Return the coldest blocks of a level."""
        return self._levels[level].coldest(count, pinned)

    def unpinned(self, keys: Sequence[Key]) -> None:
        """Offer these again."""
        for queue in self._levels:
            queue.unpinned(keys)
