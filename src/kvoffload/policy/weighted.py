"""Recency weighted by what access frequency has been worth on the traffic at hand."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby, islice

from ..errors import ConfigError
from ..retention import Retention
from ..types import Key
from .classes import END_CLASSES, BlockClasses, class_of
from .guard import Guard, LastUse
from .lru import LRUPolicy
from .offers import Offers
from .returns import ReturnLaw, step_of
from .runs import GHOST, Run, RunTable

GHOSTS_PER_SLOT = 3
"""Evicted blocks that are remembered, as a multiple of all slots."""
LEAST_GHOSTS = 16384
"""At least so many are, for a small cache would learn nothing of what it just lost."""

LIKELY = 0.5
"""Share of blocks that return from which on one of them is likely to."""


class WeightedPolicy:
    """Evict the blocks whose waiting is worth least, by what was learned of such blocks.

    In some traffic a block used often is far likelier to return than a new one, in some only
    recency tells; the very end of a prompt may never return, or as surely as the rest. The policy
    learns which. Blocks are classed by what was known at their last use: how often they were used,
    whether they end the prompt, how much of the prompt was new. For each class and age, counted in
    requests, it learns what share returns, and evicts where the Gittins index is lowest; a new
    block that is worth less than all it would replace is not let in. The statistics outlive
    eviction in a bounded table of ghosts. Where LRU would have hit more lately, it is followed.

    Blocks of one chain with the same past are one record, so that a request costs little more than
    the number of such runs, and only the end of a chain is offered: a chain's tail leaves before
    its head whatever was learned.

    Args:
        frequency_weight: 0 is plain LRU, exactly; 1 is the learned weight.

    Raises:
        ConfigError: `frequency_weight` is negative or not finite.

    Source: `ReturnLaw`; tail first after CachedAttention (Gao et al., USENIX ATC 2024) and vLLM's
    block manager (2023).
    """

    name = "weighted"

    def __init__(self, frequency_weight: float = 1.0) -> None:
        if not (math.isfinite(frequency_weight) and frequency_weight >= 0):
            raise ConfigError(
                f"frequency_weight must be a finite number of at least 0, not {frequency_weight!r}"
            )
        self.frequency_weight = frequency_weight
        self._lru = None if frequency_weight else LRUPolicy()
        self._attached = False
        self._now = 0
        self._capacities: list[int] = []
        self._law = ReturnLaw(frequency_weight)
        self._classes = BlockClasses(self._law)
        self._selected: tuple[int, int, list[tuple[float, Run, int]]] | None = None
        # The chain used last, while none of it was stepped over since: mostly, it is unpinned next.
        self._offered: Sequence[Key] = ()

    def attach(self, capacities: Sequence[int]) -> None:
        """Serve a manager with these levels; see `EvictionPolicy`."""
        if self._attached:
            raise ConfigError("this policy object serves another manager: make one for each")
        self._attached = True
        if self._lru is not None:
            self._lru.attach(capacities)
            return
        slots = sum(capacities)
        self._capacities = list(capacities)
        self._table = RunTable(len(capacities), max(LEAST_GHOSTS, GHOSTS_PER_SLOT * slots))
        self._guard = Guard(slots)
        self._offers = [Offers(self._law, self._guard) for _ in capacities]

    def admit(
        self,
        keys: Sequence[Key],
        level: int,
        *,
        chain: Sequence[Key] = (),
        pinned: Collection[Key] = (),
        retention: Retention | None = None,
    ) -> Collection[Key]:
        """Admit all but the end of a chain that is worth less than all it would replace.

        Blocks that come without the chain they are part of are all admitted.
        """
        if self._lru is not None or not chain:
            return keys
        if self._guard.follows_lru or not self._law.lessons:
            return keys
        surplus = len(keys) - max(0, self._capacities[level] - self._table.resident[level])
        if surplus <= 0:
            return keys
        # What would be left if all came in first, and then the least worth had to go.
        own = self._worth_of_new(keys, chain, self._first_class(retention))
        others = [(worth, blocks) for worth, _, blocks in self._select(level, surplus, pinned)]
        others.reverse()
        declined = 0
        while surplus > 0 and own:
            lower = own if not others or own[-1][0] < others[-1][0] else others
            _, blocks = lower.pop()
            if lower is own:
                declined += min(blocks, surplus)
            surplus -= blocks
        if not declined:
            return keys
        return list(islice(keys, len(keys) - declined))

    def insert(self, keys: Sequence[Key], level: int) -> None:
        """Add blocks to a level; what was known of them before they left counts again."""
        if self._lru is not None:
            self._lru.insert(keys, level)
            return
        now = self._now
        self._selected = None
        for run in reversed(self._table.walk(keys, now)):
            if run.level == GHOST:
                self._table.enter(run, level, now)
                self._offer(run)

    def remove(self, keys: Sequence[Key], level: int) -> None:
        """Remove blocks from a level; they become ghosts."""
        if self._lru is not None:
            self._lru.remove(keys, level)
            return
        self._selected = None
        for run in self._table.cut_out(keys):
            parent = self._table.leave(run, self._now)
            if parent is not None:
                self._offer(parent)

    def use(self, keys: Sequence[Key], *, retention: Retention | None = None) -> None:
        """Note one use of a chain, and learn from it."""
        if self._lru is not None:
            self._lru.use(keys)
            return
        self._now = now = self._now + 1
        self._selected = None
        table, law = self._table, self._law
        end = len(keys)
        runs = table.walk(keys, now, (end - 2, end - 1))
        last_uses, hits, new_blocks = _last_uses(runs)
        if self._guard.note_request(now, last_uses, hits):
            self._forget_worth()
        first = self._first_class(retention)
        note_use, epoch = law.note_use, law.epoch
        after = end
        above: Run | None = None
        used: list[Run] = []
        for run in runs:
            blocks = len(run.keys)
            after -= blocks
            past = (run.cell, run.epoch, now - run.last_use - 1) if run.uses else None
            run.uses += 1
            run.cell = cell = class_of(first, run.uses, after, new_blocks)
            run.epoch = epoch
            run.last_use = now
            run.fresh = False
            note_use(cell, blocks, past)
            if run.queue is not None:
                run.queue.discard(run)
            if run.level == GHOST:
                table.remember(run)
            if run.parent is not above:
                left = table.link(above, run)
                if left is not None:
                    self._offer(left)
            if above is not None and above.cell == cell and _are_alike(above, run):
                table.merge(above, run)
                used[-1] = run
            else:
                used.append(run)
            above = run
        for run in used:
            if run.level != GHOST and run.is_leaf:
                self._offers[run.level].push(run)
        self._offered = keys
        if law.end_request():
            self._forget_worth()

    def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
        """Return the blocks of a level that are worth least, the end of a chain first."""
        if self._lru is not None:
            return self._lru.victims(level, count, pinned)
        chosen: list[Key] = []
        if count <= 0:
            return chosen
        for _, run, blocks in self._select(level, count, pinned):
            chosen += run.keys[: -blocks - 1 : -1]
        if len(chosen) < count:
            chosen += self._hidden(level, set(chosen), pinned)
        return chosen[:count]

    def unpinned(self, keys: Sequence[Key]) -> None:
        """Offer these again."""
        if self._lru is not None:
            self._lru.unpinned(keys)
            return
        if keys == self._offered:
            return
        self._selected = None
        for run in dict.fromkeys(self._table.runs_of(keys)):
            if run is not None and run.queue is None:
                self._offer(run)

    def likely(self, keys: Sequence[Key]) -> list[Key]:
        """Return those of the blocks of which more than half return, as far as it has learned."""
        if self._lru is not None or not self._law.lessons:
            return []
        found: list[Key] = []
        for run, alike in groupby(keys, self._table.run_of):
            if run is not None and run.uses:
                age = step_of(self._now - run.last_use)
                if self._law.share(run.cell, age) > LIKELY:
                    found += alike
        return found

    # Inside

    def _first_class(self, retention: Retention | None) -> int:
        """Return the first class for what a caller says, which may be new."""
        if retention is None:
            return 0
        known = self._law.num_classes
        first = self._classes.first_of(retention)
        if self._law.num_classes > known:
            for offers in self._offers:
                offers.grow()  # and look anew: what was learned has another base
        return first

    def _offer(self, run: Run) -> None:
        """Put a run that is at the end of its chain among the victims, if it isn't."""
        if run.queue is None and run.level != GHOST and run.is_leaf:
            offers = self._offers[run.level]
            if run.last_use == self._now:
                offers.push(run)
            else:
                offers.give_back(run)

    def _worth_of_new(
        self, keys: Sequence[Key], chain: Sequence[Key], first: int
    ) -> list[tuple[float, int]]:
        """Return the worth of blocks that are to come, once used, with how many; the last last."""
        uses_of = [0 if run is None else run.uses for run in self._table.runs_of(keys)]
        new_blocks = sum(1 for run in self._table.runs_of(chain) if run is None or not run.uses)
        found: list[tuple[float, int]] = []
        ends = {key: end for end, key in enumerate(chain[:-END_CLASSES:-1])}
        body = len(keys)
        while body and keys[body - 1] in ends:
            body -= 1
        for uses, alike in groupby(uses_of[:body]):
            use_class = class_of(first, uses + 1, END_CLASSES - 1, new_blocks)
            found.append((self._law.worth(use_class, 0), sum(1 for _ in alike)))
        for key, uses in zip(keys[body:], uses_of[body:], strict=True):
            found.append((self._law.worth(class_of(first, uses + 1, ends[key], new_blocks), 0), 1))
        return found

    def _select(
        self, level: int, count: int, pinned: Collection[Key]
    ) -> list[tuple[float, Run, int]]:
        """Return runs, least worth first, with how many blocks of their ends may leave.

        A run comes after all that follow it at this level, as if these had left already.
        """
        if self._selected is not None:
            # `victims` mostly follows an `admit` that looked at the same ones.
            for_level, for_count, selected = self._selected
            if for_level == level and for_count >= count and _are_loose(selected, pinned):
                return selected
        self._offered = ()
        offers = self._offers[level]
        offers.look(self._now)
        found: list[tuple[float, Run, int]] = []
        taken: list[Run] = []
        left: dict[Run, int] = {}
        freed: list[tuple[float, int, int, Run]] = []
        total = 0
        while total < count:
            is_freed = bool(freed) and freed[0][0] <= offers.lowest
            if is_freed:
                worth, _, _, run = heapq.heappop(freed)
            else:
                worth = offers.lowest
                offered = offers.first()
                if offered is None:
                    break
                run = offered
            blocks = _loose_end(run.keys, pinned) if pinned else len(run.keys)
            if not is_freed:
                if blocks and run.is_leaf:
                    if total + blocks >= count:
                        found.append((worth, run, blocks))
                        total += blocks
                        break
                    taken.append(run)
                    offers.discard(run)
                else:
                    offers.discard(run)  # until it is a leaf, and unpinned
                    continue
            if not blocks:
                continue
            found.append((worth, run, blocks))
            total += blocks
            parent = run.parent
            if blocks == len(run.keys) and parent is not None and parent.level == level:
                left[parent] = left.get(parent, 0) + 1
                assert parent.children is not None
                if sum(parent.children[: level + 1]) == left[parent]:
                    if parent.queue is not None:
                        offers.discard(parent)
                    place = (offers.worth_of(parent), parent.last_use, len(found), parent)
                    heapq.heappush(freed, place)
        for run in taken:
            offers.give_back(run)
        self._selected = (level, total, found)
        return found

    def _hidden(self, level: int, chosen: set[Key], pinned: Collection[Key]) -> Iterator[Key]:
        """Yield the rest: blocks before pinned ones, which leave when there is nothing else."""
        for run in self._table.runs_at(level):
            for key in reversed(run.keys):
                if key not in chosen and key not in pinned:
                    yield key

    def _forget_worth(self) -> None:
        for offers in self._offers:
            offers.forget()


