"""The offline optimum: what a policy that knows the future would hit."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Hashable, Sequence

from ..errors import ConfigError
from ..retention import Retention
from ..types import Key


class OptimalPolicy:
    """Evict what is used again last, and let in nothing that is used again later still.

    For simulations: it is told all requests beforehand. A bound, not a rule that could be run.

    Args:
        chains: All requests to come, in order.

    Source: MIN (Belady, IBM Systems Journal 1966), with bypass.
    """

    name = "optimal"

    def __init__(self, chains: Sequence[Sequence[Hashable]]) -> None:
        self._next_uses = _next_uses(chains)
        self._now = 0
        self._capacities: list[int] = []
        # Of blocks that are anywhere or will be: when they are used again, and how deep they lie.
        self._next: dict[Key, tuple[float, int]] = {}
        self._level_of: dict[Key, int] = {}
        self._heaps: list[list[tuple[float, int, int, Key]]] = []
        self._sizes: list[int] = []
        self._count = 0

    def attach(self, capacities: Sequence[int]) -> None:
        """Serve a simulation with these levels; see `EvictionPolicy`."""
        if self._heaps:
            raise ConfigError("this policy object serves another manager: make one for each")
        self._capacities = list(capacities)
        self._heaps = [[] for _ in capacities]
        self._sizes = [0] * len(capacities)

    def admit(
        self,
        keys: Sequence[Key],
        level: int,
        *,
        chain: Sequence[Key] = (),
        pinned: Collection[Key] = (),
        retention: Retention | None = None,
    ) -> Collection[Key]:
        """Admit what is used again, and sooner than what would have to leave."""
        uses = self._uses_now(chain)
        own = [(uses.get(key, math.inf), key) for key in keys]
        while own and own[-1][0] == math.inf:
            own.pop()
        free = self._capacities[level] - self._sizes[level]
        surplus = len(own) - free
        if surplus > 0:
            # What may leave is sorted, farthest first; of the new blocks the last is farthest.
            others = self.victims(level, surplus, pinned)[::-1]
            for _ in range(surplus):
                if others and self._next[others[-1]][0] >= own[-1][0]:
                    others.pop()
                else:
                    own.pop()
        return [key for _, key in own]

    def insert(self, keys: Sequence[Key], level: int) -> None:
        """Add blocks to a level."""
        for depth, key in enumerate(keys):
            self._level_of[key] = level
            self._next.setdefault(key, (math.inf, depth))
            self._push(key)
        self._sizes[level] += len(keys)

    def remove(self, keys: Sequence[Key], level: int) -> None:
        """Remove blocks from a level."""
        for key in keys:
            del self._level_of[key]
        self._sizes[level] -= len(keys)

    def use(self, keys: Sequence[Key], *, retention: Retention | None = None) -> None:
        """Let one request pass."""
        uses = self._uses_now(keys)
        self._now += 1
        for depth, key in enumerate(keys):
            if key in self._level_of:
                self._next[key] = (uses.get(key, math.inf), depth)
                self._push(key)

    def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
        """Return the blocks that are used again last, the deepest first among equals."""
        heap = self._heaps[level]
        chosen: list[Key] = []
        seen: set[Key] = set()
        aside = []
        while heap and len(chosen) < count:
            entry = heapq.heappop(heap)
            when, depth, _, key = entry
            stale = self._level_of.get(key) != level or self._next[key] != (-when, -depth)
            if stale or key in seen:
                continue
            seen.add(key)
            aside.append(entry)
            if key not in pinned:
                chosen.append(key)
        for entry in aside:
            heapq.heappush(heap, entry)
        return chosen

    def unpinned(self, keys: Sequence[Key]) -> None:
        """Do nothing, for nothing was set aside."""

    def _uses_now(self, keys: Sequence[Key]) -> dict[Hashable, float]:
        """Return when each block of the request that is under way is used again."""
        if self._now >= len(self._next_uses):
            return {}
        return dict(zip(keys, self._next_uses[self._now], strict=False))

    def _push(self, key: Key) -> None:
        when, depth = self._next[key]
        self._count += 1
        heapq.heappush(self._heaps[self._level_of[key]], (-when, -depth, self._count, key))


def _next_uses(chains: Sequence[Sequence[Hashable]]) -> list[list[float]]:
    """Return, for each block of each request, the number of the next request that has it."""
    upcoming: dict[Hashable, float] = {}
    found: list[list[float]] = []
    for number in range(len(chains) - 1, -1, -1):
        chain = chains[number]
        found.append([upcoming.get(key, math.inf) for key in chain])
        upcoming.update(dict.fromkeys(chain, float(number)))
    found.reverse()
    return found
