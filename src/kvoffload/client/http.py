"""Calls over HTTP: connections, deadlines, and what can go wrong on the way."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import anyio.to_thread
import httpx

from ..errors import TierTimeoutError, TierUnavailableError
from ..service.wire import BATCH, CALL_HEADER, SEQUENCE_HEADER, pack_header
from ..types import BlockHash, Buffer, ByteArray
from .address import Address
from .decoding import TIER, error_of
from .transport import Transport

PIECE_BYTES = 256 * 1024
"""Payload bytes that are handed on at a time; more would hold the event loop for too long."""
KEEPALIVE_S = 3.0
"""Seconds that an idle connection is used again; shorter than servers keep theirs (5 s), so that
a call does not meet one that is just being closed."""
MOST_ANSWER_BYTES = 16 * 1024 * 1024
"""Longest answer in JSON that is read."""


class NotSentError(Exception):
    """Nothing of the call reached the service; it may be made again."""


class BrokenOffError(Exception):
    """The connection broke before anything of the answer came."""


class BatchBody(httpx.AsyncByteStream):
    """The body of a batch, sent from its payloads as they lie.

    An iterator of its own and no generator, for whoever sends it may stop half-way, and a
    generator would then be closed by a task that nobody awaits.

    Args:
        block_hashes: The blocks.
        payloads: Their payloads, checked.
        given: The payloads as they were given; those that are `bytes` are sent without a copy.
    """

    def __init__(
        self,
        block_hashes: Sequence[BlockHash],
        payloads: Sequence[ByteArray],
        given: Sequence[Buffer] = (),
    ) -> None:
        sizes = [payload.nbytes for payload in payloads]
        head = pack_header(block_hashes, sizes)
        self.size = len(head) + sum(sizes)
        self._head = head
        self._views = [payload.data for payload in payloads]
        self._given = given

    def __aiter__(self) -> AsyncIterator[bytes]:
        return BatchPieces(self._head, self._views, self._given)

    def end(self) -> None:
        """Let go of the payloads, which are the caller's again."""
        for view in self._views:
            view.release()
        self._views = []
        self._given = ()


