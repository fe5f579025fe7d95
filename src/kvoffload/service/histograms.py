"""Histograms of durations: cheap to feed and easy to merge, in buckets that suit Prometheus."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

BOUNDS_S = (
    *(0.0001, 0.0002, 0.0005),
    *(0.001, 0.002, 0.005),
    *(0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0),
    *(10.0, 20.0, 60.0),
)
"""Upper bounds of the buckets, inclusive, in seconds: from what a load from memory takes to what a
client waits for at most. The same for all, so that any two can be added, here and in a query."""


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """A histogram at one moment; snapshots with the same bounds can be added and subtracted.

    Attributes:
        counts: Observations in each bucket (not in those below it too), and at the end those above
            the last bound.
        sum_s: Sum of all observations.
        bounds: Upper bounds of the buckets.
    """

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    sum_s: float = 0.0
    bounds: tuple[float, ...] = BOUNDS_S

    @property
    def count(self) -> int:
        """Return how many observations there are."""
        return sum(self.counts)

    def cumulative(self) -> list[int]:
        """Return how many observations are at most each bound, and at the end all of them."""
        return list(accumulate(self.counts))

    def quantile(self, q: float) -> float:
        """Estimate a quantile: evenly spread within its bucket, as `histogram_quantile` has it.

        So a figure here and one in a dashboard agree. What lies above the last bound counts as
        that bound; 0 if nothing was observed.

        Raises:
            ValueError: `q` is not within 0 and 1.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"a quantile is between 0 and 1, not {q!r}")
        rank = q * self.count
        below = 0
        lower = 0.0
        for upper, count in zip(self.bounds, self.counts, strict=False):
            if count and below + count >= rank:
                return lower + (upper - lower) * max(0.0, rank - below) / count
            below += count
            lower = upper
        return lower if below < self.count else 0.0

    def summary(self) -> dict[str, float]:
        """Return the figures that people look at, as plain values."""
        return {
            "count": self.count,
            "sum_s": self.sum_s,
            "p50_s": self.quantile(0.5),
            "p95_s": self.quantile(0.95),
            "p99_s": self.quantile(0.99),
        }

    def __add__(self, other: HistogramSnapshot) -> HistogramSnapshot:
        """Return both together."""
        self._check(other)
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return HistogramSnapshot(counts, self.sum_s + other.sum_s, self.bounds)

    def since(self, earlier: HistogramSnapshot) -> HistogramSnapshot:
        """Return what was observed after an earlier snapshot of the same histogram."""
        self._check(earlier)
        counts = tuple(a - b for a, b in zip(self.counts, earlier.counts, strict=True))
        if min(counts) < 0:
            raise ValueError("not an earlier snapshot of the same histogram")
        return HistogramSnapshot(counts, max(0.0, self.sum_s - earlier.sum_s), self.bounds)

    def _check(self, other: HistogramSnapshot) -> None:
        if self.bounds != other.bounds:
            raise ValueError("histograms with different bounds can't be put together")


class Histogram:
    """Counts durations in fixed buckets.

    Args:
        bounds: Upper bounds of the buckets, ascending; `BOUNDS_S` unless there is a reason.

    Raises:
        ValueError: The bounds do not ascend, or there are none.
    """

    __slots__ = ("_bounds", "_counts", "_sum_s")

    def __init__(self, bounds: Sequence[float] = BOUNDS_S) -> None:
        self._bounds = tuple(bounds)
        if not self._bounds or any(
            not low < high for low, high in zip(self._bounds, self._bounds[1:], strict=False)
        ):
            raise ValueError(f"bounds must ascend, not {self._bounds!r}")
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration; one that is no number is left out, for it would spoil the sum."""
        if not math.isfinite(seconds):
            return
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum_s += seconds

    def snapshot(self) -> HistogramSnapshot:
        """Return what was counted so far."""
        return HistogramSnapshot(tuple(self._counts), self._sum_s, self._bounds)

    def quantile(self, q: float) -> float:
        """Estimate a quantile; see `HistogramSnapshot.quantile`."""
        return self.snapshot().quantile(q)

    def __repr__(self) -> str:
        snapshot = self.snapshot()
        return f"<Histogram of {snapshot.count}, {snapshot.sum_s:g} s>"
