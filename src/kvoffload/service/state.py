"""What the endpoints share: the manager, who may call, how much is taken on, and what is open."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
from starlette.requests import HTTPConnection

from ..managers.async_lru_manager import AsyncLRUManager
from .access import ANYONE, AccessControl, Principal
from .limits import Limits
from .observing import Latencies, LoopLag, ServiceStats
from .problems import RefusedError
from .prometheus import KVOffloadCollector
from .sessions import Sessions

STATE = "kvoffload"
"""Where an application's `state` has the service."""


@dataclass(slots=True, eq=False)
class Service:
    """A manager that is served.

    Attributes:
        manager: The manager, open.
        access: Who may call; `None` for nobody.
        limits: How much is taken on.
        sessions: What clients hold.
        latencies: How long operations of the manager take.
        loop_lag: How late the event loop is.
        collector: The metrics of all this.
        draining: Set when the service was told to stop.
        calls: Calls that are under way.
        calls_of: The same by who calls.
        own_namespace: Name of the manager's own namespace.
        calls_total: Calls that were begun.
        streams: Streams of events that are open.
        events_missed: Events that slow readers of streams missed.
        started_at: When it was opened, in seconds of `time.monotonic`.
    """

    manager: AsyncLRUManager
    access: AccessControl | None
    limits: Limits
    sessions: Sessions = field(init=False)
    latencies: Latencies = field(default_factory=Latencies)
    loop_lag: LoopLag = field(default_factory=LoopLag)
    collector: KVOffloadCollector = field(init=False)
    draining: anyio.Event = field(default_factory=anyio.Event)
    calls: int = 0
    calls_of: Counter[Principal] = field(default_factory=Counter)
    own_namespace: str = field(init=False)
    calls_total: int = 0
    streams: int = 0
    events_missed: int = 0
    started_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.sessions = Sessions(self.limits)
        self.own_namespace = self.manager.namespaces()[0]
        self.manager.observe(self.latencies)
        self.collector = KVOffloadCollector(
            self.manager,
            latencies=self.latencies,
            loop_lag=self.loop_lag,
            service=lambda: ServiceStats(len(self.sessions), self.calls_total, self.events_missed),
        )

    def note_missed(self, events: int) -> None:
        """Count events that a slow reader missed."""
        self.events_missed += events

    @property
    def block_bytes(self) -> int:
        """Bytes of a block at most."""
        return self.manager.block_bytes

    def begin_stream(self) -> None:
        """Count a stream of events in.

        Raises:
            RefusedError: There are too many.
        """
        if self.streams >= self.limits.max_sessions:
            raise RefusedError(
                429,
                "TooManyStreams",
                f"{self.streams} streams of events are open, and no more are served",
                headers={"Retry-After": "1"},
            )
        self.streams += 1

    async def end_stream(self) -> None:
        """Count a stream of events out."""
        self.streams -= 1

    def name_of(self, namespace: str | None) -> str:
        """Return the namespace of a call, which may not name one."""
        return self.own_namespace if namespace is None else namespace

    def begin_call(self, principal: Principal) -> None:
        """Count a call in.

        Raises:
            RefusedError: Too many are under way, all or its caller's, or the service is stopping.
        """
        if self.draining.is_set():
            raise RefusedError(
                503,
                "ClosedError",
                "the service is stopping",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        mine, most = self.calls_of[principal], self.limits.share_of(self.limits.max_concurrent)
        if self.calls >= self.limits.max_concurrent or (principal is not ANYONE and mine >= most):
            raise RefusedError(
                429,
                "TooManyCalls",
                f"{self.calls} calls are being served, {mine} of them for this token, and no more "
                "at once",
                headers={"Retry-After": "1"},
            )
        self.calls += 1
        self.calls_total += 1
        self.calls_of[principal] += 1

    def end_call(self, principal: Principal) -> None:
        """Count a call out."""
        self.calls -= 1
        self.calls_of[principal] -= 1
        if not self.calls_of[principal]:
            del self.calls_of[principal]


@asynccontextmanager
async def running(
    make_manager: Callable[[], AsyncLRUManager], access: AccessControl | None, limits: Limits
) -> AsyncIterator[Service]:
    """Open a manager and serve it; on leaving, end all sessions, flush and close.

    Raises:
        TierLockedError, TierError, ConfigError: The manager can't be opened.
    """
    async with make_manager() as manager:
        service = Service(manager, access, limits)
        async with anyio.create_task_group() as group:
            group.start_soon(service.sessions.reap)
            group.start_soon(service.loop_lag.run)
            try:
                yield service
            finally:
                service.draining.set()
                group.cancel_scope.cancel()
        await service.sessions.end_all()


def service_of(connection: HTTPConnection) -> Service:
    """Return the service of the application that a request came to.

    Raises:
        RefusedError: There is none: its lifespan was not run.
    """
    service = getattr(connection.app.state, STATE, None)
    if not isinstance(service, Service):
        raise RefusedError(503, "ClosedError", "the cache is not open: was the lifespan run?")
    return service