class BatchPieces(AsyncIterator[bytes]):
    """One pass over a batch."""

    def __init__(self, head: bytes, views: Sequence[memoryview], given: Sequence[Buffer]) -> None:
        self._pieces = self._cut(head, views, given)

    async def __anext__(self) -> bytes:
        for piece in self._pieces:
            return piece
        raise StopAsyncIteration

    @staticmethod
    def _cut(head: bytes, views: Sequence[memoryview], given: Sequence[Buffer]) -> Iterator[bytes]:
        yield head
        for view, payload in zip_longest(views, given):
            if type(payload) is bytes:
                yield payload
                continue
            for start in range(0, view.nbytes, PIECE_BYTES):
                yield bytes(view[start : start + PIECE_BYTES])


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What a call sends.

    Attributes:
        method: Its method.
        path: Its path, below `/v1`.
        json: Its body, unless that is a batch.
        batch: Its body, if that is a batch.
        read_timeout_s: Seconds without any byte of the answer after which it is given up; the
            client's own if not given.
        is_repeatable: Whether it may be made again where the connection broke before any byte of
            the answer came.
    """

    method: str
    path: str
    json: Mapping[str, Any] | None = None
    batch: BatchBody | None = None
    read_timeout_s: float | None = None
    is_repeatable: bool = False


class Http:
    """The connections to one service.

    Args:
        address: Where it is.
        token: Who calls; in no message and no `repr`.
        timeout_s: Seconds without any byte of an answer after which a call is given up.
        connect_timeout_s: Seconds for a connection.
        max_connections: Connections for calls; streams have their own.
        ssl_context: How the service proves who it is; the system's authorities if not given.
    """

    def __init__(
        self,
        address: Address,
        token: str | None,
        timeout_s: float,
        connect_timeout_s: float,
        max_connections: int,
        ssl_context: ssl.SSLContext | None,
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._max_connections = max_connections
        self._ssl_context = ssl_context
        self._url = httpx.URL(address.base)
        self._prefix = self._url.raw_path.rstrip(b"/") + b"/v1"
        self._headers = {"Host": self._url.netloc.decode("ascii")}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._calls: Transport | None = None
        self._streams: Transport | None = None

    async def open(self) -> None:
        """Get ready to connect."""
        context = self._ssl_context
        if self.address.is_secure and context is None:  # reads the authorities from a file
            context = await anyio.to_thread.run_sync(ssl.create_default_context)
        socket, most = self.address.socket, self._max_connections
        self._calls = Transport(context, socket, most, KEEPALIVE_S)
        self._streams = Transport(context, socket, None, 0.0)

    async def close(self) -> None:
        """Close all connections."""
        for transport in (self._calls, self._streams):
            if transport is not None:
                await transport.aclose()

    async def answer(
        self,
        out: Outgoing,
        params: Mapping[str, str],
        name: str | None = None,
        *,
        aside: bool = False,
    ) -> httpx.Response:
        """Send a call; return the answer, whose body is not read yet and which must be closed.

        Args:
            out: The call.
            params: Of its URL.
            name: By which it can be taken back.
            aside: Send it on a connection of its own, whether others are free or not.

        Raises:
            NotSentError: No connection.
            BrokenOffError: The connection broke before the answer began.
            TierUnavailableError: The service does not answer in time.
        """
        headers = dict(self._headers)
        stream: httpx.AsyncByteStream | None = None
        content: bytes | None = None
        if name is not None:
            headers[CALL_HEADER] = name
        if out.batch is not None:
            stream = out.batch
            headers["Content-Type"] = BATCH
            headers["Content-Length"] = str(out.batch.size)
        elif out.json is not None:
            content = json.dumps(out.json, separators=(",", ":")).encode()
            headers["Content-Type"] = "application/json"
        read_s = self.timeout_s if out.read_timeout_s is None else out.read_timeout_s
        transport = self._streams if aside else self._calls
        return await self._send(transport, out, params, headers, content, stream, read_s)

    @asynccontextmanager
    async def stream(
        self, path: str, params: Mapping[str, str], silence_s: float
    ) -> AsyncIterator[httpx.Response]:
        """Send a call whose answer stays open, and is given up after so much silence."""
        out = Outgoing("GET", path)
        headers = dict(self._headers)
        response = await self._send(self._streams, out, params, headers, None, None, silence_s)
        try:
            yield response
        finally:
            await response.aclose()

    async def _send(
        self,
        transport: Transport | None,
        out: Outgoing,
        params: Mapping[str, str],
        headers: Mapping[str, str],
        content: bytes | None,
        stream: httpx.AsyncByteStream | None,
        read_s: float,
    ) -> httpx.Response:
        assert transport is not None, "not open"
        query = str(httpx.QueryParams(params)).encode()
        raw_path = self._prefix + out.path.encode() + (b"?" + query if query else b"")
        request = httpx.Request(
            out.method,
            self._url.copy_with(raw_path=raw_path),
            headers=headers,
            content=content,
            stream=stream,
            extensions={
                "timeout": {
                    "connect": self._connect_timeout_s,
                    "read": read_s,
                    "write": self.timeout_s,
                    "pool": self.timeout_s,
                }
            },
        )
        with self.trouble():
            return await transport.handle_async_request(request)

    @contextmanager
    def trouble(self) -> Iterator[None]:
        """Make of what the transport raises what callers of the library expect."""
        where = self.address.shown
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            raise NotSentError(f"no connection to the service at {where}: {_why(exc)}") from exc
        except httpx.PoolTimeout as exc:
            raise TierTimeoutError(
                f"all {self._max_connections} connections to the service at {where} were in use "
                f"for {self.timeout_s:g} s",
                tier=TIER,
            ) from exc
        except httpx.TimeoutException as exc:
            raise TierTimeoutError(
                f"the service at {where} did not answer in time", tier=TIER
            ) from exc
        except httpx.TransportError as exc:
            raise BrokenOffError(
                f"the connection to the service at {where} broke: {_why(exc)}"
            ) from exc


def chunks_of(response: httpx.Response) -> AsyncIterator[bytes]:
    """Return the body of an answer as it comes, without httpx's own layers."""
    assert isinstance(response.stream, httpx.AsyncByteStream)
    return response.stream.__aiter__()


async def read_all(response: httpx.Response) -> bytes:
    """Return the body of an answer that is no batch.

    Raises:
        httpx.TransportError: It did not come whole.
        TierUnavailableError: It is far too long.
    """
    body = bytearray()
    async for chunk in chunks_of(response):
        body += chunk
        if len(body) > MOST_ANSWER_BYTES:
            raise TierUnavailableError("the service answered at excessive length", tier=TIER)
    return bytes(body)


async def read_json(response: httpx.Response) -> Any:
    """Return the JSON of an answer; `None` if it has no body.

    Raises:
        httpx.TransportError: It did not come whole.
        TierUnavailableError: It is none.
    """
    body = await read_all(response)
    try:
        return json.loads(body) if body else None
    except ValueError:
        raise TierUnavailableError("the service answered with no JSON", tier=TIER) from None


async def check_status(response: httpx.Response) -> None:
    """Raise the error that an answer stands for, if it is one.

    Raises:
        OffloadError: As the service says.
        SessionLostError: The service does not know the session.
    """
    if response.status_code >= 400:
        raise error_of(response.status_code, await read_all(response))


def sequence_of(response: httpx.Response) -> int:
    """Return the line of the session's stream that an answer names; -1 for none."""
    value = response.headers.get(SEQUENCE_HEADER, "")
    return int(value) if value.isdecimal() else -1


def _why(exc: Exception) -> str:
    return str(exc) or type(exc).__name__
