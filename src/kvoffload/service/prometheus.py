"""A manager's counters for Prometheus: a collector, and a scrape that doesn't hold the loop.

In the service and in an application of your own::

    collector = KVOffloadCollector(kv, latencies=latencies, loop_lag=lag)
    exposition = Exposition.accepted(request.headers.get("accept"))
    body = await render(collector, exposition)          # content type: exposition.content_type

or with what else you export, where holding the loop for the scrape is acceptable::

    registry.register(KVOffloadCollector(kv))
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappush, heappushpop
from operator import add, attrgetter, itemgetter, sub
from typing import Protocol, runtime_checkable

from prometheus_client import Metric
from prometheus_client.registry import Collector

from ..metrics import ManagerStats
from ..shares import NamespaceShare
from . import VERSION
from .exposition import Exposition, Family, Labels, Sample, Turns, lines
from .families import COUNTED, FAMILIES, PRESENT
from .observing import Latencies, LoopLag, ServiceStats, TimingSnapshot
from .snapshots import NamespaceRow, Snapshot, TimingRow

MAX_NAMESPACES = 200
"""Namespaces that have series of their own unless told otherwise; some 20 series each."""

_counters = attrgetter(*COUNTED)
_present = attrgetter(*PRESENT)


class HasStats(Protocol):
    """Any manager."""

    def get_stats(self) -> ManagerStats:
        """Return a snapshot of the counters."""


@runtime_checkable
class HasNamespaces(Protocol):
    """A manager that knows what happened in each namespace: `AsyncLRUManager`."""

    def namespaces(self) -> list[str]:
        """Return the names, its own first."""

    def namespace(self, name: str) -> HasStats:
        """Return the manager as seen from inside one."""


class KVOffloadCollector(Collector):
    """Reads a manager when it is scraped; see docs/metrics.md for what comes of it.

    The namespaces with the most bytes have series of their own; the manager's own has always. The
    others are in one sum, whose counters never run backwards: it counts what happens in a namespace
    while it has no series, and keeps that when it gets some.

    A registry's `collect()` runs where it is called: call it in the thread of the manager's loop.

    Args:
        manager: Any manager; one without `namespaces()` is exported without them.
        latencies: Durations, if they are observed: `kv.observe(latencies)`.
        loop_lag: The lag of the loop, if it is watched.
        service: What the service counts beside, if there is one.
        max_namespaces: How many namespaces have series of their own; 0 for none.

    Raises:
        ValueError: `max_namespaces` is negative.
    """

    def __init__(
        self,
        manager: HasStats,
        *,
        latencies: Latencies | None = None,
        loop_lag: LoopLag | None = None,
        service: Callable[[], ServiceStats] | None = None,
        max_namespaces: int = MAX_NAMESPACES,
    ) -> None:
        if max_namespaces < 0:
            raise ValueError(f"max_namespaces must be at least 0, not {max_namespaces!r}")
        self._manager = manager
        self._latencies = latencies
        self._loop_lag = loop_lag
        self._service = service
        self._max_namespaces = max_namespaces
        self._rest = _Rest()

    def describe(self) -> Iterator[Metric]:
        """Return the families without series, so that a registry needn't collect to know names."""
        for family, _ in FAMILIES:
            yield Metric(family.name, family.help, family.kind, family.unit)

    def collect(self) -> Iterator[Metric]:
        """Return all series, for a registry."""
        snapshot = _exhaust(self.gather())
        for family, read in FAMILIES:
            metric = Metric(family.name, family.help, family.kind, family.unit)
            for suffix, labels, value in read(snapshot):
                metric.add_sample(family.name + suffix, labels.pairs, value)
            if metric.samples:
                yield metric

    def gather(self) -> Generator[None, None, Snapshot]:
        """Take a snapshot in steps, between which others may run; a namespace's is in one step."""
        service = self._service() if self._service is not None else None
        stats = self._manager.get_stats()
        yield
        rows: Sequence[NamespaceRow] = ()
        known: int | None = None
        shares: list[tuple[Labels, NamespaceShare]] = []
        if isinstance(self._manager, HasNamespaces):
            names = self._manager.namespaces()
            known = len(names)
            # All of them, for whoever made the settings named them.
            given: Mapping[str, NamespaceShare] = getattr(self._manager, "shares", {})
            for name, share in given.items():
                scope = "own" if name == names[0] else "named"
                shares.append((Labels(namespace=name, scope=scope), share))
            yield
            if self._max_namespaces:
                rows = yield from self._gather_namespaces(self._manager, names, len(stats.tiers))
        operations: list[TimingRow] = []
        own: list[TimingRow] = []
        if self._latencies is not None:
            operations += _timing_rows(Labels(), self._latencies.snapshots())
            yield
            for name, timings in self._latencies.namespace_snapshots().items():
                own += _timing_rows(Labels(namespace=name), timings)
                yield
        lag = self._loop_lag
        return Snapshot(
            VERSION,
            stats,
            namespaces=rows,
            shares=shares,
            known_namespaces=known,
            operations=operations,
            namespace_operations=own,
            in_progress=self._latencies.in_progress if self._latencies is not None else {},
            loop_lag=lag.snapshot() if lag is not None else None,
            recent_lag_s=lag.recent_max_s if lag is not None else None,
            service=service,
        )

    def _gather_namespaces(
        self, manager: HasNamespaces, names: Sequence[str], num_tiers: int
    ) -> Generator[None, None, list[NamespaceRow]]:
        rest = self._rest
        largest: list[tuple[bool, int, bool, int, str, _Usage]] = []
        counters: dict[str, tuple[int, ...]] = {}
        total = _Usage((0,) * len(PRESENT), (0,) * (2 * num_tiers))
        for number, name in enumerate(names):
            stats = manager.namespace(name).get_stats()
            usage = _Usage.of(stats)
            counters[name] = _counters(stats)
            total += usage
            # Of equal ones those that have series already; then those that are named first.
            rank = (number == 0, sum(usage.tiers[1::2]), name in rest.members, -number)
            if len(largest) < self._max_namespaces:
                heappush(largest, (*rank, name, usage))
            else:
                heappushpop(largest, (*rank, name, usage))
            yield
        # Another scrape may have its own members by the next turn; this one goes on with these.
        rest.members = shown = frozenset(name for *_, name, _ in largest)
        for name in names:
            rest.count(name, counters[name], apart=name in shown)
            yield
        rest.forget(counters)
        rows = []
        for is_own, _, _, _, name, usage in sorted(largest, key=itemgetter(3), reverse=True):
            labels = Labels(namespace=name, scope="own" if is_own else "named")
            rows.append(usage.row(labels, counters[name]))
            total -= usage
            yield
        if len(shown) < len(names) or any(rest.counters):
            rows.append(total.row(Labels(namespace="other", scope="other"), rest.counters))
        return rows


