"""One connection to a server that speaks RESP; values go from the socket to where they belong.

A client library hands a value over as an object of its own, which then has to be copied to its
slot. Here the loop reads into the slot itself, and writes from it, so that no byte is copied
twice on the way; and a connection that is given up is aborted, so that nothing looks at a buffer
any more that is the caller's again.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

CONTROL_BYTES = 64 * 1024
"""Bytes read at a time that are not known to belong into a value."""
CHUNK_BYTES = 1024 * 1024
"""Most bytes handed to the transport at a time: what a socket does not take, it copies."""

Part: TypeAlias = bytes | memoryview
Reply: TypeAlias = "bool | int | bytes | list[Reply] | ReplyError | LostConnectionError | None"


class ReplyError(Exception):
    """What a server said instead of an answer.

    Attributes:
        code: Its first word, such as `"OOM"` or `"MOVED"`.
    """

    @property
    def code(self) -> str:
        """The first word."""
        return str(self).partition(" ")[0]


class LostConnectionError(ConnectionError):
    """The connection ended before the answer was there."""


class Value:
    """Where a value's bytes belong: a header of this length, a payload that fills, a trailer.

    Attributes:
        header: The header, once it was read.
        payload: The buffer.
        trailer: What comes after it.
    """

    __slots__ = ("header", "payload", "trailer")

    def __init__(self, header_bytes: int, payload: memoryview, trailer_bytes: int) -> None:
        self.header = bytearray(header_bytes)
        self.payload = payload.cast("B") if payload.nbytes else payload
        self.trailer = bytearray(trailer_bytes)

    @property
    def size(self) -> int:
        """Bytes of the value."""
        return len(self.header) + self.payload.nbytes + len(self.trailer)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and what it wants to know of who comes.

    Attributes:
        host: Name or number; empty for a Unix socket.
        port: TCP port.
        path: Unix socket.
        database: Number of the database.
        username: User, where the server knows more than one.
        password: Password; shows nowhere.
        ssl_context: TLS, where there is one.
    """

    host: str = ""
    port: int = 0
    path: str = ""
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ssl_context: ssl.SSLContext | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


def command(*words: bytes) -> bytes:
    """Return a command as it is sent."""
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"".join(parts)


async def connect(address: Address) -> Connection:
    """Connect and authenticate.

    Raises:
        OSError: There is nobody, or it went away again.
        ReplyError: The server does not let us in.
    """
    loop = asyncio.get_running_loop()
    connection = Connection()
    if address.path:
        await loop.create_unix_connection(lambda: connection, address.path)
    else:
        await loop.create_connection(
            lambda: connection, address.host, address.port, ssl=address.ssl_context
        )
    greeting: list[bytes] = []
    if address.password is not None:
        user = [] if address.username is None else [address.username.encode()]
        greeting.append(command(b"AUTH", *user, address.password.encode()))
    if address.database:
        greeting.append(command(b"SELECT", b"%d" % address.database))
    try:
        for reply in await connection.ask(greeting):
            if isinstance(reply, ReplyError):
                raise reply
    except BaseException:
        connection.abort()
        raise
    return connection


