"""S3-FIFO: a small queue on probation before the main one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from ..types import Key
from .per_level import PerLevelPolicy

SMALL_SHARE = 0.1
"""Part of a level that is for blocks on probation."""
MOST_USES = 3
PROMOTED_FROM = 2
"""Uses on probation that take a block into the main queue."""


class S3FIFOPolicy(PerLevelPolicy):
    """Evict quickly what was not used again soon after it came; admits everything.

    The use that stores a block does not count as one; of an evicted block only the key is kept,
    for at most as many as there are slots.

    Source: S3-FIFO (Yang et al., SOSP 2023).
    """

    name = "s3fifo"

    def __init__(self) -> None:
        super().__init__(_Queues)


class _Queues:
    """One level's queues, oldest first; the numbers are uses, -1 before the one that stores."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._small: OrderedDict[Key, int] = OrderedDict()
        self._main: OrderedDict[Key, int] = OrderedDict()
        self._ghosts: OrderedDict[Key, None] = OrderedDict()

    def push(self, keys: Sequence[Key]) -> None:
        for key in reversed(keys):
            if key in self._ghosts:
                del self._ghosts[key]
                self._main[key] = -1
            else:
                self._small[key] = -1

    def discard(self, keys: Sequence[Key]) -> None:
        for key in keys:
            if self._small.pop(key, None) is not None:
                self._ghosts[key] = None
            else:
                del self._main[key]
        while len(self._ghosts) > self._capacity:
            self._ghosts.popitem(last=False)

    def use(self, keys: Sequence[Key]) -> None:
        for key in keys:
            for queue in (self._small, self._main):
                if key in queue:
                    queue[key] = min(MOST_USES, queue[key] + 1)

    def coldest(self, count: int, pinned: Collection[Key]) -> list[Key]:
        small, main = self._small, self._main
        chosen: list[Key] = []
        aside_small: list[tuple[Key, int]] = []  # chosen or pinned: they keep their places
        aside_main: list[tuple[Key, int]] = []
        while len(chosen) < count and (small or main):
            if small and (len(small) >= SMALL_SHARE * self._capacity or not main):
                key, uses = small.popitem(last=False)
                if key in pinned:
                    aside_small.append((key, uses))
                elif uses >= PROMOTED_FROM:
                    main[key] = 0
                else:
                    chosen.append(key)
                    aside_small.append((key, uses))
            else:
                key, uses = main.popitem(last=False)
                if key in pinned:
                    aside_main.append((key, uses))
                elif uses > 0:
                    main[key] = uses - 1
                else:
                    chosen.append(key)
                    aside_main.append((key, uses))
        for queue, aside in ((small, aside_small), (main, aside_main)):
            for key, uses in reversed(aside):
                queue[key] = uses
                queue.move_to_end(key, last=False)
        return chosen

    def unpinned(self, keys: Sequence[Key]) -> None:
        """Do nothing, for nothing was set aside."""
