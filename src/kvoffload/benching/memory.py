"""Hot and warm blocks, beside bare copies and bare tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from time import perf_counter

import numpy as np

from ..copying import copy_apart
from ..managers.async_lru_manager import AsyncLRUManager
from ..movement.transfer import COPY_THREADS
from ..storage.format import checksum
from ..tiers.memory import MemoryTier
from .raw_io import MIB
from .rows import Row, Work, chain_of, expect, row_of
from .timing import Contender, alternate, stack_apart, timed_apart

LEASED_BLOCKS = 16
"""Blocks of a request whose lease is timed."""

_CALLS = 100
_CHECKSUM_BYTES = 64 * MIB


async def measure_store(
    payloads: Sequence[memoryview], into: Sequence[memoryview], seconds: float
) -> list[Row]:
    """Store into a hot tier that evicts as much, beside a bare copy."""
    count, block_bytes = len(payloads), len(payloads[0])
    shares = [range(first, count, COPY_THREADS) for first in range(COPY_THREADS)]
    chains = cycle([chain_of("a", count), chain_of("b", count)])
    sources = [np.frombuffer(payload, np.uint8) for payload in payloads]
    targets = [np.frombuffer(buffer, np.uint8) for buffer in into]
    hot = MemoryTier(count, block_bytes)
    async with AsyncLRUManager(hot=hot, policy="lru") as kv, stack_apart() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(COPY_THREADS))

        def copy_share(share: range) -> None:
            copy_apart([targets[number] for number in share], [sources[number] for number in share])

        async def store_share(chain: Sequence[str], share: range) -> int:
            names, data = [chain[number] for number in share], [payloads[n] for n in share]
            return len((await kv.store(names, data)).stored)

        async def store() -> float:
            chain = next(chains)
            started = perf_counter()
            stored = await asyncio.gather(*(store_share(chain, share) for share in shares))
            took = perf_counter() - started
            expect("stored in memory", sum(stored), count)
            return took

        contenders = {
            "copy": timed_apart(lambda: list(pool.map(copy_share, shares))),
            "store": store,
        }
        timings = await alternate(contenders, seconds)
    return [
        row_of(
            "store in memory",
            timings,
            ours="store",
            limits=["copy"],
            limit_is=f"numpy copy of the blocks into touched memory, {_threads()}",
            reached_is="store into a full hot tier, which evicts as many, "
            f"{COPY_THREADS} at a time",
            moved=Work(count, block_bytes),
        )
    ]


async def measure_lease(payloads: Sequence[memoryview], seconds: float) -> list[Row]:
    """Lease hot blocks, beside a bare task."""
    payloads = payloads[:LEASED_BLOCKS]
    chain = chain_of("leased", len(payloads))
    async with AsyncLRUManager(hot=MemoryTier(len(payloads), len(payloads[0]))) as kv:
        expect("stored in memory", len((await kv.store(chain, payloads)).stored), len(chain))

        async def nothing() -> None:
            pass

        async def tasks() -> float:
            started = perf_counter()
            for _ in range(_CALLS):
                async with asyncio.TaskGroup() as group:
                    group.create_task(nothing())
            return (perf_counter() - started) / _CALLS

        async def leases() -> float:
            shown = 0
            started = perf_counter()
            for _ in range(_CALLS):
                async with kv.request(chain) as request, request.load() as lease:
                    for _view in lease:
                        shown += 1
            took = (perf_counter() - started) / _CALLS
            expect("leased", shown, len(chain) * _CALLS)
            return took

        timings = await alternate({"task": tasks, "lease": leases}, seconds)
    return [
        row_of(
            "lease of hot blocks",
            timings,
            ours="lease",
            limits=["task"],
            limit_is="a task of nothing in a task group, started and awaited",
            reached_is=f"request of {len(chain)} hot blocks: found, loaded, each view looked at, "
            "left; nothing is copied, whatever the size of a block",
        )
    ]


async def measure_promotion(
    payloads: Sequence[memoryview], into: Sequence[memoryview], seconds: float
) -> list[Row]:
    """Promote warm blocks into a hot tier with room, beside a bare copy."""
    count, block_bytes = len(payloads), len(payloads[0])
    chain, other = chain_of("promoted", count), chain_of("other", count)
    async with AsyncLRUManager(
        hot=MemoryTier(count, block_bytes),
        warm=MemoryTier(count, block_bytes, name="warm"),
        policy="lru",
        promote_threshold=1,
        watermarks=(0.0, 0.0),
    ) as kv:
        await kv.store(chain, payloads)

        async def promote() -> float:
            # The other chain pushes this one down; explicitly evicted, it leaves room behind.
            await kv.store(other, payloads)
            await kv.evict(other)
            where = [place.tier for place in kv.locate(chain)]
            expect("demoted to the warm tier", where.count("warm"), count)
            before = kv.get_stats().promotions
            started = perf_counter()
            async with kv.load(chain):
                took = perf_counter() - started
            expect("promoted", kv.get_stats().promotions - before, count)
            return took

        contenders: dict[str, Contender] = {
            "copy": _copying(payloads, into),
            "promotion": promote,
        }
        timings = await alternate(contenders, seconds)
    return [
        row_of(
            "promotion",
            timings,
            ours="promotion",
            limits=["copy"],
            limit_is="numpy copy of the blocks into touched memory, 1 thread",
            reached_is="load that promotes the blocks from the warm to the hot tier",
            moved=Work(count, block_bytes),
        )
    ]


async def measure_checksum(
    payloads: Sequence[memoryview], into: Sequence[memoryview], seconds: float
) -> list[Row]:
    """Compute checksums, beside a bare copy."""
    count = max(1, min(len(payloads), _CHECKSUM_BYTES // len(payloads[0])))
    payloads, into = payloads[:count], into[:count]

    def compute() -> None:
        for payload in payloads:
            checksum(payload)

    contenders = {"copy": _copying(payloads, into), "checksum": timed_apart(compute)}
    timings = await alternate(contenders, seconds)
    return [
        row_of(
            "checksum",
            timings,
            ours="checksum",
            limits=["copy"],
            limit_is="numpy copy of the blocks into touched memory, 1 thread",
            reached_is="xxh3 of the blocks, as of all that is written cold or read there, 1 thread",
            moved=Work(count, len(payloads[0])),
        )
    ]


def _copying(payloads: Sequence[memoryview], into: Sequence[memoryview]) -> Contender:
    sources = [np.frombuffer(payload, np.uint8) for payload in payloads]
    targets = [np.frombuffer(buffer, np.uint8) for buffer in into]
    return timed_apart(lambda: copy_apart(targets, sources))


def _threads() -> str:
    return "1 thread" if COPY_THREADS == 1 else f"{COPY_THREADS} threads"