async def render(
    collector: KVOffloadCollector,
    exposition: Exposition = Exposition.TEXT,
    *,
    turns: Turns | None = None,
) -> bytes:
    """Return what a scrape shows, with turns of the event loop in between.

    Each namespace is shown as it was at one moment, and so is the manager.

    Args:
        collector: What to show.
        exposition: The format, as `Exposition.accepted` has it.
        turns: How long to work between two turns of the loop.
    """
    turns = Turns() if turns is None else turns
    snapshot = await turns.follow(collector.gather())
    return await turns.join(lines(_read(snapshot), exposition))


@dataclass(frozen=True, slots=True)
class _Usage:
    """What a namespace, or several, have now: `PRESENT`, and blocks and bytes of each tier."""

    present: tuple[int, ...]
    tiers: tuple[int, ...]

    @classmethod
    def of(cls, stats: ManagerStats) -> _Usage:
        tiers = stats.tiers.values()
        return cls(_present(stats), tuple(n for tier in tiers for n in (tier.blocks, tier.bytes)))

    def __add__(self, more: _Usage) -> _Usage:
        return _Usage(
            tuple(map(add, self.present, more.present)), tuple(map(add, self.tiers, more.tiers))
        )

    def __sub__(self, part: _Usage) -> _Usage:
        return _Usage(
            tuple(map(sub, self.present, part.present)), tuple(map(sub, self.tiers, part.tiers))
        )

    def row(self, labels: Labels, counters: Sequence[int]) -> NamespaceRow:
        tiers = list(zip(self.tiers[::2], self.tiers[1::2], strict=True))
        return NamespaceRow(labels, counters, self.present, tiers)


class _Rest:
    """Counts what happens in namespaces while they have no series of their own."""

    def __init__(self) -> None:
        self.members: frozenset[str] = frozenset()
        self.counters = [0] * len(COUNTED)
        self._seen: dict[str, tuple[int, ...]] = {}

    def count(self, name: str, counters: Sequence[int], *, apart: bool) -> None:
        """Add what a namespace counted since it was seen last, unless it is shown apart.

        Two scrapes at once may come here in the other order than they took their snapshots; then
        the older one adds nothing.
        """
        seen = self._seen.get(name) or (0,) * len(counters)
        if not apart:
            grown = (max(0, now - before) for now, before in zip(counters, seen, strict=True))
            self.counters = list(map(add, self.counters, grown))
        self._seen[name] = tuple(map(max, counters, seen))

    def forget(self, known: Mapping[str, object]) -> None:
        """Drop what was seen of namespaces that are gone; if one comes back, it starts anew."""
        if len(self._seen) > len(known):
            self._seen = {name: seen for name, seen in self._seen.items() if name in known}


def _timing_rows(
    labels: Labels, timings: dict[tuple[str, str], TimingSnapshot]
) -> Iterator[TimingRow]:
    for (operation, outcome), timing in timings.items():
        yield TimingRow(labels | Labels(operation=operation, outcome=outcome), timing)


def _read(snapshot: Snapshot) -> Iterator[tuple[Family, Iterable[Sample]]]:
    for family, read in FAMILIES:
        yield family, read(snapshot)


def _exhaust(steps: Generator[None, None, Snapshot]) -> Snapshot:
    try:
        while True:
            next(steps)
    except StopIteration as done:
        snapshot: Snapshot = done.value
        return snapshot
