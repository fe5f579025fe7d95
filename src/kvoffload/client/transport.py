"""An httpx transport that reads in large pieces.

httpx's own reads 64 KiB at a time, and spends more on each piece than the copying of it takes.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx

READ_BYTES = 256 * 1024
"""Most bytes that are read at a time; copying more on would hold the event loop for too long."""


class WideStream(httpcore.AsyncNetworkStream):
    """A connection that is read in large pieces."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        """Read what there is, more than `max_bytes` perhaps: httpcore takes what comes."""
        return await self._stream.read(max(max_bytes, READ_BYTES), timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Write all of it."""
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        """Go on with TLS."""
        return WideStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        """Say something of the connection."""
        return self._stream.get_extra_info(info)


class WideBackend(httpcore.AsyncNetworkBackend):
    """Makes such connections."""

    def __init__(self) -> None:
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect over TCP."""
        return WideStream(
            await self._backend.connect_tcp(host, port, timeout, local_address, socket_options)
        )

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect over a Unix socket."""
        return WideStream(await self._backend.connect_unix_socket(path, timeout, socket_options))

    async def sleep(self, seconds: float) -> None:
        """Wait before another try."""
        await self._backend.sleep(seconds)


class Transport(httpx.AsyncBaseTransport):
    """Sends requests over a pool of such connections.

    Args:
        ssl_context: For `https`.
        socket: Path of a Unix socket to go through, if any.
        max_connections: Connections at once; `None` for any number.
        keepalive_s: Seconds that an idle connection is kept.
    """

    def __init__(
        self,
        ssl_context: ssl.SSLContext | None,
        socket: str | None,
        max_connections: int | None,
        keepalive_s: float,
    ) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            # A context is made even where none is needed, and reads a file.
            ssl_context=ssl_context or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            max_connections=max_connections,
            max_keepalive_connections=max_connections if keepalive_s else 0,
            keepalive_expiry=keepalive_s,
            uds=socket,
            network_backend=WideBackend(),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; return the answer, whose body is not read yet.

        Raises:
            httpx.TransportError: As the connection fails.
        """
        url = request.url
        assert isinstance(request.stream, httpx.AsyncByteStream)
        sent = httpcore.Request(
            request.method,
            httpcore.URL(
                scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
            ),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with as_httpx():
            answer = await self._pool.handle_async_request(sent)
        return httpx.Response(answer.status, headers=answer.headers, stream=AnswerStream(answer))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()


class AnswerStream(httpx.AsyncByteStream):
    """The body of an answer."""

    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with as_httpx():
            async for chunk in self._answer.aiter_stream():
                yield chunk

    async def aclose(self) -> None:
        """Give the connection back, or close it where it was not read to the end."""
        await self._answer.aclose()


@contextmanager
def as_httpx() -> Iterator[None]:
    """Raise httpcore's errors as the ones of the same names that httpx has."""
    try:
        yield
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as exc:
        kind = getattr(httpx, type(exc).__name__)
        raise kind(str(exc)) from exc
