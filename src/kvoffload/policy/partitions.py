"""One policy for each of some namespaces, and one for all others, together in one order."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..retention import Retention
from ..types import EvictionPolicy, ForecastingPolicy, Key


@dataclass(slots=True)
class Partition:
    """The blocks that one policy orders.

    Attributes:
        policy: It.
        most: Slots that they take at most, if that is known.
        resident: How many there are at each level.
    """

    policy: EvictionPolicy
    most: int | None = None
    resident: list[int] = field(default_factory=list)


class PartitionedPolicy:
    """Orders the blocks of each partition by a policy of its own; see `EvictionPolicy`.

    Between partitions, the one leaves first whose coldest block was used least recently. So each
    can be asked for victims alone, at no more cost than those take.

    Args:
        make: Makes a policy, a new one each time.
        slots: The namespaces that have a partition of their own (`None` for the manager's own),
            each with the slots that its blocks take at most, if that is known.

    Attributes:
        namespaces: Those that have a partition of their own.
        time_of: Says when a resident block was used last, in seconds.
    """

    def __init__(
        self, make: Callable[[], EvictionPolicy], slots: Mapping[str | None, int | None]
    ) -> None:
        self._own = {namespace: Partition(make(), most) for namespace, most in slots.items()}
        self._rest = Partition(make())
        self.namespaces = tuple(slots)
        self._partitions = (*self._own.values(), self._rest)
        self.time_of: Callable[[Key], float] = _at_one_time

    def attach(self, capacities: Sequence[int]) -> None:
        """Serve a manager with these levels; see `EvictionPolicy`."""
        for each in self._partitions:
            most = each.most
            each.policy.attach(
                capacities if most is None else [max(1, min(most, slots)) for slots in capacities]
            )
            each.resident = [0] * len(capacities)

    def admit(
        self,
        keys: Sequence[Key],
        level: int,
        *,
        chain: Sequence[Key] = (),
        pinned: Collection[Key] = (),
        retention: Retention | None = None,
    ) -> Collection[Key]:
        """Ask the policy of the chain's namespace."""
        if not keys:
            return keys
        policy = self._of(keys[0]).policy
        return policy.admit(keys, level, chain=chain, pinned=pinned, retention=retention)

    def insert(self, keys: Sequence[Key], level: int) -> None:
        """Add blocks to a level."""
        for each, group in self._groups(keys):
            each.policy.insert(group, level)
            each.resident[level] += len(group)

    def remove(self, keys: Sequence[Key], level: int) -> None:
        """Remove blocks from a level."""
        for each, group in self._groups(keys):
            each.policy.remove(group, level)
            each.resident[level] -= len(group)

    def use(self, keys: Sequence[Key], *, retention: Retention | None = None) -> None:
        """Note one use of a chain, which is of one namespace."""
        if keys:
            self._of(keys[0]).policy.use(keys, retention=retention)

    def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
        """Return the coldest blocks of a level."""
        return self.victims_among(level, count, pinned, list)

    def unpinned(self, keys: Sequence[Key]) -> None:
        """Offer these again."""
        for each, group in self._groups(keys):
            each.policy.unpinned(group)

    # Beyond the protocol

    def victims_among(
        self,
        level: int,
        count: int,
        pinned: Collection[Key],
        allowed: Callable[[list[Key]], list[Key]],
    ) -> list[Key]:
        """Return the coldest blocks of a level that may leave.

        Args:
            level: The level.
            count: Most blocks to return.
            pinned: Blocks that are nobody's victims.
            allowed: Given the victims of one partition, returns those that may leave.
        """
        offered = [
            iter(allowed(each.policy.victims(level, count, pinned)))
            for each in self._partitions
            if each.resident[level]
        ]
        if len(offered) == 1:
            return list(offered[0])[:count]
        # Never two of one partition: so each keeps its order, whatever the times are.
        heads = [
            (self.time_of(key), number, key)
            for number, keys in enumerate(offered)
            for key in _next(keys)
        ]
        heapq.heapify(heads)
        chosen: list[Key] = []
        while heads and len(chosen) < count:
            _, number, key = heapq.heappop(heads)
            chosen.append(key)
            for following in _next(offered[number]):
                heapq.heappush(heads, (self.time_of(following), number, following))
        return chosen

    def alone(self, namespace: str | None) -> EvictionPolicy | None:
        """Return the policy of a namespace that has its own, else `None`."""
        own = self._own.get(namespace)
        return None if own is None else own.policy

    def num_residents(self, level: int, *namespaces: str | None) -> int:
        """Return how many blocks there are at a level, of these namespaces if any are named."""
        chosen = [self._own[each] for each in namespaces] if namespaces else self._partitions
        return sum(each.resident[level] for each in chosen)

    # Inside

    def _of(self, key: Key) -> Partition:
        namespace = key[0] if isinstance(key, tuple) else None
        return self._own.get(namespace, self._rest)

    def _groups(self, keys: Sequence[Key]) -> Iterable[tuple[Partition, Sequence[Key]]]:
        """Return the blocks of each partition among these, in their order."""
        if len(keys) == 1:
            return [(self._of(keys[0]), keys)]
        groups: dict[int, tuple[Partition, list[Key]]] = {}
        for key in keys:
            each = self._of(key)
            groups.setdefault(id(each), (each, []))[1].append(key)
        return groups.values()


class ForecastingPartitions(PartitionedPolicy):
    """The same of policies that can tell what they expect; see `ForecastingPolicy`."""

    def likely(self, keys: Sequence[Key]) -> Collection[Key]:
        """Return those of these resident blocks that are likelier than not to be used again."""
        found: list[Key] = []
        for each, group in self._groups(keys):
            if isinstance(each.policy, ForecastingPolicy):
                found += each.policy.likely(group)
        return found


def make_partitions(
    make: Callable[[], EvictionPolicy], slots: Mapping[str | None, int | None]
) -> PartitionedPolicy:
    """Return a `PartitionedPolicy` of these, one that forecasts if its parts do."""
    kind = ForecastingPartitions if isinstance(make(), ForecastingPolicy) else PartitionedPolicy
    return kind(make, slots)


def _at_one_time(_: Key) -> float:
    return 0.0


def _next(keys: Iterable[Key]) -> Iterable[Key]:
    """Return the next one as a sequence of one, or nothing."""
    for key in keys:
        return (key,)
    return ()
