"""Clients of a Mooncake store: where it is, connections to it, and memory that it may look at."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import os
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from ..aligned import address_of, aligned_empty
from ..checks import check_choice
from ..errors import ConfigError
from ..sizes import parse_size
from ..types import ByteArray
from .lanes import Lanes
from .mooncake_library import Store, StoreError, meaning_of, new_store

CONTROL_LANES = 2
"""Threads for what is small, so that it does not queue behind payloads."""
EXIT_S = 2.0
"""Seconds that the interpreter's end waits for calls under way."""

_PORTS = {"mooncake": 50051, "mooncake+shm": 50052}
_SETTINGS = ("protocol", "devices", "metadata", "hostname", "segment", "buffer")


@dataclass(frozen=True)
class Address:
    """Where a store is, and how this process takes part in it.

    Attributes:
        host: The master's; of `mooncake+shm`, that of a `mooncake_client` on this machine.
        port: Its port.
        shared_memory: Whether it is that client, with which memory is shared.
        protocol: What carries the payloads.
        devices: RDMA devices, with commas between; none lets the library choose.
        metadata: The transfer engine's metadata server.
        hostname: This machine's, as the others know it; none is the address that the master sees.
        segment_bytes: Memory of this process that the store may fill.
        buffer_bytes: Memory that the library takes for itself.
    """

    host: str
    port: int
    shared_memory: bool = False
    protocol: str = "tcp"
    devices: str = ""
    metadata: str = "P2PHANDSHAKE"
    hostname: str = ""
    segment_bytes: int = 0
    buffer_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse_url(url: str) -> Address:
    """Return what a URL says.

    Raises:
        ConfigError: It says nothing, or something that is not known.
    """
    scheme = url.partition("://")[0].lower()
    parts = port = None
    with contextlib.suppress(ValueError):  # as the context of ours it would show what was given
        parts = urlsplit(url)
        port = parts.port or _PORTS[scheme] if scheme in _PORTS else None
        given = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts is None or port is None or not parts.hostname or parts.path.strip("/"):
        raise ConfigError(
            "url must be mooncake://master:port[?protocol=rdma&...], or mooncake+shm://host:port "
            "of a mooncake_client on this machine"
        )
    if "@" in parts.netloc:
        raise ConfigError("url: Mooncake knows no users and no passwords")
    shared_memory = scheme == "mooncake+shm"
    for name in given:
        check_choice("url: a setting", name, ("buffer",) if shared_memory else _SETTINGS)
    try:
        segment, buffer = [parse_size(given.get(name, "0")) for name in ("segment", "buffer")]
    except ConfigError as exc:
        raise ConfigError(f"url: segment or buffer {exc}") from exc
    return Address(
        host=parts.hostname,
        port=port,
        shared_memory=shared_memory,
        protocol=check_choice("url: protocol", given.get("protocol", "tcp"), ("tcp", "rdma")),
        devices=given.get("devices", ""),
        metadata=given.get("metadata", Address.metadata),
        hostname=given.get("hostname", ""),
        segment_bytes=segment,
        buffer_bytes=buffer,
    )


class Room:
    """Memory of one thread's own, through which payloads go to the store and from it."""

    def __init__(self, allocate: Callable[[int], ByteArray], size: int) -> None:
        self._allocate = allocate
        self._size = size
        # One that was too small stays, for a transfer that failed may still look at it.
        self._arrays: list[ByteArray] = []

    def take(self, size: int) -> tuple[ByteArray, int]:
        """Return memory of at least that size, and its address.

        Raises:
            StoreError: There is none.
        """
        if not self._arrays or len(self._arrays[-1]) < size:
            while self._size < size:
                self._size *= 2
            self._arrays.append(self._allocate(self._size))
        return self._arrays[-1], address_of(self._arrays[-1])


class Connection:
    """A store that this process is connected to, until it ends.

    Connecting and disconnecting, the library lets no other thread run, for 20 ms and for seconds.
    So the one is done once, and the other never.

    Attributes:
        store: What is called.
        is_broken: Whether another connection has to be made.
    """

    def __init__(self, store: Store, address: Address) -> None:
        self.store = store
        self.is_broken = False
        # It would be closed while the interpreter is taken down.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))
        self._address = address
        self._rooms: list[Room] = []

    def take_rooms(self, count: int, size: int) -> list[Room]:
        """Return memory for some threads."""
        rooms = [self._rooms.pop() for _ in range(min(count, len(self._rooms)))]
        return rooms + [Room(self._allocate, size) for _ in range(count - len(rooms))]

    def give_back(self, room: Room) -> None:
        """Take memory back; on any thread."""
        self._rooms.append(room)

    def _allocate(self, size: int) -> ByteArray:
        if self._address.shared_memory:
            start = self.store.alloc_from_mem_pool(size)
            if not start:
                raise StoreError(f"the shared memory has no {size} bytes more: raise staging_bytes")
            array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
        else:
            array = aligned_empty(size)
        code = self.store.register_buffer(address_of(array), size)
        if code:
            raise StoreError(f"{size} bytes could not be registered: {meaning_of(code)}")
        return array


