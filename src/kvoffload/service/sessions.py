"""What a client holds: pins, reservations and requests, which end with its session."""

from __future__ import annotations

import logging
import secrets
from collections import Counter, deque
from collections.abc import MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio

from ..errors import NotPinnedError, OffloadError
from ..keys import show_hash
from ..managers.async_lru_manager import AsyncLRUManager, NamespaceView
from ..managers.contract import Contract
from ..request import RequestScope
from ..twophase import SlotView
from ..types import BlockHash, Lease
from .access import ANYONE, Principal
from .calls import Calls
from .limits import Limits
from .problems import RefusedError
from .streams import SessionStream

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("kvoffload")

SESSION = "kvoffload.session"
"""Where the scope of a call has its session, if it is in one."""
CANCEL = "kvoffload.cancel"
"""Where the scope of a call has the cancel scope that it runs in."""


@dataclass(slots=True, eq=False)
class HeldRequest:
    """A request scope that a client has open.

    Attributes:
        scope: The scope.
        block_hashes: Its chain.
    """

    scope: RequestScope
    block_hashes: Sequence[BlockHash]


@dataclass(slots=True, eq=False)
class Session:
    """One client's pins, reservations and requests, in one namespace.

    Attributes:
        id: Its name, which can't be guessed.
        namespace: The namespace.
        principal: Who opened it; for others it is not there.
        view: The manager as seen from inside the namespace.
        watched: Whose counters and events it is told: that, or the manager with all namespaces.
        held: Blocks that are pinned for it, with until when, on the manager's clock, each time.
        reserved: Blocks that are reserved for it, with where their bytes go.
        requests: Open request scopes, by name.
        leases: Open leases and how many blocks they pin, by name.
        calls: Calls that are under way, or can be taken back.
        stream: Tells the client what happens; `None` while it doesn't listen.
        last_use: When it was used last.
    """

    id: str
    namespace: str
    principal: Principal
    view: NamespaceView
    watched: Contract
    last_use: float
    held: dict[BlockHash, deque[float]] = field(default_factory=dict)
    reserved: dict[BlockHash, SlotView] = field(default_factory=dict)
    requests: dict[str, HeldRequest] = field(default_factory=dict)
    leases: dict[str, tuple[AbstractAsyncContextManager[Lease], int]] = field(default_factory=dict)
    calls: Calls = field(default_factory=Calls)
    stream: SessionStream | None = None
    is_over: bool = False
    _being_taken: int = 0

    @property
    def holds(self) -> int:
        """How much it holds: blocks and requests."""
        leased = sum(count for _, count in self.leases.values())
        asked = sum(1 + len(request.block_hashes) for request in self.requests.values())
        pinned = sum(map(len, self.held.values()))
        return pinned + len(self.reserved) + asked + leased + self._being_taken

    @contextmanager
    def call(self, scope: MutableMapping[str, Any], name: str | None) -> Iterator[Session]:
        """Count a call as under way, which keeps the session from ending by itself.

        Args:
            scope: The call's ASGI scope.
            name: What the client calls it.

        Raises:
            RefusedError: The client has taken it back already.
        """
        with self.calls.call(scope[CANCEL], name):
            scope[SESSION] = self
            try:
                yield self
            finally:
                self.last_use = anyio.current_time()

    @property
    def is_busy(self) -> bool:
        """Whether a call in it is under way."""
        return len(self.calls) > 0

    @contextmanager
    def taking(self, more: int, limits: Limits) -> Iterator[None]:
        """Count what a call is about to take for the session, for as long as the body takes.

        Raises:
            RefusedError: It would hold too much.
        """
        if self.holds + more > limits.max_held:
            raise RefusedError(
                429,
                "TooManyHeld",
                f"the session holds {self.holds} blocks and requests; at most {limits.max_held} "
                "are kept for one: complete some first",
            )
        self._being_taken += more
        try:
            yield
        finally:
            self._being_taken -= more

    def request(self, name: str) -> HeldRequest:
        """Return an open request.

        Raises:
            RefusedError: There is none of that name.
        """
        try:
            return self.requests[name]
        except KeyError:
            raise RefusedError(
                404, "SessionNotFound", "the session has no such request (any more)"
            ) from None

    def tell(self, block_hashes: Sequence[BlockHash]) -> dict[str, str]:
        """Tell the client where blocks are now; return the headers of the answer to its call."""
        return {} if self.stream is None else self.stream.tell(block_hashes)

    def hold(self, block_hashes: Sequence[BlockHash]) -> None:
        """Note that blocks were pinned for it."""
        until = self.view.clock() + self.view.reservation_ttl_s
        for block_hash in block_hashes:
            self.held.setdefault(block_hash, deque()).append(until)

    def release(self, block_hashes: Sequence[BlockHash]) -> None:
        """Note that blocks are to be unpinned, each once for each time that it is named.

        Raises:
            NotPinnedError: The session does not hold some that often (any more); then nothing was
                changed.
        """
        self._drop_expired()
        for block_hash, count in Counter(block_hashes).items():
            times = len(self.held.get(block_hash, ()))
            if times < count:
                raise NotPinnedError(
                    f"complete_load of block {show_hash(block_hash)}, which no prepare_load of "
                    "this session holds" + (" that often" if times else " (any more)")
                )
        for block_hash in block_hashes:
            self._let_go(block_hash)

    async def end_lease(self, name: str) -> None:
        """Unpin what a lease holds; nothing if there is none of that name any more."""
        if name in self.leases:
            await self.leases.pop(name)[0].__aexit__(None, None, None)

    async def end_request(self, name: str) -> None:
        """Leave a request's scope; nothing if there is none of that name any more."""
        if name in self.requests:
            await self.requests.pop(name).scope.__aexit__(None, None, None)

    async def abandon_load(self, block_hashes: Sequence[BlockHash]) -> None:
        """Unpin what it still holds of these; each as often as it is named."""
        self._drop_expired()
        for block_hash in block_hashes:
            if block_hash in self.held:
                self._let_go(block_hash)
                with suppress(NotPinnedError):  # its time was up
                    await self.view.complete_load([block_hash])

    async def abandon_store(self, block_hashes: Sequence[BlockHash]) -> None:
        """Give up what of these is still reserved for it."""
        mine = [self.reserved.pop(each, None) for each in dict.fromkeys(block_hashes)]
        still = [each.block_hash for each in mine if each is not None and each.is_prepared]
        await self.view.complete_store(still, success=False)

    def _let_go(self, block_hash: BlockHash) -> None:
        times = self.held[block_hash]
        times.popleft()
        if not times:
            del self.held[block_hash]

    def _drop_expired(self) -> None:
        """Forget pins whose time was up: by now they may be another session's."""
        now = self.view.clock()
        for block_hash in [each for each, times in self.held.items() if times[0] <= now]:
            while block_hash in self.held and self.held[block_hash][0] <= now:
                self._let_go(block_hash)

    async def end(self) -> None:
        """Give back all that it holds; calls in it that are under way are cancelled."""
        self.is_over = True
        await self.calls.cancel_all()
        for name in list(self.leases):
            await self.end_lease(name)
        requests, self.requests = self.requests, {}
        for held in requests.values():
            await held.scope.__aexit__(None, None, None)
        await self.abandon_load([each for each, times in self.held.items() for _ in times])
        await self.abandon_store(list(self.reserved))


