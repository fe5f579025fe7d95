"""The front door: tiers, policy, prefetch and lifecycle in one awaitable manager."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Self

from ..checks import COLD_ADMISSIONS, check_choice, check_count, check_seconds
from ..core import check_tiers
from ..errors import TierError
from ..keys import check_hashes, check_namespace
from ..movement.remote.part import RemoteOptions
from ..movement.remote.sightings import ASK_BLOCKS
from ..named import Named
from ..policy import make_policy, policy_maker
from ..policy.partitions import make_partitions
from ..prefetch import Prefetcher
from ..remote.protocol import RemoteTier
from ..shares import NamespaceShare, Shares, check_shares
from ..types import BlockHash, Clock, EvictionPolicy, Key, Tier
from .contract import (
    CLOSE_TIMEOUT_S,
    RESERVATION_TTL_S,
    STAGING_BYTES,
    WATERMARKS,
    Contract,
    Manager,
)


class AsyncLRUManager(Manager):
    """Keeps blocks in one to four tiers, with one policy over all of them.

    It owns its tiers, its policy, its background tasks and its shutdown; it works in the event
    loop that it is opened on, and nowhere else.

    Args:
        hot: First tier, in memory.
        warm: Second tier, in memory.
        cold: Third tier, on disk.
        remote: Last tier: a `RemoteTier`, which is an engine shared with other managers, or a
            `Tier` with slots of this manager alone.
        policy: `"weighted"`, `"lru"`, `"arc"`, `"s3fifo"`, `"fifo"`, or an `EvictionPolicy` of
            your own, one object a manager; or what makes one, as its class does.
        prefetch_lookahead: Hinted blocks that are read at a time; and those that are read ahead
            without a hint, where a request hits a chain whose head is in memory and the rest not,
            and there is room that was made ahead.
        promote_threshold: Uses in a lower tier that promote a block to the hot one.
        namespace: Isolation domain that is part of every key.
        staging_bytes: Budget of the buffers for blocks that have no address of their own.
        reservation_ttl_s: Seconds until a two-phase holder that never completes is given up.
        cold_admission: `"all"` writes what leaves memory to a persistent tier; `"reused"`, which
            spares the disk, only what was used beyond the use that stored it, at `flush` too;
            `"likely"` also what the policy finds likelier than not to be used again.
        watermarks: Shares of the slots of a tier above another. Where fewer are free than the
            first, the coldest blocks are moved down in the background until as many are free as
            the second, so that a store seldom waits for a lower tier. `(0, 0)` for never.
        when_full: What a store does that needs room in a lower tier nevertheless: `"wait"` (its
            result says for how long), or `"reject"` (`RejectReason.THROTTLED`).
        write_policy: `"back"` writes a block to disk when it leaves memory, and at `flush` and
            close; `"through"` also before the `store` returns that brings it.
        shares: What namespaces may have at most, and what is kept for them, by name (`namespace`
            for the manager's own). Each of these has an eviction policy of its own then, so
            `policy` is a name or what makes one, and no object.
        clock: Time; tests inject `kvoffload.testing.ManualClock`.
        close_timeout_s: Seconds for draining and flushing at close, and as much for the tiers.
        remote_timeout_s: Seconds that a call to a `RemoteTier` may take: a lookup, or 32 MiB read
            or written. The first one that takes longer, or fails, makes the manager do without it
            until a probe in the background finds the engine well.
        remote_ttl_s: Seconds that its answer to a lookup is believed.
        remote_queue_bytes: Payload bytes of blocks that wait to be sent to it; what exceeds them
            is not sent, and counted in `TierStats.dropped_blocks`.
        remote_admission: Which blocks are sent to it: all that become ready here, or as
            `cold_admission`, when they are used.

    Raises:
        ConfigError: A setting is wrong, or the tiers differ in `block_bytes` or share a name; or
            the shares reserve more than the tiers have.
    """

    def __init__(
        self,
        *,
        hot: Tier,
        warm: Tier | None = None,
        cold: Tier | None = None,
        remote: Tier | RemoteTier | None = None,
        policy: str | EvictionPolicy | Callable[[], EvictionPolicy] = "weighted",
        prefetch_lookahead: int = 4,
        promote_threshold: int = 3,
        namespace: str = "",
        staging_bytes: int = STAGING_BYTES,
        reservation_ttl_s: float = RESERVATION_TTL_S,
        cold_admission: str = "all",
        watermarks: tuple[float, float] = WATERMARKS,
        when_full: str = "wait",
        write_policy: str = "back",
        shares: Mapping[str, NamespaceShare] | None = None,
        clock: Clock | None = None,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
        remote_timeout_s: float = 0.5,
        remote_ttl_s: float = 1.0,
        remote_queue_bytes: int = 256 * 1024 * 1024,
        remote_admission: str = "all",
    ) -> None:
        check_count("prefetch_lookahead", prefetch_lookahead)
        check_seconds("remote_timeout_s", remote_timeout_s, positive=True)
        check_seconds("remote_ttl_s", remote_ttl_s)
        check_count("remote_queue_bytes", remote_queue_bytes, least=0)
        check_choice("remote_admission", remote_admission, COLD_ADMISSIONS)
        tiers = [tier for tier in (hot, warm, cold) if tier is not None]
        far: RemoteOptions | None = None
        # One with slots is the manager's own; one with keys it shares with others.
        if isinstance(remote, RemoteTier):
            far = RemoteOptions(
                remote, remote_timeout_s, remote_ttl_s, remote_queue_bytes, remote_admission
            )
        elif remote is not None:
            tiers.append(remote)
        accounts = None
        if shares:
            check_tiers(tiers)
            check_namespace(namespace)
            shares = check_shares(shares, tiers)
            accounts = _accounts(shares, policy, namespace, hot.block_bytes)
        self._shares = MappingProxyType(dict(shares or {}))
        super().__init__(
            tiers,
            make_policy(policy) if accounts is None else accounts.policy,
            namespace=namespace,
            staging_bytes=staging_bytes,
            reservation_ttl_s=reservation_ttl_s,
            clock=clock,
            promote_threshold=promote_threshold,
            close_timeout_s=close_timeout_s,
            cold_admission=cold_admission,
            watermarks=watermarks,
            when_full=when_full,
            write_policy=write_policy,
            shares=accounts,
            remote=far,
        )
        self._prefetcher = Prefetcher(
            self._core.index,
            self._is_wanted,
            self._bring_up,
            batch_blocks=prefetch_lookahead,
            workers=1,
            may_fetch=self._may_bring_up,
            find=None if far is None else self._find,
        )
        self._core.prefetchers.append(self._prefetcher)
        self._lookahead = prefetch_lookahead
        self._core.read_ahead = self._read_ahead

    @property
    def shares(self) -> Mapping[str, NamespaceShare]:
        """What namespaces may have, by name; empty where none has a share."""
        return self._shares

    def hint_prefetch(self, block_hashes: Sequence[BlockHash]) -> int:
        """Queue blocks of lower tiers to be brought up in the background; return how many were.

        With a `RemoteTier`, also those that are not here and may be there: that is asked later.

        Never waits. A full queue drops its oldest and counts them in `prefetch_dropped`. They are
        read behind what somebody waits for, into room that stores can spare.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
        """
        return _hint(self, self._prefetcher, block_hashes)

    def cancel_prefetch(self, block_hashes: Sequence[BlockHash]) -> int:
        """Take blocks back out of the queue; return how many. What is being read goes on.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
        """
        return _cancel(self, self._prefetcher, block_hashes)

    def namespace(self, name: str) -> NamespaceView:
        """Return this manager as seen from inside one namespace.

        For tenants that share a manager: the same hash in two namespaces is two blocks. The
        manager itself looks up and stores in its own namespace alone (`namespace=` when it was
        made), but its `clear`, `evict(num_blocks=)`, stats and events are those of all.

        Raises:
            ConfigError: The name is no `str`, or too long.
        """
        return NamespaceView(self, name)

    def namespaces(self) -> list[str]:
        """Return the names of the namespaces with blocks or a share, the manager's own first."""
        own, *others = self._core.namespaces()
        return [own, *sorted({*others, *self._shares} - {own})]

    # Inside

    def _read_ahead(self, keys: Sequence[Key]) -> Sequence[Key]:
        """Hint the first blocks of a chain that are not in memory, if its head is.

        Nobody asked for it: so only into room that was made ahead.
        """
        ready, levels = self._core.index.ready, self._core.index.levels

        def is_in_memory(key: Key) -> bool:
            entry = ready.get(key)  # none where only the remote tier has it
            return entry is not None and levels[entry.level].tier.addressable

        if not (keys and levels[0].low) or is_in_memory(keys[-1]):
            return ()
        first = 0
        while is_in_memory(keys[first]):
            first += 1
        ahead = keys[first : first + self._lookahead] if first else ()
        return self._prefetcher.hint(ahead, asked=False)

    async def _may_bring_up(self) -> bool:
        """Wait until nobody waits for a read, and for room that stores can spare."""
        await self._core.quiet()
        return await self._core.loading.spare_room()

    def _is_wanted(self, key: Key) -> bool:
        index, remote = self._core.index, self._core.remote
        entry = index.ready.get(key)
        if entry is not None:
            return entry.level > 0
        return remote is not None and key not in index.pending and remote.may_have(key)

    async def _find(self, keys: Sequence[Key]) -> Sequence[Key]:
        """Return those of hinted blocks that are here or on the remote tier."""
        index, remote = self._core.index, self._core.remote
        assert remote is not None
        far = [key for key in keys if key not in index.ready]
        if not far:
            return keys
        sizes: Mapping[Key, int | None] = {}
        ahead = [key for key in self._prefetcher.waiting(ASK_BLOCKS) if key not in index.ready]
        try:
            sizes = await remote.sizes(far, ahead)
        except TierError:  # told where it happened
            index.count("prefetch_dropped", far)
        return [key for key in keys if sizes.get(key) is not None or key in index.ready]

    async def _bring_up(self, keys: Sequence[Key]) -> Sequence[Key]:
        index, remote = self._core.index, self._core.remote
        named = Named(index, tuple(self._prefetcher.hinted))
        near = [index.ready[key] for key in keys if key in index.ready]
        if near:
            await self._core.loading.promote(near, named)
        if remote is not None and len(near) < len(keys):
            await remote.bring_ahead([key for key in keys if key not in index.ready], named)
        return [key for key in keys if (entry := index.ready.get(key)) and entry.level == 0]


class NamespaceView(Contract):
    """An `AsyncLRUManager` seen from inside one namespace; leaving it closes nothing.

    Its stats, events, `clear` and `evict` see its own blocks alone. Of a tier's stats it has the
    capacity, the state, and the blocks (and their bytes) that have their home there; the rest is 0.
    """

    def __init__(self, manager: AsyncLRUManager, name: str) -> None:
        core = manager._core
        check_namespace(name)
        super().__init__(core, None if name == core.namespace else name)
        self._sees_all = False
        self._name = name
        self._manager = manager
        core.index.namespaced = core.index.namespaced or self._namespace is not None

    def hint_prefetch(self, block_hashes: Sequence[BlockHash]) -> int:
        """Queue blocks to be brought up; see `AsyncLRUManager.hint_prefetch`."""
        return _hint(self, self._manager._prefetcher, block_hashes)

    def cancel_prefetch(self, block_hashes: Sequence[BlockHash]) -> int:
        """Take hints back; see `AsyncLRUManager.cancel_prefetch`."""
        return _cancel(self, self._manager._prefetcher, block_hashes)

    def namespace(self, name: str) -> NamespaceView:
        """Return the manager as seen from inside another namespace; names do not nest."""
        return self._manager.namespace(name)

    async def __aenter__(self) -> Self:
        """Return the view; the manager must be open when it is used."""
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do nothing: the manager is closed by who opened it."""

    def __repr__(self) -> str:
        return f"<NamespaceView {self._name!r} of {self._manager!r}>"


def _hint(view: Contract, prefetcher: Prefetcher, block_hashes: Sequence[BlockHash]) -> int:
    view._core.check()
    return len(prefetcher.hint(view._keys(check_hashes(block_hashes))))


def _cancel(view: Contract, prefetcher: Prefetcher, block_hashes: Sequence[BlockHash]) -> int:
    view._core.check()
    return prefetcher.cancel(view._keys(check_hashes(block_hashes)))


def _accounts(
    shares: Mapping[str, NamespaceShare],
    policy: str | EvictionPolicy | Callable[[], EvictionPolicy],
    own_namespace: str,
    block_bytes: int,
) -> Shares:
    """Return the books of namespaces with shares, over a policy for each of them."""
    slots = {
        None if name == own_namespace else name: (
            None if share.max_bytes is None else share.max_bytes // block_bytes
        )
        for name, share in shares.items()
    }
    return Shares(shares, own_namespace, make_partitions(policy_maker(policy), slots))
