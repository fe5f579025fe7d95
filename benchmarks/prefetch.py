"""What hints gain: time from when a request is served to its last block, with and without them.

    python benchmarks/prefetch.py TRACE [--requests 1500] [--speed 20] [--queue-ms 100]
        [--latency-ms 2] [--rate-mb 1000] [--path DIR] [--json]

Requests of a trace come at its arrival times, so many times faster, and wait in an engine's queue
for a while before they are served. With hints, `hint_prefetch` is called as each arrives. Cold
blocks lie on disk, past the page cache; then in a tier that takes the stated time for a call and
for its bytes. Blocks are 64 KiB; memory has room for 5 % of the distinct ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from kvoffload import AsyncLRUManager, CapacityError, DiskTier, MemoryTier, Tier, TierError
from kvoffload.workload import Workload, read_trace

BLOCK_BYTES = 64 * 1024
PAYLOAD = bytes(BLOCK_BYTES)


class StatedTier:
    """A tier in memory that takes its time for a call and for each byte, one call at a time."""

    def __init__(self, num_blocks: int, latency_s: float, bytes_per_s: float) -> None:
        self._inner = MemoryTier(num_blocks, BLOCK_BYTES, name="cold")
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0

    addressable = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    async def read(
        self, slots: Sequence[int], into: Sequence[memoryview]
    ) -> list[TierError | None]:
        """Read, when the calls before are done, in the stated time."""
        seconds = self._latency_s + sum(map(len, into)) / self._bytes_per_s
        self._free_at = max(self._free_at, time.perf_counter()) + seconds
        await asyncio.sleep(self._free_at - time.perf_counter())
        return await self._inner.read(slots, into)


async def serve(
    workload: Workload, cold: Tier, *, hints: bool, speed: float, queue_s: float
) -> dict[str, float]:
    """Serve a trace; return what requests with hits waited for their blocks, in seconds."""
    waits: list[float] = []
    hot = max(64, workload.num_distinct_blocks // 20)
    manager = AsyncLRUManager(hot=MemoryTier(hot, BLOCK_BYTES), cold=cold, prefetch_lookahead=32)
    async with manager as kv:
        began = time.perf_counter()

        async def one(at_s: float, chain: Sequence[bytes]) -> None:
            await asyncio.sleep(max(0.0, began + at_s / speed - time.perf_counter()))
            if hints:
                kv.hint_prefetch(chain[: await kv.lookup(chain)])
            await asyncio.sleep(queue_s)
            async with kv.request(chain) as request:
                if request.hit:
                    served = time.perf_counter()
                    with suppress(CapacityError):
                        async with request.load():
                            waits.append(time.perf_counter() - served)
                await request.store([PAYLOAD] * (len(chain) - request.hit))

        async with asyncio.TaskGroup() as tasks:
            for at_s, chain in zip(workload.arrivals_s, workload.chains, strict=True):
                tasks.create_task(one(at_s, chain))
        stats = kv.get_stats()
    p50, p90, p99 = np.percentile(waits, (50, 90, 99)).tolist()
    return {
        "mean_s": float(np.mean(waits)),
        "p50_s": p50,
        "p90_s": p90,
        "p99_s": p99,
        "requests": len(waits),
        "useful": stats.prefetch_useful,
        "late": stats.prefetch_late,
        "wasted": stats.prefetch_wasted,
        "dropped": stats.prefetch_dropped,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--speed", type=float, default=20.0)
    parser.add_argument("--queue-ms", type=float, default=100.0)
    parser.add_argument("--latency-ms", type=float, default=2.0)
    parser.add_argument("--rate-mb", type=float, default=1000.0)
    parser.add_argument("--path", type=Path, default=Path.cwd().parent)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    workload = read_trace(options.trace, limit=options.requests)
    blocks = workload.num_distinct_blocks
    report: dict[str, dict[str, float]] = {}
    for kind in ("disk, direct I/O", "stated tier"):
        for hints in (False, True):
            with tempfile.TemporaryDirectory(prefix="kvoffload-hints-", dir=options.path) as place:
                cold: Tier
                if kind == "stated tier":
                    latency_s, rate = options.latency_ms / 1e3, options.rate_mb * 1e6
                    cold = StatedTier(blocks, latency_s, rate)  # type: ignore[assignment]  # by __getattr__
                else:
                    cold = DiskTier(Path(place) / "cold", blocks, BLOCK_BYTES)
                case = f"{kind}, {'hints' if hints else 'no hints'}"
                report[case] = found = asyncio.run(
                    serve(
                        workload,
                        cold,
                        hints=hints,
                        speed=options.speed,
                        queue_s=options.queue_ms / 1e3,
                    )
                )
            if not options.json:
                times = ", ".join(
                    f"{name} {found[name + '_s'] * 1e3:.2f}"
                    for name in ("mean", "p50", "p90", "p99")
                )
                counts = ", ".join(
                    f"{name} {found[name]:.0f}" for name in ("useful", "late", "wasted", "dropped")
                )
                print(
                    f"{case:28} to the last block, ms: {times}; hinted blocks: {counts}", flush=True
                )
    if options.json:
        json.dump(report, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
