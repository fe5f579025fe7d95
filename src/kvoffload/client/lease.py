"""Leases of a client: blocks that are pinned in the service, and views of copies on this side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from ..errors import ClosedError, TierUnavailableError
from ..types import BlockHash, Lease
from ..views import Lent, take_back, warn_derived
from .buffers import Buffers, Fetched, fetch
from .decoding import TIER, SessionLostError
from .http import Outgoing
from .live import Live
from .room import Room


class RemoteLease:
    """The `async with` of one load.

    Args:
        room: Where to ask.
        buffers: Where the blocks go.
        check: Refuses use of a closed client.
        out: The call that fetches them.
        block_hashes: The blocks.
        live: The session that it belongs to; whichever there is, if not given.
    """

    def __init__(
        self,
        room: Room,
        buffers: Buffers,
        check: Callable[[], None],
        out: Outgoing,
        block_hashes: Sequence[BlockHash],
        live: Live | None = None,
    ) -> None:
        self._room = room
        self._buffers = buffers
        self._check = check
        self._out = out
        self._block_hashes = block_hashes
        self._live = live
        self._is_entered = False
        self._fetched: Fetched | None = None
        self._lent: list[Lent] = []
        self._lease: Lease | None = None

    async def __aenter__(self) -> Lease:
        """Pin the blocks, read them into buffers, and make the views."""
        self._check()
        if self._is_entered:
            raise ClosedError("a lease is entered once: call load() again")
        self._is_entered = True
        if self._block_hashes:
            try:
                self._fetched = await fetch(
                    self._room, self._buffers, self._out, self._block_hashes, self._live
                )
            except SessionLostError as exc:
                raise ClosedError(f"the request ended with its session: {exc}") from exc
            self._lent = [self._buffers.lend(entry) for entry in self._fetched.entries]
        self._lease = Lease(self._block_hashes, [one[0] for one in self._lent])
        return self._lease

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the views back and unpin; also when cancelled, and then for a bounded time."""
        if self._lease is not None:
            self._lease.end()
            self._lease = None
        derived = take_back(self._lent)
        fetched, self._fetched = self._fetched, None
        if fetched is not None:
            self._buffers.give_back([entry.slot for entry in fetched.entries])
            name = fetched.more.get("lease")
            if name is not None:
                out = Outgoing("DELETE", f"/sessions/{{session}}/leases/{name}")
                await self._room.give_back(fetched.live, out)
        warn_derived(derived)


def unavailable(exc: SessionLostError) -> TierUnavailableError:
    """Return what the loss of a session is to a call that it tore."""
    return TierUnavailableError(f"the session was lost: {exc}", tier=TIER)
