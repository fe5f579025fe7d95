"""What a policy would hit on a trace: block ids alone, no bytes, no waiting."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ..errors import ConfigError
from ..policy import POLICIES, WeightedPolicy
from ..policy.optimal import OptimalPolicy
from ..retention import Retention
from ..types import EvictionPolicy, Key
from .foresight import foretell
from .trace import Workload

Chains = Sequence[Sequence[Hashable]]


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came of simulating one policy at one size.

    Attributes:
        trace: Name of the workload.
        policy: Name of the policy.
        capacity: Blocks of the cache.
        visits: Blocks of all requests together.
        prefix_hits: Leading blocks that were there when their request came.
        block_hits: Blocks that were there, also behind a missing one.
        writes: Blocks that were let in.
        evictions: Blocks that left for others.
    """

    trace: str
    policy: str
    capacity: int
    visits: int
    prefix_hits: int
    block_hits: int
    writes: int
    evictions: int

    @property
    def prefix_hit_ratio(self) -> float:
        """Leading blocks that were there, 0 to 1: the share of a prefill that is saved."""
        return self.prefix_hits / self.visits if self.visits else 0.0

    @property
    def block_hit_ratio(self) -> float:
        """Blocks that were there, 0 to 1; a policy that tears chains apart has more of these."""
        return self.block_hits / self.visits if self.visits else 0.0


TOLD = "told"
"""Name, in simulations, of the weighted policy whose callers say what they know."""


def policy_for(name: str, chains: Chains) -> EvictionPolicy:
    """Return a new policy; `optimal` is told the requests.

    Raises:
        ConfigError: No policy of this name.
    """
    if name == OptimalPolicy.name:
        return OptimalPolicy(chains)
    if name == TOLD:
        return WeightedPolicy()
    if name not in POLICIES:
        names = ", ".join(sorted([*POLICIES, OptimalPolicy.name, TOLD]))
        raise ConfigError(f"unknown policy {name!r}: choose from {names}")
    return POLICIES[name]()


def simulate(
    workload: Workload,
    policy: str | EvictionPolicy,
    capacity: int,
    *,
    told: Sequence[Retention | None] = (),
    accuracy: float = 1.0,
    on_request: Callable[[], None] | None = None,
) -> Simulated:
    """Run requests one after the other against one tier of so many blocks.

    The policy is the very object that a manager would run. For each request its leading blocks
    that are there are counted; then what is missing is stored, as far as the policy admits it and
    there is room beside the request's own blocks; then the chain counts as used once.

    Args:
        workload: The requests; only their block ids matter.
        policy: Name of a policy, or a new object; `told` is the weighted one, whose callers say of
            each request whether its chain goes on.
        capacity: Blocks of the cache.
        accuracy: How often what they say is right, 0 to 1.
        told: What the caller of each request says of it; nothing for those beyond.
        on_request: Called after each request.

    Raises:
        ConfigError: `capacity` is below 1, or there is no such policy.
    """
    if capacity < 1:
        raise ConfigError(f"a cache has at least 1 block, not {capacity}")
    chains = [request.hash_ids for request in workload.requests]
    if isinstance(policy, str):
        name = policy
        policy = policy_for(name, chains)
        if name == TOLD:
            told = foretell(chains, accuracy)
    else:
        name = getattr(policy, "name", type(policy).__name__)
    policy.attach([capacity])
    resident: set[Key] = set()
    visits = prefix_hits = block_hits = writes = evictions = 0
    for chain, retention in zip_longest(chains, told[: len(chains)]):
        visits += len(chain)
        if resident.issuperset(chain):
            prefix_hits += len(chain)
            block_hits += len(chain)
        else:
            here = list(map(resident.__contains__, chain))
            prefix_hits += here.index(False)
            block_hits += sum(here)
            missing = [key for key, there in zip(chain, here, strict=True) if not there]
            missing = list(dict.fromkeys(missing))
            own = frozenset(chain)
            admitted = list(policy.admit(missing, 0, chain=chain, pinned=own, retention=retention))
            surplus = len(resident) + len(admitted) - capacity
            if surplus > 0:
                victims = policy.victims(0, surplus, own)
                policy.remove(victims, 0)
                resident.difference_update(victims)
                evictions += len(victims)
                del admitted[capacity - len(resident) :]
            policy.insert(admitted, 0)
            resident.update(admitted)
            writes += len(admitted)
        policy.use(list(dict.fromkeys(chain)), retention=retention)
        if on_request is not None:
            on_request()
    return Simulated(
        workload.name, name, capacity, visits, prefix_hits, block_hits, writes, evictions
    )


def least_capacity(
    workload: Workload, policy: str, prefix_hit_ratio: float, *, accuracy: float = 1.0
) -> int | None:
    """Return about the fewest blocks with which a policy reaches a prefix hit ratio.

    To 1 %, by bisection; `None` if all blocks together don't reach it.
    """
    low, high = 0, max(1, workload.num_distinct_blocks)

    def reached(capacity: int) -> float:
        return simulate(workload, policy, capacity, accuracy=accuracy).prefix_hit_ratio

    if reached(high) < prefix_hit_ratio:
        return None
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        if reached(middle) >= prefix_hit_ratio:
            high = middle
        else:
            low = middle
    return high
