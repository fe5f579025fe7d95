"""Blocks of one chain that were used alike, as one record: what a policy works on."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence

from ..types import Key

GHOST = -1
"""Level of blocks that are nowhere, and only remembered."""
MAX_NEW_KEYS = 256
"""Most blocks of a run that nobody has used yet: such blocks need not be of one chain."""


class Run:
    """Neighbouring blocks of one chain with the same past.

    Attributes:
        keys: Head first.
        level: Where they are, or `GHOST`.
        uses: How often they were used; 0 for blocks that only came.
        last_use: Number of the request that used them last, or with which they came.
        cell: Their class among the statistics.
        epoch: Of the last use, for the statistics.
        fresh: They came since the last request that used them.
        left: Number of the request after which they left a level.
        parent: The run before it in the chain, as far as known.
        children: Runs that follow it, by level; `None` for none ever.
        queue: The queue that offers it, or `None` while it is parked or nowhere.
        ticket: Grows whenever it moves between queues, so that old places can be told.
    """

    __slots__ = (
        "cell",
        "children",
        "epoch",
        "fresh",
        "keys",
        "last_use",
        "left",
        "level",
        "parent",
        "queue",
        "ticket",
        "uses",
    )

    def __init__(self, keys: list[Key], now: int) -> None:
        self.keys = keys
        self.level = GHOST
        self.uses = 0
        self.last_use = now
        self.cell = 0
        self.epoch = -1
        self.fresh = True
        self.left = -1
        self.parent: Run | None = None
        self.children: list[int] | None = None
        self.queue: RunQueue | None = None
        self.ticket = 0

    @property
    def is_leaf(self) -> bool:
        """Whether no block that follows is at this level or above."""
        children, level = self.children, self.level
        # Mostly what follows is at the same level.
        return children is None or not (children[level] or (level and any(children[:level])))


class RunQueue:
    """Leaf runs of one kind, from least to most recently used.

    Puts its number into `changed` whenever its first may be another.
    """

    __slots__ = ("_changed", "_number", "_order", "_returned")

    def __init__(self, number: int, changed: set[int]) -> None:
        self._number = number
        self._changed = changed
        self._order: OrderedDict[Run, None] = OrderedDict()
        self._returned: list[tuple[int, int, Run]] = []  # last use, ticket; older than it looks

    def push(self, run: Run) -> None:
        """Append a run that was used just now."""
        run.queue = self
        run.ticket += 1
        if not self._order:
            self._changed.add(self._number)
        self._order[run] = None

    def give_back(self, run: Run) -> None:
        """Offer a run in the place that its last use gives it."""
        run.queue = self
        run.ticket += 1
        self._changed.add(self._number)
        oldest = next(iter(self._order), None)
        if oldest is None or run.last_use <= oldest.last_use:
            self._order[run] = None
            self._order.move_to_end(run, last=False)
            return
        heapq.heappush(self._returned, _Place((run.last_use, run.ticket, run)))

    def discard(self, run: Run) -> None:
        """Offer a run no more."""
        run.queue = None
        run.ticket += 1
        self._changed.add(self._number)
        self._order.pop(run, None)

    def first(self) -> Run | None:
        """Return the least recently used run, if there is one."""
        order, returned = self._order, self._returned
        while returned and returned[0][1] != returned[0][2].ticket:
            heapq.heappop(returned)
        oldest = next(iter(order), None)
        if returned and (oldest is None or returned[0][0] <= oldest.last_use):
            return returned[0][2]
        return oldest


class _Place(tuple[int, int, Run]):
    """An entry of the heap, ordered without ever comparing runs."""

    __slots__ = ()

    def __lt__(self, other: tuple[int, int, Run]) -> bool:  # type: ignore[override]  # of its own kind
        return self[:2] < other[:2]


class RunTable:
    """Which run each block is in, resident ones and a bounded number of ghosts.

    Attributes:
        resident: Blocks at each level.
        ghosts: Runs that left, the first to be forgotten first.
    """

    def __init__(self, num_levels: int, max_ghosts: int) -> None:
        """Start empty; `max_ghosts` is in blocks."""
        self.resident = [0] * num_levels
        self.ghosts: OrderedDict[Run, None] = OrderedDict()
        self._max_ghosts = max_ghosts
        self._num_ghosts = 0
        self._run_of: dict[Key, Run] = {}
        self._num_levels = num_levels

    def __len__(self) -> int:
        """Return how many blocks are known, ghosts included."""
        return len(self._run_of)

    def run_of(self, key: Key) -> Run | None:
        """Return the run of a block, if it is known."""
        return self._run_of.get(key)

    def runs_at(self, level: int) -> list[Run]:
        """Return the runs of a level, least recently used first; takes a look at all blocks."""
        runs = {run for run in self._run_of.values() if run.level == level}
        return sorted(runs, key=lambda run: run.last_use)

    def runs_of(self, keys: Sequence[Key]) -> list[Run | None]:
        """Return the run of each block that is known."""
        return list(map(self._run_of.get, keys))

    def walk(self, keys: Sequence[Key], now: int, cuts: Sequence[int] = ()) -> list[Run]:
        """Return the runs that a chain consists of, cut so that none holds other blocks.

        Args:
            keys: The chain, head first, each block once.
            now: The number of this request.
            cuts: Positions that a run must start at, rising.
        """
        run_of = self._run_of
        chain = keys if type(keys) is list else list(keys)  # slices are compared with lists
        end = len(chain)
        runs: list[Run] = []
        start = 0
        while start < end:
            run = run_of.get(chain[start])
            stop = end
            for cut in cuts:
                if cut > start:
                    stop = cut
                    break
            if run is None:
                past = min(stop, start + MAX_NEW_KEYS)
                if not run_of.keys().isdisjoint(chain[start:past]):
                    past = start + 1
                    while chain[past] not in run_of:
                        past += 1
                run = Run(chain[start:past], now)
                run_of.update(dict.fromkeys(run.keys, run))
            else:
                if run.keys[0] != chain[start]:
                    _, run = self.split(run, run.keys.index(chain[start]))
                length = len(run.keys)
                past = start + length
                if past > stop or run.keys != chain[start:past]:
                    run, _ = self.split(run, _common(run.keys, chain, start, min(past, stop)))
                    past = start + len(run.keys)
            runs.append(run)
            start = past
        return runs

    def split(self, run: Run, at: int) -> tuple[Run, Run]:
        """Cut a run in two; return the upper and the lower part, one of which it is."""
        # Runs that follow point to it, so then it has to be the lower part; else the longer one.
        stays_upper = run.children is None and 2 * at > len(run.keys)
        new = Run(run.keys[at:] if stays_upper else run.keys[:at], run.last_use)
        run.keys = run.keys[:at] if stays_upper else run.keys[at:]
        new.level, new.uses, new.cell = run.level, run.uses, run.cell
        new.epoch, new.fresh, new.left = run.epoch, run.fresh, run.left
        self._run_of.update(dict.fromkeys(new.keys, new))
        upper, lower = (run, new) if stays_upper else (new, run)
        if run.level == GHOST and run in self.ghosts:
            self.ghosts[new] = None
        if not run.uses:  # they need not be of one chain
            if run.queue is not None:
                run.queue.give_back(new)
            return upper, lower
        if upper is new:
            upper.parent = run.parent
        lower.parent = upper
        if run.level != GHOST:
            upper.children = [0] * self._num_levels
            upper.children[run.level] = 1
            if upper.queue is not None:
                queue = upper.queue
                queue.discard(upper)
                queue.give_back(lower)
        return upper, lower

    def merge(self, upper: Run, lower: Run) -> None:
        """Put a run's blocks before those of its only child."""
        self._run_of.update(dict.fromkeys(upper.keys, lower))
        lower.keys = upper.keys + lower.keys
        lower.parent = upper.parent
        if upper.queue is not None:
            upper.queue.discard(upper)
        upper.level, upper.parent, upper.keys = GHOST, None, []

    def link(self, parent: Run | None, run: Run) -> Run | None:
        """Note that a run follows another; return the one that it followed until now."""
        before = run.parent
        if before is parent:
            return None
        if run.level != GHOST:
            if before is not None and before.children is not None:
                before.children[run.level] -= 1
            if parent is not None:
                self._count_child(parent, run.level)
        run.parent = parent
        return before

    def enter(self, run: Run, level: int, now: int) -> None:
        """Note that a run came to a level."""
        if run in self.ghosts:
            del self.ghosts[run]
            self._num_ghosts -= len(run.keys)
        run.fresh = run.fresh or run.left != now
        run.level = level
        self.resident[level] += len(run.keys)
        if run.parent is not None:
            self._count_child(run.parent, level)

    def leave(self, run: Run, now: int) -> Run | None:
        """Note that a run left its level; return the run before it, if that has one child less."""
        if run.queue is not None:
            run.queue.discard(run)
        level, run.level, run.left = run.level, GHOST, now
        self.resident[level] -= len(run.keys)
        parent = run.parent
        if run.uses:
            self.remember(run)
        else:
            self._forget(run)  # there is nothing to be known of it
        if parent is None or parent.children is None:
            return None
        parent.children[level] -= 1
        return parent

    def remember(self, run: Run) -> None:
        """Keep a run that is nowhere among the ghosts, and forget the oldest ones."""
        if run not in self.ghosts:
            self._num_ghosts += len(run.keys)
        self.ghosts[run] = None
        self.ghosts.move_to_end(run)
        while self._num_ghosts > self._max_ghosts:
            oldest, _ = self.ghosts.popitem(last=False)
            self._num_ghosts -= len(oldest.keys)
            self._forget(oldest)

    def cut_out(self, keys: Sequence[Key]) -> list[Run]:
        """Return runs that hold just these known blocks; any order will do."""
        chain = list(keys)
        end = len(chain)
        runs: list[Run] = []
        start = 0
        while start < end:
            run = self._run_of[chain[start]]
            held = run.keys
            if held[-1] == chain[start]:  # from the tail, as they are evicted
                common = _common(held[::-1], chain, start, end)
                if common < len(held):
                    _, run = self.split(run, len(held) - common)
            else:
                if held[0] != chain[start]:
                    _, run = self.split(run, held.index(chain[start]))
                common = _common(run.keys, chain, start, end)
                if common < len(run.keys):
                    run, _ = self.split(run, common)
            past = start + common
            runs.append(run)
            start = past
        return runs

    def _forget(self, run: Run) -> None:
        deque(map(self._run_of.pop, run.keys), maxlen=0)
        run.keys, run.parent = [], None

    def _count_child(self, parent: Run, level: int) -> None:
        if parent.children is None:
            parent.children = [0] * self._num_levels
        parent.children[level] += 1


def _common(held: list[Key], chain: list[Key], start: int, stop: int) -> int:
    """Return how many blocks of a run follow each other in a chain from here."""
    most = min(len(held), stop - start)
    if held[:most] == chain[start : start + most]:
        return most
    common = 1
    while held[common] == chain[start + common]:
        common += 1
    return common
