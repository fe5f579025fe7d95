"""Shares: what a namespace may have at most, what is kept for it, and what it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, TypeAlias

from .checks import check_count
from .errors import ConfigError
from .keys import check_namespace
from .policy.partitions import PartitionedPolicy

if TYPE_CHECKING:
    from .blocks import BlockEntry
    from .types import Key, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceShare:
    """What a namespace may have, in bytes of payload over all tiers; a block counts once.

    Attributes:
        max_bytes: Its quota: it never has more, in any tier or in all of them. Blocks count from
            the moment that they get room, so pending ones do. `None` for no quota.
        reserved_bytes: As long as it has no more, none of its blocks is evicted for another
            namespace's. They may be demoted.

    Raises:
        ConfigError: A number is no integer of at least 0, or more is reserved than it may have.
    """

    max_bytes: int | None = None
    reserved_bytes: int = 0

    def __post_init__(self) -> None:
        check_count("reserved_bytes", self.reserved_bytes, least=0)
        if self.max_bytes is not None:
            check_count("max_bytes", self.max_bytes, least=0)
            if self.reserved_bytes > self.max_bytes:
                raise ConfigError(
                    f"reserved_bytes={self.reserved_bytes} is more than "
                    f"max_bytes={self.max_bytes} lets the namespace have"
                )


def check_shares(
    shares: Mapping[str, NamespaceShare], tiers: Sequence[Tier]
) -> Mapping[str, NamespaceShare]:
    """Return a copy of the shares.

    What is reserved is compared with the slots in whole blocks, so that each namespace can have
    its own while the others have theirs, if their blocks are whole ones. All slots may be
    reserved: then namespaces without a share have what the others leave unused.

    Raises:
        ConfigError: A name is no namespace, a share is none, or more is reserved than fits.
    """
    if not isinstance(shares, Mapping):
        raise ConfigError(f"shares must map namespaces to NamespaceShare, not {shares!r}")
    for name, share in shares.items():
        check_namespace(name)
        if not isinstance(share, NamespaceShare):
            raise ConfigError(f"the share of {name!r} must be a NamespaceShare, not {share!r}")
    block_bytes = tiers[0].block_bytes
    slots = sum(tier.num_blocks for tier in tiers)
    reserved = sum(-(-share.reserved_bytes // block_bytes) for share in shares.values())
    if reserved > slots:
        raise ConfigError(
            f"the shares reserve {reserved} blocks of {block_bytes} bytes in all, but the tiers "
            f"have {slots} slots together: reserve less"
        )
    return dict(shares)


class Nobody(Enum):
    """See `NOBODY`."""

    NOBODY = "nobody"


NOBODY: Final = Nobody.NOBODY
"""Room is made for no namespace in particular."""

Whom: TypeAlias = str | Nobody | None
"""The namespace that room is made for; `None` is the manager's own."""


def namespace_of(keys: Sequence[Key]) -> str | None:
    """Return the namespace of keys that are all of one; `None` for the manager's own."""
    return keys[0][0] if keys and isinstance(keys[0], tuple) else None


def whom_of(entries: Iterable[BlockEntry]) -> Whom:
    """Return the one namespace of all these blocks, or `NOBODY`."""
    whom: Whom = NOBODY
    for number, entry in enumerate(entries):
        if number and entry.namespace != whom:
            return NOBODY
        whom = entry.namespace
    return whom


