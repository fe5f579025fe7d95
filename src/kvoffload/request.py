"""The scope of one prompt: its hit blocks pinned, the rest stored as it is computed, one use."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio

from .blocks import BlockEntry
from .checks import check_count, check_seconds
from .core import Core
from .errors import ClosedError, ConfigError
from .lease import LeaseScope, ObservedLeaseScope
from .movement.planning import plan_load
from .open_store import Outcome
from .payloads import check_payloads
from .retention import Retention, as_retention
from .streamed import Source, skip_source, store_from_source
from .types import BlockHash, Buffer, Key, Lease, LoadPlan, RejectReason, StoreResult

if TYPE_CHECKING:
    from collections.abc import Callable


class RequestScope:
    """The chain of one prompt; see `kvoffload.types.Request`.

    `hit` blocks are pinned from entry to exit, and so is what `store` adds. Leaving the scope, in
    whatever way, takes all pins back and counts one use of the whole chain, tail first.
    """

    def __init__(
        self,
        core: Core,
        keys: Sequence[Key],
        block_hashes: Sequence[BlockHash],
        wait_pending_s: float,
        retention: Retention | None,
        to_result: Callable[[Outcome], StoreResult],
    ) -> None:
        self._core = core
        self._keys = keys
        self._block_hashes = block_hashes
        self._wait_pending_s = wait_pending_s
        self._retention = retention
        self._to_result = to_result
        self._pinned: list[BlockEntry] = []
        self._condemned = 0
        self._leases: set[LeaseScope] = set()
        self._ahead: Sequence[Key] = ()
        self._entered = False
        self._ended = False
        self._hit = 0
        self._is_far = False  # some of the hit blocks have to be fetched, and are not pinned yet
        self._next = 0
        self._rejection: RejectReason | None = None
        self._storing = False

    @property
    def hit(self) -> int:
        """Prefix hit: leading blocks that were ready on entry, pinned until the end.

        Those among them that only a `RemoteTier` has are pinned once they were loaded; until then
        its engine may evict them, and a load that names one raises `BlockNotFoundError`.

        Raises:
            ClosedError: The scope was not entered yet.
        """
        if not self._entered:
            raise ClosedError("use a request inside its `async with`")
        return self._hit

    @property
    def retention(self) -> Retention | None:
        """How likely, or how soon, the chain is used again, as far as its caller knows.

        Set it whenever more is known, until the scope is left; a number is a likelihood. Set to
        `Retention.SESSION_OVER`, the blocks that no other chain shares are freed on leaving.

        Raises:
            ConfigError: On setting: neither a number from 0 to 1 nor a `Retention`.
        """
        return self._retention

    @retention.setter
    def retention(self, retention: Retention | float | None) -> None:
        self._retention = as_retention(retention)

    async def __aenter__(self) -> RequestScope:
        """Find and pin the prefix hit, waiting for pending blocks as long as was said."""
        core = self._core
        core.check()
        if self._entered:
            raise ClosedError("a request is entered once: call request() again")
        self._entered = True
        index, keys = core.index, self._keys
        entries = index.prefix(keys)
        if len(entries) < len(keys):
            if self._wait_pending_s > 0:
                entries = await self._wait_for_pending(len(entries))
            hit = len(entries)
            if core.remote is not None and hit < len(keys):
                hit = await core.remote.prefix(keys)
                core.check()
                entries = [e for e in map(index.ready.get, keys[:hit]) if e is not None]
                self._is_far = len(entries) < hit
            index.count("misses", keys[hit:])
            keys = keys[:hit]
        index.pin(entries)
        self._pinned = entries
        self._condemned = index.condemned
        self._hit = self._next = len(keys)
        if core.read_ahead is not None:
            self._ahead = core.read_ahead(keys)
        index.count("hits", keys)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Count the one use and unpin."""
        if self._ended:
            return
        self._ended = True
        for prefetcher in self._core.prefetchers if self._ahead else ():
            prefetcher.cancel(self._ahead, asked=False)  # nobody will want them any more
        self._end()

    def plan(
        self, *, tokens_per_s: float, block_tokens: int = 16, deadline_s: float | None = None
    ) -> LoadPlan:
        """Say how many of the `hit` blocks to load so that all of them are there soonest.

        A cold block can take longer to read than to compute: from each tier's recent reads, and
        from what is being read from it now, it follows how long. Until a tier was read from, it
        counts as fast. Load `plan.blocks` of them, and compute the rest; those are there already,
        and are not stored again.

        Args:
            tokens_per_s: Tokens that the engine computes in a second of prefill.
            block_tokens: Tokens of a block.
            deadline_s: Seconds that loading may take at most.

        Raises:
            ClosedError: The scope was not entered yet, or left.
            ConfigError: A number that is not positive and finite.
        """
        self._check()
        check_seconds("tokens_per_s", tokens_per_s, positive=True)
        check_count("block_tokens", block_tokens)
        if deadline_s is not None:
            check_seconds("deadline_s", deadline_s)
        core = self._core
        levels = core.index.levels
        return plan_load(
            levels if core.remote is None else [*levels, core.remote.level],
            core.extent(self._keys[: self._hit]),  # one may have turned out to be damaged
            block_s=block_tokens / tokens_per_s,
            deadline_s=deadline_s,
        )

    def load(
        self, num_blocks: int | None = None, *, timeout_s: float | None = None
    ) -> AbstractAsyncContextManager[Lease]:
        """Lease the `hit` blocks, or the first `num_blocks` of them; not a use of its own.

        Raises:
            ConfigError: `num_blocks` is not from 0 to `hit`.
            LoadTimeoutError: On entry, if `timeout_s` passed first; recompute.
            CapacityError: On entry, if more has to be read at once than fits.
            BlockNotFoundError: On entry, if only a remote tier had some, and they are gone.
            TierError: On entry, if a tier could not read some.
        """
        self._check()
        count = self._hit
        if num_blocks is not None:
            count = check_count("num_blocks", num_blocks, least=0)
            if count > self._hit:
                raise ConfigError(f"num_blocks={count}, but only {self._hit} blocks were hit")
        scope = ObservedLeaseScope if self._core.observers else LeaseScope
        return scope(
            self._core,
            self._keys[:count],
            self._block_hashes[:count],
            timeout_s,
            self,
        )

    async def store(self, payloads: Sequence[Buffer]) -> StoreResult:
        """Store the next blocks of the chain, from where the call before stopped.

        A rejection ends the chain: what comes after it is rejected too, for no prefix would reach
        it. Cancelled, the blocks of this call are not stored, and the next call starts there.

        Raises:
            ConfigError: More payloads than blocks are left, or one is too long.
            TypeError: A payload is no buffer.
        """
        self._check()
        core = self._core
        core.check()
        keys = self._keys[self._next : self._next + len(payloads)]
        if len(payloads) > len(keys):
            raise ConfigError(
                f"{len(payloads)} payloads, but only {len(keys)} blocks of the chain are left"
            )
        data = check_payloads(payloads, core.block_bytes)
        if self._rejection is not None:
            self._next += len(keys)
            return self._to_result(self._rejected(keys, self._rejection))
        return await self._stored(keys, core.store(keys, data, self._keys, self._retention))

    async def store_from(self, sizes: Sequence[int], source: Source) -> StoreResult:
        """Store the next blocks of the chain, whose payloads arrive little by little.

        As `NamespaceView.store_from`. If the source raises, or it is cancelled, the blocks of this
        call are not stored, and the next call starts where this one did.

        Raises:
            ConfigError: More sizes than blocks are left, or one that is too long.
            TypeError: A size is no integer.
        """
        self._check()
        core = self._core
        core.check()
        keys = self._keys[self._next : self._next + len(sizes)]
        if len(sizes) > len(keys):
            raise ConfigError(f"{len(sizes)} payloads, but only {len(keys)} blocks are left")
        if self._rejection is not None:
            await skip_source(source, sizes)
            self._next += len(keys)
            return self._to_result(self._rejected(keys, self._rejection))
        storing = store_from_source(
            core, keys, sizes, source, chain=self._keys, retention=self._retention, is_chain=True
        )
        return await self._stored(keys, storing)

    # The leases of its blocks

    def lend(self, lease: LeaseScope, count: int) -> list[BlockEntry] | None:
        """Let a lease have the first blocks; see `PinHolder`."""
        # A pinned block leaves when it turns out to be damaged, and not else.
        if self._ended or self._condemned != self._core.index.condemned:
            return None
        self._leases.add(lease)
        return self._pinned[:count]

    def lend_pins(self, lease: LeaseScope, entries: list[BlockEntry]) -> bool:
        """Let a lease rely on the pins of the request; see `PinHolder`."""
        if self._is_far and not self._ended:
            # Those that were fetched just now stay pinned until the end, as the others do.
            self._core.index.pin(entries)
            self._pinned[:0] = entries
            self._is_far = len(entries) < self._hit
        # One that turned out to be damaged may have been stored anew, and is another entry then.
        if entries != self._pinned[: len(entries)]:
            return False
        self._leases.add(lease)
        return True

    def take_pins_back(self, lease: LeaseScope) -> None:
        """Note that a lease ended; see `PinHolder`."""
        self._leases.discard(lease)

    # Inside

    async def _stored(
        self, keys: Sequence[Key], storing: Coroutine[Any, Any, Outcome]
    ) -> StoreResult:
        """Note what became of the next blocks of the chain, once it is known."""
        if self._storing:
            storing.close()
            raise ConfigError("a request stores its chain one call after the other, not at once")
        core = self._core
        self._storing = True
        try:
            with core.observed("store", keys) if core.observers else nullcontext():
                outcome = await storing
        finally:
            self._storing = False
        self._next += len(keys)
        if outcome.rejected:
            self._rejection = next(iter(outcome.rejected.values()))
        if self._ended:
            self._end()
        else:
            added = [entry for entry in map(core.index.ready.get, keys) if entry is not None]
            core.index.pin(added)
            self._pinned += added
        return self._to_result(outcome)

    def _check(self) -> None:
        if not self._entered or self._ended:
            raise ClosedError("use a request inside its `async with`")

    def _end(self) -> None:
        """Count the one use, unpin, and free what is said to be over."""
        keys = self._keys
        if len(set(keys)) < len(keys):
            keys = list(dict.fromkeys(keys))
        try:
            self._core.index.use(keys, self._retention)
        finally:  # a policy of the user's may raise
            pinned, self._pinned = self._pinned, []
            for lease in self._leases:  # they outlive the request
                lease.pin()
            self._leases.clear()
            self._core.index.unpin(pinned)
        if self._retention is not None and self._retention.is_over:
            self._core.removal.forget_soon(keys)

    def _rejected(self, keys: Sequence[Key], reason: RejectReason) -> Outcome:
        index = self._core.index
        present = [key for key in dict.fromkeys(keys) if key in index.ready]
        rejected = {key: reason for key in keys if key not in index.ready}
        index.count("rejected", list(rejected))
        return Outcome(present=present, rejected=rejected)

    async def _wait_for_pending(self, hit: int) -> list[BlockEntry]:
        """Wait while the first block that is missing is one that another caller is storing."""
        index = self._core.index
        with anyio.move_on_after(self._wait_pending_s):
            while hit < len(self._keys) and self._keys[hit] in index.pending:
                await index.changed.wait()
                hit = index.prefix_hit(self._keys)
        self._core.check()
        return index.prefix(self._keys)


class ObservedRequestScope(RequestScope):
    """The same where the manager has observers: a request lasts until its scope is left."""

    _observed: ExitStack | None = None

    async def __aenter__(self) -> RequestScope:
        """Enter, observed."""
        with self._core.observed("request", self._keys) as observed:
            await super().__aenter__()
            self._observed = observed.pop_all()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave, and let the observers know how."""
        observed, self._observed = self._observed, None
        try:
            await super().__aexit__(exc_type, exc, traceback)
        finally:
            if observed is not None:
                observed.__exit__(exc_type, exc, traceback)
