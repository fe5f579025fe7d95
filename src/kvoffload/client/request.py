"""Requests of a client: the chain of one prompt, whose scope is open in the service."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from ..checks import check_count, check_seconds
from ..errors import ClosedError, ConfigError
from ..payloads import check_payloads
from ..retention import Retention, as_retention
from ..service.wire import hashes_to_text
from ..types import BlockHash, Buffer, Lease, LoadPlan, StoreResult
from .buffers import Buffers
from .decoding import SessionLostError, result_from_json, retention_to_json
from .http import BatchBody, Outgoing, read_json
from .lease import RemoteLease
from .live import Live
from .planning import plan_load
from .room import Room


class RemoteRequest:
    """The chain of one prompt; see `kvoffload.types.Request`.

    `hit` blocks are pinned in the service from entry to exit, and so is what `store` adds. Should
    the session be lost, they are not any more: its methods raise `ClosedError`, which says why.
    """

    def __init__(
        self,
        room: Room,
        buffers: Buffers,
        check: Callable[[], None],
        block_hashes: Sequence[BlockHash],
        wait_pending_s: float,
        retention: Retention | None,
    ) -> None:
        self._room = room
        self._buffers = buffers
        self._check_client = check
        self._block_hashes = block_hashes
        self._wait_pending_s = wait_pending_s
        self._retention = retention
        self._told: Retention | None = retention
        self._entered = False
        self._ended = False
        self._live: Live | None = None
        self._path = ""
        self._hit = 0
        self._next = 0
        self._storing = False

    @property
    def hit(self) -> int:
        """Prefix hit: leading blocks that were ready on entry, pinned until the end.

        Raises:
            ClosedError: The scope was not entered yet.
        """
        if not self._entered:
            raise ClosedError("use a request inside its `async with`")
        return self._hit

    @property
    def retention(self) -> Retention | None:
        """How likely, or how soon, the chain is used again, as far as its caller knows.

        What was set is told with the next `store`, or on leaving.

        Raises:
            ConfigError: On setting: neither a number from 0 to 1 nor a `Retention`.
        """
        return self._retention

    @retention.setter
    def retention(self, retention: Retention | float | None) -> None:
        self._retention = as_retention(retention)

    async def __aenter__(self) -> RemoteRequest:
        """Find and pin the prefix hit, waiting for pending blocks as long as was said.

        Raises:
            TierUnavailableError: The service can't be reached.
        """
        self._check_client()
        if self._entered:
            raise ClosedError("a request is entered once: call request() again")
        self._entered = True
        out = Outgoing(
            "POST",
            "/sessions/{session}/requests",
            json={
                "block_hashes": hashes_to_text(self._block_hashes),
                "wait_pending_s": self._wait_pending_s,
                "retention": retention_to_json(self._retention),
            },
            read_timeout_s=self._room.http.timeout_s + self._wait_pending_s,
        )
        body, live = await self._room.exchange(out, read_json)
        self._live = live
        self._path = f"/sessions/{{session}}/requests/{body['request']}"
        self._hit = self._next = body["hit"]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Count the one use and unpin; also when cancelled, and then for a bounded time."""
        if self._ended:
            return
        self._ended = True
        live = self._live
        if live is not None:
            if self._retention != self._told:
                await self._room.give_back(live, self._change())
            await self._room.give_back(live, Outgoing("DELETE", self._path))

    def plan(
        self, *, tokens_per_s: float, block_tokens: int = 16, deadline_s: float | None = None
    ) -> LoadPlan:
        """Say how many of the `hit` blocks to load so that all of them are there soonest.

        Reckoned from what the service last told of its tiers and from how fast this client's loads
        were, without asking; a tier, or a connection, that nothing was read from counts as fast.

        Args:
            tokens_per_s: Tokens that the engine computes in a second of prefill.
            block_tokens: Tokens of a block.
            deadline_s: Seconds that loading may take at most.

        Raises:
            ClosedError: The scope was not entered yet, or left, or lost its session.
            ConfigError: A number that is not positive and finite.
        """
        self._check()
        check_seconds("tokens_per_s", tokens_per_s, positive=True)
        check_count("block_tokens", block_tokens)
        if deadline_s is not None:
            check_seconds("deadline_s", deadline_s)
        return plan_load(
            self._room.mirror.stats.tiers,
            self._room.mirror.locate(self._block_hashes[: self._hit]),
            self._buffers.block_bytes,
            self._buffers.meter,
            block_s=block_tokens / tokens_per_s,
            deadline_s=deadline_s,
        )

    def load(
        self, num_blocks: int | None = None, *, timeout_s: float | None = None
    ) -> AbstractAsyncContextManager[Lease]:
        """Lease the `hit` blocks, or the first `num_blocks` of them; not a use of its own.

        Raises:
            ClosedError: The scope was not entered yet, or left; on entry also: lost its session.
            ConfigError: `num_blocks` is not from 0 to `hit`.
            LoadTimeoutError: On entry, if `timeout_s` passed first; recompute.
            CapacityError: On entry, if there are too few buffers, here or in the service.
            TierError: On entry, if a tier could not read some.
        """
        live = self._check()
        if timeout_s is not None:
            check_seconds("timeout_s", timeout_s)
        count = self._hit
        if num_blocks is not None:
            count = check_count("num_blocks", num_blocks, least=0)
            if count > self._hit:
                raise ConfigError(f"num_blocks={count}, but only {self._hit} blocks were hit")
        out = Outgoing(
            "POST",
            f"{self._path}/load",
            json={"num_blocks": count, "timeout_s": timeout_s},
            read_timeout_s=self._room.http.timeout_s + (timeout_s or 0.0),
        )
        hashes = self._block_hashes[:count]
        return RemoteLease(self._room, self._buffers, self._check_client, out, hashes, live)

    async def store(self, payloads: Sequence[Buffer]) -> StoreResult:
        """Store the next blocks of the chain, from where the call before stopped.

        A rejection ends the chain: what comes after it is rejected too. Cancelled, the blocks of
        this call are not stored, and the next call starts there.

        Raises:
            ConfigError: More payloads than blocks are left, or one is too long.
            TypeError: A payload is no buffer.
            ClosedError: The scope was not entered yet, or left, or lost its session.
        """
        live = self._check()
        self._check_client()
        hashes = self._block_hashes[self._next : self._next + len(payloads)]
        if len(payloads) > len(hashes):
            raise ConfigError(
                f"{len(payloads)} payloads, but only {len(hashes)} blocks of the chain are left"
            )
        data = check_payloads(payloads, self._buffers.block_bytes)
        if self._storing:
            raise ConfigError("a request stores its chain one call after the other, not at once")
        if not data:
            return StoreResult()
        self._storing = True
        try:
            if self._retention != self._told:
                told = self._retention
                await self._room.call(self._change(), live)
                self._told = told
            out = Outgoing("POST", f"{self._path}/store", batch=BatchBody(hashes, data, payloads))
            result = result_from_json(await self._room.call(out, live))
        except SessionLostError as exc:
            raise ClosedError(f"the request ended with its session: {exc}") from exc
        finally:
            self._storing = False
        self._next += len(hashes)
        return result

    def _change(self) -> Outgoing:
        said = retention_to_json(self._retention)
        return Outgoing("PATCH", self._path, json={"retention": said})

    def _check(self) -> Live:
        if not self._entered or self._ended or self._live is None:
            raise ClosedError("use a request inside its `async with`")
        self._live.check("the request")
        return self._live

    def __repr__(self) -> str:
        return f"<request of {len(self._block_hashes)} blocks, {self._hit} hit>"
