"""Memory and time of a manager's books at a million blocks.

    python benchmarks/footprint.py [--blocks 1000000] [--json]

Memory is what the process grows by, with the payloads' own bytes and the keys taken off (the keys
of ghosts are kept in). Time is that of batches of 128 in random order, at 30,000 blocks and at the
full size; the growth is shown beside that of an inline coroutine over an `OrderedDict`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence

from overhead import Batch, Floor, batches, make_keys

from kvoffload import AsyncLRUManager, MemoryTier

POLICIES = ("lru", "weighted")
SAMPLE_BLOCKS = 128 * 400


def resident_bytes() -> int:
    """Return the memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  # a kernel file
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def footprint(blocks: int, policy: str) -> dict[str, float]:
    """Fill a manager, use every block, and with ghosts on overwrite it; bytes a block."""
    keys = make_keys(blocks)
    random.Random(1).shuffle(keys)
    manager = AsyncLRUManager(hot=MemoryTier(blocks, 1), policy=policy)
    async with manager:
        gc.collect()
        before = resident_bytes()
        for batch in batches(keys, 128):
            await manager.prepare_store(batch)
            await manager.complete_store(batch)
            await manager.touch(batch)
        gc.collect()
        figures = {"filled and used": (resident_bytes() - before) / blocks}
        if policy == "weighted":
            # Every block evicted once, then some more, so that both generations of ghosts fill.
            del keys
            for _ in range(4):
                for batch in batches(make_keys(blocks), 128):
                    await manager.prepare_store(batch)
                    await manager.complete_store(batch)
                    await manager.touch(batch)
            gc.collect()
            key_bytes = 80  # of a resident block's own key, allocated after `before`
            figures["with ghosts and their keys"] = (resident_bytes() - before) / blocks - key_bytes
        return {name: round(value, 1) for name, value in figures.items()}


async def time_random(call: Callable[[Batch], Awaitable[object]], work: Sequence[Batch]) -> float:
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter_ns()
        for batch in work:
            await call(batch)
        best = min(best, (time.perf_counter_ns() - started) / sum(map(len, work)))
    return best


async def speed(blocks: int, policy: str) -> dict[str, float]:
    """Return ns a block of random batches, of the floor and of a manager."""
    rng = random.Random(2)
    keys = make_keys(blocks)
    fresh = make_keys(SAMPLE_BLOCKS * 3)
    rng.shuffle(keys)
    floor = Floor(blocks)
    await floor.store(keys)
    figures: dict[str, float] = {}
    async with AsyncLRUManager(hot=MemoryTier(blocks, 1), policy=policy) as manager:
        for batch in batches(keys, 100):
            await manager.prepare_store(batch)
            await manager.complete_store(batch)
        work = [rng.sample(keys[: blocks // 100 * 100], 128) for _ in range(SAMPLE_BLOCKS // 128)]
        gc.collect()
        gc.freeze()
        figures["floor lookup"] = await time_random(floor.touch, work)
        figures["lookup"] = await time_random(manager.lookup, work)
        for batch in work:
            await manager.touch(batch)

        async def two_phase(batch: Batch) -> None:
            await manager.prepare_store(batch)
            await manager.complete_store(batch)

        for name, call in (("floor store", floor.store), ("store", two_phase)):
            best = float("inf")
            for number in range(3):
                new = fresh[number * SAMPLE_BLOCKS : (number + 1) * SAMPLE_BLOCKS]
                started = time.perf_counter_ns()
                for batch in batches(new, 128):
                    await call(batch)
                best = min(best, (time.perf_counter_ns() - started) / SAMPLE_BLOCKS)
            figures[name] = best
    return figures


def child(what: str, blocks: int, policy: str) -> dict[str, float]:
    """Run one measurement in a process of its own, so that none inherits another's heap."""
    command = [sys.executable, __file__, "--child", what, "--policy", policy]
    command += ["--blocks", str(blocks)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures: dict[str, float] = json.loads(output)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--policy", choices=POLICIES)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=("footprint", "speed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        measure = footprint if options.child == "footprint" else speed
        json.dump(asyncio.run(measure(options.blocks, options.policy)), sys.stdout)
        return
    results: dict[str, dict[str, float]] = {}
    for policy in (options.policy,) if options.policy else POLICIES:
        row = {
            f"bytes a block, {k}": v for k, v in child("footprint", options.blocks, policy).items()
        }
        small, large = child("speed", 30_000, policy), child("speed", options.blocks, policy)
        for name in ("lookup", "store"):
            ours = large[name] / small[name]
            floors = large[f"floor {name}"] / small[f"floor {name}"]
            row[f"{name} ns at 30,000"] = round(small[name], 1)
            row[f"{name} ns at {options.blocks:,}"] = round(large[name], 1)
            row[f"{name} growth"] = round(ours, 2)
            row[f"{name} growth of the floor"] = round(floors, 2)
            row[f"{name} growth / the floor's"] = round(ours / floors, 2)
        results[policy] = row
    if options.json:
        json.dump(results, sys.stdout, indent=1)
        return
    for policy, row in results.items():
        print(f"\nAsyncLRUManager, policy {policy}, {options.blocks:,} blocks")
        for name, value in row.items():
            print(f"  {name:44} {value:10.2f}")


if __name__ == "__main__":
    main()
