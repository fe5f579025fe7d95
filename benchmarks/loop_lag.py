"""How late an event loop is while the cold tier works flat out, beside two bare reading threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle

import numpy as np
from disk_contests import Bench, Work, fill
from raw_io import Call, RawFile, make_blocks, plan_calls

from kvoffload import DiskTier

SLEEP_S = 0.001
LEAST_BOUND_S = 0.002
"""A 99th percentile up to here is fine, whatever the reference has."""

REFERENCE_FACTOR = 1.5


@dataclass(frozen=True, slots=True)
class Lag:
    """By how many seconds sleeps were too long, and what was moved meanwhile."""

    p50_s: float
    p99_s: float
    max_s: float
    bytes_per_s: float

    @property
    def bound_s(self) -> float:
        """Return the most that the 99th percentile may be where this is the reference."""
        return max(LEAST_BOUND_S, REFERENCE_FACTOR * self.p99_s)

    def __str__(self) -> str:
        p50, p99, most = (value * 1e3 for value in (self.p50_s, self.p99_s, self.max_s))
        rate = self.bytes_per_s / 1e9
        return f"{p50:8.2f} ms p50 {p99:8.2f} ms p99 {most:8.2f} ms max, at {rate:5.2f} GB/s"

    def as_json(self) -> dict[str, float]:
        """Return plain values."""
        return asdict(self)


def compare_lag(bench: Bench, loop: str, work: Work, seconds: float) -> tuple[Lag, Lag]:
    """Return the lag of a loop beside the tier, and that beside two bare threads."""
    runner = bench.runners[loop]
    count = work.num_blocks
    payloads = make_blocks(count, work.block_bytes, seed=1)
    into = make_blocks(count, work.block_bytes)
    with bench.directory() as directory:
        with bench.tier(directory / "tier", work, runner, num_slots=2 * count) as tier:
            ours = runner.run(_lag_beside_tier(tier, payloads, into, seconds))
        with bench.raw_file(directory / "raw", replace(work, direct=False)) as file:
            fill(file, payloads)
            shares = [plan_calls(buffers, 1) for buffers in (payloads, into)]
            reference = runner.run(_lag_beside_threads(file, shares, seconds))
    return ours, reference


async def _lag_beside_tier(
    tier: DiskTier, payloads: Sequence[memoryview], into: Sequence[memoryview], seconds: float
) -> Lag:
    """Read the first half of the slots and rewrite the second half, both without a pause."""
    count = len(payloads)
    reads, writes = range(count), range(count, 2 * count)
    keys = [slot.to_bytes(8, "big") for slot in writes]
    batch_bytes = sum(map(len, payloads))
    until = time.perf_counter() + seconds

    assert not any(await tier.write(reads, payloads, keys))

    async def read_on() -> int:
        batches = 0
        while time.perf_counter() < until:
            assert not any(await tier.read(reads, into))
            batches += 1
        return batches

    async def write_on() -> int:
        batches = 0
        while time.perf_counter() < until:
            assert not any(await tier.write(writes, payloads, keys))
            await tier.flush()
            batches += 1
        return batches

    async with asyncio.TaskGroup() as tasks:
        loads = [tasks.create_task(read_on()), tasks.create_task(write_on())]
        probing = tasks.create_task(probe(seconds))
    moved = batch_bytes * sum(load.result() for load in loads)
    return _summary(probing.result(), moved / seconds)


async def _lag_beside_threads(file: RawFile, shares: Sequence[list[Call]], seconds: float) -> Lag:
    """Have one bare thread for each share of calls read a cached file."""
    with _reading(file, shares) as moved:
        late = await probe(seconds)
    return _summary(late, sum(moved) / seconds)


async def probe(seconds: float) -> list[float]:
    """Sleep 1 ms over and over; return by how much each sleep was too long."""
    until = time.perf_counter() + seconds
    late = []
    while (started := time.perf_counter()) < until:
        await asyncio.sleep(SLEEP_S)
        late.append(max(0.0, time.perf_counter() - started - SLEEP_S))
    return late


@contextmanager
def _reading(file: RawFile, shares: Sequence[list[Call]]) -> Iterator[list[int]]:
    stop = threading.Event()
    moved = [0] * len(shares)

    def read_on(number: int) -> None:
        for call in cycle(shares[number]):
            if stop.is_set():
                return
            file.read(call)
            moved[number] += call.num_bytes

    threads = [threading.Thread(target=read_on, args=(number,)) for number in range(len(shares))]
    for thread in threads:
        thread.start()
    try:
        yield moved
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _summary(late: list[float], bytes_per_s: float) -> Lag:
    p50, p99, most = np.percentile(late, (50, 99, 100)).tolist()
    return Lag(p50, p99, most, bytes_per_s)
