"""How late an event loop is: beside bare threads that read a cached file, or anything else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import cycle

import numpy as np

from .raw_io import Call, RawFile
from .timing import apart

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

    @classmethod
    def of(cls, late: Sequence[float], bytes_per_s: float) -> Lag:
        """Sum up what `probe` returned."""
        p50, p99, most = np.percentile(late, (50, 99, 100)).tolist()
        return cls(p50, p99, most, bytes_per_s)

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


async def probe(seconds: float) -> list[float]:
    """Sleep 1 ms over and over; return by how much each sleep was too long."""
    until = time.perf_counter() + seconds
    late = []
    while (started := time.perf_counter()) < until:
        await asyncio.sleep(SLEEP_S)
        late.append(max(0.0, time.perf_counter() - started - SLEEP_S))
    return late


async def lag_beside_threads(file: RawFile, shares: Sequence[list[Call]], seconds: float) -> Lag:
    """Have one bare thread for each share of calls read a cached file."""
    async with reading(file, shares) as moved:
        late = await probe(seconds)
    return Lag.of(late, sum(moved) / seconds)


@asynccontextmanager
async def reading(file: RawFile, shares: Sequence[list[Call]]) -> AsyncIterator[list[int]]:
    """Have one bare thread for each share of calls read a file; yield the bytes that each moved."""
    stop = threading.Event()
    moved = [0] * len(shares)

    def read_on(number: int) -> None:
        for call in cycle(shares[number]):
            if stop.is_set():
                return
            file.read(call)
            moved[number] += call.num_bytes

    threads = [threading.Thread(target=read_on, args=(number,)) for number in range(len(shares))]

    def end() -> None:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()

    try:
        for thread in threads:
            await apart(thread.start)
        yield moved
    finally:
        await apart(end)
