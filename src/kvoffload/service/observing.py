"""What a manager does not count itself: how long operations take, and how late the loop is."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType

import anyio

from .histograms import Histogram, HistogramSnapshot

OPERATIONS = ("load", "request", "store")
"""What a manager tells its observers of."""

OUTCOMES = ("ok", "error", "cancelled")
"""How an operation ends: by itself, by an error, or since the caller gave up."""


@dataclass(slots=True)
class Timing:
    """Operations of one kind that ended in one way.

    Attributes:
        durations: How long they took.
        blocks: How many blocks they named.
    """

    durations: Histogram = field(default_factory=Histogram)
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class TimingSnapshot:
    """A `Timing` at one moment."""

    durations: HistogramSnapshot = field(default_factory=HistogramSnapshot)
    blocks: int = 0

    def __add__(self, other: TimingSnapshot) -> TimingSnapshot:
        """Return both together."""
        return TimingSnapshot(self.durations + other.durations, self.blocks + other.blocks)


class Latencies:
    """An observer that keeps a histogram for each operation and outcome: `kv.observe(latencies)`.

    The first few namespaces that do anything have histograms of their own beside; the others are
    in the sums alone, however many there are. (A namespace that has one keeps it: were it given to
    another, a counter would run backwards.)

    Args:
        max_namespaces: How many namespaces have histograms of their own; 0 for none.
        clock: Seconds, from wherever.
    """

    def __init__(
        self, *, max_namespaces: int = 16, clock: Callable[[], float] = perf_counter
    ) -> None:
        if max_namespaces < 0:
            raise ValueError(f"max_namespaces must be at least 0, not {max_namespaces!r}")
        self._clock = clock
        self._max_namespaces = max_namespaces
        self._timings: dict[tuple[str, str], Timing] = {}
        self._by_namespace: dict[str, dict[tuple[str, str], Timing]] = {}
        self._in_progress: dict[str, int] = dict.fromkeys(OPERATIONS, 0)

    def __call__(self, operation: str, namespace: str, blocks: int) -> AbstractContextManager[None]:
        """Return what times an operation; a manager calls this."""
        return _Timed(self, operation, namespace, blocks)

    @property
    def in_progress(self) -> Mapping[str, int]:
        """Return how many operations of each kind have begun and not ended."""
        return dict(self._in_progress)

    def snapshot(self, operation: str, outcome: str | None = None) -> HistogramSnapshot:
        """Return how long an operation took, in one outcome or in all together."""
        total = HistogramSnapshot()
        for (kind, ended), timing in self._timings.items():
            if kind == operation and outcome in (None, ended):
                total += timing.durations.snapshot()
        return total

    def snapshots(self) -> dict[tuple[str, str], TimingSnapshot]:
        """Return all that was timed, by operation and outcome."""
        return _frozen(self._timings)

    def namespace_snapshots(self) -> dict[str, dict[tuple[str, str], TimingSnapshot]]:
        """Return the same for each namespace that has histograms of its own."""
        return {name: _frozen(timings) for name, timings in self._by_namespace.items()}

    # Inside

    def _begin(self, operation: str) -> float:
        self._in_progress[operation] = self._in_progress.get(operation, 0) + 1
        return self._clock()

    def _end(self, operation: str, namespace: str, blocks: int, began: float, outcome: str) -> None:
        seconds = max(0.0, self._clock() - began)
        self._in_progress[operation] -= 1
        key = operation, outcome
        tables = [self._timings]
        if (own := self._by_namespace.get(namespace)) is not None:
            tables.append(own)
        elif len(self._by_namespace) < self._max_namespaces:
            tables.append(self._by_namespace.setdefault(namespace, {}))
        for table in tables:
            if (timing := table.get(key)) is None:
                timing = table[key] = Timing()
            timing.durations.observe(seconds)
            timing.blocks += blocks


class _Timed:
    """Times one operation; left in another task than it was entered in, it is as good."""

    __slots__ = ("_began", "_blocks", "_latencies", "_namespace", "_operation")

    def __init__(self, latencies: Latencies, operation: str, namespace: str, blocks: int) -> None:
        self._latencies = latencies
        self._operation = operation
        self._namespace = namespace
        self._blocks = blocks

    def __enter__(self) -> None:
        self._began = self._latencies._begin(self._operation)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            outcome = "ok"
        else:
            outcome = "error" if issubclass(exc_type, Exception) else "cancelled"
        self._latencies._end(self._operation, self._namespace, self._blocks, self._began, outcome)


def _frozen(timings: Mapping[tuple[str, str], Timing]) -> dict[tuple[str, str], TimingSnapshot]:
    return {
        key: TimingSnapshot(timing.durations.snapshot(), timing.blocks)
        for key, timing in sorted(timings.items())
    }


class LoopLag:
    """By how much an event loop is late: sleeps a while over and over, and notes the rest.

    Run `run()` in a task group of your own, for as long as the loop is to be watched.

    Args:
        interval_s: How long to sleep. What holds the loop for less is seen by chance only.
        recent: How many of the last sleeps `recent_max_s` is about; a minute's unless told
            otherwise.
        clock: Seconds, from wherever.
        sleep: Tests bring their own.
    """

    def __init__(
        self,
        *,
        interval_s: float = 0.05,
        recent: int | None = None,
        clock: Callable[[], float] = perf_counter,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
    ) -> None:
        if not interval_s > 0:
            raise ValueError(f"interval_s must be positive, not {interval_s!r}")
        self._interval_s = interval_s
        self._clock = clock
        self._sleep = sleep
        self._histogram = Histogram()
        most = max(1, round(60 / interval_s)) if recent is None else recent
        self._recent: deque[float] = deque(maxlen=most)

    async def run(self) -> None:
        """Watch the loop until cancelled."""
        while True:
            due = self._clock() + self._interval_s
            await self._sleep(self._interval_s)
            late = max(0.0, self._clock() - due)
            self._histogram.observe(late)
            self._recent.append(late)

    @property
    def recent_max_s(self) -> float:
        """Return the latest that the loop lately was; 0 for not watched yet."""
        return max(self._recent, default=0.0)

    def snapshot(self) -> HistogramSnapshot:
        """Return how late the loop was since it is watched."""
        return self._histogram.snapshot()


@dataclass(frozen=True, slots=True)
class ServiceStats:
    """What a service counts beside its manager.

    Attributes:
        sessions: Sessions of clients that are open.
        requests: Calls answered.
        events_missed: Events that slow readers of them missed.
    """

    sessions: int = 0
    requests: int = 0
    events_missed: int = 0
