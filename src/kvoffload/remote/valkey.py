"""The default tier past one machine: Valkey or Redis, one server or a cluster."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from ..checks import check_count, check_seconds
from ..copying import INLINE_COPY_BYTES
from ..errors import ClosedError, ConfigError, CorruptBlockError, TierError, TierUnavailableError
from ..keys import check_namespace, decode_key
from ..types import Medium
from .envelope import (
    TRAILER_BYTES,
    VERSION,
    added_bytes,
    header_bytes,
    header_of,
    layout_fingerprint,
    mistake,
    trailer_of,
)
from .nodes import Node, Nodes
from .outcomes import Outcome, delete_corrupt, misfits
from .protocol import RemoteOutcome
from .resp import LostConnectionError, Reply, ReplyError, Value, command
from .routing import Answer, Told, Work, all_of, is_down, redirection, route
from .url import parse_url

CHECK_THREADS = 2
"""Threads for checksums: two are faster than the network."""
SCAN_COUNT = 1000
"""Keys of the engine that one step of a `clear` looks at."""
_SPECIAL = frozenset(b"*?[]\\^-")

_JOINED_BYTES = 64 * 1024

T = TypeVar("T")


class ValkeyTier:
    """A `RemoteTier` on Valkey or Redis; needs nothing installed but the server.

    Each block is one value, under a name made of the format's version, the layout and the block's
    canonical key. The engine evicts: give it a `maxmemory` and `maxmemory-policy allkeys-lru`; and
    no block of a power of two bytes, if its memory counts: with the header, its allocator takes a
    quarter more for those.

    Args:
        url: `redis://[[user]:password@]host[:port][/database]` or `valkey://...`; `rediss://` or
            `valkeys://` with TLS; `unix:///path[?database=1]`; or the path of a Unix socket. With
            `?cluster=true` it names one node of a cluster.
        name: Name of the tier.
        layout: What the payloads look like (model, number format, parallel ranks), where the
            namespace does not say so: blocks of another layout are not there.
        cluster: Whether it is a cluster, if the URL does not say so.
        pool: Connections for payloads, to each server.
        ttl_s: Seconds that a block is kept at most; `None` for as long as the engine likes.
        username: User, if the URL has none.
        password: Password, if the URL has none; no message and no `repr` shows it.
        ssl_context: TLS of your own, for `rediss://`.

    Raises:
        ConfigError: The URL is none of these, or a number is out of range.
    """

    medium = Medium.REMOTE

    def __init__(
        self,
        url: str,
        *,
        name: str = "remote",
        layout: str = "",
        cluster: bool = False,
        pool: int = 4,
        ttl_s: float | None = None,
        username: str | None = None,
        password: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.name = name
        self._pool = check_count("pool", pool)
        self._expiry: tuple[bytes, ...] = ()
        if ttl_s is not None:
            milliseconds = max(1, round(1000 * check_seconds("ttl_s", ttl_s, positive=True)))
            self._expiry = (b"PX", b"%d" % milliseconds)
        self._layout = layout_fingerprint(layout)
        self._prefix = b"kvoffload:%d:%x:" % (VERSION, self._layout)
        address, wants_tls, is_cluster = parse_url(url, username, password, ssl_context)
        self._address, self._wants_tls = address, wants_tls
        self._is_cluster = cluster or is_cluster
        if self._is_cluster and (address.path or address.database):
            raise ConfigError("a cluster has a host, a port and one database, 0; no Unix socket")
        self._open: tuple[Nodes, ThreadPoolExecutor] | None = None

    def __repr__(self) -> str:
        kind = "cluster at " if self._is_cluster else ""
        return f"<ValkeyTier {self.name!r}: {kind}{self._address}>"

    # Life

    async def open(self) -> None:
        """Connect once, to see that the server is there.

        Raises:
            TierUnavailableError: It does not answer, or does not let us in; later calls try again.
        """
        if self._open is None:
            # They don't step aside for the loop as other threads do: its next write waits for them.
            executor = ThreadPoolExecutor(CHECK_THREADS, thread_name_prefix="kvoffload-remote")
            address = self._address
            if self._wants_tls and address.ssl_context is None:
                # It reads the system's certificates.
                loop = asyncio.get_running_loop()
                context = await loop.run_in_executor(executor, ssl.create_default_context)
                address = replace(address, ssl_context=context)
            nodes = Nodes(address, self._pool, is_cluster=self._is_cluster)
            self._open = nodes, executor
        await self.check()

    async def close(self) -> None:
        """Give up all connections; idempotent."""
        if self._open is not None:
            nodes, executor = self._open
            self._open = None
            nodes.close()
            executor.shutdown(wait=False)

    async def check(self) -> None:
        """Make sure that each server answers.

        Raises:
            TierUnavailableError: One does not, or no cluster is there.
        """
        nodes = await self._nodes()
        try:
            for node in nodes.all:
                (reply,) = await node.ask([command(b"PING")])
                if isinstance(reply, ReplyError):
                    raise reply
        except (OSError, ReplyError) as exc:
            nodes.is_stale = True
            raise self._unavailable(exc) from exc

    # Blocks

    async def find(self, keys: Sequence[bytes]) -> list[int | None]:
        """Return the payload bytes of each block, `None` where it is not there.

        Raises:
            TierUnavailableError: The engine does not answer.
        """
        sizes = await self._sizes(keys)
        return [None if size is None or size < 0 else size for size in sizes]

    async def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[Outcome]:
        """Fill each buffer with its block; what does not check is deleted.

        Raises:
            TierUnavailableError: The engine does not answer.
        """
        names = self._names(keys)
        outcomes: list[Told] = [None] * len(keys)
        sizes = [buffer.nbytes for buffer in into]

        async def read(node: Node, numbers: Sequence[int], asking: bool) -> None:
            await self._in_lanes(node, numbers, sizes, outcomes, read_lane, asking)

        async def read_lane(node: Node, numbers: Sequence[int], asking: bool) -> None:
            values = [Value(header_bytes(keys[n]), into[n], TRAILER_BYTES) for n in numbers]
            checks: list[tuple[int, Awaitable[str | None]]] = []
            async with node.data.connection() as connection:
                replies: list[asyncio.Future[Reply]] = []
                commands: list[bytes] = []
                for number, value in zip(numbers, values, strict=True):
                    if asking:
                        connection.expect()
                        commands.append(command(b"ASKING"))
                    replies.append(connection.expect(value))
                    commands.append(command(b"GET", names[number]))
                await connection.send(b"".join(commands))
                for number, value, reply in zip(numbers, values, replies, strict=True):
                    got = await connection.reply(reply)
                    if got is True:
                        parts = value.header, value.trailer, keys[number], value.payload
                        check = partial(mistake, *parts, self._layout)
                        checks.append((number, self._work(value.payload.nbytes, check)))
                    elif got is None:
                        outcomes[number] = RemoteOutcome.ABSENT
                    else:
                        outcomes[number] = redirection(got) or self._refusal(got, keys[number])
            for number, checking in checks:
                wrong = await checking
                outcomes[number] = (
                    RemoteOutcome.DONE if wrong is None else self._corrupt(wrong, keys[number])
                )

        await self._route(names, outcomes, read)
        await delete_corrupt(keys, outcomes, self.delete)
        return [self._told(outcome) for outcome in outcomes]

    async def put(self, keys: Sequence[bytes], payloads: Sequence[memoryview]) -> list[Outcome]:
        """Write the blocks that are not there yet.

        Raises:
            TierUnavailableError: The engine does not answer.
        """
        names = self._names(keys)
        sizes = [payload.nbytes for payload in payloads]
        found = await self._sizes(keys)
        outcomes: list[Told] = [
            RemoteOutcome.PRESENT if there == size else None
            for there, size in zip(found, sizes, strict=True)
        ]
        wrong = misfits(keys, found, sizes)
        if wrong:
            await self.delete(wrong)
        end = b"".join(b"\r\n$%d\r\n%b" % (len(word), word) for word in (b"NX", *self._expiry))
        end += b"\r\n"
        words = 4 + len(self._expiry)

        async def write(node: Node, numbers: Sequence[int], asking: bool) -> None:
            await self._in_lanes(node, numbers, sizes, outcomes, write_lane, asking)

        async def write_lane(node: Node, numbers: Sequence[int], asking: bool) -> None:
            async with node.data.connection() as connection:
                replies: list[asyncio.Future[Reply]] = []
                for number in numbers:
                    header = header_of(keys[number], sizes[number], self._layout)
                    # Made while the payload is on its way.
                    sealing = self._work(
                        sizes[number], partial(trailer_of, header, payloads[number])
                    )
                    if asking:
                        connection.expect()
                        await connection.send(command(b"ASKING"))
                    replies.append(connection.expect())
                    begin = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b" % (
                        words,
                        len(names[number]),
                        names[number],
                        sizes[number] + added_bytes(keys[number]),
                        header,
                    )
                    if sizes[number] > _JOINED_BYTES:
                        await connection.send(begin, payloads[number].cast("B"))
                        await connection.send(await sealing + end)
                    else:  # one packet is sent sooner
                        await connection.send(
                            b"".join((begin, payloads[number], await sealing, end))
                        )
                for number, reply in zip(numbers, replies, strict=True):
                    got = await connection.reply(reply)
                    if got == b"OK":
                        outcomes[number] = RemoteOutcome.DONE
                    elif got is None:
                        outcomes[number] = RemoteOutcome.PRESENT
                    else:
                        outcomes[number] = redirection(got) or self._refusal(got, keys[number])

        await self._route(names, outcomes, write)
        return [self._told(outcome) for outcome in outcomes]

    async def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Delete blocks; say of each whether it was there.

        Raises:
            TierUnavailableError: The engine does not answer.
            TierError: It refuses.
        """
        replies = await self._ask_each(b"UNLINK", keys)
        for key, reply in zip(keys, replies, strict=True):
            if isinstance(reply, ReplyError):
                raise self._refusal(reply, key)
        return [reply == 1 for reply in replies]

    async def clear(self, namespace: str) -> AsyncIterator[int]:
        """Delete all blocks of a namespace, of this layout; see `RemoteTier.clear`.

        Raises:
            TierUnavailableError: The engine does not answer.
        """
        name = check_namespace(namespace).encode()
        own = self._prefix + b"?" + _literally(bytes([len(name)]) + name) + b"*"
        nodes = await self._nodes()
        for node in nodes.all:
            cursor = b"0"
            while True:
                scan = command(b"SCAN", cursor, b"MATCH", own, b"COUNT", b"%d" % SCAN_COUNT)
                try:
                    (reply,) = await node.ask([scan])
                    if isinstance(reply, ReplyError):
                        raise reply
                    cursor, found = _cursor_and_names(reply)
                    gone = await node.ask([command(b"UNLINK", each) for each in found])
                except (OSError, ReplyError, ValueError) as exc:
                    raise self._unavailable(exc) from exc
                yield sum(reply == 1 for reply in gone)
                if cursor == b"0":
                    break

    # Inside: to which server

    async def _nodes(self) -> Nodes:
        if self._open is None:
            raise ClosedError(f"{self!r} is not open")
        nodes, _ = self._open
        try:
            await nodes.refresh()
        except (OSError, ReplyError, ValueError) as exc:
            raise self._unavailable(exc) from exc
        return nodes

    async def _route(self, names: Sequence[bytes], told: list[Told], work: Work) -> None:
        if None in told:
            nodes = await self._nodes()
            try:
                await route(nodes, names, told, work)
            except (OSError, ReplyError, ValueError) as exc:
                raise self._unavailable(exc) from exc

    async def _ask_each(self, verb: bytes, keys: Sequence[bytes]) -> list[Reply]:
        """Send a command for each key, all at once; return the replies."""
        names = self._names(keys)
        replies: list[Told] = [None] * len(keys)

        async def ask(node: Node, numbers: Sequence[int], asking: bool) -> None:
            first = command(b"ASKING") if asking else b""
            async with node.control.connection() as connection:
                expected: list[asyncio.Future[Reply]] = []
                for _ in numbers:
                    if asking:
                        connection.expect()
                    expected.append(connection.expect())
                await connection.send(
                    b"".join([first + command(verb, names[number]) for number in numbers])
                )
                for number, future in zip(numbers, expected, strict=True):
                    reply = await connection.reply(future)
                    replies[number] = redirection(reply) or Answer(reply)
                    if is_down(reply):
                        assert isinstance(reply, ReplyError)
                        raise reply

        await self._route(names, replies, ask)
        return [each.reply if isinstance(each, Answer) else None for each in replies]

    async def _in_lanes(
        self,
        node: Node,
        numbers: Sequence[int],
        sizes: Sequence[int],
        outcomes: list[Told],
        work: Work,
        asking: bool,
    ) -> None:
        """Spread payloads over the connections; what fails is an outcome of those it concerns."""
        total = sum([sizes[number] for number in numbers])
        count = min(node.data.size, len(numbers)) if total > INLINE_COPY_BYTES else 1

        async def run(_: Node, lane: Sequence[int], asked: bool) -> None:
            try:
                await work(node, lane, asked)
            except (OSError, ReplyError) as exc:
                for number in lane:
                    if outcomes[number] is None:
                        outcomes[number] = self._unavailable(exc)
                if self._open is not None:
                    self._open[0].is_stale = True

        await all_of([(run, node, numbers[first::count], asking) for first in range(count)])

    # Inside: the bytes

    async def _sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """Return the payload bytes of what has the keys' names, negative where it is no block."""
        sizes: list[int | None] = []
        for key, reply in zip(keys, await self._ask_each(b"STRLEN", keys), strict=True):
            if isinstance(reply, int):
                sizes.append(reply - added_bytes(key) if reply else None)
            else:
                sizes.append(-1 if isinstance(reply, ReplyError) else None)
        return sizes

    def _names(self, keys: Sequence[bytes]) -> list[bytes]:
        return [self._prefix + key for key in keys]

    def _work(self, size: int, work: Callable[[], T]) -> Awaitable[T]:
        """Do something with so many bytes, on a thread where they are many."""
        loop = asyncio.get_running_loop()
        if size > INLINE_COPY_BYTES // 4 and self._open is not None:
            return loop.run_in_executor(self._open[1], work)
        done: asyncio.Future[T] = loop.create_future()
        done.set_result(work())
        return done

    # Inside: what went wrong

    def _unavailable(self, exc: Exception) -> TierUnavailableError:
        error = TierUnavailableError(f"valkey at {self._address}: {exc}", tier=self.name)
        error.__cause__ = exc
        return error

    def _refusal(self, reply: Reply, key: bytes) -> TierError:
        """Return what a reply means that is not the one that was hoped for."""
        if not isinstance(reply, ReplyError):
            return self._corrupt(f"the server said {reply!r}", key)
        if reply.code == "WRONGTYPE":
            return self._corrupt("it is no value", key)
        if is_down(reply):
            return self._unavailable(reply)
        error = TierError(f"valkey at {self._address} refused: {reply}", tier=self.name)
        error.block_hash = decode_key(key)[1]
        return error

    def _corrupt(self, why: str, key: bytes) -> CorruptBlockError:
        block_hash = decode_key(key)[1]
        return CorruptBlockError(
            f"what valkey at {self._address} has for the block does not check: {why}",
            tier=self.name,
            block_hash=block_hash,
        )

    def _told(self, outcome: Told) -> Outcome:
        if isinstance(outcome, RemoteOutcome | TierError):
            return outcome
        return self._unavailable(LostConnectionError("it was cut off"))


def _literally(text: bytes) -> bytes:
    """Return a pattern that matches this text alone."""
    return b"".join([b"\\%c" % each if each in _SPECIAL else b"%c" % each for each in text])


def _cursor_and_names(reply: Reply) -> tuple[bytes, list[bytes]]:
    if isinstance(reply, list) and len(reply) == 2:
        cursor, found = reply
        if isinstance(cursor, bytes) and isinstance(found, list):
            return cursor, [name for name in found if isinstance(name, bytes)]
    raise ValueError(f"not what SCAN returns: {reply!r}")
