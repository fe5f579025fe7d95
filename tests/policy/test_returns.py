"""The law of returns: what it learns from traffic that is known, and what waiting is worth."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvoffload.policy import returns
from kvoffload.policy.returns import AGE_EDGES, NUM_BINS, WORTH_AGES, ReturnLaw, step_of

AGES = np.diff([*AGE_EDGES, 2 * AGE_EDGES[-1]])


def test_steps_cover_all_ages() -> None:
    assert WORTH_AGES[0] == 0
    assert sorted(set(WORTH_AGES)) == WORTH_AGES
    assert set(AGE_EDGES) <= set(WORTH_AGES)
    for age in (0, 1, 7, 8, 100, 5000, 10**6):
        step = step_of(age)
        assert WORTH_AGES[step] <= age
        assert step + 1 == len(WORTH_AGES) or age < WORTH_AGES[step + 1]


@given(hazard=st.lists(st.floats(0.001, 0.9), min_size=NUM_BINS, max_size=NUM_BINS))
@settings(max_examples=40, deadline=None)
def test_the_index_is_the_best_ratio_over_all_times_to_stop(hazard: list[float]) -> None:
    """Beside sums that are written out."""
    index = returns._gittins(np.array([hazard]))[0]
    for start in range(NUM_BINS):
        best = uses = waiting = 0.0
        unused = 1.0
        for age_bin in range(start, NUM_BINS):
            uses += unused * hazard[age_bin]
            waiting += unused * AGES[age_bin] * (1 - hazard[age_bin] / 2)
            unused *= 1 - hazard[age_bin]
            best = max(best, uses / waiting)
        assert index[start] == pytest.approx(best)


def law_of(*groups: int, weight: float = 1.0) -> ReturnLaw:
    """Return a law with groups of so many classes."""
    law = ReturnLaw(weight)
    for num_classes in groups:
        law.add_groups(1, num_classes)
    return law


def run(law: ReturnLaw, share: dict[int, float], gap: int, requests: int) -> None:
    """Let one block of each class be born a request; a share of them return after a gap."""
    rng = random.Random(1)
    epochs: list[int] = []
    for now in range(requests):
        for use_class, chance in share.items():
            returns = now >= gap and rng.random() < chance
            law.note_use(
                use_class, 10, (use_class, epochs[now - gap], gap - 1) if returns else None
            )
        epochs.append(law.epoch)
        law.end_request()


def test_classes_that_return_are_worth_more() -> None:
    law = law_of(2, 1)
    run(law, {0: 0.1, 1: 0.6, 2: 0.9}, gap=30, requests=2000)
    young = step_of(0)
    assert law.worth(0, young) < law.worth(1, young) < law.worth(2, young)
    # 0.6 of them return after 30 requests.
    assert law.worth(1, young) == pytest.approx(0.6 / 30, rel=0.5)


def test_past_the_age_at_which_they_return_they_are_worth_little() -> None:
    law = law_of(1)
    run(law, {0: 0.6}, gap=30, requests=2000)
    assert law.worth(0, step_of(200)) < 0.1 * law.worth(0, step_of(20))


def test_a_class_of_which_nothing_is_known_is_like_its_group() -> None:
    law = law_of(2, 1)
    run(law, {0: 0.9, 2: 0.05}, gap=20, requests=1000)
    young = step_of(0)
    assert law.worth(1, young) == pytest.approx(law.worth(0, young), rel=0.3)


@pytest.mark.parametrize("weight", [0.01, 1.0, 50.0, 1e6])
def test_any_weight_gives_an_order(weight: float) -> None:
    """A power of a small number vanished, and all classes looked alike."""
    law = law_of(2, weight=weight)
    run(law, {0: 0.2, 1: 0.7}, gap=10, requests=500)
    worth = [law.worth(use_class, step_of(0)) for use_class in (0, 1)]
    assert np.isfinite(worth).all()
    assert worth[0] < worth[1]


def test_what_it_keeps_is_bounded() -> None:
    law = law_of(1)
    run(law, {0: 0.5}, gap=5, requests=AGE_EDGES[-1] + 4000)
    assert len(law._cohorts) <= AGE_EDGES[-1] // returns.EPOCH_REQUESTS + 2


@pytest.mark.parametrize("asked_every", [1, 7, 64, 1000])
def test_worth_does_not_depend_on_when_it_is_asked(asked_every: int) -> None:
    """It is found when it is first asked for, from what the last lesson knew."""
    rng = random.Random(3)
    law, other = law_of(3, 2), law_of(3, 2)
    epochs: list[int] = []
    for now in range(700):
        for use_class in range(5):
            gap = rng.choice((1, 9, 40))
            past = (use_class, epochs[now - gap], gap - 1) if gap <= now else None
            blocks = rng.randrange(1, 4)
            for each in (law, other):
                each.note_use(use_class, blocks, past)
        epochs.append(law.epoch)
        if now == 300:
            new = law.add_groups(1, 2, 0.5)
            assert new == other.add_groups(1, 2, 0.5)
            assert law.worth(new, 0) == other.worth(new, 0)
        assert law.end_request() == other.end_request()
        law.worth(0, 0)
        if now % asked_every == 0:
            assert other.share(4, 0) == law.share(4, 0)
    for use_class in range(law.num_classes):
        for step in range(len(WORTH_AGES)):
            assert law.worth(use_class, step) == other.worth(use_class, step)
            assert law.share(use_class, step) == other.share(use_class, step)
