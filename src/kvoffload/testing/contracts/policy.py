"""What every eviction policy has to do, as tests: subclass and supply `make_policy`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ...errors import ConfigError
from ...types import EvictionPolicy, Key

EVERY_TYPE: tuple[Key, ...] = (
    b"1",
    "1",
    1,
    -1,
    2**70,
    ("tenant", b"1"),
    ("tenant", 1),
    ("other", b"1"),
)
"""Keys that a policy must not confuse."""


def chain(name: str, length: int) -> list[Key]:
    """Return the keys of a prefix chain, head first."""
    return [f"{name}{number}" for number in range(length)]


def drain(policy: EvictionPolicy, level: int, residents: int) -> list[Key]:
    """Evict a level one block at a time, as a manager that needs one slot again and again does."""
    order: list[Key] = []
    for _ in range(residents):
        victims = policy.victims(level, 1, frozenset())
        assert len(victims) == 1, f"{residents - len(order)} residents, but none was offered"
        policy.remove(victims, level)
        order += victims
    assert policy.victims(level, 1, frozenset()) == []
    return order


class PolicyContract:
    """Tests of the `EvictionPolicy` protocol, collected where a subclass is named `Test...`.

    For instance::

        class TestMyPolicy(PolicyContract):
            def make_policy(self) -> MyPolicy:
                return MyPolicy()

    Needs pytest, and Hypothesis for the random walk through all calls, which is skipped without.

    Attributes:
        capacities: Slots of the levels that the policy is attached to.
        max_examples: Random walks to try.
    """

    capacities: Sequence[int] = (8, 16, 32)
    max_examples: int = 60

    def make_policy(self) -> EvictionPolicy:
        """Return a new policy, attached to nothing."""
        raise NotImplementedError

    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        """Return a policy that serves three levels."""
        policy = self.make_policy()
        policy.attach(self.capacities)
        return policy

    def test_serves_one_manager_only(self, policy: EvictionPolicy) -> None:
        """One object shared by two managers would mix up their blocks."""
        with pytest.raises(ConfigError):
            policy.attach(self.capacities)

    def test_protocol(self) -> None:
        """It has every method."""
        assert isinstance(self.make_policy(), EvictionPolicy)

    def test_an_empty_policy_offers_nothing(self, policy: EvictionPolicy) -> None:
        """Each level starts empty."""
        for level in range(len(self.capacities)):
            assert policy.victims(level, 4, frozenset()) == []

    @pytest.mark.parametrize("used", [False, True], ids=["inserted", "used"])
    def test_tail_of_a_fresh_chain_leaves_before_its_head(
        self, policy: EvictionPolicy, used: bool
    ) -> None:
        """A block is of no use without all its prefix, so the deepest goes first."""
        keys = chain("c", 6)
        policy.insert(keys, 0)
        if used:
            policy.use(keys)
        assert policy.victims(0, 6, frozenset()) == keys[::-1]

    def test_tail_leaves_before_head_one_at_a_time(self, policy: EvictionPolicy) -> None:
        """Taking victims out singly gives the same order as asking for all of them."""
        keys = chain("c", 6)
        policy.insert(keys, 0)
        policy.use(keys)
        assert drain(policy, 0, 6) == keys[::-1]

    def test_tail_leaves_first_after_many_uses(self, policy: EvictionPolicy) -> None:
        """Whatever is learned from uses, a chain used as a whole stays ordered by depth."""
        keys = chain("c", 6)
        policy.insert(keys, 0)
        for _ in range(300):
            policy.use(keys)
        assert drain(policy, 0, 6) == keys[::-1]

    def test_at_most_as_many_as_asked(self, policy: EvictionPolicy) -> None:
        """From none to more than there are."""
        keys = chain("c", 6)
        policy.insert(keys, 0)
        assert policy.victims(0, 0, frozenset()) == []
        for count in (1, 3, 6, 7, 100):
            victims = policy.victims(0, count, frozenset())
            assert 1 <= len(victims) <= min(count, 6)
            assert len(set(victims)) == len(victims)

    def test_asking_removes_nothing(self, policy: EvictionPolicy) -> None:
        """A manager may ask, and then not evict: the write below failed, say."""
        keys = chain("c", 6)
        policy.insert(keys, 0)
        for _ in range(3):
            policy.victims(0, 4, frozenset())
        assert sorted(map(str, drain(policy, 0, 6))) == sorted(map(str, keys))

    def test_removed_keys_are_offered_no_more(self, policy: EvictionPolicy) -> None:
        """The rest stays."""
        keys = chain("c", 6)
        policy.insert(keys, 0)
        policy.remove(keys[1:3], 0)
        assert set(drain(policy, 0, 4)) == {keys[0], *keys[3:]}

    def test_pinned_keys_are_no_victims(self, policy: EvictionPolicy) -> None:
        """However cold they are."""
        keys = chain("c", 6)
        policy.insert(keys, 0)
        pinned = frozenset(keys[3:])
        assert set(policy.victims(0, 6, pinned)) <= set(keys[:3])
        assert policy.victims(0, 1, pinned) != []
        assert policy.victims(0, 6, frozenset(keys)) == []

    def test_unpinned_keys_are_offered_again(self, policy: EvictionPolicy) -> None:
        """A policy may set aside what it steps over, but not for good."""
        keys = chain("c", 6)
        policy.insert(keys, 0)
        for _ in range(2):
            assert policy.victims(0, 6, frozenset(keys)) == []
        policy.unpinned(keys[2:4])
        assert set(policy.victims(0, 6, frozenset({*keys[:2], *keys[4:]}))) == set(keys[2:4])
        policy.unpinned([*keys[:2], *keys[4:]])
        assert set(drain(policy, 0, 6)) == set(keys)

    def test_a_key_pinned_again_is_no_victim(self, policy: EvictionPolicy) -> None:
        """Unpinned, then pinned before the next victim is needed: it counts what holds now."""
        keys = chain("c", 4)
        policy.insert(keys, 0)
        policy.victims(0, 4, frozenset(keys))
        policy.unpinned(keys)
        assert policy.victims(0, 4, frozenset(keys)) == []
        policy.unpinned(keys)
        assert set(drain(policy, 0, 4)) == set(keys)

    def test_a_key_used_while_pinned_is_offered_again(self, policy: EvictionPolicy) -> None:
        """Loading a block pins it and counts as a use; afterwards it can leave like any other."""
        keys = chain("c", 4)
        policy.insert(keys, 0)
        policy.victims(0, 4, frozenset(keys))
        policy.use(keys)
        policy.unpinned(keys)
        assert set(drain(policy, 0, 4)) == set(keys)

    def test_levels_are_independent(self, policy: EvictionPolicy) -> None:
        """Each level offers its own residents alone."""
        for level in range(len(self.capacities)):
            policy.insert(chain(f"level{level}-", 4), level)
        for level in range(len(self.capacities)):
            assert set(policy.victims(level, 16, frozenset())) <= set(chain(f"level{level}-", 4))
        policy.remove(chain("level0-", 4), 0)
        for level in range(1, len(self.capacities)):
            assert set(drain(policy, level, 4)) == set(chain(f"level{level}-", 4))

    def test_keys_move_between_levels(self, policy: EvictionPolicy) -> None:
        """Down when demoted, up when promoted; a use meanwhile concerns nobody's victims."""
        keys = chain("c", 4)
        policy.insert(keys, 0)
        policy.remove(keys[2:], 0)
        policy.use(keys)
        policy.insert(keys[2:], 1)
        policy.use(keys)
        assert set(policy.victims(0, 9, frozenset())) <= set(keys[:2])
        assert set(policy.victims(1, 9, frozenset())) <= set(keys[2:])
        policy.remove(keys[2:], 1)
        policy.insert(keys[2:], 0)
        assert set(drain(policy, 0, 4)) == set(keys)

    def test_removed_and_inserted_again(self, policy: EvictionPolicy) -> None:
        """Evicted blocks come back all the time."""
        keys = chain("c", 4)
        for _ in range(5):
            policy.insert(keys, 0)
            policy.use(keys)
            assert set(drain(policy, 0, 4)) == set(keys)

    def test_use_ignores_what_is_not_resident(self, policy: EvictionPolicy) -> None:
        """The chain of a request is used as a whole, also where some of it was rejected."""
        keys = chain("c", 4)
        policy.use(["never seen", *keys])
        policy.insert(keys[:2], 0)
        policy.use(["never seen", *keys])
        policy.use([])
        assert set(drain(policy, 0, 2)) == set(keys[:2])

    def test_empty_calls(self, policy: EvictionPolicy) -> None:
        """Nothing is a legal chain."""
        policy.insert([], 0)
        policy.remove([], 0)
        policy.unpinned([])
        assert list(policy.admit([], 0)) == []
        assert policy.victims(0, 1, frozenset()) == []

    def test_admission_chooses_among_the_keys_asked_for(self, policy: EvictionPolicy) -> None:
        """Some or all of them, or none."""
        keys = chain("c", 6)
        for level in range(len(self.capacities)):
            assert set(policy.admit(keys, level)) <= set(keys)

    def test_keys_of_every_type(self, policy: EvictionPolicy) -> None:
        """`1`, `"1"`, `b"1"` and the same hash of two namespaces are different blocks."""
        policy.insert(EVERY_TYPE, 0)
        policy.use(EVERY_TYPE)
        policy.remove(EVERY_TYPE[:1], 0)
        assert set(drain(policy, 0, len(EVERY_TYPE) - 1)) == set(EVERY_TYPE[1:])

    def test_any_walk_through_the_calls(self) -> None:
        """Random calls, compared with a model: every resident is offered, and nothing else."""
        pytest.importorskip("hypothesis")
        from .policy_machine import run_policy_machine

        run_policy_machine(self.make_policy, self.capacities, self.max_examples)
