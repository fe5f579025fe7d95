"""What one level offers to evict, and what of it is worth least."""

from __future__ import annotations

import math
from heapq import heappop, heappush

from .guard import Guard
from .returns import WORTH_AGES, ReturnLaw, step_of
from .runs import Run, RunQueue

STRETCH = 27
"""Classes of which the least worth is kept, so that a change doesn't take a look at all."""


class Offers:
    """The runs that one level offers, a queue for each class, and what their first are worth.

    Attributes:
        lowest: The least worth of all.
    """

    def __init__(self, law: ReturnLaw, guard: Guard) -> None:
        """Start empty, with a queue for each class of the law."""
        self.lowest = math.inf
        self._law = law
        self._guard = guard
        self._now = 0
        self._changed: set[int] = set()
        self._queues: list[RunQueue] = []
        self._worth: list[float] = []
        self._least: list[float] = []  # of each stretch of that
        self._aging: list[tuple[int, int]] = []  # when age changes it: a heap
        self._due: list[float] = []  # the first time at which each is in there
        self.grow()

    def grow(self) -> None:
        """Make queues for classes that came since."""
        new = range(len(self._queues), self._law.num_classes)
        self._queues += [RunQueue(number, self._changed) for number in new]
        self._worth += [math.inf] * len(new)
        self._due += [math.inf] * len(new)
        self._least = [math.inf] * -(-len(self._worth) // STRETCH)
        self.forget()

    def push(self, run: Run) -> None:
        """Offer a run that was used just now."""
        self._queues[run.cell].push(run)

    def give_back(self, run: Run) -> None:
        """Offer a run in the place that its last use gives it."""
        self._queues[run.cell].give_back(run)

    def discard(self, run: Run) -> None:
        """Offer a run no more."""
        self._queues[run.cell].discard(run)
        self.look(self._now)

    def first(self) -> Run | None:
        """Return the run that is worth least."""
        if self.lowest == math.inf:
            return None
        start = self._least.index(self.lowest) * STRETCH
        return self._queues[self._worth.index(self.lowest, start)].first()

    def worth_of(self, run: Run) -> float:
        """Return what waiting for a run is worth, or how recent it is where LRU is followed."""
        if self._guard.follows_lru or not self._law.lessons:
            return run.last_use
        return self._law.worth(run.cell, step_of(self._now - run.last_use))

    def look(self, now: int) -> None:
        """Bring `lowest` up to date."""
        self._now = now
        aging, changed = self._aging, self._changed
        while aging and aging[0][0] <= now:
            _, number = heappop(aging)
            self._due[number] = math.inf
            changed.add(number)
        if changed:
            for number in changed:
                self._look_at(number)
            for stretch in {number // STRETCH for number in changed}:
                start = stretch * STRETCH
                self._least[stretch] = min(self._worth[start : start + STRETCH])
            changed.clear()
            self.lowest = min(self._least)

    def forget(self) -> None:
        """Note that what was learned has changed."""
        self._changed.update(range(len(self._queues)))

    def _look_at(self, number: int) -> None:
        run = self._queues[number].first()
        if run is None:
            self._worth[number] = math.inf
            return
        self._worth[number] = self.worth_of(run)
        step = step_of(self._now - run.last_use) + 1
        if step < len(WORTH_AGES):
            due = run.last_use + WORTH_AGES[step]
            if due < self._due[number]:
                self._due[number] = due
                heappush(self._aging, (due, number))
