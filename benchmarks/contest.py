"""The same work done in several ways, timed in turns, so that a noisy moment hits them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvoffload.benching.timing import Timings, in_turns

Contender = Callable[[], float]
"""Does the work once and returns the seconds that it took."""


@dataclass(frozen=True, slots=True)
class Contest:
    """How long each contender took for one piece of work.

    Attributes:
        total_bytes: Bytes that each contender moves once a round.
        reference: What ours are compared with; the fastest of them counts.
        ours: The tier, by event loop.
        others: Shown beside, and compared with nothing.
    """

    total_bytes: int
    reference: Mapping[str, Timings]
    ours: Mapping[str, Timings]
    others: Mapping[str, Timings] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, Timings]:
        """Return all contenders."""
        return {**self.reference, **self.others, **self.ours}

    def ratios(self, name: str) -> tuple[float, float]:
        """Return the rate of one of ours over the reference: best by best, and median by median."""
        timings = self.ours[name]
        best = min(other.best for other in self.reference.values()) / timings.best
        median = min(other.median for other in self.reference.values()) / timings.median
        return best, median

    def lines(self) -> list[str]:
        """Return a table for people."""
        fastest = min(self.reference, key=lambda name: self.reference[name].best)
        lines = []
        for name, timings in self.rows.items():
            rates = [self.total_bytes / seconds / 1e9 for seconds in (timings.best, timings.median)]
            line = f"  {name:38} {rates[0]:6.2f} GB/s best  {rates[1]:6.2f} median"
            line += f"  {timings.best * 1e3:8.2f} ms"
            if name == fastest:
                line += "  <- fastest"
            if name in self.ours:
                line += "  ratio {:.2f} best  {:.2f} median".format(*self.ratios(name))
            lines.append(line)
        return lines

    def as_json(self) -> dict[str, object]:
        """Return plain values: seconds, bytes and ratios."""
        return {
            "total_bytes": self.total_bytes,
            "best_s": {name: timings.best for name, timings in self.rows.items()},
            "median_s": {name: timings.median for name, timings in self.rows.items()},
            "ratio_best": {name: self.ratios(name)[0] for name in self.ours},
            "ratio_median": {name: self.ratios(name)[1] for name in self.ours},
        }


def alternate(contenders: Mapping[str, Contender], rounds: int) -> dict[str, Timings]:
    """Time each contender once a round, after one round that doesn't count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number, name in in_turns(list(contenders), range(-1, rounds)):
        took = contenders[name]()
        if number >= 0:
            seconds[name].append(took)
    return {name: Timings(tuple(values)) for name, values in seconds.items()}
