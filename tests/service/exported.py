"""Stand-ins for what the collector reads, and what all its names are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from kvoffload import ManagerStats, Medium, NamespaceShare, TierState, TierStats
from kvoffload.service.exposition import Exposition
from kvoffload.service.families import FAMILIES
from kvoffload.service.observing import Latencies, LoopLag, ServiceStats
from kvoffload.service.prometheus import KVOffloadCollector

NAMES = {family.exported: family for family, _ in FAMILIES}


def stats(start: int = 0, *, num_bytes: int = 0, **changed: int) -> ManagerStats:
    """Counters that all differ, from `start` up."""
    numbers = {
        each.name: start + number
        for number, each in enumerate(dataclasses.fields(ManagerStats))
        if each.name != "tiers"
    }
    hot = TierStats(
        Medium.CPU,
        10,
        blocks=5,
        bytes=num_bytes,
        blocks_read=11,
        blocks_written=12,
        bytes_read=13,
        bytes_written=14,
        hits=15,
        errors=16,
        queue_depth=17,
        queue_bytes=18,
        wait_s=0.5,
        read_latency_s=0.25,
        read_bytes_per_s=1e9,
        free_blocks=2,
        pending_blocks=2,
        retired_blocks=1,
    )
    cold = dataclasses.replace(hot, medium=Medium.DISK, bytes=0, state=TierState.READ_ONLY)
    return ManagerStats(**{**numbers, **changed}, tiers={"hot": hot, "cold": cold})


@dataclass
class View:
    """A manager or one of its namespaces."""

    stats: ManagerStats

    def get_stats(self) -> ManagerStats:
        return self.stats


@dataclass
class StandIn:
    """A manager whose counters are what a test says."""

    stats: ManagerStats = field(default_factory=stats)
    by_namespace: dict[str, ManagerStats] = field(default_factory=dict)
    shares: dict[str, NamespaceShare] = field(default_factory=dict)

    def get_stats(self) -> ManagerStats:
        return self.stats

    def namespaces(self) -> list[str]:
        return list(self.by_namespace)

    def namespace(self, name: str) -> View:
        return View(self.by_namespace[name])


def full_collector() -> KVOffloadCollector:
    """A collector of which every family has series."""
    latencies, lag = Latencies(), LoopLag()
    for operation in ("load", "request", "store"):
        with latencies(operation, "team", 3):
            pass
    manager = StandIn(
        by_namespace={"": stats(100), "team": stats(200), "more": stats(300)},
        shares={"team": NamespaceShare(max_bytes=9, reserved_bytes=5)},
    )
    return KVOffloadCollector(
        manager,
        latencies=latencies,
        loop_lag=lag,
        service=lambda: ServiceStats(sessions=3, requests=4, events_missed=5),
        max_namespaces=2,
    )


def parse(text: bytes, exposition: Exposition = Exposition.TEXT) -> dict[str, Metric]:
    """Read what a scrape shows, by the name of the family."""
    parser = (
        text_string_to_metric_families
        if exposition is Exposition.TEXT
        else openmetrics_parser.text_string_to_metric_families
    )
    families = list(parser(text.decode()))
    by_name = {family.name: family for family in families}
    assert len(by_name) == len(families)
    return by_name


def values(families: dict[str, Metric], name: str) -> dict[tuple[str, ...], float]:
    """Return the values of a metric by those of its labels; no two series are the same."""
    samples = [
        (tuple(sample.labels.values()), sample.value)
        for family in families.values()
        for sample in family.samples
        if sample.name == name
    ]
    assert len(dict(samples)) == len(samples)
    return dict(samples)
