"""The contract of every manager, over a service."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager

from ..checks import check_count, check_seconds
from ..errors import ConfigError, OffloadError
from ..events import OffloadingEvent
from ..keys import check_hashes, check_key_lengths
from ..lifecycle import Lifecycle
from ..metrics import ManagerStats
from ..payloads import check_payloads, check_sizes
from ..retention import Retention, as_retention
from ..service.wire import hashes_from_text, hashes_to_text
from ..types import (
    BlockHash,
    BlockLocation,
    Buffer,
    FlushResult,
    Lease,
    LoadStoreSpec,
    PrepareStoreOutput,
    Request,
    StoreResult,
)
from .buffers import Buffers
from .decoding import location_from_json, result_from_json, stats_from_json
from .http import BatchBody, Outgoing
from .lease import RemoteLease
from .request import RemoteRequest
from .room import Room
from .twophase import RemoteTwoPhase

log = logging.getLogger("kvoffload")

QUEUE_HINTS = 256
"""Calls of `hint_prefetch` and `cancel_prefetch` that wait to be sent."""


class RemoteManager:
    """The coroutine contract of a manager, seen from inside one namespace of a service.

    Every method may be used from the event loop alone that the client was opened on, raises
    `ClosedError` before open and after close, and `WrongLoopError` from anywhere else. What the
    service refuses is raised as a manager would: see each method of `AsyncLRUManager`. Beyond that
    any call may raise `TierUnavailableError` (`TierTimeoutError` where it took too long) with
    `tier="service"`, and `AccessDeniedError`.

    When a call returns, `locate`, `get_stats` and `events` tell what it did. Cancelled, a call is
    taken back: the service has stopped it, or given back what it gave, by the time that the
    cancellation goes on.
    """

    def __init__(self, lifecycle: Lifecycle, room: Room, buffers: Buffers, namespace: str) -> None:
        self._lifecycle = lifecycle
        self._room = room
        self._buffers = buffers
        self._namespace = namespace
        self._two_phase = RemoteTwoPhase(room, buffers)
        self._check = lifecycle.check
        self._hints: deque[Outgoing] = deque()
        self._hinting = False

    @property
    def block_bytes(self) -> int:
        """Bytes of a block at most, as the service says.

        Raises:
            ClosedError: The client was not opened yet.
        """
        self._check()
        return self._buffers.block_bytes

    # Looking

    async def lookup(self, block_hashes: Sequence[BlockHash]) -> int:
        """Return the prefix hit: the count of leading ready blocks, over all tiers.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
        """
        self._check()
        hashes = check_hashes(block_hashes)
        if not hashes:
            return 0
        body = await self._room.call(_chain("/lookup", hashes, is_repeatable=True))
        hit: int = body["hit"]
        return hit

    def locate(self, block_hashes: Sequence[BlockHash]) -> list[BlockLocation]:
        """Return state and tier of each block as the service told them last; no use, no I/O.

        Known are the blocks that a call of this client named (the last 65,536 of them), and what
        has happened to those since, whoever did it; all others are absent: ask `fetch_locations`.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
        """
        self._check()
        return self._room.mirror.locate(check_hashes(block_hashes))

    async def fetch_locations(self, block_hashes: Sequence[BlockHash]) -> list[BlockLocation]:
        """Ask the service for state and tier of each block; no use.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
        """
        self._check()
        hashes = check_hashes(block_hashes)
        if not hashes:
            return []
        body = await self._room.call(_chain("/locate", hashes, is_repeatable=True))
        return [location_from_json(each["state"], each["tier"]) for each in body["blocks"]]

    def get_stats(self) -> ManagerStats:
        """Return the counters as the service told them last; allowed after close too.

        They have the effects of every call of this client that returned; those of others follow
        within seconds. Buffers of this side are not in them.
        """
        return self._room.mirror.stats

    async def fetch_stats(self) -> ManagerStats:
        """Ask the service for the counters of the client's namespace."""
        self._check()
        body = await self._room.call(Outgoing("GET", "/stats", is_repeatable=True))
        return stats_from_json(body)

    def events(self) -> AsyncIterator[OffloadingEvent]:
        """Subscribe, at this call, to what happens from now on.

        Not a coroutine: `async for event in client.events()`. Ends when the client closes, and
        when its session is lost, for what happens then is not known: subscribe again, which also
        opens a new session.

        A reader that is slower than the events misses the oldest, and is told how many.
        """
        self._check()
        subscription = self._room.mirror.events.subscribe()
        self._room.begin()
        return subscription

    # Storing and loading

    async def store(
        self, block_hashes: Sequence[BlockHash], payloads: Sequence[Buffer]
    ) -> StoreResult:
        """Copy the payloads of a chain into the service, head first; one use of the chain.

        They are sent from the caller's buffers as they lie. Cancelled, or where the connection
        breaks, none of the blocks are stored unless all are.

        Raises:
            ConfigError: Unequal lengths, a payload longer than a block, a hash that is too long,
                or more than the service takes at once.
            TypeError: A hash is no `bytes`, `str` or `int`, or a payload no buffer.
        """
        self._check()
        hashes = check_hashes(block_hashes)
        if len(payloads) != len(hashes):
            raise ConfigError(f"{len(hashes)} block hashes, but {len(payloads)} payloads")
        check_key_lengths(hashes, self._namespace)
        data = check_payloads(payloads, self._buffers.block_bytes)
        if not hashes:
            return StoreResult()
        out = Outgoing("POST", "/store", batch=BatchBody(hashes, data, payloads))
        return result_from_json(await self._room.call(out))

    def load(
        self, block_hashes: Sequence[BlockHash], *, timeout_s: float | None = None
    ) -> AbstractAsyncContextManager[Lease]:
        """Pin blocks in the service and lease read-only views of copies, in the order asked.

        One use of the chain. The views are buffers of this client's, filled from the connection;
        they are valid inside the `async with` alone, which unpins however it is left. Should the
        session be lost meanwhile, the views stay good, but the blocks are not pinned any more.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
            BlockNotFoundError: On entry: some are absent or pending; names them.
            CapacityError: On entry: they don't fit the buffers that are free, here or there.
            LoadTimeoutError: On entry: `timeout_s` passed; recompute.
            TierError: On entry: a tier could not read some.
        """
        if timeout_s is not None:
            check_seconds("timeout_s", timeout_s)
        hashes = check_hashes(block_hashes)
        out = Outgoing(
            "POST",
            "/sessions/{session}/leases",
            json={"block_hashes": hashes_to_text(hashes), "timeout_s": timeout_s},
            read_timeout_s=self._room.http.timeout_s + (timeout_s or 0.0),
        )
        return RemoteLease(self._room, self._buffers, self._check, out, hashes)

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
            wait_pending_s: Seconds to wait for blocks that another caller is storing; 3600 at most.
            retention: How likely, or how soon, the chain is used again.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
            ConfigError: `wait_pending_s` is negative or not finite, or `retention` is neither.
        """
        check_seconds("wait_pending_s", wait_pending_s)
        hashes = check_hashes(block_hashes)
        check_key_lengths(hashes, self._namespace)
        said = as_retention(retention)
        return RemoteRequest(self._room, self._buffers, self._check, hashes, wait_pending_s, said)

    async def touch(self, block_hashes: Sequence[BlockHash]) -> None:
        """Count one use of a chain; blocks that are not ready are passed over.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
        """
        self._check()
        hashes = check_hashes(block_hashes)
        if hashes:
            await self._room.call(_chain("/touch", hashes))

    # Leaving

    async def evict(
        self, block_hashes: Sequence[BlockHash] | None = None, *, num_blocks: int | None = None
    ) -> list[BlockHash]:
        """Remove these blocks, or the `num_blocks` coldest of the namespace, from every tier.

        Returns:
            What left. Pinned and pending blocks stay.

        Raises:
            ConfigError: Neither or both are given, or `num_blocks` is negative.
            TypeError: A hash is no `bytes`, `str` or `int`.
            TierError: A tier could not erase some; they left, but may come back after a restart.
        """
        self._check()
        if block_hashes is not None and num_blocks is None:
            hashes = check_hashes(block_hashes)
            return await self._leave(_chain("/evict", hashes)) if hashes else []
        if block_hashes is None and num_blocks is not None:
            check_count("num_blocks", num_blocks, least=0)
            return await self._leave(Outgoing("POST", "/evict", json={"num_blocks": num_blocks}))
        raise ConfigError("evict takes either block_hashes or num_blocks=")

    async def forget(self, block_hashes: Sequence[BlockHash]) -> list[BlockHash]:
        """Remove what no other chain was seen to share of a chain that is over; return it.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
            TierError: A tier could not erase some; they left, but may come back after a restart.
        """
        self._check()
        hashes = check_hashes(block_hashes)
        return await self._leave(_chain("/forget", hashes)) if hashes else []

    async def clear(self) -> None:
        """Evict everything of the namespace that is not pinned or pending, for good.

        Raises:
            TierError: A tier could not erase some; they left, but may come back after a restart.
        """
        self._check()
        await self._room.call(Outgoing("POST", "/clear"))

    async def flush(self) -> FlushResult:
        """Make durable what the cold tier has room for, of all namespaces; evict nothing.

        Raises:
            AccessDeniedError: The token has not the right `admin` in all namespaces.
            TierError: The tier could not make sure of what it has.
        """
        self._check()
        body = await self._room.call(Outgoing("POST", "/flush"))
        return FlushResult(body["durable"], body["not_durable"])

    # Two phases

    async def prepare_store(
        self, block_hashes: Sequence[BlockHash], *, sizes: Sequence[int] | None = None
    ) -> PrepareStoreOutput | None:
        """Reserve slots in the service for the blocks that are neither present nor pending.

        They are pending until `complete_store`, until the service's `reservation_ttl_s` passed, or
        until the session ends. Not a use. Where to put the bytes are buffers of this client's.

        Returns:
            What to store, where, and what left to make room; `None` if there is no room, or there
            are too few buffers, and then nothing was reserved.

        Raises:
            ConfigError: Unequal lengths, a size that is negative or too long, a hash too long.
            TypeError: A hash is no `bytes`, `str` or `int`, or a size no integer.
        """
        self._check()
        hashes = check_hashes(block_hashes)
        if sizes is not None:
            check_sizes(sizes, len(hashes), self._buffers.block_bytes)
        check_key_lengths(hashes, self._namespace)
        return await self._two_phase.prepare_store(hashes, sizes)

    async def complete_store(self, block_hashes: Sequence[BlockHash], success: bool = True) -> None:
        """Send and publish reserved blocks, or with `success=False` give them up; not a use.

        Blocks that this client has not reserved (any more) are passed over. Their views end; drop
        what you made over them first. Cancelled, or where the connection breaks, they are given up.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
            TierError: The service's hottest tier could not write some; those were given up.
        """
        self._check()
        await self._two_phase.complete_store(check_hashes(block_hashes), success=success)

    async def prepare_load(self, block_hashes: Sequence[BlockHash]) -> LoadStoreSpec:
        """Pin blocks in the service, counted, and read them into buffers. Not a use.

        They stay pinned until `complete_load`, until the service's `reservation_ttl_s` passed, or
        until the session ends.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
            BlockNotFoundError: Some are absent or pending; names them, and nothing was pinned.
            CapacityError: They don't fit the buffers that are free, here or there.
            TierError: A tier could not read some.
        """
        self._check()
        return await self._two_phase.prepare_load(check_hashes(block_hashes))

    async def complete_load(self, block_hashes: Sequence[BlockHash]) -> None:
        """Unpin what `prepare_load` pinned; with the last one of a block its views end.

        Cancelled, it is seen through.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
            NotPinnedError: Some are not held, or not any more; then nothing was changed.
        """
        self._check()
        await self._two_phase.complete_load(check_hashes(block_hashes))

    # Hints

    def hint_prefetch(self, block_hashes: Sequence[BlockHash]) -> int:
        """Hint that blocks are needed soon; return how many hints were handed on.

        Never waits: they are sent in the background, in the order of the calls. While 256 calls
        wait to be sent, more are dropped. How many the service queued it tells in its counters.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
        """
        return self._hint("/prefetch", block_hashes)

    def cancel_prefetch(self, block_hashes: Sequence[BlockHash]) -> int:
        """Take hints back, as far as that is not too late; return how many were handed on.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
        """
        return self._hint("/prefetch/cancel", block_hashes)

    # Inside

    async def _leave(self, out: Outgoing) -> list[BlockHash]:
        return hashes_from_text((await self._room.call(out))["evicted"])

    def _hint(self, path: str, block_hashes: Sequence[BlockHash]) -> int:
        self._check()
        hashes = check_hashes(block_hashes)
        if not hashes or len(self._hints) >= QUEUE_HINTS:
            return 0
        self._hints.append(_chain(path, hashes))
        if not self._hinting:
            self._hinting = True
            self._room.jobs.start(lambda _: self._send_hints())
        return len(hashes)

    async def _send_hints(self) -> None:
        try:
            while self._hints:
                try:
                    await self._room.call(self._hints.popleft())
                except OffloadError as exc:
                    log.warning("a hint was not sent: %s", exc)
        finally:
            self._hinting = False


def _chain(path: str, hashes: Sequence[BlockHash], *, is_repeatable: bool = False) -> Outgoing:
    names = {"block_hashes": hashes_to_text(hashes)}
    return Outgoing("POST", path, json=names, is_repeatable=is_repeatable)