class Sessions:
    """All sessions of a service."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._sessions: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def open(
        self,
        manager: AsyncLRUManager,
        namespace: str,
        principal: Principal,
        *,
        everywhere: bool = False,
    ) -> Session:
        """Start a session, which is told the counters and events of its namespace, or of all.

        Raises:
            RefusedError: There are too many.
        """
        mine = sum(session.principal == principal for session in self._sessions.values())
        most = self._limits.share_of(self._limits.max_sessions)
        is_full = len(self._sessions) >= self._limits.max_sessions
        if is_full or (principal is not ANYONE and mine >= most):
            raise RefusedError(
                429,
                "TooManySessions",
                f"{len(self._sessions)} sessions are open, {mine} of them for this token, and no "
                "more are served",
                headers={"Retry-After": "1"},
            )
        view = manager.namespace(namespace)
        session = Session(
            secrets.token_urlsafe(16),
            namespace,
            principal,
            view,
            manager if everywhere else view,
            anyio.current_time(),
        )
        self._sessions[session.id] = session
        return session

    def find(self, name: str, namespace: str, principal: Principal) -> Session:
        """Return a session.

        Raises:
            RefusedError: There is none of that name for this principal in this namespace.
        """
        session = self._sessions.get(name)
        if session is None or session.is_over or session.namespace != namespace:
            session = None
        if session is None or session.principal != principal:
            raise RefusedError(404, "SessionNotFound", "there is no such session (any more)")
        return session

    async def end(self, session: Session) -> None:
        """End a session and give back all that it holds; idempotent, also when cancelled."""
        if self._sessions.pop(session.id, None) is None:
            return
        if session.stream is not None:
            session.stream.end("the session ended")
        with anyio.CancelScope(shield=True):
            try:
                await session.end()
            except OffloadError as exc:  # the manager is closing: it takes back all by itself
                log.debug("ending a session: %s", exc)

    async def end_all(self) -> None:
        """End every session."""
        for session in list(self._sessions.values()):
            await self.end(session)

    async def reap(self) -> None:
        """End sessions whose client was not heard of for too long; runs until cancelled."""
        ttl_s = self._limits.session_ttl_s
        while True:
            await anyio.sleep(ttl_s / 4)
            now = anyio.current_time()
            for session in list(self._sessions.values()):
                is_silent = session.stream is None and not session.is_busy
                if is_silent and now - session.last_use > ttl_s:
                    log.warning("a session was silent for %g s and has ended", ttl_s)
                    await self.end(session)