def _last_uses(runs: Sequence[Run]) -> tuple[list[LastUse], int, int]:
    """Return of a chain: when it was used last, its prefix hit, and how much of it is new."""
    last_uses: list[LastUse] = []
    hits = new_blocks = 0
    hitting = True
    for run in runs:
        blocks = len(run.keys)
        if run.level == GHOST or run.fresh:
            hitting = False
        if hitting:
            hits += blocks
        last_use = run.last_use if run.uses else None
        if last_use is None:
            new_blocks += blocks
        if last_uses and last_uses[-1][0] == last_use:
            last_uses[-1] = (last_use, last_uses[-1][1] + blocks)
        else:
            last_uses.append((last_use, blocks))
    return last_uses, hits, new_blocks


def _are_alike(upper: Run, lower: Run) -> bool:
    """Tell whether two runs of one class, of the chain just used, need no telling apart."""
    return (
        upper.level == lower.level != GHOST
        and upper.children is not None
        and sum(upper.children) == 1
    )


def _are_loose(found: Sequence[tuple[float, Run, int]], pinned: Collection[Key]) -> bool:
    """Tell whether none of the chosen blocks is pinned."""
    return not pinned or all(
        key not in pinned for _, run, blocks in found for key in run.keys[-blocks:]
    )


def _loose_end(keys: Sequence[Key], pinned: Collection[Key]) -> int:
    """Return how many of the last keys are not pinned."""
    loose = 0
    for key in reversed(keys):
        if key in pinned:
            break
        loose += 1
    return loose
