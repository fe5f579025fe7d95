"""Adaptive replacement: a share for blocks used once and one for blocks used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from ..types import Key
from .per_level import PerLevelPolicy
from .recency import RecencyQueue


class ARCPolicy(PerLevelPolicy):
    """Balance recency against frequency by what was evicted too early; admits everything.

    The use that stores a block does not count as one; of an evicted block only the key is kept,
    for at most as many as there are slots.

    Source: ARC (Megiddo and Modha, USENIX FAST 2003).
    """

    name = "arc"

    def __init__(self) -> None:
        super().__init__(_Lists)


class _Lists:
    """One level's four lists; `share` is how many blocks used once it should have."""

    def __init__(self, capacity: int) -> None:
        self.once = RecencyQueue()
        self.again = RecencyQueue()
        self._capacity = capacity
        self._share = 0.0
        self._unused: set[Key] = set()
        self._once_ghosts: OrderedDict[Key, None] = OrderedDict()
        self._again_ghosts: OrderedDict[Key, None] = OrderedDict()

    def push(self, keys: Sequence[Key]) -> None:
        once: list[Key] = []
        again: list[Key] = []
        for key in keys:
            if key in self._once_ghosts:
                ratio = len(self._again_ghosts) / len(self._once_ghosts)
                self._share = min(float(self._capacity), self._share + max(1.0, ratio))
                del self._once_ghosts[key]
                again.append(key)
            elif key in self._again_ghosts:
                ratio = len(self._once_ghosts) / len(self._again_ghosts)
                self._share = max(0.0, self._share - max(1.0, ratio))
                del self._again_ghosts[key]
                again.append(key)
            else:
                once.append(key)
        self.once.push(once)
        self.again.push(again)
        self._unused.update(keys)

    def discard(self, keys: Sequence[Key]) -> None:
        for key in keys:
            ghosts = self._once_ghosts if key in self.once else self._again_ghosts
            ghosts[key] = None
        self.once.discard(keys)
        self.again.discard(keys)
        self._unused.difference_update(keys)
        while self._once_ghosts and len(self.once) + len(self._once_ghosts) > self._capacity:
            self._once_ghosts.popitem(last=False)
        while len(self._once_ghosts) + len(self._again_ghosts) > self._capacity:
            ghosts = self._again_ghosts or self._once_ghosts
            ghosts.popitem(last=False)

    def use(self, keys: Sequence[Key]) -> None:
        first = {key for key in keys if key in self._unused}
        moved = [key for key in keys if key not in first and key in self.once]
        self._unused -= first
        self.once.discard(moved)
        self.once.use(keys)
        # Together, wherever they come from: the chain's order is theirs now.
        risen = set(moved)
        self.again.renew([key for key in keys if key in risen or key in self.again])

    def coldest(self, count: int, pinned: Collection[Key]) -> list[Key]:
        once = self.once.coldest(count, pinned)
        again = self.again.coldest(count, pinned)
        surplus = max(0, len(self.once) - int(self._share))
        from_once = min(len(once), max(min(count, surplus), count - len(again)))
        return [*once[:from_once], *again[: count - from_once]]

    def unpinned(self, keys: Sequence[Key]) -> None:
        self.once.unpinned(keys)
        self.again.unpinned(keys)
