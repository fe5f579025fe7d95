"""What a scrape shows, as it was at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..metrics import ManagerStats
from ..shares import NamespaceShare
from .exposition import Labels
from .histograms import HistogramSnapshot
from .observing import ServiceStats, TimingSnapshot


@dataclass(frozen=True, slots=True)
class NamespaceRow:
    """What is exported of a namespace.

    Attributes:
        labels: Its name and scope.
        counters: Values in the order of `families.COUNTED`.
        present: Values in the order of `families.PRESENT`.
        tiers: For each tier, in order, blocks that have their home there, and their bytes.
    """

    labels: Labels
    counters: Sequence[int]
    present: Sequence[int]
    tiers: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class TimingRow:
    """What is exported of the operations of one kind that ended in one way."""

    labels: Labels
    timing: TimingSnapshot


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a scrape shows.

    Attributes:
        version: That of kvoffload.
        stats: The whole manager.
        namespaces: Those with series of their own, and the sum of the others.
        shares: What namespaces may have, with the labels of each.
        known_namespaces: How many there are.
        operations: Durations by operation and outcome.
        namespace_operations: The same of some namespaces.
        in_progress: Operations that have begun and not ended.
        loop_lag: How late the loop was, if it is watched.
        recent_lag_s: At most, lately.
        service: What the service counts, if there is one.
    """

    version: str
    stats: ManagerStats
    namespaces: Sequence[NamespaceRow] = ()
    shares: Sequence[tuple[Labels, NamespaceShare]] = ()
    known_namespaces: int | None = None
    operations: Sequence[TimingRow] = ()
    namespace_operations: Sequence[TimingRow] = ()
    in_progress: Mapping[str, int] = field(default_factory=dict)
    loop_lag: HistogramSnapshot | None = None
    recent_lag_s: float | None = None
    service: ServiceStats | None = None
