from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.service.histograms import BOUNDS_S, Histogram, HistogramSnapshot

DURATIONS = st.lists(st.floats(0, 100, allow_nan=False), max_size=60)


def fed(durations: list[float]) -> Histogram:
    histogram = Histogram()
    for seconds in durations:
        histogram.observe(seconds)
    return histogram


def test_the_bounds_reach_from_a_load_from_memory_to_what_a_client_waits_for() -> None:
    assert BOUNDS_S[0] == 0.0001
    assert BOUNDS_S[-1] == 60
    steps = [high / low for low, high in pairwise(BOUNDS_S)]
    assert all(2 <= round(step, 6) <= 3 for step in steps)


def test_a_bound_belongs_to_its_bucket() -> None:
    """As Prometheus has it: `le` is less or equal."""
    histogram = Histogram([1, 2])
    for seconds in (0, 1, 1.5, 2, 2.5):
        histogram.observe(seconds)
    snapshot = histogram.snapshot()
    assert snapshot.counts == (2, 2, 1)
    assert snapshot.cumulative() == [2, 4, 5]
    assert (snapshot.count, snapshot.sum_s) == (5, 7)
    assert repr(histogram) == "<Histogram of 5, 7 s>"


def test_what_is_no_number_is_left_out() -> None:
    histogram = fed([float("nan"), float("inf"), 1.0])
    assert (histogram.snapshot().count, histogram.snapshot().sum_s) == (1, 1.0)


def test_quantiles_are_interpolated_as_in_a_query() -> None:
    """Compared by hand with what `histogram_quantile` makes of the same buckets."""
    histogram = Histogram([1, 2, 4])
    for seconds in (0.5, 0.5, 3, 3):
        histogram.observe(seconds)
    assert histogram.quantile(0.25) == 0.5
    assert histogram.quantile(0.5) == 1
    assert histogram.quantile(0.75) == 3
    assert histogram.quantile(1) == 4
    assert histogram.quantile(0) == 0
    histogram.observe(99)
    assert histogram.quantile(1) == 4


def test_a_summary() -> None:
    histogram = Histogram([1, 2, 4])
    for seconds in (0.5, 0.5, 3, 3):
        histogram.observe(seconds)
    assert histogram.snapshot().summary() == {
        "count": 4,
        "sum_s": 7,
        "p50_s": 1,
        "p95_s": pytest.approx(3.8),
        "p99_s": pytest.approx(3.96),
    }


def test_no_observation_has_no_quantile() -> None:
    assert Histogram().quantile(0.5) == 0
    with pytest.raises(ValueError, match="between 0 and 1"):
        Histogram().quantile(1.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Histogram().quantile(float("nan"))


@pytest.mark.parametrize("bounds", [[], [1, 1], [2, 1], [1, float("nan")]])
def test_bounds_ascend(bounds: list[float]) -> None:
    with pytest.raises(ValueError, match="must ascend"):
        Histogram(bounds)


@given(DURATIONS, DURATIONS)
def test_two_together_are_as_one_that_saw_all(one: list[float], other: list[float]) -> None:
    both = fed([*one, *other]).snapshot()
    merged = fed(one).snapshot() + fed(other).snapshot()
    assert merged.counts == both.counts
    assert merged.sum_s == pytest.approx(both.sum_s)
    rest = both.since(fed(one).snapshot())
    assert rest.counts == fed(other).snapshot().counts
    assert rest.sum_s == pytest.approx(sum(other))


@given(DURATIONS.filter(bool), st.floats(0, 1), st.floats(0, 1))
def test_a_quantile_is_in_the_bucket_of_the_true_one(
    durations: list[float], q: float, other: float
) -> None:
    histogram = fed(durations)
    estimate = histogram.quantile(q)
    assert 0 <= estimate <= BOUNDS_S[-1]
    low, high = sorted((q, other))
    assert histogram.quantile(low) <= histogram.quantile(high)
    true = sorted(durations)[max(0, -int(-q * len(durations) // 1) - 1)]
    bound = next((bound for bound in BOUNDS_S if true <= bound), BOUNDS_S[-1])
    assert estimate <= bound * (1 + 1e-9)


def test_what_does_not_fit_together() -> None:
    with pytest.raises(ValueError, match="different bounds"):
        Histogram([1]).snapshot() + HistogramSnapshot()
    with pytest.raises(ValueError, match="not an earlier snapshot"):
        HistogramSnapshot().since(fed([1]).snapshot())
