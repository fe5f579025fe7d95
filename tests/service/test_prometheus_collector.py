from __future__ import annotations

import asyncio
import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from tests.service.exported import NAMES, StandIn, View, full_collector, parse, stats, values

from kvoffload import ManagerStats, TierState, TierStats
from kvoffload.service.exposition import Exposition, Turns
from kvoffload.service.families import COUNTED, FAMILIES, PRESENT
from kvoffload.service.histograms import BOUNDS_S
from kvoffload.service.prometheus import KVOffloadCollector, render
from kvoffload.testing import small_manager

BASE_UNITS = {"seconds", "bytes"}
NOT_BASE_UNITS = re.compile(
    r"_(ms|msec|milliseconds|us|microseconds|minutes|hours|days|s|sec|kb|mb|gb|kib|mib|gib"
    r"|kilobytes|megabytes|bits|percent|percentage)(_|$)"
)
TYPE_IN_NAME = re.compile(r"_(counter|gauge|histogram|summary|metric)(_|$)")


# Lint


def test_names_follow_the_conventions() -> None:
    """What `promtool check metrics` looks for."""
    assert len(NAMES) == len(FAMILIES)
    for name, family in NAMES.items():
        assert re.fullmatch(r"kvoffload(_[a-z0-9]+)+", name), name
        assert not NOT_BASE_UNITS.search(name), name
        assert not TYPE_IN_NAME.search(name), name
        assert name.endswith("_total") == (family.kind == "counter"), name
        assert not re.search(r"_(bucket|count|sum|created)$", name), name
        assert family.kind in {"counter", "gauge", "histogram"}
        if family.kind == "gauge" and name.endswith("_info"):
            assert "always 1" in family.help
        unit = family.name.rpartition("_")[2]
        assert family.unit == (unit if unit in BASE_UNITS else ""), name
        if "_per_" not in name:
            assert all(word not in family.name.split("_")[:-1] for word in BASE_UNITS), name
        else:
            assert name.endswith("_bytes_per_second")


def test_help_is_a_sentence() -> None:
    for family, _ in FAMILIES:
        assert re.fullmatch(r"[A-Z0-9][^\n]*\.", family.help), family


def test_labels_follow_the_conventions() -> None:
    for family, _ in FAMILIES:
        assert len(set(family.labels)) == len(family.labels)
        assert not {"le", "quantile", "job", "instance"} & set(family.labels)
        assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", label) for label in family.labels)


@pytest.mark.parametrize("exposition", Exposition)
async def test_what_is_shown_is_what_is_declared(exposition: Exposition) -> None:
    """Every family has series here, with its type, help and labels, and none is shown beside."""
    families = parse(await render(full_collector(), exposition), exposition)
    assert list(families) == [family.name for family, _ in FAMILIES]
    for family, _ in FAMILIES:
        shown = families[family.name]
        assert (shown.type, shown.documentation) == (family.kind, family.help)
        if exposition is Exposition.OPENMETRICS:
            assert shown.unit == family.unit
        for sample in shown.samples:
            labels = set(sample.labels) - ({"le"} if family.kind == "histogram" else set())
            assert labels == set(family.labels), sample
            assert sample.value >= 0


def test_everything_that_is_counted_is_exported() -> None:
    """Whoever adds a counter to the stats adds it here, to the docs and to the dashboard."""
    of_managers = {each.name for each in dataclasses.fields(ManagerStats)}
    assert of_managers == {*COUNTED, *PRESENT, "tiers"}
    shown = parse(generate_latest(registered(full_collector())))
    of_hot = {
        value
        for name in shown
        if name.startswith("kvoffload_tier_")
        for labels, value in values(shown, NAMES_BY_FAMILY[name]).items()
        if "hot" in labels
    }
    hot = stats().tiers["hot"]
    exempt = {"medium", "state"}
    for each in dataclasses.fields(TierStats):
        if each.name not in exempt:
            assert getattr(hot, each.name) in of_hot, each.name


NAMES_BY_FAMILY = {family.name: name for name, family in NAMES.items()}


# Rendering


def registered(collector: KVOffloadCollector) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(collector)
    return registry


async def test_a_registry_shows_the_same() -> None:
    """The collector in a registry of one's own, and our rendering, differ in no series."""
    collector = full_collector()
    registry = registered(collector)
    ours = parse(await render(collector))
    theirs = parse(generate_latest(registry))
    assert list(ours) == list(theirs)
    assert ours == theirs
    openmetrics = Exposition.OPENMETRICS
    strict = parse(await render(collector, openmetrics), openmetrics)
    theirs_strict = generate_openmetrics(registry)  # type: ignore[no-untyped-call]
    assert strict == parse(theirs_strict, openmetrics)


