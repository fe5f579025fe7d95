"""Runs: whatever chains come, the table shows the same blocks as a plain model of it."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvoffload import Key, WeightedPolicy
from kvoffload.policy.runs import GHOST, Run

LEVELS = 2
# Chains of a small tree: the path to a node, so that prefixes are shared and branch.
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(
    lambda path: [tuple(path[: deep + 1]) for deep in range(len(path))]
)
# Blocks of no chain in particular, in any order.
LOOSE = st.lists(st.integers(0, 20).map(lambda n: ("loose", n)), max_size=6, unique=True)
CHAINS = st.one_of(PATHS, LOOSE)


class RunsMachine(RuleBasedStateMachine):
    """The weighted policy's records beside a dictionary of who is where."""

    @initialize()
    def start(self) -> None:
        """Begin with an empty policy."""
        self.policy = WeightedPolicy()
        self.policy.attach([8, 8])
        self.level_of: dict[Key, int] = {}

    @rule(chain=CHAINS, level=st.integers(0, LEVELS - 1))
    def insert(self, chain: list[Key], level: int) -> None:
        """Store what is new."""
        new = [key for key in chain if key not in self.level_of]
        self.policy.insert(new, level)
        self.level_of.update(dict.fromkeys(new, level))

    @rule(chain=CHAINS)
    def use(self, chain: list[Key]) -> None:
        """Use a chain, whatever of it is there."""
        self.policy.use(chain)

    @rule(data=st.data(), level=st.integers(0, LEVELS - 1))
    def remove_any(self, data: st.DataObject, level: int) -> None:
        """Evict blocks that a caller names, in any order."""
        here = sorted((key for key, at in self.level_of.items() if at == level), key=repr)
        if here:
            keys = data.draw(st.lists(st.sampled_from(here), unique=True, max_size=5))
            self.policy.remove(keys, level)
            for key in keys:
                del self.level_of[key]

    @rule(level=st.integers(0, LEVELS - 1), count=st.integers(1, 6), move=st.booleans())
    def evict(self, level: int, count: int, move: bool) -> None:
        """Make room, by eviction or by demotion."""
        keys = self.policy.victims(level, count, frozenset())
        self.policy.remove(keys, level)
        for key in keys:
            del self.level_of[key]
        if move:
            self.policy.insert(keys[::-1], 1 - level)
            self.level_of.update(dict.fromkeys(keys, 1 - level))

    @rule(level=st.integers(0, LEVELS - 1))
    def offer_all(self, level: int) -> None:
        """Each block once, as a close asks."""
        here = [key for key, at in self.level_of.items() if at == level]
        offered = self.policy.victims(level, 99, frozenset())
        assert len(offered) == len(set(offered))
        assert set(offered) == set(here)

    @invariant()
    def records_match(self) -> None:
        """Each block is in one run, at its level; counts and offers are right."""
        if not hasattr(self, "policy"):
            return
        table = self.policy._table
        runs = set(table._run_of.values())
        for run in runs:
            assert run.keys
            assert all(table.run_of(key) is run for key in run.keys)
            assert (run in table.ghosts) == (run.level == GHOST)
        shown = {key: run.level for run in runs for key in run.keys if run.level != GHOST}
        assert shown == self.level_of
        for level in range(LEVELS):
            assert table.resident[level] == list(shown.values()).count(level)
        assert table._num_ghosts == sum(len(run.keys) for run in table.ghosts)
        children: dict[Run, list[int]] = {}
        for run in runs:
            if run.parent is not None and run.level != GHOST:
                children.setdefault(run.parent, [0] * LEVELS)[run.level] += 1
        for run in runs:
            assert (run.children or [0] * LEVELS) == children.get(run, [0] * LEVELS)
            if run.level != GHOST and run.is_leaf:
                assert run.queue is not None, "nobody would ever evict it"
            if run.level == GHOST:
                assert run.queue is None


TestRuns = RunsMachine.TestCase
TestRuns.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
