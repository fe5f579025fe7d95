"""What callers say tells blocks apart, is believed at first, and is learned."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from kvoffload import Retention
from kvoffload.policy.classes import BlockClasses
from kvoffload.policy.returns import ReturnLaw
from kvoffload.workload.simulation import simulate
from kvoffload.workload.trace import TraceRequest, Workload


def kinds(*said: Retention | None) -> list[int]:
    classes = BlockClasses(ReturnLaw())
    return [classes.first_of(each) for each in said]


def test_each_kind_of_thing_said_has_classes_of_its_own() -> None:
    said = [None, Retention(0.1), Retention(0.9), Retention(0.9, 5), Retention(within_s=5)]
    assert len(set(kinds(*said))) == len(said)
    assert kinds(None)[0] == 0


def test_what_is_nearly_the_same_is_one_kind() -> None:
    """Else a caller who says 0.731 and then 0.732 would teach nothing."""
    assert len(set(kinds(Retention(0.7), Retention(0.72), Retention(0.68)))) == 1
    assert len(set(kinds(Retention(within_s=9), Retention(within_s=60)))) == 1
    assert len(set(kinds(Retention(within_s=60), Retention(within_s=80)))) == 2


def test_there_are_but_so_many_kinds() -> None:
    """However many different numbers are said: each takes memory, and time at each lesson."""
    rng = random.Random(1)
    law = ReturnLaw()
    classes = BlockClasses(law)
    untold = law.num_classes
    for _ in range(3000):
        classes.first_of(Retention(rng.random(), 10 ** rng.uniform(-3, 12)))
        classes.first_of(Retention(within_s=10 ** rng.uniform(-3, 12)))
    assert law.num_classes <= untold * (1 + 11 * 6 + 6)


def sessions(seed: int, requests: int) -> tuple[list[list[int]], list[bool]]:
    """Chats of six blocks and more, half of which go on at each turn; and which did."""
    rng = random.Random(seed)
    fresh = iter(range(10**9))
    chains: list[list[int]] = []
    turns: list[tuple[int, int]] = []  # request, chat
    going: dict[int, list[int]] = {}
    for number in range(requests):
        waiting = [chat for chat in going if len(going) > 30]
        chat = rng.choice(waiting) if waiting else number
        chain = going.pop(chat, [])
        chain += [next(fresh) for _ in range(6 if not chain else 2)]
        chains.append(list(chain))
        turns.append((number, chat))
        if rng.random() < 0.5:
            going[chat] = chain
    last = {chat: number for number, chat in turns}
    return chains, [last[chat] > number for number, chat in turns]


def hits(chains: Sequence[Sequence[int]], told: Sequence[Retention]) -> int:
    requests = [TraceRequest(0.0, tuple(chain)) for chain in chains]
    return simulate(Workload("sessions", requests), "weighted", 60, told=told).prefix_hits


@pytest.mark.parametrize("turned", [False, True], ids=["right", "wrong way round"])
def test_a_caller_who_knows_is_heard(turned: bool) -> None:
    """Also one who has it the wrong way round, for what it means is learned."""
    chains, goes_on = sessions(1, 3000)
    told = [Retention(0.9 if goes is not turned else 0.1) for goes in goes_on]
    assert hits(chains, told) > 1.2 * hits(chains, [])


def test_a_caller_who_guesses_costs_little() -> None:
    chains, goes_on = sessions(2, 3000)
    rng = random.Random(3)
    told = [Retention(rng.choice([0.1, 0.9])) for _ in goes_on]
    assert hits(chains, told) > 0.95 * hits(chains, [])


def test_a_caller_is_believed_before_anything_is_learned_of_it() -> None:
    """A kind that is said for the first time is worth what it says."""
    law = ReturnLaw()
    classes = BlockClasses(law)
    rng = random.Random(4)
    epochs: list[int] = []
    for now in range(800):
        returns = now >= 20 and rng.random() < 0.3
        law.note_use(0, 10, (0, epochs[now - 20], 19) if returns else None)
        epochs.append(law.epoch)
        law.end_request()
    unlikely, likely = (classes.first_of(Retention(each)) for each in (0.1, 0.9))
    assert law.worth(unlikely, 0) < law.worth(0, 0) < law.worth(likely, 0)
    assert law.share(unlikely, 0) == pytest.approx(0.1, abs=0.02)
    assert law.share(likely, 0) == pytest.approx(0.9, abs=0.02)