def test_a_registry_learns_the_names_without_a_scrape() -> None:
    class NeverRead(StandIn):
        def get_stats(self) -> ManagerStats:
            raise AssertionError("read")

    registry = CollectorRegistry()
    registry.register(KVOffloadCollector(NeverRead()))
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(KVOffloadCollector(NeverRead()))


async def test_counters_of_the_manager() -> None:
    families = parse(await render(full_collector()))
    assert values(families, "kvoffload_hits_total") == {(): 0}
    assert values(families, "kvoffload_evicted_blocks_total") == {(): 4}
    assert values(families, "kvoffload_corrupt_blocks_total") == {
        (): stats().corrupt,
    }
    assert values(families, "kvoffload_pinned_blocks") == {(): stats().pinned}
    assert values(families, "kvoffload_tier_info") == {("hot", "cpu"): 1, ("cold", "disk"): 1}
    assert (
        sum(
            value
            for labels, value in values(families, "kvoffload_tier_slots").items()
            if "hot" in labels
        )
        == 10
    )
    assert values(families, "kvoffload_sessions") == {(): 3}
    assert values(families, "kvoffload_events_missed_total") == {(): 5}


async def test_a_tier_is_in_one_state() -> None:
    families = parse(await render(full_collector()))
    states = values(families, "kvoffload_tier_state")
    assert {labels for labels, value in states.items() if value} == {
        ("hot", "serving"),
        ("cold", "read_only"),
    }
    assert len(states) == 2 * len(TierState)


async def test_histograms() -> None:
    families = parse(await render(full_collector()), Exposition.TEXT)
    buckets = values(families, "kvoffload_operation_duration_seconds_bucket")
    of_load = [value for labels, value in buckets.items() if labels[:2] == ("load", "ok")]
    assert len(of_load) == len(BOUNDS_S) + 1
    assert of_load == sorted(of_load)
    assert of_load[-1] == 1
    counts = values(families, "kvoffload_operation_duration_seconds_count")
    assert counts["load", "ok"] == 1
    assert values(families, "kvoffload_operation_blocks_total")["store", "ok"] == 3
    assert "team" in {
        labels[0]
        for labels in values(families, "kvoffload_namespace_operation_duration_seconds_count")
    }


async def test_a_manager_without_namespaces_observers_or_service() -> None:
    families = parse(await render(KVOffloadCollector(View(stats()))))
    assert not any(
        part in name for name in families for part in ("namespace", "operation", "lag", "sessions")
    )
    async with small_manager("lru") as kv:
        await kv.store(["a"], [b"x"])
        families = parse(await render(KVOffloadCollector(kv)))
        assert values(families, "kvoffload_stored_blocks_total") == {(): 1}


# Namespaces


def test_a_negative_number_of_namespaces() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        KVOffloadCollector(StandIn(), max_namespaces=-1)


async def test_the_largest_namespaces_have_series_and_the_rest_a_sum() -> None:
    manager = StandIn(
        by_namespace={
            "": stats(1000),
            "small": stats(1, num_bytes=10),
            "large": stats(2, num_bytes=30),
            "other": stats(3, num_bytes=40),
            "middle": stats(4, num_bytes=20),
        }
    )
    families = parse(await render(KVOffloadCollector(manager, max_namespaces=3)))
    assert values(families, "kvoffload_namespace_hits_total") == {
        ("", "own"): 1000,
        ("large", "named"): 2,
        ("other", "named"): 3,
        ("other", "other"): 1 + 4,
    }
    assert values(families, "kvoffload_namespace_tier_bytes")["other", "other", "hot"] == 30
    assert values(families, "kvoffload_namespace_tier_bytes")["other", "named", "hot"] == 40
    assert values(families, "kvoffload_namespace_tier_blocks")["other", "other", "cold"] == 10
    assert values(families, "kvoffload_namespaces") == {(): 5}


async def test_none_has_series() -> None:
    manager = StandIn(by_namespace={"": stats(), "a": stats()})
    families = parse(await render(KVOffloadCollector(manager, max_namespaces=0)))
    assert values(families, "kvoffload_namespaces") == {(): 2}
    assert not any(name.startswith("kvoffload_namespace_") for name in families)


