"""Drives a manager with a workload: real bytes in, every byte checked on its way out."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import anyio
import anyio.to_thread
import numpy as np

from ..errors import (
    BlockNotFoundError,
    CapacityError,
    ConfigError,
    LoadTimeoutError,
    TierError,
)
from ..metrics import ManagerStats, TierStats
from ..types import BlockHash, Buffer, Lease, StoreResult
from .payload import PayloadBuffer, PayloadCodec
from .trace import Workload

STORE_BYTES = 8 << 20
"""Payload bytes of one `store` call at most; a longer chain takes several, as it does in a
prefill that works in chunks."""

LAG_PERIOD_S = 0.001
"""Sleep of the probe. What it oversleeps is the lag of the event loop."""

_RECOMPUTE = (BlockNotFoundError, CapacityError, LoadTimeoutError, TierError)
"""Errors on which an engine computes the blocks anew and goes on."""


class ReplayRequest(Protocol):
    """The part of a request that a replay needs."""

    @property
    def hit(self) -> int:
        """Prefix hit."""

    def load(self) -> AbstractAsyncContextManager[Lease]:
        """Lease the `hit` blocks."""

    async def store(self, payloads: Sequence[Buffer]) -> StoreResult:
        """Store the next blocks of the chain."""


class ReplayTarget(Protocol):
    """The part of a manager that a replay needs."""

    async def lookup(self, block_hashes: Sequence[BlockHash]) -> int:
        """Return the prefix hit."""

    def request(
        self, block_hashes: Sequence[BlockHash]
    ) -> AbstractAsyncContextManager[ReplayRequest]:
        """Open the scope of one prompt's chain."""

    def get_stats(self) -> ManagerStats:
        """Return a snapshot of the counters."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Distribution of the duration of one kind of call, in microseconds; 0 without a call."""

    calls: int
    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class TierReport:
    """What one tier did during the replay.

    Attributes:
        medium: Kind of the tier.
        capacity_blocks: Slots.
        blocks: Slots that held a block at the end.
        hits: Blocks that a load found here.
        bytes_read: Payload bytes read or viewed.
        bytes_written: Payload bytes written.
        read_gb_per_s: `bytes_read` over the seconds of the whole replay, in 10**9 bytes.
        write_gb_per_s: `bytes_written`, the same.
        errors: Blocks that could not be read, written or erased.
    """

    medium: str
    capacity_blocks: int
    blocks: int
    hits: int
    bytes_read: int
    bytes_written: int
    read_gb_per_s: float
    write_gb_per_s: float
    errors: int


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay did and measured.

    Attributes:
        requests: Requests replayed.
        blocks: Blocks of all their chains.
        hit_blocks: Leading blocks that were ready when their request began.
        prefix_hit_ratio: `hit_blocks` / `blocks`, 0 to 1.
        seconds: Wall-clock time, opening and closing the manager not included.
        wrong_bytes: Loaded bytes that were not what was stored. Anything but 0 is a defect.
        verified_bytes: Loaded bytes that were checked.
        failed_loads: Requests whose hit blocks could not be loaded after all (no room, or a tier
            failed); an engine would compute them anew.
        rejected: Blocks that `store` did not take, each time that it was asked.
        evictions: Blocks that left every tier to make room.
        promotions: Moves to a higher tier.
        demotions: Moves to a lower tier.
        io_errors: Blocks that a tier could not read, write or erase.
        loop_lag_p99_ms: See `loop_lag_max_ms`.
        loop_lag_max_ms: A probe sleeps 1 ms over and over; its lag is what it oversleeps, that is
            how long a ready task waited for the event loop (and 0.1 ms of timer resolution).
        late_max_s: How long after its arrival a request started at most, for all workers were
            busy; 0 at speed 0.
        lookup: Of each `lookup` of a chain.
        load: Of each entering of a lease, the reading of cold blocks included.
        store: Of each `request.store`.
        tiers: One report for each tier, by name.
    """

    requests: int
    blocks: int
    hit_blocks: int
    prefix_hit_ratio: float
    seconds: float
    wrong_bytes: int
    verified_bytes: int
    failed_loads: int
    rejected: int
    evictions: int
    promotions: int
    demotions: int
    io_errors: int
    loop_lag_p99_ms: float
    loop_lag_max_ms: float
    late_max_s: float
    lookup: Latency
    load: Latency
    store: Latency
    tiers: dict[str, TierReport]


async def replay(
    manager: ReplayTarget,
    workload: Workload,
    *,
    block_bytes: int,
    concurrency: int = 8,
    speed: float = 0.0,
    on_request: Callable[[], None] | None = None,
) -> ReplayReport:
    """Replay a workload on an open manager.

    Each request looks its chain up, opens a request scope, loads the hit blocks, checks every
    byte of them, and stores the payloads of the rest. Payloads are made and checked on a worker
    thread, so that the lag of the event loop is the manager's.

    Args:
        manager: Any manager, open.
        workload: What to replay.
        block_bytes: Bytes of each payload.
        concurrency: Requests under way at once, at most.
        speed: 0 starts a request as soon as there is a free worker; else the arrival times of the
            workload are kept, divided by this.
        on_request: Called on the event loop whenever a request is done; must not block.

    Raises:
        ConfigError: A number is out of range.
    """
    if block_bytes < 1 or concurrency < 1:
        raise ConfigError("block_bytes and concurrency must be at least 1")
    if not 0 <= speed < float("inf"):
        raise ConfigError(f"speed must be 0 or a positive number, not {speed!r}")
    codec = await anyio.to_thread.run_sync(PayloadCodec, block_bytes)
    run = _Run(manager, workload, codec, speed, on_request)
    before = manager.get_stats()
    seconds = await run.drive(concurrency)
    return run.report(seconds, before, manager.get_stats())


def _samples() -> array[float]:
    return array("d")


@dataclass(slots=True)
class _Samples:
    """Durations, in seconds."""

    lookup: array[float] = field(default_factory=_samples)
    load: array[float] = field(default_factory=_samples)
    store: array[float] = field(default_factory=_samples)
    lag: array[float] = field(default_factory=_samples)


class _Run:
    """One replay under way; all of it belongs to one event loop."""

    def __init__(
        self,
        manager: ReplayTarget,
        workload: Workload,
        codec: PayloadCodec,
        speed: float,
        on_request: Callable[[], None] | None,
    ) -> None:
        self._manager = manager
        self._workload = workload
        self._codec = codec
        self._speed = speed
        self._on_request = on_request
        self._store_blocks = max(1, STORE_BYTES // codec.block_bytes)
        # More threads than this only take the cores away from the event loop.
        self._threads = anyio.CapacityLimiter(max(1, min(2, (os.cpu_count() or 1) - 1)))
        self._samples = _Samples()
        self._requests = self._blocks = self._hit_blocks = 0
        self._verified_blocks = self._wrong_bytes = self._failed_loads = self._rejected = 0
        self._late_max_s = 0.0

    async def drive(self, concurrency: int) -> float:
        """Replay everything; return the seconds it took."""
        chains = await anyio.to_thread.run_sync(lambda: self._workload.chains)
        # All workers draw from one iterator, so requests start in order; `next` doesn't await.
        todo = iter(zip(self._workload.arrivals_s, chains, strict=True))
        longest = max(map(len, chains), default=0)
        started_s, started = anyio.current_time(), perf_counter()
        async with anyio.create_task_group() as probe:
            probe.start_soon(self._probe_lag)
            async with anyio.create_task_group() as workers:
                for _ in range(min(concurrency, len(chains))):
                    buffer = PayloadBuffer(self._codec, min(longest, self._store_blocks))
                    workers.start_soon(self._work, todo, buffer, started_s)
            seconds = perf_counter() - started
            probe.cancel_scope.cancel()
        return seconds

    async def _work(
        self,
        todo: Iterator[tuple[float, tuple[bytes, ...]]],
        buffer: PayloadBuffer,
        started_s: float,
    ) -> None:
        for arrival_s, chain in todo:
            if self._speed:
                start_s = started_s + arrival_s / self._speed
                await anyio.sleep_until(start_s)
                self._late_max_s = max(self._late_max_s, anyio.current_time() - start_s)
            await self._request(chain, buffer)
            self._requests += 1
            self._blocks += len(chain)
            if self._on_request is not None:
                self._on_request()

    async def _request(self, chain: tuple[bytes, ...], buffer: PayloadBuffer) -> None:
        samples = self._samples
        before = perf_counter()
        await self._manager.lookup(chain)
        samples.lookup.append(perf_counter() - before)
        async with self._manager.request(chain) as request:
            hit = request.hit
            self._hit_blocks += hit
            if hit:
                before = perf_counter()
                try:
                    async with request.load() as lease:
                        samples.load.append(perf_counter() - before)
                        # In two steps: `+=` would read the sum before the await, and lose what
                        # other workers add to it meanwhile.
                        wrong_bytes = await anyio.to_thread.run_sync(
                            self._codec.wrong_bytes, chain[:hit], lease, limiter=self._threads
                        )
                        self._wrong_bytes += wrong_bytes
                        self._verified_blocks += hit
                except _RECOMPUTE:
                    # What comes after blocks that are not there can't be reached; the next
                    # request of this chain stores from where it breaks off.
                    self._failed_loads += 1
                    return
            for start in range(hit, len(chain), self._store_blocks):
                payloads = await anyio.to_thread.run_sync(
                    buffer.fill, chain[start : start + self._store_blocks], limiter=self._threads
                )
                before = perf_counter()
                result = await request.store(payloads)
                samples.store.append(perf_counter() - before)
                if result.rejected:
                    self._rejected += len(result.rejected)
                    return

    async def _probe_lag(self) -> None:
        while True:
            before = perf_counter()
            await anyio.sleep(LAG_PERIOD_S)
            self._samples.lag.append(perf_counter() - before - LAG_PERIOD_S)

    def report(self, seconds: float, before: ManagerStats, after: ManagerStats) -> ReplayReport:
        """Sum up what happened between two snapshots of the manager."""
        samples = self._samples
        lag_ms = np.asarray(samples.lag) * 1e3 if samples.lag else np.zeros(1)
        return ReplayReport(
            requests=self._requests,
            blocks=self._blocks,
            hit_blocks=self._hit_blocks,
            prefix_hit_ratio=self._hit_blocks / self._blocks if self._blocks else 0.0,
            seconds=seconds,
            wrong_bytes=self._wrong_bytes,
            verified_bytes=self._verified_blocks * self._codec.block_bytes,
            failed_loads=self._failed_loads,
            rejected=self._rejected,
            evictions=after.evictions - before.evictions,
            promotions=after.promotions - before.promotions,
            demotions=after.demotions - before.demotions,
            io_errors=after.io_errors - before.io_errors,
            loop_lag_p99_ms=float(np.percentile(lag_ms, 99)),
            loop_lag_max_ms=float(lag_ms.max()),
            late_max_s=self._late_max_s,
            lookup=_latency(samples.lookup),
            load=_latency(samples.load),
            store=_latency(samples.store),
            tiers={
                name: _tier(before.tiers.get(name), tier, seconds)
                for name, tier in after.tiers.items()
            },
        )


def _latency(samples: array[float]) -> Latency:
    if not samples:
        return Latency(0, 0.0, 0.0)
    p50, p99 = np.percentile(np.asarray(samples), (50, 99)) * 1e6
    return Latency(len(samples), float(p50), float(p99))


def _tier(before: TierStats | None, after: TierStats, seconds: float) -> TierReport:
    before = before or TierStats(after.medium, after.capacity_blocks)
    bytes_read = after.bytes_read - before.bytes_read
    bytes_written = after.bytes_written - before.bytes_written
    return TierReport(
        medium=after.medium.value,
        capacity_blocks=after.capacity_blocks,
        blocks=after.blocks,
        hits=after.hits - before.hits,
        bytes_read=bytes_read,
        bytes_written=bytes_written,
        read_gb_per_s=bytes_read / seconds / 1e9,
        write_gb_per_s=bytes_written / seconds / 1e9,
        errors=after.errors - before.errors,
    )
