"""The contract of every manager, written once over its core."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from types import TracebackType
from typing import Self

from ..checks import (
    COLD_ADMISSIONS,
    WHEN_FULL,
    WRITE_POLICIES,
    check_choice,
    check_count,
    check_seconds,
    check_watermarks,
)
from ..clock import SystemClock
from ..core import Core
from ..errors import ConfigError
from ..events import OffloadingEvent
from ..keys import check_chain, check_hashes, check_key_lengths
from ..lease import LeaseScope, ObservedLeaseScope
from ..metrics import ManagerStats
from ..movement.remote.part import RemoteOptions
from ..named import Named
from ..observing import Observer
from ..open_store import Outcome
from ..options import CoreOptions
from ..payloads import check_payloads, check_sizes
from ..request import ObservedRequestScope, RequestScope
from ..retention import Retention, as_retention
from ..shares import Shares
from ..streamed import Source, store_from_source
from ..twophase import Spec
from ..types import (
    BlockHash,
    BlockLocation,
    BlockState,
    Buffer,
    Clock,
    EvictionPolicy,
    FlushResult,
    ForecastingPolicy,
    Key,
    Lease,
    LoadStoreSpec,
    PrepareStoreOutput,
    Request,
    StoreResult,
    Tier,
    TierState,
)
from ..views import warn_derived

STAGING_BYTES = 256 * 1024 * 1024
RESERVATION_TTL_S = 600.0
CLOSE_TIMEOUT_S = 30.0
WATERMARKS = (0.02, 0.05)
UNOBSERVED = nullcontext()


class Contract:
    """The coroutine contract, seen from inside one namespace of a core.

    Every method may be used from the event loop alone that the manager was opened on, raises
    `ClosedError` before open and after close, and `WrongLoopError` from anywhere else. A method
    that needs neither I/O nor a copy beyond 256 KiB returns without suspending.
    """

    def __init__(self, core: Core, namespace: str | None) -> None:
        self._core = core
        # None is the manager's own namespace, whose keys are the bare hashes.
        self._namespace = namespace
        self._name_of_keys = core.namespace if namespace is None else namespace
        self._check = core.check
        self._sees_all = namespace is None

    @property
    def block_bytes(self) -> int:
        """Bytes of a block at most."""
        return self._core.block_bytes

    @property
    def reservation_ttl_s(self) -> float:
        """Seconds until what was prepared and not completed is taken back."""
        return self._core.options.reservation_ttl_s

    @property
    def clock(self) -> Clock:
        """The time that the manager goes by."""
        return self._core.clock

    def tier_states(self) -> dict[str, TierState]:
        """Return what each tier can do now, by its name; allowed after close too."""
        levels, remote = self._core.index.levels, self._core.remote
        if remote is not None:
            levels = [*levels, remote.level]
        return {
            level.tier.name: getattr(level.tier, "state", TierState.SERVING) for level in levels
        }

    # Looking

    async def lookup(self, block_hashes: Sequence[BlockHash]) -> int:
        """Return the prefix hit: the count of leading ready blocks, over all tiers.

        Changes no recency. Never suspends, but with a `RemoteTier` that has to be asked: then for
        its `remote_timeout_s` at most.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
        """
        self._check()
        keys = self._keys(check_hashes(block_hashes))
        hit = self._core.index.prefix_hit(keys)
        if hit < len(keys) and self._core.remote is not None:
            hit = await self._core.remote.prefix(keys)
        counters = self._core.index.counters_of(self._namespace)
        counters["hits"] += hit
        if hit < len(keys):
            counters["misses"] += len(keys) - hit
        return hit

    def locate(self, block_hashes: Sequence[BlockHash]) -> list[BlockLocation]:
        """Return state and highest tier of each block; no use, no I/O.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
        """
        self._core.check()
        index = self._core.index
        found: list[BlockLocation] = []
        for key in self._keys(check_hashes(block_hashes)):
            entry = index.ready.get(key)
            if entry is not None:
                found.append(BlockLocation(BlockState.READY, index.levels[entry.level].tier.name))
            else:
                found.append(self._core.locate_far(key))
        return found

    def get_stats(self) -> ManagerStats:
        """Return a snapshot of the counters; allowed after close too.

        Hits and misses of the manager are those of `lookup` and `request`, hits of a tier those of
        loads.
        """
        return self._core.stats(self._namespace, everywhere=self._sees_all)

    def events(self) -> AsyncIterator[OffloadingEvent]:
        """Subscribe, at this call, to what happens from now on; ends when the manager closes.

        Not a coroutine: `async for event in manager.events()`.

        A reader that is slower than the events misses the oldest, and is told how many.
        """
        self._core.check()
        own = self._core.namespace if self._namespace is None else self._namespace
        return self._core.events.subscribe(None if self._sees_all else own)

    # Storing and loading

    async def store(
        self, block_hashes: Sequence[BlockHash], payloads: Sequence[Buffer]
    ) -> StoreResult:
        """Copy the payloads of a chain in, head first; one use of the chain.

        What exceeds the hottest tier goes further down, and colder blocks give way. Each hash is
        in exactly one of `stored`, `present` and `rejected` of the result; a hash that is given
        twice is stored once, with its first payload.

        Cancelled, blocks whose bytes were not complete are not stored.

        Raises:
            ConfigError: Unequal lengths, a payload longer than a block, or a hash that is too long.
            TypeError: A hash is no `bytes`, `str` or `int`, or a payload no buffer.
        """
        core = self._core
        core.check()
        hashes = check_hashes(block_hashes)
        if len(payloads) != len(hashes):
            raise ConfigError(f"{len(hashes)} block hashes, but {len(payloads)} payloads")
        data = check_payloads(payloads, core.block_bytes)
        check_key_lengths(hashes, self._name_of_keys)
        keys = self._keys(hashes)
        with core.observed("store", keys) if core.observers else UNOBSERVED:
            outcome = await core.store(keys, data)
        core.index.use(list(dict.fromkeys(keys)))
        return self._to_result(outcome)

    async def store_from(
        self, block_hashes: Sequence[BlockHash], sizes: Sequence[int], source: Source
    ) -> StoreResult:
        """Store a chain whose payloads arrive little by little, head first; else as `store`.

        They are filled in straight into the slots, or where that takes more than free memory, into
        a buffer for a group of them; never are all in memory beside the tiers.

        If the source raises, or it is cancelled, none of the blocks stay that it stored.

        Raises:
            ConfigError: Not as many sizes as hashes, one that is longer than a block, or a hash
                that is too long.
            TypeError: A hash is no `bytes`, `str` or `int`, or a size no integer.
        """
        core = self._core
        core.check()
        hashes = check_hashes(block_hashes)
        check_key_lengths(hashes, self._name_of_keys)
        keys = self._keys(hashes)
        with core.observed("store", keys) if core.observers else UNOBSERVED:
            outcome = await store_from_source(core, keys, sizes, source)
        core.index.use(list(dict.fromkeys(keys)))
        return self._to_result(outcome)

    def load(
        self, block_hashes: Sequence[BlockHash], *, timeout_s: float | None = None
    ) -> AbstractAsyncContextManager[Lease]:
        """Pin blocks and lease read-only views of them, in the order asked; one use of the chain.

        Views of memory are the slots themselves, without a copy; cold blocks are read first. They
        are valid inside the `async with` alone, which unpins however it is left.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
            BlockNotFoundError: On entry: some are absent or pending; names them.
            CapacityError: On entry: more has to be read at once than fits the memory there is.
            LoadTimeoutError: On entry: `timeout_s` passed; recompute.
            TierError: On entry: a tier could not read some.
        """
        if timeout_s is not None:
            check_seconds("timeout_s", timeout_s)
        hashes = check_hashes(block_hashes)
        scope = ObservedLeaseScope if self._core.observers else LeaseScope
        return scope(self._core, self._keys(hashes), hashes, timeout_s)

    def request(
        self,
        block_hashes: Sequence[BlockHash],
        *,
        wait_pending_s: float = 0.0,
        retention: Retention | float | None = None,
    ) -> AbstractAsyncContextManager[Request]:
        """Open the scope of one prompt's chain; leaving it counts as one use of the whole chain.

        Args:
            block_hashes: The chain, head first.
            wait_pending_s: Seconds to wait for blocks that another caller is storing.
            retention: How likely, or how soon, the chain is used again: a likelihood from 0 to 1,
                or a `Retention`. It can be said later too, by setting `retention` of the request.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
            ConfigError: `wait_pending_s` is negative or not finite, or `retention` is neither.
        """
        if wait_pending_s != 0.0:
            check_seconds("wait_pending_s", wait_pending_s)
        hashes = check_chain(block_hashes, self._name_of_keys)
        scope = ObservedRequestScope if self._core.observers else RequestScope
        return scope(
            self._core,
            self._keys(hashes),
            hashes,
            wait_pending_s,
            None if retention is None else as_retention(retention),
            self._to_result,
        )

    async def touch(self, block_hashes: Sequence[BlockHash]) -> None:
        """Count one use of a chain; blocks that are not ready are passed over.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
        """
        self._core.check()
        self._core.index.use(list(dict.fromkeys(self._keys(check_hashes(block_hashes)))))

    # Leaving

    async def evict(
        self, block_hashes: Sequence[BlockHash] | None = None, *, num_blocks: int | None = None
    ) -> list[BlockHash]:
        """Remove these blocks, or the `num_blocks` coldest, from every tier; return what left.

        Pinned and pending blocks stay. A block on its way between tiers is waited for. Once this
        returned, what left does not come back after a crash of the process; after a power loss,
        once `flush` returned too. Many leave a slice at a time, and other tasks run in between.
        Cancelled, it goes on.

        Raises:
            ConfigError: Neither or both are given, or `num_blocks` is negative.
            TypeError: A hash is no `bytes`, `str` or `int`.
            TierError: A tier could not erase some; they left, but may come back after a restart.
        """
        core = self._core
        core.check()
        if block_hashes is not None and num_blocks is None:
            keys = list(dict.fromkeys(self._keys(check_hashes(block_hashes))))
            left = await core.removal.evict(keys)
            return [key[1] if isinstance(key, tuple) else key for key in left]
        if block_hashes is None and num_blocks is not None:
            check_count("num_blocks", num_blocks, least=0)
            entries = await core.removal.evict_coldest(
                num_blocks, self._namespace, everywhere=self._sees_all
            )
            return [entry.block_hash for entry in entries]
        raise ConfigError("evict takes either block_hashes or num_blocks=")

    async def forget(self, block_hashes: Sequence[BlockHash]) -> list[BlockHash]:
        """Remove the blocks of a chain that is over from every tier; return what left.

        Those that another chain was seen to share since the manager was opened stay, as do pinned
        and pending ones, and what is used before this returns: so of a chat that has ended, all but
        the system prompt leaves. Else as `evict`. A request does the same on its way out, with
        `retention=Retention.SESSION_OVER`.

        Args:
            block_hashes: The chain as it was used last, head first.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
            TierError: A tier could not erase some; they left, but may come back after a restart.
        """
        core = self._core
        core.check()
        keys = list(dict.fromkeys(self._keys(check_hashes(block_hashes))))
        return [entry.block_hash for entry in await core.removal.forget(keys)]

    async def clear(self) -> None:
        """Evict everything that is not pinned or pending, for good; cancelled, it goes on.

        Raises:
            TierError: A tier could not erase some; they left, but may come back after a restart.
        """
        core = self._core
        core.check()
        await core.removal.clear(
            self._namespace,
            everywhere=self._sees_all,
            names=core.namespaces() if self._sees_all else [self._name_of_keys],
        )

    async def flush(self) -> FlushResult:
        """Copy what lies only in memory to the persistent tier and make it durable; evict nothing.

        Returns:
            Counts of blocks, those of every namespace: what is durable now, and what is not, for
            the persistent tier had no free slot or there is none.

        Raises:
            TierError: The tier could not make sure of what it has.
        """
        self._core.check()
        return await self._core.flush()

    # Two phases, for engines that move the bytes themselves

    async def prepare_store(
        self, block_hashes: Sequence[BlockHash], *, sizes: Sequence[int] | None = None
    ) -> PrepareStoreOutput | None:
        """Reserve slots of the hottest tier for the blocks that are neither present nor pending.

        They are pending until `complete_store`, or until `reservation_ttl_s` passed. Not a use.

        Args:
            block_hashes: The chain, head first.
            sizes: Payload bytes of each; `block_bytes` where it is not given.

        Returns:
            What to store, where, and what left to make room; `None` if there is no room, and then
            nothing was changed. Cancelled, what was reserved is given up.

        Raises:
            ConfigError: Unequal lengths, a size that is negative or too long, a hash too long.
            TypeError: A hash is no `bytes`, `str` or `int`, or a size no integer.
        """
        core, index = self._core, self._core.index
        core.check()
        hashes = check_hashes(block_hashes)
        if sizes is not None:
            check_sizes(sizes, len(hashes), core.block_bytes)
        check_key_lengths(hashes, self._name_of_keys)
        keys = self._keys(hashes)
        new = core.unknown(keys)
        if sizes is None:
            new_sizes: Sequence[int] = [core.block_bytes] * len(new)
        else:
            size_of = dict(zip(reversed(keys), reversed(sizes), strict=True))
            new_sizes = [size_of[key] for key in new]
        named = Named(index, [] if len(new) == len(keys) else [*{*keys} - {*new}])
        try:
            reserved = await core.reserve(new, new_sizes, named)
        finally:
            named.release()
        if reserved is None:
            return None
        to_store = tuple(self._to_hashes(new))
        spec = Spec(to_store, reserved.stored, index, core.two_phase, writable=True)
        evicted = reserved.evicted
        return PrepareStoreOutput(to_store, spec, tuple(self._to_hashes(evicted)))

    async def complete_store(self, block_hashes: Sequence[BlockHash], success: bool = True) -> None:
        """Publish reserved blocks, or with `success=False` give them up; not a use.

        Blocks that are unknown, ready, or being stored by `store` are passed over. Their
        views end; drop what you made over them (slices, arrays) first, for it could still write.
        A completion is of a hash, so where an earlier holder of a block was given up, the first
        one is taken for that holder's, and passed over: no block is published half written.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
            TierError: The hottest tier is a disk and could not write some; those were given up.
        """
        core = self._core
        core.check()
        keys = self._keys(check_hashes(block_hashes))
        warn_derived(await core.complete_store(keys, success=success), writable=success)

    async def prepare_load(self, block_hashes: Sequence[BlockHash]) -> LoadStoreSpec:
        """Pin blocks, counted, and say where they lie; cold ones are read first. Not a use.

        They stay pinned until `complete_load`, or until `reservation_ttl_s` passed. Cancelled,
        nothing stays pinned.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
            BlockNotFoundError: Some are absent or pending; names them, and nothing was pinned.
            CapacityError: More has to be read at once than fits the memory there is.
            TierError: A tier could not read some.
        """
        core = self._core
        core.check()
        hashes = tuple(check_hashes(block_hashes))
        entries = await core.prepare_load(self._keys(hashes))
        return Spec(hashes, entries, core.index, core.two_phase, writable=False)

    async def complete_load(self, block_hashes: Sequence[BlockHash]) -> None:
        """Unpin what `prepare_load` pinned; with the last one of a block its views end.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
            NotPinnedError: Some are not held, or not any more; then nothing was changed.
        """
        core = self._core
        core.check()
        warn_derived(core.two_phase.end_load(self._keys(check_hashes(block_hashes))))

    def observe(self, observer: Observer) -> None:
        """Have an observer see each request, load and store of all namespaces from now on."""
        self._core.observers.append(observer)

    def check_invariants(self) -> None:
        """Raise `AssertionError` where the manager's books do not balance; for tests."""
        self._core.index.check_invariants()

    # Inside

    def _keys(self, hashes: Sequence[BlockHash]) -> Sequence[Key]:
        namespace = self._namespace
        if namespace is None:
            return hashes
        return [(namespace, block_hash) for block_hash in hashes]

    def _to_hashes(self, keys: Iterable[Key]) -> list[BlockHash]:
        """Return the hashes of those keys that are of this namespace."""
        if not self._core.index.namespaced:
            return list(keys)  # type: ignore[arg-type]  # no namespace but the manager's own
        if self._namespace is None:
            return [key for key in keys if not isinstance(key, tuple)]
        return [key[1] for key in keys if isinstance(key, tuple) and key[0] == self._namespace]

    def _to_result(self, outcome: Outcome) -> StoreResult:
        rejected = outcome.rejected
        return StoreResult(
            stored=tuple(self._to_hashes(outcome.stored)),
            present=tuple(self._to_hashes(outcome.present)),
            rejected=dict(zip(self._to_hashes(rejected), rejected.values(), strict=True)),
            evicted=tuple(self._to_hashes(outcome.evicted)),
            waited_s=outcome.waited_s,
        )

    def _sees(self, key: Key) -> bool:
        return self._sees_all or self._owns(key)

    def _owns(self, key: Key) -> bool:
        return (key[0] if isinstance(key, tuple) else None) == self._namespace