class Client:
    """What one tier has of a connection: threads, and memory of this process for the store.

    Attributes:
        connection: What it is to.
        store: The connection's.
        data: Threads for payloads, each with memory of its own.
        control: Threads for what is small, so that it does not queue behind payloads.
    """

    def __init__(
        self, connection: Connection, segments: list[str], pool: int, room_bytes: int, tier: str
    ) -> None:
        self.connection = connection
        self.store = connection.store
        rooms = connection.take_rooms(pool, room_bytes)
        self.data = Lanes(rooms, "mooncake", tier, connection.give_back)
        self.control = Lanes([None] * CONTROL_LANES, "mooncake-control", tier)
        self._segments = segments
        self._closing: threading.Thread | None = None
        _clients.add(self)

    def close(self) -> None:
        """Give all up. What is under way fails; its threads end in the background."""
        if self._closing is None:
            self.data.retire()
            self.control.retire()
            self._closing = start(self._close, "mooncake-close")

    def _close(self) -> None:
        if self._segments:
            self.store.unmount_and_free_segment(self._segments)
        self.data.join()
        self.control.join()
        _clients.discard(self)


async def knock(address: Address) -> str:
    """Make sure that a server of Mooncake's answers there; return the address we have for it.

    It is sent a call that it does not have, and says so, unless it is stopped.

    Raises:
        OSError: Nobody is there.
        StoreError: Somebody else is.
    """
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(_KNOCK)
        if await reader.read(1) != _KNOCK[:1]:
            raise StoreError("it does not speak as a server of Mooncake's does")
        host: str = writer.get_extra_info("sockname")[0]
    finally:
        writer.transport.abort()
    return f"[{host}]" if ":" in host else host


_KNOCK = struct.pack("<BBBBIIII", 21, 0, 0, 0, 1, 0, 0, 0)
"""A call without arguments of coro_rpc's, to a function whose number is 0."""


def connect(address: Address, hostname: str, pool_bytes: int) -> tuple[Connection, list[str]]:
    """Return a connection, and the segments of memory that the store has here for it.

    On a thread, and where somebody is known to answer: else it takes long.

    Args:
        address: Where the store is.
        hostname: This machine's, where the address has none.
        pool_bytes: Memory to share with a client on this machine, if it is that.

    Raises:
        ConfigError: The library is missing.
        StoreError: It could not connect.
    """
    with _lock:
        key = os.getpid(), address, hostname
        connection = _connections.get(key)
        if connection is not None and connection.is_broken:
            _broken.append(connection)
            connection = None
        if connection is None:
            connection = _connections[key] = Connection(
                _set_up(address, hostname, pool_bytes), address
            )
    segments: list[str] = []
    if address.segment_bytes:
        told = connection.store.allocate_and_mount_segment(address.segment_bytes, address.protocol)
        if told["ret"]:
            raise StoreError(f"the store does not take the segment: {meaning_of(told['ret'])}")
        segments = told["segment_ids"]
    return connection, segments


def _set_up(address: Address, hostname: str, pool_bytes: int) -> Store:
    store = new_store()
    if address.shared_memory:
        code = store.setup_dummy(pool_bytes, address.buffer_bytes, str(address))
    else:
        code = store.setup(
            address.hostname or hostname,
            address.metadata,
            0,
            address.buffer_bytes,
            address.protocol,
            address.devices,
            str(address),
        )
    if code:
        raise StoreError(
            "its client could not be set up; with MC_LOG_LEVEL=INFO in the environment it says why "
            f"({code})"
        )
    return store


# Threads in the library

_lock = threading.Lock()
_connections: dict[tuple[int, Address, str], Connection] = {}
_broken: list[Connection] = []
_clients: set[Client] = set()  # that are not closed yet
_threads: set[threading.Thread] = set()  # that set up or close


def start(work: Callable[[], None], name: str) -> threading.Thread:
    """Start a thread that may be in the library for long."""

    def run() -> None:
        try:
            work()
        finally:
            _threads.discard(thread)

    # A daemon, for one that is stuck may not keep the interpreter from ending.
    thread = threading.Thread(target=run, name=f"kvoffload-{name}", daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


def _forget() -> None:
    """Leave a parent's connections alone: in a process that was forked, their threads are not."""
    global _lock
    _lock = threading.Lock()  # one of those threads may have it
    for each in (_broken, _clients, _threads):
        each.clear()


os.register_at_fork(after_in_child=_forget)


@atexit.register
def _leave() -> None:
    """Get all threads out of the library.

    One that comes back out of it while the interpreter is taken down takes the process with it.
    """
    for client in list(_clients):
        client.close()
    deadline = time.monotonic() + EXIT_S
    for thread in list(_threads):
        thread.join(max(0.0, deadline - time.monotonic()))
    if _threads or _broken:
        # The library's own handler would wait for whoever does not answer, up to minutes.
        with contextlib.suppress(AttributeError):
            libc = ctypes.CDLL(None)
            libc.on_exit(libc._exit, None)
