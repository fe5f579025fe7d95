"""What keeps failing is tried ever more seldom, and never given up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvoffload.storage.breaker import Breaker


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_opens_after_failures_in_a_row_alone() -> None:
    breaker = Breaker(3, clock=Time())
    assert [breaker.failed(), breaker.failed()] == [False, False]
    breaker.succeeded()
    assert [breaker.failed(), breaker.failed()] == [False, False]
    assert breaker.allows()
    assert breaker.failed()
    assert breaker.is_open
    assert not breaker.allows()


def test_one_attempt_at_a_time_is_let_through() -> None:
    """A failing disk must not get the whole load again each time that it is tried."""
    time = Time()
    breaker = Breaker(1, retry_s=2, clock=time)
    breaker.failed()
    time.now += 2
    assert not breaker.is_open
    assert breaker.allows()
    assert not breaker.allows()
    assert breaker.is_open
    assert breaker.succeeded()
    assert breaker.is_closed
    assert breaker.allows()
    assert breaker.allows()


@given(st.integers(1, 12))
def test_each_failed_attempt_doubles_the_wait_up_to_a_limit(attempts: int) -> None:
    time = Time()
    breaker = Breaker(1, retry_s=1, most_retry_s=60, clock=time)
    breaker.failed()
    for _ in range(attempts):
        time.now += 60
        assert breaker.allows()
        breaker.failed()
    time.now += min(60, 2**attempts) - 0.5
    assert not breaker.allows()
    time.now += 0.5
    assert breaker.allows()


def test_an_attempt_that_never_comes_back_does_not_close_the_door_for_good() -> None:
    """Its thread may be stuck."""
    time = Time()
    breaker = Breaker(1, retry_s=1, clock=time)
    breaker.failed()
    time.now += 1
    assert breaker.allows()
    time.now += 1
    assert breaker.allows()
