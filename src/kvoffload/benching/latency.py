"""Waiting for cold blocks, and what the event loop notices of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from time import perf_counter

import numpy as np

from ..managers.async_lru_manager import AsyncLRUManager
from ..sizes import human_bytes
from .cold import cold_manager
from .lag import probe, reading
from .raw_io import Call, RawFile, make_blocks
from .rows import MILLISECONDS, Row, Work, chain_of, expect, row_of
from .timing import alternate, apart, stack_apart

_SMALL_BYTES = 4096
_SMALL_BLOCKS = 16
_CALLS = 100


async def measure_hop(place: Path, seconds: float) -> list[Row]:
    """Load one small cold block, beside a thread's answer."""
    payloads = await apart(lambda: make_blocks(_SMALL_BLOCKS, _SMALL_BYTES, seed=2))
    chain = chain_of("cold", len(payloads))
    loop = asyncio.get_running_loop()
    async with cold_manager(place / "small", payloads, "off") as kv, stack_apart() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        names = cycle(chain)

        async def hop() -> float:
            started = perf_counter()
            for _ in range(_CALLS):
                await loop.run_in_executor(pool, int)
            return (perf_counter() - started) / _CALLS

        async def load() -> float:
            started = perf_counter()
            for _ in range(_CALLS):
                async with kv.load([next(names)]) as lease:
                    expect("loaded", len(lease), 1)
            return (perf_counter() - started) / _CALLS

        timings = await alternate({"hop": hop, "load": load}, seconds)
    return [
        row_of(
            "hop to a thread",
            timings,
            ours="load",
            limits=["hop"],
            limit_is="a call of nothing on a thread, awaited by the event loop",
            reached_is="load of one cold block of 4 KiB that the page cache has: all that a load "
            "takes but the moving of bytes",
        )
    ]


async def measure_one_block(
    kv: AsyncLRUManager, chain: Sequence[str], file: RawFile, calls: Sequence[Call], seconds: float
) -> Row:
    """Load one cold block that the page cache has, beside a bare read on a thread."""
    count = min(len(chain), 16)
    loop = asyncio.get_running_loop()
    async with stack_apart() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))

        async def read() -> float:
            started = perf_counter()
            for call in calls[:count]:
                await loop.run_in_executor(pool, file.read, call)
            return (perf_counter() - started) / count

        async def load() -> float:
            started = perf_counter()
            for name in chain[:count]:
                async with kv.load([name]) as lease:
                    expect("loaded", len(lease), 1)
            return (perf_counter() - started) / count

        timings = await alternate({"read": read, "load": load}, seconds)
    size = human_bytes(calls[0].num_bytes)
    return row_of(
        "one cold block",
        timings,
        ours="load",
        limits=["read"],
        limit_is="preadv of one block that the page cache has, on a thread that the event loop "
        "awaits",
        reached_is=f"load of one such cold block of {size}, checked",
    )


async def measure_lag(
    kv: AsyncLRUManager, chain: Sequence[str], file: RawFile, calls: Sequence[Call], seconds: float
) -> Row:
    """Probe the event loop while cold blocks are loaded, and beside two bare reading threads."""
    piece = min(0.5, max(0.05, seconds / 8))
    shares = [list(calls[0::2]), list(calls[1::2])]
    late: dict[str, list[float]] = {"threads": [], "loads": []}

    def note(name: str, found: list[float]) -> float:
        late[name] += found
        return _p99(found)

    async def beside_threads() -> float:
        async with reading(file, shares):
            found = await probe(piece)
        return note("threads", found)

    async def beside_loads() -> float:
        until = perf_counter() + piece

        async def load_on() -> None:
            while perf_counter() < until:
                async with kv.load(chain):
                    pass

        async with asyncio.TaskGroup() as group:
            group.create_task(load_on())
            found = await probe(piece)
        return note("loads", found)

    timings = await alternate({"threads": beside_threads, "loads": beside_loads}, seconds)
    return Row(
        "event loop lag",
        MILLISECONDS,
        limit=_p99(late["threads"]) * 1e3,
        reached=_p99(late["loads"]) * 1e3,
        limit_median=timings["threads"].median * 1e3,
        reached_median=timings["loads"].median * 1e3,
        limit_is="99th percentile of what a sleep of 1 ms oversleeps, in an idle loop beside two "
        "bare threads that read the same bytes from the page cache",
        reached_is="the same while the loop loads cold blocks, from the page cache, without a "
        f"pause; of all rounds together; {Work(len(calls), calls[0].num_bytes)}",
        rounds=len(timings["loads"].seconds),
    )


def _p99(late: Sequence[float]) -> float:
    """Return the 99th percentile; no less than what the clock can tell."""
    return max(1e-6, float(np.percentile(late, 99)))
