"""One limit, and what kvoffload reaches of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import OffloadError
from ..sizes import human_bytes
from .timing import Timings

RATE = "GB/s"
MICROSECONDS = "us"
MILLISECONDS = "ms"


class BenchError(OffloadError):
    """What was measured didn't do what it should, so that its time says nothing."""


@dataclass(frozen=True, slots=True)
class Work:
    """Blocks that are moved."""

    num_blocks: int
    block_bytes: int

    @property
    def num_bytes(self) -> int:
        """Return how many bytes they have together."""
        return self.num_blocks * self.block_bytes

    def __str__(self) -> str:
        return f"{self.num_blocks:,} blocks of {human_bytes(self.block_bytes)}"


@dataclass(frozen=True, slots=True)
class Row:
    """A limit and what is reached of it; both are the best of their rounds.

    Attributes:
        name: What is compared.
        unit: Of all figures: a rate, of which more is better, or a time.
        limit: What the machine does.
        reached: What kvoffload does.
        limit_median: The same in a round like most.
        reached_median: The same in a round like most.
        limit_is: What the limit is, and how it was measured.
        reached_is: What was measured of kvoffload.
        rounds: How often.
    """

    name: str
    unit: str
    limit: float
    reached: float
    limit_median: float
    reached_median: float
    limit_is: str
    reached_is: str
    rounds: int

    @property
    def ratio(self) -> float:
        """Return 1 where the limit is reached, and less where it isn't."""
        return self._ratio(self.limit, self.reached)

    @property
    def ratio_median(self) -> float:
        """Return the ratio of the medians."""
        return self._ratio(self.limit_median, self.reached_median)

    @property
    def ratio_is(self) -> str:
        """Return how the ratio is made."""
        return "reached / limit" if self.unit == RATE else "limit / reached"

    def _ratio(self, limit: float, reached: float) -> float:
        return reached / limit if self.unit == RATE else limit / reached


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """A row that there isn't, and why."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Setup:
    """What to measure with.

    Attributes:
        place: Directory for files; nothing else is in it.
        block_bytes: Bytes of a block.
        num_blocks: Blocks that are moved at a time.
        seconds: How long all rounds together take, about.
    """

    place: Path
    block_bytes: int
    num_blocks: int
    seconds: float


def row_of(
    name: str,
    timings: Mapping[str, Timings],
    *,
    ours: str,
    limits: Sequence[str],
    limit_is: str,
    reached_is: str,
    moved: Work | None = None,
) -> Row:
    """Make a row of rates, or of times where no blocks are given.

    Args:
        name: What is compared.
        timings: Seconds by contender.
        ours: Which contender is kvoffload.
        limits: Which contenders it is compared with; the fastest counts.
        limit_is: What the limit is.
        reached_is: What was measured of kvoffload.
        moved: What each contender moves.
    """

    def figure(seconds: float) -> float:
        return seconds * 1e6 if moved is None else moved.num_bytes / seconds / 1e9

    fastest = min(limits, key=lambda limit: timings[limit].best)
    if moved is not None:
        reached_is = f"{reached_is}; {moved}"
    if len(limits) > 1:
        limit_is = f"{limit_is}; the fastest of {len(limits)} ways: {fastest}"
    return Row(
        name,
        MICROSECONDS if moved is None else RATE,
        limit=figure(timings[fastest].best),
        reached=figure(timings[ours].best),
        limit_median=figure(min(timings[limit].median for limit in limits)),
        reached_median=figure(timings[ours].median),
        limit_is=limit_is,
        reached_is=reached_is,
        rounds=len(timings[ours].seconds),
    )


def chain_of(name: str, length: int) -> list[str]:
    """Return the hashes of a chain."""
    return [f"{name}-{number}" for number in range(length)]


def expect(what: str, found: int, wanted: int) -> None:
    """Check that all blocks were what they should have been.

    Raises:
        BenchError: Some were not.
    """
    if found != wanted:
        raise BenchError(f"only {found:,} of {wanted:,} blocks were {what}")
