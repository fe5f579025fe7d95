"""Recency weighted by what access frequency has been worth on the traffic at hand."""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from ..errors import ConfigError
from ..types import Key
from .recency import RecencyQueue

RELEARN_USES = 64
"""Uses (requests) between two re-estimations."""
DECAY = 0.99
"""What a count is still worth after a re-estimation."""
PRIOR_BLOCKS = 100.0
"""Blocks' worth of belief that a class behaves like the average."""
GAP_SAMPLES = 255
"""Reuse gaps whose median is the time scale."""
GHOST_SHARE = 1.5
"""Evicted blocks remembered in each of two generations, as a multiple of all slots."""

NEW, NEW_BELOW_HIT = 0, 1
CLASSES = 8


def _class_of(uses: int) -> int:
    """Return the class of a block used this often: 2; 3; 4-5; 6-9; 10-19; 20 and more."""
    if uses <= 3:
        return uses
    if uses <= 5:
        return 4
    if uses <= 9:
        return 5
    return 6 if uses <= 19 else 7


class _Past(NamedTuple):
    """What is known of a block; blocks used alike in one request share one record."""

    uses: int
    last_use: int
    use_class: int


_UNUSED = _Past(0, 0, NEW)


class WeightedPolicy:
    """Evict the block with the lowest learned hazard of reuse.

    In some traffic a block used often is far likelier to return than a new one, in some only
    recency tells. The policy learns which: for each class of use count it estimates the share of
    blocks that were used again, and it measures the typical gap between two uses. The score of a
    block is its last use, counted in requests, plus `frequency_weight * tau * (logit p[class] -
    logit p[new])`; with exponential times of reuse, equal score means equal hazard. Each class has
    a recency queue, so the victim is the lowest of eight heads: O(1), without a heap. Shares never
    fall with the count, so a chain's tail leaves before its head. Counts outlive eviction in a
    bounded table of ghosts, at most three times the slots.

    Args:
        frequency_weight: 0 is plain LRU, exactly; 1 is the learned weight.

    Raises:
        ConfigError: `frequency_weight` is negative or not finite.

    Source: learned hazard, own measurements on chat and agent traces (2026); tail first after
    CachedAttention (Gao et al., USENIX ATC 2024) and vLLM's block manager (2023).
    """

    name = "weighted"

    def __init__(self, frequency_weight: float = 1.0) -> None:
        if not (math.isfinite(frequency_weight) and frequency_weight >= 0):
            raise ConfigError(
                f"frequency_weight must be a finite number of at least 0, not {frequency_weight!r}"
            )
        self.frequency_weight = frequency_weight
        self._classes = CLASSES if frequency_weight else 1
        self._levels: list[list[RecencyQueue]] = []
        # Of resident blocks that were used. One that was not is in the queue of new ones, stamped
        # with when it came: most blocks are, for a moment or for good, and cost no record.
        self._pasts: dict[Key, _Past] = {}
        self._ghosts: dict[Key, _Past] = {}
        self._old_ghosts: dict[Key, _Past] = {}
        self._max_ghosts = 0
        self._now = 0
        self._born = [0.0] * CLASSES
        self._reused = [0.0] * CLASSES
        self._bonus = [0.0] * CLASSES
        self._gaps: deque[int] = deque()
        self._sorted_gaps: list[int] = []

    def attach(self, capacities: Sequence[int]) -> None:
        """Serve a manager with these levels; see `EvictionPolicy`."""
        if self._levels:
            raise ConfigError("this policy object serves another manager: make one for each")
        self._levels = [[RecencyQueue() for _ in range(self._classes)] for _ in capacities]
        self._max_ghosts = max(1, int(GHOST_SHARE * sum(capacities)))

    def admit(self, keys: Sequence[Key], level: int) -> Collection[Key]:
        """Admit everything."""
        return keys

    def insert(self, keys: Sequence[Key], level: int) -> None:
        """Add blocks to a level; what was known of them before they left counts again."""
        queues = self._levels[level]
        if not self.frequency_weight:
            queues[0].push(keys)
            return
        if not self._remembers_any(keys):
            queues[NEW].push(keys, self._now)
            return
        for key in reversed(keys):
            past = self._ghosts.pop(key, None) or self._old_ghosts.pop(key, None)
            if past is None:
                queues[NEW].push((key,), self._now)
            else:
                self._pasts[key] = past
                queues[past.use_class].push((key,))

    def remove(self, keys: Sequence[Key], level: int) -> None:
        """Remove blocks from a level; the pasts of those that were used become ghosts."""
        queues = self._levels[level]
        if not self.frequency_weight:
            queues[0].discard(keys)
            return
        pasts = {key: self._pasts.pop(key) for key in keys if key in self._pasts}
        if len(pasts) < len(keys):
            queues[NEW].discard(keys)
        for use_class in {past.use_class for past in pasts.values()}:
            queues[use_class].discard(keys)
        self._ghosts.update(pasts)
        if len(self._ghosts) > self._max_ghosts:
            self._old_ghosts = self._ghosts
            self._ghosts = {}

    def use(self, keys: Sequence[Key]) -> None:
        """Note one use of a chain, and learn from it."""
        if not self.frequency_weight:
            for queues in self._levels:
                queues[0].use(keys)
            return
        self._now += 1
        pasts = [self._pasts.get(key, _UNUSED) for key in keys]
        self._note_gap(pasts)
        below_hit = bool(pasts) and pasts[0].uses > 0
        moves: dict[int, list[tuple[Key, int]]] = {}
        shared: dict[int, _Past] = {}
        for key, past in zip(keys, pasts, strict=True):
            if past is _UNUSED and not self._is_unused(key):
                continue  # not resident
            uses = past.uses + 1
            now = shared.get(uses)
            if now is None:
                use_class = _class_of(uses) if uses > 1 else (NEW_BELOW_HIT if below_hit else NEW)
                now = shared[uses] = _Past(uses, self._now, use_class)
            if past.uses:
                self._reused[past.use_class] += 1
            self._born[now.use_class] += 1
            self._pasts[key] = now
            moves.setdefault(now.use_class, []).append((key, past.use_class))
        for queues in self._levels:
            for new, moved in moves.items():
                here = [(key, old) for key, old in moved if key in queues[old]]
                for key, old in here:
                    if old != new:
                        queues[old].discard((key,))
                # Together, whatever class they came from: the chain's order is theirs now.
                queues[new].renew([key for key, _ in here])
        if self._now % RELEARN_USES == 0:
            self._relearn()

    def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
        """Return the blocks of a level with the lowest scores, tail first among equals."""
        queues = self._levels[level]
        if not self.frequency_weight:
            return queues[0].coldest(count, pinned)
        offers = [
            (use_class, offer)
            for use_class, queue in enumerate(queues)
            if len(queue) and (offer := queue.coldest(count, pinned))
        ]
        if len(offers) == 1:
            return offers[0][1]
        # Of equal scores the lower class goes first: along a chain the count never rises.
        heads = [(self._score(level, offer[0]), use_class, 0, offer) for use_class, offer in offers]
        chosen: list[Key] = []
        while heads and len(chosen) < count:
            heads.sort(key=_by_score)
            _, use_class, start, offer = heads.pop(0)
            limit = _by_score(heads[0]) if heads else (math.inf, 0)
            end = start
            while end < len(offer) and (self._score(level, offer[end]), use_class) < limit:
                end += 1
            chosen += offer[start:end]
            if end < len(offer):
                heads.append((self._score(level, offer[end]), use_class, end, offer))
        return chosen[:count]

    def unpinned(self, keys: Sequence[Key]) -> None:
        """Offer these again."""
        for queues in self._levels:
            for queue in queues:
                queue.unpinned(keys)

    def _remembers_any(self, keys: Sequence[Key]) -> bool:
        """Whether some of these blocks were here before and left."""
        ghosts, old = self._ghosts, self._old_ghosts
        return bool(ghosts or old) and not (
            ghosts.keys().isdisjoint(keys) and old.keys().isdisjoint(keys)
        )

    def _is_unused(self, key: Key) -> bool:
        return any(key in queues[NEW] for queues in self._levels)

    def _score(self, level: int, key: Key) -> float:
        past = self._pasts.get(key)
        if past is None:
            return self._levels[level][NEW].stamp_of(key) + self._bonus[NEW]
        return past.last_use + self._bonus[past.use_class]

    def _note_gap(self, pasts: list[_Past]) -> None:
        """Sample how many requests ago the deepest known block of this one was used."""
        for past in reversed(pasts):
            if past.uses:
                gap = self._now - past.last_use
                self._gaps.append(gap)
                insort(self._sorted_gaps, gap)
                if len(self._gaps) > GAP_SAMPLES:
                    self._sorted_gaps.remove(self._gaps.popleft())
                return

    def _relearn(self) -> None:
        pool_born = sum(self._born)
        pool = (sum(self._reused) + 1.0) / (pool_born + 2.0)
        shares: list[float] = []
        for born, reused in zip(self._born, self._reused, strict=True):
            share = (reused + PRIOR_BLOCKS * pool) / (born + PRIOR_BLOCKS)
            share = min(max(share, 1e-4), 1 - 1e-4)
            shares.append(max(share, shares[-1]) if shares else share)
        median = self._sorted_gaps[len(self._sorted_gaps) // 2] if self._sorted_gaps else 0
        tau = median / math.log(2)
        logits = [math.log(share / (1 - share)) for share in shares]
        self._bonus = [self.frequency_weight * tau * (logit - logits[NEW]) for logit in logits]
        self._born = [DECAY * born for born in self._born]
        self._reused = [DECAY * reused for reused in self._reused]


def _by_score(head: tuple[float, int, int, list[Key]]) -> tuple[float, int]:
    return head[:2]
