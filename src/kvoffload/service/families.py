"""Every metric there is: its name, what it means, and where in a snapshot its values are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeAlias

from ..metrics import TierStats
from ..types import TierState
from .exposition import NO_LABELS, Family, Labels, Sample
from .histograms import BOUNDS_S, HistogramSnapshot
from .snapshots import Snapshot, TimingRow

COUNTED = {
    "hits": ("hits", "Leading ready blocks of each lookup and request."),
    "misses": ("misses", "The other blocks of each lookup and request."),
    "stored": ("stored_blocks", "Blocks that became ready."),
    "rejected": ("rejected_blocks", "Blocks that a store did not take."),
    "evictions": ("evicted_blocks", "Blocks that left every tier to make room."),
    "spared": ("spared_blocks", "Evicted blocks that cold_admission kept off the disk."),
    "promotions": ("promoted_blocks", "Moves of a block to a higher tier."),
    "demotions": ("demoted_blocks", "Moves of a block to a lower tier."),
    "expired": (
        "expired_reservations",
        "Reservations and pins taken back from holders that never completed them.",
    ),
    "io_errors": ("io_errors", "Blocks that a tier could not read, write or erase."),
    "corrupt": ("corrupt_blocks", "Blocks that were dropped since their bytes did not check."),
    "prefetch_issued": ("prefetch_issued_blocks", "Blocks fetched because of a hint."),
    "prefetch_useful": ("prefetch_useful_blocks", "Fetched blocks that were then used."),
    "prefetch_wasted": ("prefetch_wasted_blocks", "Fetched blocks that left before any use."),
    "prefetch_late": ("prefetch_late_blocks", "Hinted blocks wanted before they were fetched."),
    "prefetch_dropped": (
        "prefetch_dropped_blocks",
        "Hinted blocks that were not fetched: queue full, cancelled, or failed.",
    ),
}
"""Counters of `ManagerStats`, in what is said of the manager and of each namespace."""

PRESENT = {
    "pending": ("pending_blocks", "Blocks that are being stored now."),
    "pinned": ("pinned_blocks", "Blocks that are pinned now."),
}
"""What else `ManagerStats` has of both."""

NAMESPACE = ("namespace", "scope")
"""`scope` is `own` (the manager's), `named`, or `other`: the sum of those without series of their
own. So a namespace that somebody names "other" is not mistaken for it."""

TIER = ("tier",)


Reader: TypeAlias = Callable[[Snapshot], Iterable[Sample]]

_LE = [Labels(le=repr(bound)) for bound in BOUNDS_S] + [Labels(le="+Inf")]


def _of_manager(name: str, suffix: str, snapshot: Snapshot) -> Iterator[Sample]:
    yield suffix, NO_LABELS, getattr(snapshot.stats, name)


def _of_tiers(read: Callable[[TierStats], float], suffix: str, snap: Snapshot) -> Iterator[Sample]:
    for name, tier in snap.stats.tiers.items():
        yield suffix, Labels(tier=name), read(tier)


def _counter_of_namespaces(column: int, snapshot: Snapshot) -> Iterator[Sample]:
    for row in snapshot.namespaces:
        yield "_total", row.labels, row.counters[column]


def _present_of_namespaces(column: int, snapshot: Snapshot) -> Iterator[Sample]:
    for row in snapshot.namespaces:
        yield "", row.labels, row.present[column]


def _tiers_of_namespaces(column: int, snapshot: Snapshot) -> Iterator[Sample]:
    tiers = [Labels(tier=name) for name in snapshot.stats.tiers]
    for row in snapshot.namespaces:
        for tier, usage in zip(tiers, row.tiers, strict=True):
            yield "", row.labels | tier, usage[column]


def _quotas(snapshot: Snapshot) -> Iterator[Sample]:
    for labels, share in snapshot.shares:
        if share.max_bytes is not None:
            yield "", labels, share.max_bytes


def _reserves(snapshot: Snapshot) -> Iterator[Sample]:
    for labels, share in snapshot.shares:
        if share.reserved_bytes:
            yield "", labels, share.reserved_bytes


def _info(snapshot: Snapshot) -> Iterator[Sample]:
    yield "", Labels(version=snapshot.version), 1


def _tier_info(snapshot: Snapshot) -> Iterator[Sample]:
    for name, tier in snapshot.stats.tiers.items():
        yield "", Labels(tier=name, medium=tier.medium.value), 1


def _tier_slots(snapshot: Snapshot) -> Iterator[Sample]:
    for name, tier in snapshot.stats.tiers.items():
        yield "", Labels(tier=name, use="free"), tier.free_blocks
        yield "", Labels(tier=name, use="pending"), tier.pending_blocks
        yield "", Labels(tier=name, use="ready"), tier.blocks
        yield "", Labels(tier=name, use="retired"), tier.retired_blocks


def _tier_states(snapshot: Snapshot) -> Iterator[Sample]:
    for name, tier in snapshot.stats.tiers.items():
        for state in TierState:
            yield "", Labels(tier=name, state=state.value), int(tier.state is state)


def _histogram(labels: Labels, histogram: HistogramSnapshot) -> Iterator[Sample]:
    total = 0
    for le, total in zip(_LE, histogram.cumulative(), strict=True):
        yield "_bucket", labels | le, total
    yield "_count", labels, total
    yield "_sum", labels, histogram.sum_s


def _durations(rows: Iterable[TimingRow]) -> Iterator[Sample]:
    for row in rows:
        yield from _histogram(row.labels, row.timing.durations)


def _operation_durations(snapshot: Snapshot) -> Iterator[Sample]:
    return _durations(snapshot.operations)


def _operation_blocks(snapshot: Snapshot) -> Iterator[Sample]:
    for row in snapshot.operations:
        yield "_total", row.labels, row.timing.blocks


def _namespace_durations(snapshot: Snapshot) -> Iterator[Sample]:
    return _durations(snapshot.namespace_operations)


def _in_progress(snapshot: Snapshot) -> Iterator[Sample]:
    for operation, number in snapshot.in_progress.items():
        yield "", Labels(operation=operation), number


def _known(snapshot: Snapshot) -> Iterator[Sample]:
    if snapshot.known_namespaces is not None:
        yield "", NO_LABELS, snapshot.known_namespaces


def _lag(snapshot: Snapshot) -> Iterator[Sample]:
    if snapshot.loop_lag is not None:
        yield from _histogram(NO_LABELS, snapshot.loop_lag)


def _recent_lag(snapshot: Snapshot) -> Iterator[Sample]:
    if snapshot.recent_lag_s is not None:
        yield "", NO_LABELS, snapshot.recent_lag_s


def _of_service(name: str, suffix: str, snapshot: Snapshot) -> Iterator[Sample]:
    if snapshot.service is not None:
        yield suffix, NO_LABELS, getattr(snapshot.service, name)


def _families() -> Iterator[tuple[Family, Reader]]:
    gauge, counter, histogram = "gauge", "counter", "histogram"
    yield (
        Family("kvoffload_build_info", gauge, "Version of kvoffload; always 1.", "", ("version",)),
        _info,
    )
    for name, (stem, text) in COUNTED.items():
        yield Family(f"kvoffload_{stem}", counter, text), partial(_of_manager, name, "_total")
    for name, (stem, text) in PRESENT.items():
        yield Family(f"kvoffload_{stem}", gauge, text), partial(_of_manager, name, "")

    def tier(
        name: str, kind: str, text: str, read: Callable[[TierStats], float], unit: str = ""
    ) -> tuple[Family, Reader]:
        suffix = "_total" if kind == counter else ""
        return (
            Family(f"kvoffload_tier_{name}", kind, text, unit, TIER),
            partial(_of_tiers, read, suffix),
        )

    yield (
        Family("kvoffload_tier_info", gauge, "Kind of the tier; always 1.", "", ("tier", "medium")),
        _tier_info,
    )
    yield tier("capacity_blocks", gauge, "Slots of the tier.", lambda t: t.capacity_blocks)
    yield (
        Family(
            "kvoffload_tier_slots",
            gauge,
            "Slots of the tier by what is in them; together they are its capacity.",
            "",
            ("tier", "use"),
        ),
        _tier_slots,
    )
    yield tier("used_bytes", gauge, "Payload bytes of ready blocks.", lambda t: t.bytes, "bytes")
    yield tier("hits", counter, "Blocks that a load found in the tier.", lambda t: t.hits)
    yield tier("read_blocks", counter, "Blocks read or viewed.", lambda t: t.blocks_read)
    yield tier("written_blocks", counter, "Blocks written.", lambda t: t.blocks_written)
    yield tier(
        "read_bytes", counter, "Payload bytes read or viewed.", lambda t: t.bytes_read, "bytes"
    )
    yield tier(
        "written_bytes", counter, "Payload bytes written.", lambda t: t.bytes_written, "bytes"
    )
    yield tier(
        "errors", counter, "Blocks that could not be read, written or erased.", lambda t: t.errors
    )
    yield tier(
        "queue_blocks", gauge, "Blocks that are being read or written now.", lambda t: t.queue_depth
    )
    yield tier("queue_bytes", gauge, "Their payload bytes.", lambda t: t.queue_bytes, "bytes")
    yield tier(
        "wait_seconds",
        gauge,
        "Time that the oldest call for them has taken so far.",
        lambda t: t.wait_s,
        "seconds",
    )
    yield tier(
        "read_latency_seconds",
        gauge,
        "Time of a read whatever its size, by the recent ones.",
        lambda t: t.read_latency_s,
        "seconds",
    )
    yield tier(
        "read_bytes_per_second",
        gauge,
        "Bytes a second of a read beyond that.",
        lambda t: t.read_bytes_per_s,
    )
    yield tier(
        "backlog_bytes",
        gauge,
        "Payload bytes of blocks that wait to be sent to a remote tier.",
        lambda t: t.backlog_bytes,
        "bytes",
    )
    yield tier(
        "dropped_blocks",
        counter,
        "Blocks that were to be sent to a remote tier and were not.",
        lambda t: t.dropped_blocks,
    )
    yield (
        Family(
            "kvoffload_tier_state",
            gauge,
            "1 for the state that the tier is in: all of it works, no space for more, reads"
            " alone (the breaker is open), or it does not answer.",
            "",
            ("tier", "state"),
        ),
        _tier_states,
    )
    yield Family("kvoffload_namespaces", gauge, "Namespaces that are known."), _known
    for column, (stem, text) in enumerate(COUNTED.values()):
        yield (
            Family(f"kvoffload_namespace_{stem}", counter, text, "", NAMESPACE),
            partial(_counter_of_namespaces, column),
        )
    for column, (stem, text) in enumerate(PRESENT.values()):
        yield (
            Family(f"kvoffload_namespace_{stem}", gauge, text, "", NAMESPACE),
            partial(_present_of_namespaces, column),
        )
    yield (
        Family(
            "kvoffload_namespace_tier_blocks",
            gauge,
            "Blocks of the namespace that have their home in the tier.",
            "",
            NAMESPACE + TIER,
        ),
        partial(_tiers_of_namespaces, 0),
    )
    yield (
        Family(
            "kvoffload_namespace_tier_bytes",
            gauge,
            "Their payload bytes.",
            "bytes",
            NAMESPACE + TIER,
        ),
        partial(_tiers_of_namespaces, 1),
    )
    yield (
        Family(
            "kvoffload_namespace_max_bytes",
            gauge,
            "Bytes that the namespace may have; it has no series where there is no quota.",
            "bytes",
            NAMESPACE,
        ),
        _quotas,
    )
    yield (
        Family(
            "kvoffload_namespace_reserved_bytes",
            gauge,
            "Bytes up to which nothing of it is evicted for another, where there are any.",
            "bytes",
            NAMESPACE,
        ),
        _reserves,
    )
    operation = ("operation", "outcome")
    yield (
        Family(
            "kvoffload_operation_duration_seconds",
            histogram,
            "Time of an operation: load until the bytes are there, store, request to its end.",
            "seconds",
            operation,
        ),
        _operation_durations,
    )
    yield (
        Family(
            "kvoffload_operation_blocks",
            counter,
            "Blocks that these operations named.",
            "",
            operation,
        ),
        _operation_blocks,
    )
    yield (
        Family(
            "kvoffload_operations_in_progress",
            gauge,
            "Operations that have begun and not ended.",
            "",
            ("operation",),
        ),
        _in_progress,
    )
    yield (
        Family(
            "kvoffload_namespace_operation_duration_seconds",
            histogram,
            "Time of an operation, of the first few namespaces that did any.",
            "seconds",
            ("namespace", *operation),
        ),
        _namespace_durations,
    )
    yield (
        Family(
            "kvoffload_loop_lag_seconds",
            histogram,
            "Time by which the event loop was late.",
            "seconds",
        ),
        _lag,
    )
    yield (
        Family(
            "kvoffload_loop_lag_recent_max_seconds",
            gauge,
            "The most of that in the last minute.",
            "seconds",
        ),
        _recent_lag,
    )
    yield (
        Family("kvoffload_sessions", gauge, "Sessions of clients that are open."),
        partial(_of_service, "sessions", ""),
    )
    yield (
        Family("kvoffload_service_requests", counter, "Calls that the service answered."),
        partial(_of_service, "requests", "_total"),
    )
    yield (
        Family("kvoffload_events_missed", counter, "Events that slow readers of them missed."),
        partial(_of_service, "events_missed", "_total"),
    )


FAMILIES: tuple[tuple[Family, Reader], ...] = tuple(_families())
"""All of them, in the order of a scrape."""
