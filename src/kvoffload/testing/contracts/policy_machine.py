"""A random walk through the calls of an eviction policy, beside a model of what it was told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ...types import EvictionPolicy, Key

NUM_KEYS = 24
KEYS = st.integers(0, NUM_KEYS - 1)
CHAINS = st.lists(KEYS, min_size=1, max_size=6, unique=True)


class PolicyMachine(RuleBasedStateMachine):
    """The policy, told what a manager would tell it; the model says who is where and pinned."""

    def __init__(self, policy: EvictionPolicy, capacities: Sequence[int]) -> None:
        super().__init__()
        self.policy = policy
        self.policy.attach(capacities)
        self.num_levels = len(capacities)
        self.level_of: dict[Key, int] = {}
        self.pinned: set[Key] = set()

    @rule(chain=CHAINS, level=st.integers(0, 9), used=st.booleans())
    def insert(self, chain: list[int], level: int, used: bool) -> None:
        """Store what is new of a chain."""
        new: list[Key] = [key for key in chain if key not in self.level_of]
        self.policy.insert(new, level % self.num_levels)
        self.level_of.update(dict.fromkeys(new, level % self.num_levels))
        if used:
            self.policy.use(list(chain))

    @rule(chain=CHAINS)
    def use(self, chain: list[int]) -> None:
        """Load, touch, or finish a request."""
        self.policy.use(list(chain))

    @rule(chain=CHAINS)
    def pin(self, chain: list[int]) -> None:
        """Open a lease."""
        self.pinned.update(key for key in chain if key in self.level_of)

    @rule(level=st.integers(0, 9), count=st.integers(1, 4))
    def pin_the_coldest(self, level: int, count: int) -> None:
        """Lease just what would leave next, so that the policy has to step over it."""
        level %= self.num_levels
        self.pinned.update(self.policy.victims(level, count, frozenset(self.pinned)))
        self._check_victims(level, 1)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        """Leave a lease."""
        pinned = sorted(self.pinned, key=str)
        freed = data.draw(st.lists(st.sampled_from(pinned), min_size=1, unique=True))
        self.pinned.difference_update(freed)
        self.policy.unpinned(freed)

    @rule(level=st.integers(0, 9), count=st.integers(0, NUM_KEYS), evict=st.booleans())
    def make_room(self, level: int, count: int, evict: bool) -> None:
        """Ask for victims, and evict, demote or spare them."""
        level %= self.num_levels
        victims = self._check_victims(level, count)
        if not evict:
            return
        self.policy.remove(victims, level)
        for key in victims:
            del self.level_of[key]
        if level + 1 < self.num_levels and victims:
            down = victims[: len(victims) // 2]
            self.policy.insert(down, level + 1)
            self.level_of.update(dict.fromkeys(down, level + 1))

    @rule(chain=CHAINS)
    def remove(self, chain: list[int]) -> None:
        """Evict explicitly."""
        for level in range(self.num_levels):
            gone = [key for key in chain if key in self._free(level)]
            self.policy.remove(gone, level)
            for key in gone:
                del self.level_of[key]

    @invariant()
    def pins_concern_residents(self) -> None:
        """The model itself is sound."""
        assert self.pinned <= self.level_of.keys()

    def teardown(self) -> None:
        """Every resident is offered in the end: nothing was lost, nothing was made up."""
        # The last pin stays a while: a policy must not rely on there being none.
        freed = sorted(self.pinned, key=str)[1:]
        self.pinned.difference_update(freed)
        self.policy.unpinned(freed)
        self._drain()
        last = list(self.pinned)
        self.pinned.clear()
        self.policy.unpinned(last)
        self._drain()
        assert self.level_of == {}

    def _drain(self) -> None:
        for level in range(self.num_levels):
            while victims := self._check_victims(level, 3):
                self.policy.remove(victims, level)
                for key in victims:
                    del self.level_of[key]

    def _check_victims(self, level: int, count: int) -> list[Key]:
        victims = self.policy.victims(level, count, frozenset(self.pinned))
        free = self._free(level)
        assert len(victims) <= count
        assert len(set(victims)) == len(victims)
        assert set(victims) <= free
        assert bool(victims) == bool(free and count)
        return victims

    def _free(self, level: int) -> set[Key]:
        return {
            key for key, where in self.level_of.items() if where == level and key not in self.pinned
        }


def run_policy_machine(
    make_policy: Callable[[], EvictionPolicy],
    capacities: Sequence[int],
    max_examples: int,
    *,
    shrink: bool = True,
) -> None:
    """Take `max_examples` random walks, each with a new policy.

    Args:
        make_policy: Makes one, attached to nothing.
        capacities: Slots of the levels to attach it to.
        max_examples: Walks to try.
        shrink: Look for the shortest walk that goes wrong.

    Raises:
        AssertionError: One of them went wrong; Hypothesis shows it.
    """

    class Machine(PolicyMachine):
        def __init__(self) -> None:
            super().__init__(make_policy(), capacities)

    def run(machine: Any) -> None:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=max_examples,
                stateful_step_count=40,
                deadline=None,
                database=None,
                phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )

    run(Machine)
