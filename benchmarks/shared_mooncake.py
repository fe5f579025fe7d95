"""Mooncake in `shared_tier.py`: `MooncakeDistributedStore` beside `MooncakeTier`, over TCP.

`shared_mooncake_shm.py` has the same through memory that is shared with a client on this machine.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from shared_engine import BATCH_BLOCKS, BLOCK_BYTES, Engine

from kvoffload import MooncakeTier
from kvoffload.aligned import address_of, aligned_empty
from kvoffload.types import ByteArray

NODE = "1GB"
POOL_BYTES = 4 * BATCH_BLOCKS * BLOCK_BYTES


@contextmanager
def engine(url: str | None) -> Iterator[Engine]:
    """Run a master and a storage node, or take the master at `url`."""
    if url is not None:
        yield Engine(Client(url), MooncakeTier(url))
        return
    with store() as (master, _):
        url = f"mooncake://{master}"
        yield Engine(Client(url), MooncakeTier(url))


@contextmanager
def store() -> Iterator[tuple[str, str]]:
    """Run a master and a storage node on loopback ports; yield their addresses."""
    package = Path(importlib.import_module("mooncake").__path__[0])
    master, metrics, node = (_free_port() for _ in range(3))
    with ExitStack() as stack:
        for port, command in (
            (
                master,
                [
                    *("mooncake_master", "--rpc_address=127.0.0.1", f"--rpc_port={master}"),
                    *("--metrics_host=127.0.0.1", f"--metrics_port={metrics}"),
                ],
            ),
            (
                node,
                [
                    *("mooncake_client", "--host=127.0.0.1", f"--port={node}"),
                    *("--metadata_server=P2PHANDSHAKE", f"--global_segment_size={NODE}"),
                    f"--master_server_address=127.0.0.1:{master}",
                ],
            ),
        ):
            process = subprocess.Popen(
                [str(package / command[0]), *command[1:]],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            _wait_for(port)
        yield f"127.0.0.1:{master}", f"127.0.0.1:{node}"


class Client:
    """The client: one call for a batch, on a thread, straight from buffers that it knows."""

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        self._is_shared = scheme == "mooncake+shm"
        self._address = rest.partition("?")[0]
        self._store: Any = None
        self._sources: dict[int, ByteArray] = {}
        self._into: list[ByteArray] = []

    async def open(self) -> None:
        self._store = importlib.import_module("mooncake.store").MooncakeDistributedStore()
        if self._is_shared:
            code = self._store.setup_dummy(POOL_BYTES, 0, self._address)
        else:
            code = self._store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", self._address)
        assert code == 0
        self._into = [self._buffer() for _ in range(BATCH_BLOCKS)]

    def _buffer(self) -> ByteArray:
        if self._is_shared:
            start = self._store.alloc_from_mem_pool(BLOCK_BYTES)
            array = np.ctypeslib.as_array((ctypes.c_uint8 * BLOCK_BYTES).from_address(start))
        else:
            array = aligned_empty(BLOCK_BYTES)
        self._store.register_buffer(address_of(array), BLOCK_BYTES)
        return array

    async def close(self) -> None:
        await self._call(self._store.close)

    async def put(self, names: Sequence[str], payloads: Sequence[bytes]) -> None:
        for payload in payloads:
            if id(payload) not in self._sources:  # in the first round, which does not count
                self._sources[id(payload)] = self._buffer()
                self._sources[id(payload)][:] = np.frombuffer(payload, np.uint8)
        addresses = [address_of(self._sources[id(payload)]) for payload in payloads]
        sizes = [len(payload) for payload in payloads]
        codes = await self._call(
            lambda: self._store.batch_upsert_from(list(names), addresses, sizes)
        )
        assert not any(codes)

    async def get(self, names: Sequence[str]) -> None:
        addresses = [address_of(array) for array in self._into]
        sizes = [BLOCK_BYTES] * len(names)
        codes = await self._call(lambda: self._store.batch_get_into(list(names), addresses, sizes))
        assert codes == sizes

    async def delete(self, names: Sequence[str]) -> None:
        await self._call(lambda: self._store.batch_remove(list(names), True))

    async def _call(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, work)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
