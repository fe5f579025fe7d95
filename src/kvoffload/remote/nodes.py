"""The servers behind a remote tier: connections to each, and in a cluster which key is whose."""

from __future__ import annotations

import asyncio
from binascii import crc_hqx
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio

from .resp import Address, Connection, LostConnectionError, Reply, ReplyError, command, connect

NUM_SLOTS = 16_384
"""Hash slots of a cluster."""
CONTROL_CONNECTIONS = 2
"""Connections of each server for what is small, so that it does not queue behind payloads."""
ASK_NODE_S = 0.2
"""Seconds after which another node is asked for the shape of the cluster."""


class Pool:
    """Connections to one server, at most so many; made when they are needed."""

    def __init__(self, address: Address, size: int) -> None:
        self.size = size
        self._address = address
        self._limit = asyncio.Semaphore(size)
        self._free: list[Connection] = []
        self._used: set[Connection] = set()
        self._is_closed = False

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Have a connection for oneself; it is given up where the body raises or is cancelled.

        Raises:
            OSError: There is nobody, or the pool was closed.
            ReplyError: The server does not let us in.
        """
        async with self._limit:
            connection: Connection | None = None
            while self._free and connection is None:
                connection = self._free.pop()
                connection = connection if connection.is_idle else None
            if connection is None and not self._is_closed:
                connection = await connect(self._address)
            if self._is_closed:  # meanwhile, perhaps: it would stay open for good
                if connection is not None:
                    connection.abort()
                raise LostConnectionError("the tier was closed")
            assert connection is not None
            self._used.add(connection)
            try:
                yield connection
            except BaseException:
                connection.abort()
                raise
            finally:
                self._used.discard(connection)
                if connection.is_idle:
                    self._free.append(connection)
                else:
                    connection.abort()

    def close(self) -> None:
        """Give up all connections, those in use too; there will be no more."""
        self._is_closed = True
        for connection in (*self._free, *self._used):
            connection.abort()
        self._free.clear()


class Node:
    """One server.

    Attributes:
        address: Where it is.
        data: Connections for payloads.
        control: Connections for all else.
    """

    def __init__(self, address: Address, pool: int) -> None:
        self.address = address
        self.data = Pool(address, pool)
        self.control = Pool(address, CONTROL_CONNECTIONS)

    async def ask(self, commands: Sequence[bytes]) -> list[Reply]:
        """Send commands at once; return their replies.

        Raises:
            OSError: There is nobody, or it went away.
            ReplyError: The server does not let us in.
        """
        async with self.control.connection() as connection:
            return await connection.ask(commands)

    def close(self) -> None:
        """Give up all connections."""
        self.data.close()
        self.control.close()


class Nodes:
    """The servers that there are: one, or those of a cluster.

    Args:
        seed: A server.
        pool: Connections to each for payloads.
        is_cluster: Whether it is one of a cluster, whose others it knows.
    """

    def __init__(self, seed: Address, pool: int, *, is_cluster: bool) -> None:
        self._seed = seed
        self._pool = pool
        self._is_cluster = is_cluster
        self._nodes: dict[str, Node] = {}
        self._slots: list[Node | None] = []
        self._is_closed = False
        self.is_stale = is_cluster
        """Whether the shape of the cluster has to be asked for."""

    @property
    def all(self) -> list[Node]:
        """The servers that have keys."""
        if not self._is_cluster:
            return [self._node(self._seed)]
        return list(dict.fromkeys(node for node in self._slots if node is not None))

    def of(self, name: bytes) -> Node | None:
        """Return the server of a key; `None` while no server has it."""
        return self._slots[slot_of(name)] if self._is_cluster else self._node(self._seed)

    def at(self, place: str) -> Node:
        """Return the server that a redirection names."""
        host, _, port = place.rpartition(":")
        return self._node(replace(self._seed, host=host or self._seed.host, port=int(port)))

    async def refresh(self) -> None:
        """Ask for the shape of the cluster, where it may have changed.

        Raises:
            OSError: No server answers.
            ReplyError: One does, and says that there is no cluster.
        """
        if not (self._is_cluster and self.is_stale):
            return
        error: Exception = ConnectionError("no node of the cluster answers")
        for node in [*reversed(self.all), self._node(self._seed)]:
            with anyio.move_on_after(ASK_NODE_S):
                try:
                    (reply,) = await node.ask([command(b"CLUSTER", b"SLOTS")])
                    if isinstance(reply, ReplyError):
                        raise reply
                    self._note_slots(reply, node)
                except (OSError, ReplyError, ValueError) as exc:
                    error = exc
                else:
                    self.is_stale = False
                    return
        try:
            raise error
        finally:
            del error

    def close(self) -> None:
        """Give up all connections; there will be no more."""
        self._is_closed = True
        for node in self._nodes.values():
            node.close()
        self._nodes.clear()
        self._slots = [None] * len(self._slots)

    # Inside

    def _node(self, address: Address) -> Node:
        node = self._nodes.get(str(address))
        if node is None:
            node = self._nodes[str(address)] = Node(address, self._pool)
            if self._is_closed:
                node.close()
        return node

    def _note_slots(self, reply: Reply, asked: Node) -> None:
        """Take over what a node says of the cluster: who has which range of slots."""
        slots: list[Node | None] = [None] * NUM_SLOTS
        for entry in _items(reply):
            first, last, primary, *_ = _items(entry)
            host, port, *_ = _items(primary)
            if not (isinstance(first, int) and isinstance(last, int) and isinstance(port, int)):
                raise ValueError(f"not a range of slots: {entry!r}")
            name = host.decode() if isinstance(host, bytes) and host != b"?" else ""
            address = replace(self._seed, host=name or asked.address.host, port=port)
            slots[first : last + 1] = [self._node(address)] * (last + 1 - first)
        self._slots = slots


def _items(reply: Reply) -> list[Reply]:
    if not isinstance(reply, list):
        raise ValueError(f"not a list: {reply!r}")
    return reply


def slot_of(name: bytes) -> int:
    """Return the hash slot of a key: of what is in its first braces, if that is anything."""
    start = name.find(b"{")
    if start >= 0:
        end = name.find(b"}", start + 1)
        if end > start + 1:
            name = name[start + 1 : end]
    return crc_hqx(name, 0) % NUM_SLOTS