class Manager(Contract):
    """A manager that owns its tiers; base of the five that have a name of their own."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        policy: EvictionPolicy,
        *,
        namespace: str,
        staging_bytes: int,
        reservation_ttl_s: float,
        clock: Clock | None,
        promote_threshold: int | None = None,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
        cold_admission: str = "all",
        watermarks: tuple[float, float] = WATERMARKS,
        when_full: str = "wait",
        write_policy: str = "back",
        shares: Shares | None = None,
        remote: RemoteOptions | None = None,
    ) -> None:
        check_choice("cold_admission", cold_admission, COLD_ADMISSIONS)
        check_choice("when_full", when_full, WHEN_FULL)
        check_choice("write_policy", write_policy, WRITE_POLICIES)
        check_watermarks(watermarks)
        admissions = {"cold_admission": cold_admission}
        if remote is not None:
            admissions["remote_admission"] = remote.admission
        for setting, admission in admissions.items():
            if admission == "likely" and not isinstance(policy, ForecastingPolicy):
                raise ConfigError(
                    f"{setting}='likely' needs a policy that forecasts, as policy='weighted' does"
                )
        check_count("staging_bytes", staging_bytes, least=0)
        check_seconds("reservation_ttl_s", reservation_ttl_s, positive=True)
        check_seconds("close_timeout_s", close_timeout_s, positive=True)
        if promote_threshold is not None:
            check_count("promote_threshold", promote_threshold)
        options = CoreOptions(
            clock=SystemClock() if clock is None else clock,
            namespace=namespace,
            staging_bytes=staging_bytes,
            reservation_ttl_s=reservation_ttl_s,
            promote_threshold=promote_threshold,
            close_timeout_s=close_timeout_s,
            cold_admission=cold_admission,
            watermarks=watermarks,
            may_wait=when_full == "wait",
            writes_through=write_policy == "through",
            shares=shares,
            remote=remote,
        )
        super().__init__(Core(type(self).__name__, tiers, policy, options), None)

    async def __aenter__(self) -> Self:
        """Open the tiers and start the background tasks; only once.

        Raises:
            ClosedError: It was opened before.
            TierLockedError: Another opener has a tier.
            ConfigError: A tier on disk has another geometry or format.
        """
        await self._core.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Refuse new work, drain, make durable and close, in a bounded time; idempotent.

        Also when the body raised or was cancelled. What does not fit the persistent tier gives
        way to what is hotter.

        Raises:
            TierError: A tier could not be made durable or closed; everything else was closed.
        """
        await self._core.close()

    def __repr__(self) -> str:
        index = self._core.index
        tiers = ", ".join(
            f"{level.tier.name} {level.blocks}/{level.slots.capacity}" for level in index.levels
        )
        phase = self._core.lifecycle.phase.value
        return f"<{type(self).__name__} {phase}: {tiers}; {len(index.pinned)} pinned>"
