"""When blocks return: learned from those that did, class by class and age by age."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

EPOCH_REQUESTS = 8
"""Requests whose blocks grow old together."""
EPOCHS_BETWEEN_LESSONS = 8
DECAY = 0.99
"""What a count is still worth after a lesson."""
PRIOR_BLOCKS = 100.0
"""Blocks' worth of belief that a class is like its group, and a group like all."""
FIRST_GUESS = 0.02
"""Share that returns at once, as long as nothing is known."""
MOST = 0.999
LEAST_BLOCKS = 0.5
"""Blocks, as they still count, from which a class is told from its group."""


STEPS = 3
"""Ages in each bin for which the worth is told apart: else all of a bin would look alike."""


def _age_edges() -> list[int]:
    edges = [0, 1, 2, 4]
    edge = EPOCH_REQUESTS
    while edge < 16384:
        edges.append(edge)
        edge = max(edge + EPOCH_REQUESTS, round(edge * 1.5 / EPOCH_REQUESTS) * EPOCH_REQUESTS)
    return edges


AGE_EDGES = _age_edges()
"""Where the bins of age begin, in requests since the last use."""
NUM_BINS = len(AGE_EDGES)
FIRST_SLOW_BIN = bisect_right(AGE_EDGES, EPOCH_REQUESTS - 1)
_EPOCHS_BACK = [
    (age_bin, -(AGE_EDGES[age_bin] // EPOCH_REQUESTS))
    for age_bin in range(FIRST_SLOW_BIN, NUM_BINS)
]
"""Each slow bin, and where among the cohorts that one is that has come to it."""
_BIN_REQUESTS = np.diff([*AGE_EDGES, 2 * AGE_EDGES[-1]]).astype(float)


def _worth_ages() -> list[int]:
    ages: list[int] = []
    for start, end in zip(AGE_EDGES, [*AGE_EDGES[1:], AGE_EDGES[-1] + 1], strict=True):
        ages += sorted({start + (end - start) * step // STEPS for step in range(STEPS)})
    return ages


WORTH_AGES = _worth_ages()
"""From which ages on, in requests, the worth is another."""


def _steps_in_bins() -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return for each step the bin that it lies in, and how far on the way to the next."""
    bins = np.searchsorted(AGE_EDGES, WORTH_AGES, side="right") - 1
    return bins, (np.array(WORTH_AGES) - np.array(AGE_EDGES)[bins]) / _BIN_REQUESTS[bins]


_STEPS_IN_BINS = _steps_in_bins()


def step_of(age: int) -> int:
    """Return the number of the last of `WORTH_AGES` that an age has reached."""
    return bisect_right(WORTH_AGES, age) - 1


Past: TypeAlias = tuple[int, int, int]
"""Of blocks that are used again: their class until then, its epoch, their age in requests."""


class ReturnLaw:
    """What share of each class of blocks returns at each age, and what waiting for it is worth.

    A discrete hazard for each class and bin of age: blocks that were used again at that age over
    those that reached it unused, evicted ones included. Classes with little evidence are drawn to
    their group, groups to all blocks. The worth of a block is the Gittins index of what is known:
    the best ratio, over all times to stop waiting, of the expected uses until then to the expected
    requests until then; the block with the lowest is the one that the cache can best do without.

    Args:
        frequency_weight: 1 tells classes apart as far as they differ; towards 0, only age counts.

    Source: index of Gittins and Jones (1974), for caching as in Aggarwal et al. (2022) and others;
    the classes, own measurements on traces of serving (2026).
    """

    def __init__(self, frequency_weight: float = 1.0) -> None:
        self.epoch = 0
        self.lessons = 0
        self._weight = frequency_weight
        self._groups = np.zeros(0, np.int64)  # of each class
        self._likelihoods: list[float | None] = []  # of each group, as it was told
        # Blocks used again in each bin, and blocks that reached it unused. Of the first bins,
        # shorter than an epoch, only the births are counted: who reached them follows.
        self._reused = np.zeros((0, NUM_BINS))
        self._reached = np.zeros((0, NUM_BINS))
        # What came since the last lesson, by the place in there: few of them do.
        self._newly_reused: dict[int, float] = {}
        self._newly_reached: dict[int, float] = {}
        self._cohorts: deque[dict[int, float]] = deque([{}])  # of this epoch and those before
        self._uses: list[tuple[int, int, Past | None]] = []  # that were noted in this epoch
        self._requests = 0
        self._worth: list[list[float]] = []
        self._is_judged = True  # what follows from the counts is only found once it is asked for
        # Of each bin, the share that is used again from there on, by rows; and each class's row.
        self._returning = np.zeros((0, NUM_BINS))
        self._row_of = np.zeros(0, np.int64)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self._groups)

    def add_groups(
        self, num_groups: int, group_classes: int, likelihood: float | None = None
    ) -> int:
        """Add groups of classes that are drawn to each other; return the number of the first class.

        With a likelihood, it is believed that such a share of them returns until more is known.
        """
        first = len(self._groups)
        groups = np.arange(num_groups) + len(self._likelihoods)
        self._groups = np.append(self._groups, np.repeat(groups, group_classes))
        self._likelihoods += [likelihood] * num_groups
        num_classes = num_groups * group_classes
        nothing = np.zeros((num_classes, NUM_BINS))
        self._reused = np.concatenate([self._reused, nothing])
        self._reached = np.concatenate([self._reached, nothing])
        self._worth += [[1.0] * len(WORTH_AGES)] * num_classes
        self._is_judged = not self.lessons
        return first

    def worth(self, use_class: int, step: int) -> float:
        """Return the expected uses for each request of waiting, from this step of age on.

        With a `frequency_weight` other than 1, its logarithm, weighted.
        """
        if not self._is_judged:
            self._judge()
        return self._worth[use_class][step]

    def share(self, use_class: int, step: int) -> float:
        """Return the share that is used again at all, from this step of age on; 0 to 1."""
        if not self.lessons:
            return 0.0
        if not self._is_judged:
            self._judge()
        lower, share = int(_STEPS_IN_BINS[0][step]), float(_STEPS_IN_BINS[1][step])
        row = self._returning[self._row_of[use_class]]
        return float(row[lower] * (1 - share) + row[min(lower + 1, NUM_BINS - 1)] * share)

    def note_use(self, use_class: int, blocks: int, past: Past | None = None) -> None:
        """Note that so many blocks were used, and belong to this class from now on.

        With their `past`, unless it was their first use.
        """
        self._uses.append((use_class, blocks, past))

    def end_request(self) -> bool:
        """Count a request; return whether something was learned from it."""
        self._requests += 1
        if self._requests % EPOCH_REQUESTS:
            return False
        self._end_epoch()
        if self.epoch % EPOCHS_BETWEEN_LESSONS:
            return False
        self._learn()
        return True

    def _count(self) -> None:
        """Count what was noted in this epoch.

        Not at each request: many times in a row, the same steps take half as long.
        """
        cohorts, reached, reused = self._cohorts, self._newly_reached, self._newly_reused
        born = cohorts[-1]
        for use_class, blocks, _ in self._uses:
            born[use_class] = born.get(use_class, 0.0) + blocks
        for use_class, total in born.items():
            place = use_class * NUM_BINS
            reached[place] = reached.get(place, 0.0) + total
        for _, blocks, past in self._uses:
            if past is not None:
                use_class, epoch, age = past
                place = use_class * NUM_BINS + bisect_right(AGE_EDGES, age) - 1
                reused[place] = reused.get(place, 0.0) + blocks
                back = epoch - self.epoch - 1
                if -len(cohorts) <= back:
                    cohort = cohorts[back]
                    left = cohort.pop(use_class, 0.0) - blocks
                    if left > 0:
                        cohort[use_class] = left
        self._uses.clear()

    def _end_epoch(self) -> None:
        """Let all cohorts grow an epoch older."""
        self._count()
        self.epoch += 1
        cohorts = self._cohorts
        for age_bin, back in _EPOCHS_BACK:
            if back < -len(cohorts):
                break
            for use_class, blocks in cohorts[back].items():
                place = use_class * NUM_BINS + age_bin
                self._newly_reached[place] = self._newly_reached.get(place, 0.0) + blocks
        cohorts.append({})
        if len(cohorts) > AGE_EDGES[-1] // EPOCH_REQUESTS + 1:
            cohorts.popleft()

    def _learn(self) -> None:
        for counts, new in (
            (self._reused, self._newly_reused),
            (self._reached, self._newly_reached),
        ):
            counts *= DECAY
            if new:
                counts.reshape(-1)[list(new)] += list(new.values())
                new.clear()
        self.lessons += 1
        self._is_judged = False

    def _judge(self) -> None:
        """Find what waiting is worth, from the counts."""
        self._is_judged = True
        reused, reached = self._reused, self._reached.copy()
        for age_bin in range(1, FIRST_SLOW_BIN):
            reached[:, age_bin] = reached[:, age_bin - 1] - reused[:, age_bin - 1]
        np.maximum(reached, reused, out=reached)
        hazards_everywhere: list[float] = []
        guess = FIRST_GUESS
        for used, there in zip(
            reused.sum(axis=0).tolist(), reached.sum(axis=0).tolist(), strict=True
        ):
            # Of an age that none has reached: like the one before. By hand, for to call NumPy on
            # each number takes as long as all the rest.
            guess = min((used + PRIOR_BLOCKS * guess) / (there + PRIOR_BLOCKS), MOST)
            hazards_everywhere.append(guess)
        everywhere = np.array(hazards_everywhere)
        groups = np.arange(len(self._likelihoods))
        members = (groups[:, None] == self._groups).astype(float)
        prior = np.array([_as_told(everywhere, likelihood) for likelihood in self._likelihoods])
        by_group = _hazard(members @ reused, members @ reached, prior)
        # A class of which nothing is known is as its group is.
        known = np.flatnonzero(reached[:, 0] > LEAST_BLOCKS)
        hazard = _hazard(reused[known], reached[known], by_group[self._groups[known]])
        hazards = np.concatenate([by_group, hazard])
        unused = np.cumprod(1 - hazards[:, ::-1], axis=1)[:, ::-1]
        worth = _gittins(hazards)
        if self._weight != 1.0:
            # Only the order counts, so that logarithms will do, which neither vanish nor overflow.
            by_age = np.log(_gittins(everywhere[None]))
            worth = by_age + self._weight * (np.log(worth) - by_age)
        row_of = self._groups.copy()
        row_of[known] = np.arange(len(by_group), len(hazards))
        self._worth = _by_class(worth, row_of)
        self._returning, self._row_of = 1 - unused, row_of


def _by_class(by_bin: NDArray[np.float64], row_of: NDArray[np.int64]) -> list[list[float]]:
    """Return the row of each class, by steps: straight lines between the edges of the bins."""
    lower, share = _STEPS_IN_BINS
    upper = np.minimum(lower + 1, NUM_BINS - 1)
    rows = (by_bin[:, lower] * (1 - share) + by_bin[:, upper] * share).tolist()
    return [rows[row] for row in row_of]


def _hazard(
    reused: NDArray[np.float64], reached: NDArray[np.float64], prior: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the share that returns in each bin of those that reach it."""
    share = (reused + PRIOR_BLOCKS * prior) / (reached + PRIOR_BLOCKS)
    return np.minimum(share, MOST)


def _as_told(hazard: NDArray[np.float64], likelihood: float | None) -> NDArray[np.float64]:
    """Return a hazard of the same shape by which this share returns in all."""
    if likelihood is None:
        return hazard
    left = 1 - min(max(likelihood, 1 - MOST), MOST)
    return np.asarray(1 - (1 - hazard) ** (np.log(left) / np.log1p(-hazard).sum()))


def _gittins(hazard: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the index of each row at the start of each bin."""
    unused = np.cumprod(1 - hazard, axis=1)
    before = np.concatenate([np.ones((len(hazard), 1)), unused[:, :-1]], axis=1)
    uses = before * hazard
    waiting = before * _BIN_REQUESTS * (1 - hazard / 2)
    # Both sums start at the bin; what came before is a common factor and cancels out.
    uses_from = np.cumsum(uses[:, None, :] * _FROM_START, axis=2)
    waiting_from = np.cumsum(waiting[:, None, :] * _FROM_START, axis=2)
    ratios = np.divide(uses_from, waiting_from, where=_FROM_START > 0, out=np.zeros_like(uses_from))
    return np.asarray(ratios.max(axis=2))


_FROM_START = np.triu(np.ones((NUM_BINS, NUM_BINS)))
"""Row by row, the bins that are not before one."""
