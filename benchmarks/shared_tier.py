"""Tiers past one machine: blocks through each beside its engine's client driven bare, in one run.

    python benchmarks/shared_tier.py [--engine NAME] [--rounds N] [--loop asyncio|uvloop] [--json]

Starts a server of each engine (another one is taken by `--url`), and moves batches of 16 blocks of
2 MiB. In turns:

- bare: the engine's own client, as fast as its users drive it (the modules `shared_ENGINE.py` say
  how), no checksum; what it reads are objects or buffers of its own.
- tier: put and get of the same batches through our tier, from buffers and into buffers, checksums
  of all bytes included.

Told are the rates, their ratios, and how late the event loop was meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

import anyio
import numpy as np
import uvloop
from shared_engine import BATCH_BLOCKS, BLOCK_BYTES, Engine, EngineMaker

from kvoffload import RemoteOutcome
from kvoffload.aligned import aligned_empty

ENGINES = ("mooncake", "mooncake_shm", "object", "valkey")
"""Each has a module, with an `engine`."""
WARM_ROUNDS = 2
LAG_STEP_S = 0.001


@dataclass(frozen=True)
class Row:
    """One way of moving batches."""

    engine: str
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


async def measure(engine_name: str, engine: Engine, rounds: int) -> list[Row]:
    bare, tier = engine.bare, engine.tier
    await bare.open()
    await tier.open()
    random = np.random.default_rng(1)
    arrays = [aligned_empty(BLOCK_BYTES) for _ in range(BATCH_BLOCKS)]
    for array in arrays:
        array[:] = random.integers(0, 256, BLOCK_BYTES, dtype=np.uint8)
    into = [aligned_empty(BLOCK_BYTES) for _ in range(BATCH_BLOCKS)]
    data, buffers = [array.data for array in arrays], [array.data for array in into]
    objects = [array.tobytes() for array in arrays]
    names = [f"bare{number}" for number in range(BATCH_BLOCKS)]
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
    for number in range(rounds + WARM_ROUNDS):
        if number:
            await bare.delete(names)
        await tier.delete(keys)
        for name, way in ways.items():
            async with lags[name].watched() if number >= WARM_ROUNDS else _nothing():
                began = time.perf_counter()
                await way()
                if number >= WARM_ROUNDS:
                    times[name].append(time.perf_counter() - began)
    assert all((one == other).all() for one, other in zip(arrays, into, strict=True))
    await tier.delete(keys)
    await bare.delete(names)
    await tier.close()
    await bare.close()
    size = BATCH_BLOCKS * BLOCK_BYTES / 1e9
    return [
        Row(engine_name, name, size / statistics.median(times[name]), lags[name].p99_ms)
        for name in ways
    ]


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Shared tiers beside their engines' clients driven bare, as ratios in one run."
    )
    parser.add_argument("--engine", choices=ENGINES, help="one alone")
    parser.add_argument("--url", help="its server; keys of our own alone are touched")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="uvloop")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.url and not arguments.engine:
        parser.error("--url needs --engine")
    run = uvloop.run if arguments.loop == "uvloop" else asyncio.run
    told = []
    for name in [arguments.engine] if arguments.engine else ENGINES:
        run_engine: EngineMaker = importlib.import_module(f"shared_{name}").engine
        with run_engine(arguments.url) as engine:
            rows = run(measure(name, engine, arguments.rounds))
        ratios = {
            what: rows[n + 1].gigabytes_per_s / rows[n].gigabytes_per_s
            for what, n in (("put", 0), ("get", 2))
        }
        told.append({"engine": name, "rows": [asdict(row) for row in rows], "ratios": ratios})
        if not arguments.json:
            for row in rows:
                rate, late = row.gigabytes_per_s, row.lag_p99_ms
                print(f"{name}, {row.name}: {rate:.2f} GB/s, loop late p99 {late:.1f} ms")
            for what, ratio in ratios.items():
                print(f"{name}, {what}: {ratio:.2f} of the bare client")
    if arguments.json:
        json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
