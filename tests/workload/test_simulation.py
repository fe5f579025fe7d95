"""Simulations: what is counted, the offline optimum as a bound, and recorded traffic."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvoffload import ConfigError, LRUPolicy
from kvoffload.policy import POLICIES
from kvoffload.workload import (
    TraceRequest,
    Workload,
    chat_workload,
    least_capacity,
    read_trace,
    simulate,
)
from kvoffload.workload.foresight import ENDS, RETURNS, foretell, goes_on

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
# Paths of a small tree, as chains are: equal id, equal prefix.
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(
    lambda path: tuple(int("1" + "".join(map(str, path[: deep + 1]))) for deep in range(len(path)))
)


def workload(*chains: tuple[int, ...]) -> Workload:
    return Workload("made", [TraceRequest(float(n), chain) for n, chain in enumerate(chains)])


def test_only_what_no_gap_precedes_is_a_prefix_hit() -> None:
    """A block behind a missing one saves nothing, and is told apart."""
    result = simulate(workload((1, 2, 3), (1, 2, 3), (4, 2, 3)), "lru", 10)
    assert (result.visits, result.prefix_hits, result.block_hits) == (9, 3, 5)
    assert result.prefix_hit_ratio == 3 / 9
    assert result.block_hit_ratio == 5 / 9
    assert (result.writes, result.evictions) == (4, 0)


def test_a_chain_longer_than_the_cache_keeps_its_head() -> None:
    """Its own blocks don't push each other out."""
    result = simulate(workload((1, 2, 3, 4), (1, 2, 3, 4)), "lru", 2)
    assert (result.prefix_hits, result.writes, result.evictions) == (2, 2, 0)


def test_no_requests() -> None:
    assert simulate(Workload("none", []), "lru", 3).prefix_hit_ratio == 0.0


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_cache_has_a_block(capacity: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 block"):
        simulate(workload((1,)), "lru", capacity)


def test_an_unknown_policy_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="arc, fifo, lru, optimal, s3fifo, told, weighted"):
        simulate(workload((1,)), "mru", 1)


def test_an_object_of_ones_own() -> None:
    assert simulate(workload((1,), (1,)), LRUPolicy(), 1).policy == "lru"


@given(chains=st.lists(PATHS, max_size=25), capacity=st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_nobody_beats_the_offline_optimum(chains: list[tuple[int, ...]], capacity: int) -> None:
    """Nor hits more than twice what was asked, nor evicts what it never wrote."""
    made = workload(*chains)
    best = simulate(made, "optimal", capacity)
    for name in POLICIES:
        result = simulate(made, name, capacity)
        assert result.prefix_hits <= best.block_hits
        assert result.evictions <= result.writes
        assert result.writes - result.evictions <= capacity


@given(chains=st.lists(PATHS, min_size=1, max_size=25))
@settings(max_examples=60, deadline=None)
def test_with_room_for_all_everything_known_hits(chains: list[tuple[int, ...]]) -> None:
    made = workload(*chains)
    hits = {simulate(made, name, made.num_distinct_blocks).prefix_hits for name in POLICIES}
    assert hits == {simulate(made, "optimal", made.num_distinct_blocks).prefix_hits}


def test_the_least_capacity_reaches_the_ratio() -> None:
    made = chat_workload(400, seed=3)
    most = simulate(made, "lru", made.num_distinct_blocks).prefix_hit_ratio
    capacity = least_capacity(made, "lru", most / 2)
    assert capacity is not None
    assert simulate(made, "lru", capacity).prefix_hit_ratio >= most / 2
    assert simulate(made, "lru", int(capacity * 0.9)).prefix_hit_ratio < most / 2
    assert least_capacity(made, "lru", 0.999) is None


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"there are no recorded traces in {TRACES}")
@pytest.mark.parametrize("trace", ["conversation_head", "synthetic", "coding_agents"])
def test_the_weighted_policy_loses_nowhere_to_lru(trace: str) -> None:
    """A rule that learns may lose a little while it does, and no more, on any traffic."""
    recorded = read_trace(TRACES / f"{trace}.jsonl.gz")
    lead = []
    for per_cent in (1, 2, 5, 10, 20, 50):
        capacity = max(1, per_cent * recorded.num_distinct_blocks // 100)
        lru, weighted = (
            simulate(recorded, name, capacity).prefix_hit_ratio for name in ("lru", "weighted")
        )
        assert weighted > lru - 0.001
        lead.append(weighted - lru)
    assert max(lead) > 0.02


def test_what_callers_could_have_said() -> None:
    """A chain goes on where a later one has its end; the very last block may be incomplete."""
    chains = [(1, 2), (3, 4), (1, 2, 5), (3, 6), (1, 2, 7)]
    assert goes_on(chains) == [True, True, True, False, False]
    assert foretell(chains) == [RETURNS, RETURNS, RETURNS, ENDS, ENDS]
    assert foretell(chains, 0.0) == [ENDS, ENDS, ENDS, RETURNS, RETURNS]
    many = [(number,) for number in range(2000)] * 2
    right = sum(said is RETURNS for said in foretell(many, 0.75)[:2000])
    assert 1400 < right < 1600
    with pytest.raises(ConfigError, match="from 0 to 1"):
        foretell(chains, 1.5)


def test_callers_who_say_what_they_know_are_worth_hits() -> None:
    """And the simulation says how many."""
    made = chat_workload(3000, seed=3)
    size = made.num_distinct_blocks // 20
    untold = simulate(made, "weighted", size).prefix_hits
    told = simulate(made, "told", size)
    assert told.policy == "told"
    assert told.prefix_hits > 1.05 * untold
    assert told.prefix_hits > simulate(made, "told", size, accuracy=0.6).prefix_hits
