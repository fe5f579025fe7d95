"""A policy for each namespace, and their common order."""

from __future__ import annotations

from collections.abc import Sequence

from kvoffload import FIFOPolicy, ForecastingPolicy, Key, LRUPolicy, WeightedPolicy
from kvoffload.policy.partitions import PartitionedPolicy, make_partitions

NONE: frozenset[Key] = frozenset()


def made(times: dict[Key, float], slots: dict[str | None, int | None]) -> PartitionedPolicy:
    policy = make_partitions(LRUPolicy, slots)
    policy.attach([8, 8])
    policy.time_of = times.__getitem__
    return policy


def keys(namespace: str, *hashes: str) -> list[Key]:
    return [(namespace, each) for each in hashes]


def test_the_oldest_of_all_leaves_first() -> None:
    """By the time of the coldest block of each partition."""
    times: dict[Key, float] = {("a", "1"): 1, ("b", "2"): 2, ("a", "3"): 3, "4": 4, ("c", "5"): 5}
    policy = made(times, {"a": None, "b": None})
    for key in times:
        policy.insert([key], 0)
    assert policy.victims(0, 9, NONE) == list(times)
    assert policy.victims(0, 2, NONE) == list(times)[:2]
    assert policy.victims(0, 2, {("a", "1")}) == list(times)[1:3]
    assert policy.victims(1, 2, NONE) == []


def test_within_a_partition_its_policy_decides() -> None:
    """Tail first where the times are equal, and whatever they are."""
    chain_a, chain_b = keys("a", "h", "m", "t"), keys("b", "h", "m", "t")
    times = dict.fromkeys([*chain_a, *chain_b], 5.0)
    times[chain_a[2]] = 9.0  # the coldest of its own all the same
    policy = made(times, {"a": None, "b": None})
    policy.insert(chain_a, 0)
    policy.insert(chain_b, 0)
    assert policy.victims(0, 6, NONE) == [*chain_b[::-1], *chain_a[::-1]]


def test_keys_of_several_namespaces_in_one_call() -> None:
    """Each goes to its own, in the order given."""
    mixed: list[Key] = [("a", "1"), "own", ("b", "1"), ("a", "2")]
    policy = made(dict.fromkeys(mixed, 0.0), {"a": None, None: None})
    policy.insert(mixed, 0)
    assert policy.num_residents(0) == 4
    assert [policy.num_residents(0, name) for name in ("a", None)] == [2, 1]
    alone = policy.alone("a")
    assert alone is not None
    assert alone.victims(0, 9, NONE) == [("a", "2"), ("a", "1")]
    assert policy.alone("b") is None
    policy.victims(0, 9, set(mixed))
    policy.unpinned(mixed)
    policy.remove(mixed[::3], 0)
    assert set(policy.victims(0, 9, NONE)) == {"own", ("b", "1")}
    assert policy.num_residents(0, "a") == 0


def test_only_what_is_allowed_leaves() -> None:
    """Asked once for each partition that has blocks there, with what it would give up."""
    policy = made(dict.fromkeys([*keys("a", "1", "2"), *keys("b", "1")], 0.0), {"a": None})
    policy.insert(keys("a", "1", "2"), 0)
    policy.insert(keys("b", "1"), 0)
    asked: list[Sequence[Key]] = []

    def allowed(offered: list[Key]) -> list[Key]:
        asked.append(offered)
        return offered[:1]

    assert policy.victims_among(0, 9, NONE, allowed) == [("a", "2"), ("b", "1")]
    assert asked == [[("a", "2"), ("a", "1")], [("b", "1")]]


def test_capacities_are_clipped_to_what_a_partition_may_have() -> None:
    """At least one slot, and no more than there are."""
    attached: list[Sequence[int]] = []

    class Told(FIFOPolicy):
        def attach(self, capacities: Sequence[int]) -> None:
            attached.append(list(capacities))
            super().attach(capacities)

    make_partitions(Told, {"a": 0, "b": 3, "c": None}).attach([2, 8])
    assert attached == [[1, 1], [2, 3], [2, 8], [2, 8]]


def test_forecasts_of_each() -> None:
    """Only where the parts can."""
    policy = make_partitions(WeightedPolicy, {"a": None})
    policy.attach([8])
    assert isinstance(policy, ForecastingPolicy)
    policy.insert([*keys("a", "1"), "own"], 0)
    assert list(policy.likely([*keys("a", "1"), "own"])) == []
    assert not isinstance(make_partitions(LRUPolicy, {"a": None}), ForecastingPolicy)