class Connection(asyncio.BufferedProtocol):
    """Sends commands and gets as many replies, in the same order."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._loop = asyncio.get_running_loop()
        self._control = bytearray(CONTROL_BYTES)
        self._start = self._stop = 0  # of what was read and not looked at
        self._skip = 0  # bytes to come that nobody wants
        self._waiting: deque[tuple[asyncio.Future[Reply], Value | None]] = deque()
        self._targets: list[memoryview] = []  # what is left to fill of the value that comes
        self._ending: Value | None = None  # its payload is there, and its trailer not yet
        self._blocked: asyncio.Future[None] | None = None
        self._lost: LostConnectionError | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it can be used by somebody else."""
        return self._lost is None and not (self._waiting or self._skip)

    # Sending

    def expect(self, value: Value | None = None) -> asyncio.Future[Reply]:
        """Return what will be the next reply that nobody else expects.

        With a value: `True` once it is filled; `None` where there is none, or one of another size.
        It is a `LostConnectionError` where the connection is lost, and raises none: of many that
        wait, one looks.
        """
        future: asyncio.Future[Reply] = self._loop.create_future()
        if self._lost is not None:
            future.set_result(self._lost)
        else:
            self._waiting.append((future, value))
        return future

    async def send(self, *parts: Part) -> None:
        """Send bytes; returns when the transport has the last of them.

        Raises:
            LostConnectionError: The connection is lost.
        """
        for part in parts:
            view = memoryview(part)
            for start in range(0, view.nbytes, CHUNK_BYTES):
                if self._lost is not None:
                    raise self._lost
                self._transport.write(view[start : start + CHUNK_BYTES])
                if self._blocked is not None:
                    await self._blocked
        if self._lost is not None:
            raise self._lost

    async def ask(self, commands: Sequence[bytes]) -> list[Reply]:
        """Send commands at once and return their replies, errors among them.

        Raises:
            LostConnectionError: The connection is lost.
        """
        replies = [self.expect() for _ in commands]
        await self.send(b"".join(commands))
        return [await self.reply(each) for each in replies]

    async def reply(self, future: asyncio.Future[Reply]) -> Reply:
        """Wait for a reply.

        Raises:
            LostConnectionError: The connection is lost.
        """
        reply = await future
        if isinstance(reply, LostConnectionError):
            raise reply
        return reply

    def abort(self) -> None:
        """End it at once; from now on no buffer of a caller's is looked at any more."""
        self._end_all(LostConnectionError("given up"))
        transport = getattr(self, "_transport", None)
        if transport is not None:
            transport.abort()

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]  # uvloop's are not derived from it
        self._transport.set_write_buffer_limits(high=CHUNK_BYTES // 4, low=CHUNK_BYTES // 16)
        if self._lost is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell all who wait."""
        lost = LostConnectionError("the connection was closed" if exc is None else str(exc))
        lost.__cause__ = exc
        self._end_all(lost)

    def pause_writing(self) -> None:
        """Let senders wait."""
        if self._blocked is None:
            self._blocked = self._loop.create_future()

    def resume_writing(self) -> None:
        """Let senders go on."""
        blocked, self._blocked = self._blocked, None
        if blocked is not None and not blocked.done():
            blocked.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes belong."""
        if self._targets:
            return self._targets[0]
        if self._stop == len(self._control):
            rest = self._control[self._start : self._stop]
            size = len(self._control) * (2 if 2 * len(rest) > len(self._control) else 1)
            self._control = bytearray(max(size, CONTROL_BYTES))
            self._control[: len(rest)] = rest
            self._start, self._stop = 0, len(rest)
        return memoryview(self._control)[self._stop :]

    def buffer_updated(self, nbytes: int) -> None:
        """Look at what came."""
        if self._lost is not None:
            return
        if self._targets:
            self._fill(nbytes)
            return
        self._stop += nbytes
        try:
            self._parse()
        except ValueError as exc:
            self._end_all(LostConnectionError(f"not the protocol that was expected: {exc}"))
            self._transport.abort()
        if self._start == self._stop:
            self._start = self._stop = 0

    # Inside

    def _end_all(self, lost: LostConnectionError) -> None:
        self._lost = self._lost or lost
        self._targets = []
        waiting, self._waiting = self._waiting, deque()
        for future, _ in waiting:
            if not future.done():
                future.set_result(self._lost)
        self.resume_writing()

    def _fill(self, nbytes: int) -> None:
        """Note that so many bytes of the value came to where they belong."""
        target = self._targets[0]
        if nbytes < len(target):
            self._targets[0] = target[nbytes:]
            return
        del self._targets[0]
        if not self._targets:
            self._ending = self._waiting[0][1]

    def _answer(self, reply: Reply) -> None:
        future, _ = self._waiting.popleft()
        if not future.done():
            future.set_result(reply)

    def _parse(self) -> None:
        """Take the replies that are complete, and begin with a value where its head is."""
        while self._start < self._stop:
            if self._skip:
                skipped = min(self._skip, self._stop - self._start)
                self._skip -= skipped
                self._start += skipped
                continue
            if self._ending is not None:
                if not self._end(self._ending):
                    return
                continue
            if not self._waiting:
                raise ValueError("a reply to no command")
            value = self._waiting[0][1]
            if value is None or self._control[self._start] != _BULK:
                found = _parse(self._control, self._start, self._stop)
                if found is None:
                    return
                reply, self._start = found
                self._answer(reply)
            elif not self._begin(value):
                return

    def _end(self, value: Value) -> bool:
        """Take what comes after a value's payload, if all of it is there."""
        after = self._start + len(value.trailer)
        if after + 2 > self._stop:
            return False
        value.trailer[:] = self._control[self._start : after]
        self._start = after + 2
        self._ending = None
        self._answer(True)
        return True

    def _begin(self, value: Value) -> bool:
        """Begin with a value, or not where it is none; say whether there is more to look at."""
        line = _line(self._control, self._start + 1, self._stop)
        if line is None:
            return False
        number, self._start = line
        size = int(number)
        if size != value.size:
            self._skip = size + 2 if size >= 0 else 0  # -1: there is none
            self._answer(None)
            return True
        header = memoryview(value.header)
        self._targets = [part for part in (header, value.payload) if part.nbytes]
        with memoryview(self._control) as control:
            while self._targets and self._start < self._stop:
                target = self._targets[0]
                count = min(len(target), self._stop - self._start)
                target[:count] = control[self._start : self._start + count]
                self._start += count
                self._fill(count)
        if not (header.nbytes or value.payload.nbytes):
            self._ending = value
        return not self._targets


_BULK = ord("$")


def _line(data: bytearray, start: int, end: int) -> tuple[bytes, int] | None:
    """Return a line and where the next one begins, if it is complete."""
    stop = data.find(b"\r\n", start, end)
    return None if stop < 0 else (bytes(data[start:stop]), stop + 2)


def _parse(data: bytearray, start: int, end: int) -> tuple[Reply, int] | None:
    """Return a reply and where the next one begins, if it is complete.

    Raises:
        ValueError: It is none.
    """
    line = _line(data, start + 1, end)
    if line is None:
        return None
    text, after = line
    kind = data[start : start + 1]
    if kind == b":":
        return int(text), after
    if kind == b"+":
        return text, after
    if kind == b"-":
        return ReplyError(text.decode(errors="replace")), after
    if kind == b"$":
        size = int(text)
        if size < 0:
            return None, after
        stop = after + size
        return (bytes(data[after:stop]), stop + 2) if stop + 2 <= end else None
    if kind == b"*":
        items: list[Reply] = []
        for _ in range(int(text)):
            found = _parse(data, after, end) if after < end else None
            if found is None:
                return None
            item, after = found
            items.append(item)
        return items, after
    raise ValueError(f"a line begins with {bytes(kind)!r}")
