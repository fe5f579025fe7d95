"""The guard: LRU's hits, counted without its blocks, and when LRU takes over."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from kvoffload import WeightedPolicy
from kvoffload.policy.guard import Guard

CAPACITY = 6
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(
    lambda path: [tuple(path[: deep + 1]) for deep in range(len(path))]
)


@given(chains=st.lists(PATHS, max_size=40))
@settings(max_examples=300, deadline=None)
def test_it_counts_what_lru_would_hit(chains: list[list[tuple[int, ...]]]) -> None:
    """Beside a plain LRU that evicts the tail of a chain before its head."""
    policy = WeightedPolicy()
    policy.attach([CAPACITY])
    counted: list[int] = []

    def note(asked: int, hits: int, lru_hits: int) -> bool:
        counted.append(lru_hits)
        return False

    policy._guard.judge = note  # type: ignore[method-assign]  # a spy
    lru: OrderedDict[tuple[int, ...], None] = OrderedDict()
    expected = []
    for chain in chains:
        hits = 0
        while hits < len(chain) and chain[hits] in lru:
            hits += 1
        expected.append(hits)
        for key in reversed(chain):
            lru[key] = None
            lru.move_to_end(key)
        while len(lru) > CAPACITY:
            lru.popitem(last=False)
        policy.use([repr(key) for key in chain])
    assert counted == expected


def test_lru_takes_over_where_it_clearly_hits_more_and_gives_back_after_its_term() -> None:
    """A rule that learned something wrong must not go on with it."""
    guard = Guard(100)
    turns = [guard.judge(10, 2, 8) for _ in range(50)]
    assert turns.count(True) == 1
    assert guard.follows_lru
    waited = 0
    while not guard.judge(10, 8, 8):
        waited += 1
    assert not guard.follows_lru
    for _ in range(50):
        guard.judge(10, 2, 8)
    assert guard.follows_lru
    again = 0
    while not guard.judge(10, 8, 8):
        again += 1
    assert again > 1.5 * waited


def test_chance_is_no_reason() -> None:
    """Large requests make large differences to and fro."""
    guard = Guard(100)
    for number in range(2000):
        swing = 50 if number % 2 else -50
        guard.judge(100, 50 + swing, 50 - swing)
    assert not guard.follows_lru
