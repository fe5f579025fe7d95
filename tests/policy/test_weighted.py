"""The learned weight: exactly LRU at zero, and what it learns from."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload import ConfigError, EvictionPolicy, Key, LRUPolicy, WeightedPolicy
from kvoffload.policy.weighted import LEAST_GHOSTS

CAPACITY = 12

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.lists(st.integers(0, 30), max_size=6, unique=True)),
        st.tuples(st.just("insert"), st.lists(st.integers(0, 30), max_size=6, unique=True)),
        st.tuples(st.just("pin"), st.lists(st.integers(0, 30), max_size=3, unique=True)),
        st.tuples(st.just("unpin"), st.lists(st.integers(0, 30), max_size=3, unique=True)),
    ),
    max_size=80,
)


class Cache:
    """As much of a cache as a policy needs: one level, ids alone."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.resident: set[Key] = set()
        self.pinned: set[Key] = set()
        self.evicted: list[Key] = []
        policy.attach([capacity])

    def insert(self, chain: Sequence[Key]) -> None:
        new = [key for key in chain if key not in self.resident]
        room = self.capacity - len(self.resident)
        held = self.pinned | set(chain)
        new = list(self.policy.admit(new, 0, chain=chain, pinned=held))
        victims = self.policy.victims(0, max(0, len(new) - room), held)
        self.policy.remove(victims, 0)
        self.resident -= set(victims)
        self.evicted += victims
        new = new[: self.capacity - len(self.resident)]
        self.policy.insert(new, 0)
        self.resident |= set(new)

    def request(self, chain: Sequence[Key]) -> int:
        hit = 0
        while hit < len(chain) and chain[hit] in self.resident:
            hit += 1
        self.insert(chain)
        self.policy.use(chain)
        return hit


@given(operations=OPERATIONS)
def test_zero_weight_is_lru_decision_for_decision(
    operations: list[tuple[str, list[int]]],
) -> None:
    """Pins included: who sets the weight to 0 gets what the other class gives."""
    caches = [
        Cache(WeightedPolicy(frequency_weight=0), CAPACITY),
        Cache(LRUPolicy(), CAPACITY),
    ]
    for what, keys in operations:
        for cache in caches:
            if what == "use":
                cache.policy.use(keys)
            elif what == "insert":
                cache.insert(keys)
            elif what == "pin":
                cache.pinned |= set(keys) & cache.resident
            else:
                cache.pinned -= set(keys)
                cache.policy.unpinned(keys)
        assert caches[0].evicted == caches[1].evicted
        assert caches[0].policy.victims(0, 99, ()) == caches[1].policy.victims(0, 99, ())


def chat(seed: int, requests: int) -> list[list[int]]:
    """Chat in which some conversations go on for long and most end at once."""
    rng = random.Random(seed)
    chains: list[list[int]] = []
    going: list[list[int]] = []
    fresh = iter(range(10**9))
    while len(chains) < requests:
        if going and rng.random() < 0.5:
            chain = rng.choice(going)
            chain += [next(fresh), next(fresh)]
            if rng.random() < 0.1:
                going.remove(chain)
        else:
            chain = [next(fresh) for _ in range(4)]
            if rng.random() < 0.25:
                going.append(chain)
                going[:] = going[-40:]
        chains.append(list(chain))
    return chains


def test_where_counts_tell_it_beats_lru() -> None:
    """Most conversations never return, one that did is likely to: LRU keeps too many new ones."""
    chains = chat(1, 6000)
    hits = {}
    for name, policy in (("lru", LRUPolicy()), ("weighted", WeightedPolicy())):
        cache = Cache(policy, 400)
        hits[name] = sum(cache.request(chain) for chain in chains)
    assert hits["weighted"] > 1.05 * hits["lru"]


def test_where_only_recency_tells_it_stays_with_lru() -> None:
    """Every chain returns as likely as any other: what is learned must not hurt."""
    rng = random.Random(2)
    chains = []
    for number in range(6000):
        base = max(0, number - int(rng.expovariate(1 / 30)))
        chains.append([base * 10 + deep for deep in range(4)])
    hits = {}
    for name, policy in (("lru", LRUPolicy()), ("weighted", WeightedPolicy())):
        cache = Cache(policy, 160)
        hits[name] = sum(cache.request(chain) for chain in chains)
    assert hits["weighted"] > 0.97 * hits["lru"]


def test_tail_first_whatever_was_learned() -> None:
    """A hole in a prefix chain would make all behind it useless."""
    cache = Cache(WeightedPolicy(), 60)
    for chain in chat(3, 800):
        cache.request(chain[:30])
        order = {key: number for number, key in enumerate(cache.policy.victims(0, 60, ()))}
        places = [order[key] for key in chain[:30] if key in order]
        assert places == sorted(places, reverse=True)


def test_ghosts_are_bounded() -> None:
    """However many blocks pass through, only so many are remembered."""
    policy = WeightedPolicy()
    cache = Cache(policy, 50)
    for number in range(8000):
        cache.request([number * 10 + deep for deep in range(3)])
    table = policy._table
    assert table.resident == [50]
    assert LEAST_GHOSTS - 3 <= len(table) - 50 <= LEAST_GHOSTS
    assert sum(len(run.keys) for run in table.ghosts) == len(table) - 50


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_wrong_weights(weight: float) -> None:
    """Says what is allowed."""
    with pytest.raises(ConfigError, match="frequency_weight must be a finite number"):
        WeightedPolicy(weight)


def test_one_policy_one_manager() -> None:
    """Two managers on one object would evict each other's blocks."""
    policy = WeightedPolicy()
    policy.attach([1])
    with pytest.raises(ConfigError, match="another manager"):
        policy.attach([1])


@pytest.mark.parametrize("seed", range(5))
def test_batches_that_are_no_chains(seed: int) -> None:
    """Callers touch blocks in any order, which ties runs of the same age to several others.

    Two of equal worth and age were compared as objects, and a close failed.
    """
    rng = random.Random(seed)
    policy = WeightedPolicy()
    policy.attach([60])
    policy.insert(range(60), 0)
    for number in range(600):
        policy.use(rng.sample(range(60), 12))
        if number % 5 == 0:
            offered = policy.victims(0, 99, ())
            assert sorted(offered, key=str) == sorted(range(60), key=str)


def test_a_chain_that_was_stepped_over_is_offered_again() -> None:
    """Also right after its use, when there is mostly nothing to offer."""
    policy = WeightedPolicy()
    policy.attach([6])
    policy.insert(["a", "b", "c"], 0)
    policy.insert(["x", "y"], 0)
    for _ in range(2):
        policy.use(["x", "y"])
        policy.use(["a", "b", "c"])
        policy.unpinned(["a", "b", "c"])  # none was stepped over
        assert policy.victims(0, 5, ()) == ["y", "x", "c", "b", "a"]
        policy.use(["a", "b", "c"])
        assert policy.victims(0, 5, {"a", "b", "c"}) == ["y", "x"]
        policy.unpinned(["a", "b", "c"])
        assert policy.victims(0, 5, ()) == ["y", "x", "c", "b", "a"]