class Shares:
    """Counts the bytes of each namespace, and knows what they may be.

    Attributes:
        policy: Orders the blocks of each namespace that has a share apart from the others'.
        max_bytes: The quotas, of those that have one.
        reserved_bytes: What is reserved, for those for whom something is.
    """

    def __init__(
        self, shares: Mapping[str, NamespaceShare], own_namespace: str, policy: PartitionedPolicy
    ) -> None:
        """Take shares by name, the manager's own namespace, and a policy partitioned by them."""
        self.policy = policy
        self.max_bytes: dict[str | None, int] = {}
        self.reserved_bytes: dict[str | None, int] = {}
        for name, share in shares.items():
            namespace = None if name == own_namespace else name
            if share.max_bytes is not None:
                self.max_bytes[namespace] = share.max_bytes
            if share.reserved_bytes:
                self.reserved_bytes[namespace] = share.reserved_bytes
        self._used: dict[str | None, int] = {}
        # Pending blocks that have no room yet, and wait for some.
        self._uncounted: set[BlockEntry] = set()

    def used(self, namespace: str | None) -> int:
        """Return the bytes of a namespace's blocks, ready or pending with room of their own."""
        return self._used.get(namespace, 0)

    def add(self, entries: Iterable[BlockEntry]) -> None:
        """Count new blocks."""
        for entry in entries:
            self._count(entry, entry.size)

    def drop(self, entries: Iterable[BlockEntry]) -> None:
        """Count blocks no more that left, or were given up."""
        for entry in entries:
            if entry in self._uncounted:
                self._uncounted.remove(entry)
            else:
                self._count(entry, -entry.size)

    def hold_back(self, entries: Iterable[BlockEntry]) -> None:
        """Don't count pending blocks until they are let in."""
        fresh = [entry for entry in entries if entry not in self._uncounted]
        self.drop(fresh)
        self._uncounted.update(fresh)

    def held_back(self, entries: Iterable[BlockEntry]) -> list[BlockEntry]:
        """Return those of the blocks that are not counted."""
        return [entry for entry in entries if entry in self._uncounted]

    def let_in(self, entries: Iterable[BlockEntry]) -> None:
        """Count blocks that were held back."""
        held = self.held_back(entries)
        self._uncounted.difference_update(held)
        self.add(held)

    def guards(self, whom: Whom) -> bool:
        """Tell whether anything is reserved for other namespaces."""
        return len(self.reserved_bytes) > (whom in self.reserved_bytes)

    def losable(
        self, entries: Iterable[BlockEntry], whom: Whom, lost: Mapping[str | None, int] | None
    ) -> list[BlockEntry]:
        """Return those of these blocks that may be evicted for a namespace's.

        Of a namespace that has something reserved, the first ones that don't take it below that;
        what comes after one that would stays, for it is of no use without.

        Args:
            entries: Blocks, in the order in which they would leave.
            whom: The namespace that they would leave for.
            lost: Bytes of each namespace that are to leave besides, if any are.
        """
        found: list[BlockEntry] = []
        spare: dict[str | None, int] = {}
        for entry in entries:
            namespace = entry.namespace
            reserved = self.reserved_bytes.get(namespace)
            if reserved is not None and namespace != whom:
                left = spare.get(namespace)
                if left is None:
                    left = self.used(namespace) - reserved - (lost or {}).get(namespace, 0)
                spare[namespace] = left - entry.size if entry.size <= left else 0
                # At its reserve, not even an empty block leaves.
                if left <= 0 or entry.size > left:
                    continue
            found.append(entry)
        return found

    def check(
        self, ready: Collection[BlockEntry], pending: Iterable[BlockEntry], num_levels: int
    ) -> None:
        """Raise `AssertionError` where the books differ from these blocks; for tests."""
        assert self._uncounted <= set(pending)
        used: Counter[str | None] = Counter()
        for entry in {*ready, *pending} - self._uncounted:
            used[entry.namespace] += entry.size
        assert {name: size for name, size in used.items() if size} == self._used
        for namespace, most in self.max_bytes.items():
            assert self.used(namespace) <= most, f"{namespace!r} has more than its quota"
        for number in range(num_levels):
            home = [entry for entry in ready if entry.level == number]
            assert self.policy.num_residents(number) == len(home)
            for namespace in self.policy.namespaces:
                mine = [entry for entry in home if entry.namespace == namespace]
                assert self.policy.num_residents(number, namespace) == len(mine)

    def _count(self, entry: BlockEntry, size: int) -> None:
        namespace = entry.namespace
        used = self._used.get(namespace, 0) + size
        if used:
            self._used[namespace] = used
        else:
            self._used.pop(namespace, None)  # there may be any number of names
