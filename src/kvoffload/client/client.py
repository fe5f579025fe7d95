"""The client itself: connections, its life, and its namespaces."""

from __future__ import annotations

import ssl as tls
from types import TracebackType
from typing import Self

import anyio

from ..checks import check_count, check_seconds
from ..keys import check_namespace
from ..lifecycle import Lifecycle
from .address import check_token, parse_address
from .buffers import Buffers
from .http import Http
from .live import Live
from .manager import RemoteManager
from .room import Room

STAGING_BYTES = 1024 * 1024 * 1024


class AsyncLRUClient(RemoteManager):
    """A manager that lives in a service: the same contract, over HTTP.

    It opens a session, to which its pins, reservations and requests belong, and follows its stream,
    by which it knows what happens. When the session is lost, because the service restarted or the
    connection broke, what was open in it is gone: requests raise `ClosedError`, `complete_load`
    raises `NotPinnedError`, both say why; reserved blocks are given up; views of leases stay good.
    The next call opens a new session by itself.

    Args:
        url: `http://host:port`, `https://host:port` (a path may follow), or `unix:/path/to.sock`.
        token: Who calls, where the service is protected. In no message and no `repr`.
        namespace: The isolation domain that it looks up and stores in.
        timeout_s: Seconds without any byte of an answer after which a call is given up.
        connect_timeout_s: Seconds for making a connection.
        max_connections: Calls under way at once; more wait for one to end. Each namespace has one
            more connection for its stream.
        staging_bytes: Budget of the buffers for loads and the two-phase form; taken as needed.
        close_timeout_s: Seconds for calls under way at close, and as much for ending the session.
        all_namespaces: Have counters and events tell of all namespaces, as those of a manager do;
            for tokens that may see all.
        ssl: How an `https` service proves who it is; the system's authorities unless given.

    Raises:
        ConfigError: A setting is wrong.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        namespace: str = "",
        timeout_s: float = 30.0,
        connect_timeout_s: float = 5.0,
        max_connections: int = 16,
        staging_bytes: int = STAGING_BYTES,
        close_timeout_s: float = 5.0,
        all_namespaces: bool = False,
        ssl: tls.SSLContext | None = None,
    ) -> None:
        address = parse_address(url)
        check_token(token)
        check_namespace(namespace)
        check_seconds("timeout_s", timeout_s, positive=True)
        check_seconds("connect_timeout_s", connect_timeout_s, positive=True)
        check_seconds("close_timeout_s", close_timeout_s, positive=True)
        check_count("max_connections", max_connections)
        check_count("staging_bytes", staging_bytes, least=0)
        self._http = Http(address, token, timeout_s, connect_timeout_s, max_connections, ssl)
        self._close_timeout_s = close_timeout_s
        self._views: dict[str, NamespaceClient] = {}
        buffers = Buffers(staging_bytes)
        lifecycle = Lifecycle(type(self).__name__)
        room = _room(self._http, lifecycle, buffers, namespace, sees_all=all_namespaces)
        super().__init__(lifecycle, room, buffers, namespace)

    def namespace(self, name: str) -> NamespaceClient:
        """Return the service as seen from inside another namespace.

        It shares connections and buffers with this client, and has a session of its own, opened
        when it is entered or used first, that ends when this client closes.

        Raises:
            ConfigError: The name is no `str`, or too long.
        """
        check_namespace(name)
        self._check()
        if name not in self._views:
            room = _room(self._http, self._lifecycle, self._buffers, name, sees_all=False)
            room.jobs = self._room.jobs
            self._views[name] = NamespaceClient(self, room, self._buffers, name)
        return self._views[name]

    async def __aenter__(self) -> Self:
        """Open a session with the service; only once.

        Raises:
            ClosedError: It was opened before.
            TierUnavailableError: The service can't be reached, or takes on no more.
            AccessDeniedError: It does not let the token in, or not in this namespace.
        """
        self._room.jobs = await self._lifecycle.open()
        try:
            await self._http.open()
            await self._room.session()
            self._lifecycle.opened()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Refuse new work, let calls under way end, and end the session; bounded, idempotent.

        Also when the body raised or was cancelled.
        """
        await self._close()

    async def _close(self) -> None:
        await self._lifecycle.close([self._drain, self._end], [self._http.close], self._timeout_s)

    @property
    def _timeout_s(self) -> float:
        return self._close_timeout_s

    @property
    def _rooms(self) -> list[Room]:
        return [self._room, *(view._room for view in self._views.values())]

    async def _drain(self) -> None:
        for room in self._rooms:
            await room.drain()

    async def _end(self) -> None:
        async with anyio.create_task_group() as group:
            for room in self._rooms:
                group.start_soon(room.end)

    def __repr__(self) -> str:
        phase = self._lifecycle.phase.value
        where = self._http.address.shown
        return f"<{type(self).__name__} {phase}: {where}, namespace {self._namespace!r}>"


class NamespaceClient(RemoteManager):
    """An `AsyncLRUClient` seen from inside one namespace; leaving it closes nothing."""

    def __init__(
        self, client: AsyncLRUClient, room: Room, buffers: Buffers, namespace: str
    ) -> None:
        super().__init__(client._lifecycle, room, buffers, namespace)
        self._client = client

    def namespace(self, name: str) -> NamespaceClient:
        """Return the service as seen from inside another namespace; names do not nest."""
        return self._client.namespace(name)

    async def __aenter__(self) -> Self:
        """Open a session in the namespace, if there is none.

        Raises:
            ClosedError: The client is not open.
            TierUnavailableError: The service can't be reached, or takes on no more.
            AccessDeniedError: It does not let the token into this namespace.
        """
        self._check()
        await self._room.session()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do nothing: the client is closed by who opened it."""

    def __repr__(self) -> str:
        return f"<NamespaceClient {self._namespace!r} of {self._client!r}>"


def _room(
    http: Http, lifecycle: Lifecycle, buffers: Buffers, namespace: str, *, sees_all: bool
) -> Room:
    def fit(live: Live) -> None:
        buffers.fit(live.hello["block_bytes"])

    return Room(http, lifecycle, namespace, sees_all=sees_all, on_open=fit)
