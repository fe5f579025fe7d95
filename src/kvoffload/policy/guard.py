"""A watch over a learned rule: what plain LRU would have hit on the same requests."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

DECAY = 0.9995
"""What a request's hits are still worth after the next one."""
DEVIATIONS = 2.0
"""Deficit that is no chance, in standard deviations of the sum of the differences."""
TOLERANCE = 0.0005
"""Deficit that matters, as a share of the blocks asked for."""
FIRST_TERM, LONGEST_TERM = 512, 8192
"""Requests for which LRU is followed the first time, twice as many each further time, and most."""


LastUse: TypeAlias = tuple[int | None, int]
"""Blocks in a row that the same request used last, if any did, and how many they are."""


class Guard:
    """Counts what LRU of the same size would have hit, and says whom to follow.

    LRU holds the blocks whose last use is among the most recent: so for each request it takes no
    more than the number of blocks that nobody used since, and no list of blocks.

    Attributes:
        follows_lru: LRU was the better of the two, and has its turn.
    """

    def __init__(self, capacity: int) -> None:
        """Watch a cache of so many blocks."""
        self.follows_lru = False
        self._capacity = capacity
        self._last_used: OrderedDict[int, int] = OrderedDict()  # request: its blocks in LRU
        self._size = 0
        self._lead = 0.0  # hits of the rule that is watched, beyond LRU's
        self._spread = 0.0  # sum of their squares
        self._asked = 0.0
        self._term = FIRST_TERM
        self._left = 0

    def note_request(self, now: int, last_uses: Sequence[LastUse], hits: int) -> bool:
        """Note the blocks of a chain, and how many hit; return whether the rule changes."""
        lru_hits = self._prefix_hit(last_uses)
        asked = 0
        for last_use, blocks in last_uses:
            asked += blocks
            self._note_use(now, last_use, blocks)
        return self.judge(asked, hits, lru_hits)

    def judge(self, asked: int, hits: int, lru_hits: int) -> bool:
        """Compare the hits of a request; return whether to follow another rule from now on."""
        if self.follows_lru:
            self._left -= 1
            self.follows_lru = self._left > 0
            return not self.follows_lru
        difference = hits - lru_hits
        self._lead = DECAY * self._lead + difference
        self._spread = DECAY * self._spread + difference * difference
        self._asked = DECAY * self._asked + asked
        if self._lead >= 0:
            return False
        bound = max(TOLERANCE * self._asked, DEVIATIONS * math.sqrt(self._spread))
        if self._lead >= -bound:
            return False
        self.follows_lru = True
        self._left = self._term
        self._term = min(2 * self._term, LONGEST_TERM)
        self._lead = self._spread = self._asked = 0.0
        return True

    # Inside

    def _prefix_hit(self, last_uses: Sequence[LastUse]) -> int:
        """Return how many leading blocks of a chain LRU has."""
        hit = 0
        held: dict[int, int] = {}
        for last_use, blocks in last_uses:
            if last_use is None:
                return hit
            # Of what a request used last, LRU still has the first ones.
            left = held[last_use] if last_use in held else self._last_used.get(last_use, 0)
            if left < blocks:
                return hit + left
            hit += blocks
            held[last_use] = left - blocks
        return hit

    def _note_use(self, now: int, last_use: int | None, blocks: int) -> None:
        """Note that blocks were used, which LRU had or stores now."""
        if last_use is not None and (held := self._last_used.get(last_use)) is not None:
            if blocks >= held:
                del self._last_used[last_use]
                self._size -= held
            else:
                self._last_used[last_use] = held - blocks
                self._size -= blocks
        self._last_used[now] = self._last_used.get(now, 0) + blocks
        self._size += blocks
        while self._size > self._capacity:
            oldest, held = next(iter(self._last_used.items()))
            given = min(held, self._size - self._capacity)
            self._size -= given
            if given == held:
                del self._last_used[oldest]
            else:
                self._last_used[oldest] = held - given