async def test_the_sum_never_runs_backwards() -> None:
    """A namespace that grows gets series of its own; `rate()` of the others sees no reset."""
    manager = StandIn(
        by_namespace={"": stats(), "a": stats(10, num_bytes=9), "b": stats(20, num_bytes=1)}
    )
    collector = KVOffloadCollector(manager, max_namespaces=2)

    async def hits() -> dict[tuple[str, ...], float]:
        return values(parse(await render(collector)), "kvoffload_namespace_hits_total")

    assert await hits() == {("", "own"): 0, ("a", "named"): 10, ("other", "other"): 20}
    manager.by_namespace["b"] = stats(25, num_bytes=100)
    assert await hits() == {("", "own"): 0, ("b", "named"): 25, ("other", "other"): 20}
    manager.by_namespace["a"] = stats(17, num_bytes=9)
    manager.by_namespace["b"] = stats(26, num_bytes=100)
    assert await hits() == {("", "own"): 0, ("b", "named"): 26, ("other", "other"): 27}
    manager.by_namespace["a"] = stats(17, num_bytes=100)
    assert ("b", "named") in await hits()  # as large: who has series keeps them
    del manager.by_namespace["a"]
    assert await hits() == {("", "own"): 0, ("b", "named"): 26, ("other", "other"): 27}
    manager.by_namespace["a"] = stats(1)
    assert (await hits())["other", "other"] == 28  # back again: it starts anew


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 100)), min_size=5, max_size=5),
        min_size=1,
        max_size=6,
    )
)
def test_nothing_is_counted_twice_or_left_out(scrapes: list[list[tuple[int, int]]]) -> None:
    """What happens in a namespace while it has no series is in the sum, exactly."""
    names = ["", "a", "b", "c", "d"]
    manager = StandIn(by_namespace={name: stats(0) for name in names})
    collector = KVOffloadCollector(manager, max_namespaces=3)
    expected = 0
    before = dict.fromkeys(names, 0)
    for growth in scrapes:
        for name, (hits, num_bytes) in zip(names, growth, strict=True):
            now = manager.by_namespace[name].hits + hits
            manager.by_namespace[name] = stats(0, num_bytes=num_bytes, hits=now)
        families = parse(generate_latest(registered(collector)))
        shown = values(families, "kvoffload_namespace_hits_total")
        rest = {name for name in names if not {(name, "own"), (name, "named")} & set(shown)}
        expected += sum(manager.by_namespace[name].hits - before[name] for name in rest)
        before = {name: view.hits for name, view in manager.by_namespace.items()}
        assert shown["other", "other"] == expected


async def test_two_scrapes_at_once_count_once() -> None:
    manager = StandIn(by_namespace={f"n{i}": stats(i, num_bytes=i) for i in range(20)})
    collector = KVOffloadCollector(manager, max_namespaces=5)
    alone = await render(KVOffloadCollector(manager, max_namespaces=5))
    both = await asyncio.gather(
        *(render(collector, turns=Turns(hold_s=0)) for _ in range(3)),
    )
    assert all(text == alone for text in both)


async def test_an_older_snapshot_adds_nothing() -> None:
    """A scrape that began earlier and ends later may not take the sum back."""
    manager = StandIn(by_namespace={"": stats(), "a": stats(5)})
    collector = KVOffloadCollector(manager, max_namespaces=1)
    slow = collector.gather()
    for _ in range(4):  # the manager, the names, each of the two
        next(slow)
    manager.by_namespace["a"] = stats(9)
    assert values(parse(await render(collector)), "kvoffload_namespace_hits_total") == {
        ("", "own"): 0,
        ("other", "other"): 9,
    }
    with pytest.raises(StopIteration):
        while True:
            next(slow)
    assert values(parse(await render(collector)), "kvoffload_namespace_hits_total") == {
        ("", "own"): 0,
        ("other", "other"): 9,
    }


async def test_a_namespace_is_shown_as_it_was_at_one_moment() -> None:
    """While others have their turns, counters move on; those of one namespace stay together."""
    manager = StandIn(by_namespace={f"n{i}": stats(0) for i in range(30)})
    done = asyncio.Event()

    async def move_on() -> None:
        start = 0
        while not done.is_set():
            start += 1000
            manager.by_namespace = dict.fromkeys(manager.by_namespace, stats(start))
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(move_on())
        families = parse(await render(KVOffloadCollector(manager), turns=Turns(hold_s=0)))
        done.set()
    hits = values(families, "kvoffload_namespace_hits_total")
    misses = values(families, "kvoffload_namespace_misses_total")
    assert len(set(hits.values())) > 2
    assert all(misses[name] == value + 1 for name, value in hits.items())


async def test_others_have_turns_during_a_scrape() -> None:
    collector = full_collector()
    turns = 0
    done = asyncio.Event()

    async def count() -> None:
        nonlocal turns
        while not done.is_set():
            await asyncio.sleep(0)
            turns += 1

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(count())
        text = await render(collector, turns=Turns(hold_s=0))
        done.set()
    assert turns >= text.count(b"\n") / 16
