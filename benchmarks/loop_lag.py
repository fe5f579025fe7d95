"""How late an event loop is while the cold tier works flat out, beside two bare reading threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from disk_contests import Bench, Work

from kvoffload import DiskTier
from kvoffload.benching.lag import Lag, lag_beside_threads, probe
from kvoffload.benching.raw_io import make_blocks, plan_calls


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
            file.fill(payloads)
            shares = [plan_calls(buffers, 1) for buffers in (payloads, into)]
            reference = runner.run(lag_beside_threads(file, shares, seconds))
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
    return Lag.of(probing.result(), moved / seconds)
