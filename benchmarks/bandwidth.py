"""Storing and loading large blocks in memory, beside one memcpy of the same bytes in the same run.

    python benchmarks/bandwidth.py [--blocks 64] [--block-mib 2] [--rounds 15] [--json]

The memcpy is one `numpy.copyto` a block, on one thread, into touched memory of the same size; runs
alternate, and each figure is the best of its rounds. `store` evicts as much as it stores. A load of
resident blocks is shown to copy nothing: its views are the arena's own memory, and its time does
not depend on the size of a block.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time

import numpy as np
import uvloop

from kvoffload import AsyncLRUManager, LRUOffloadManager, MemoryTier

MIB = 1024 * 1024


async def measure(blocks: int, block_bytes: int, rounds: int) -> dict[str, float]:
    """Return GB/s of each, ratios, and microseconds of loads."""
    rng = np.random.default_rng(1)
    payloads = [rng.integers(0, 256, block_bytes, dtype=np.uint8) for _ in range(blocks)]
    arena = np.zeros(blocks * block_bytes, dtype=np.uint8)
    targets = [arena[n * block_bytes : (n + 1) * block_bytes] for n in range(blocks)]
    total = blocks * block_bytes
    best: dict[str, float] = {}

    def note(what: str, seconds: float) -> None:
        best[what] = min(best.get(what, float("inf")), seconds)

    front = AsyncLRUManager(hot=MemoryTier(blocks, block_bytes))
    single = LRUOffloadManager(MemoryTier(blocks, block_bytes))
    small = LRUOffloadManager(MemoryTier(blocks, 64))
    async with front, single, small:
        keys = [n.to_bytes(32, "big") for n in range(blocks * 2)]
        halves = keys[:blocks], keys[blocks:]
        await small.store(halves[0], [b"x"] * blocks)
        for number in range(rounds):
            started = time.perf_counter()
            for target, payload in zip(targets, payloads, strict=True):
                np.copyto(target, payload)
            note("memcpy", time.perf_counter() - started)
            chain = halves[number % 2]
            for name, manager in (("AsyncLRUManager", front), ("LRUOffloadManager", single)):
                started = time.perf_counter()
                result = await manager.store(chain, payloads)
                note(f"{name} store", time.perf_counter() - started)
                assert len(result.stored) == blocks
                started = time.perf_counter()
                async with manager.load(chain) as lease:
                    note(f"{name} load", time.perf_counter() - started)
                    assert bytes(lease[-1][:64]) == payloads[-1][:64].tobytes()
            started = time.perf_counter()
            async with small.load(halves[0]):
                note("load of 64-byte blocks", time.perf_counter() - started)
    figures = {f"{name} GB/s": total / best[name] / 1e9 for name in best if "load" not in name}
    for name in ("AsyncLRUManager", "LRUOffloadManager"):
        figures[f"{name} store / memcpy"] = best["memcpy"] / best[f"{name} store"]
        figures[f"{name} load us a block"] = best[f"{name} load"] / blocks * 1e6
    figures["64-byte blocks load us a block"] = best["load of 64-byte blocks"] / blocks * 1e6
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--block-mib", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "both"), default="both")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {}
    for loop in ("asyncio", "uvloop") if options.loop == "both" else (options.loop,):
        factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            size = int(options.block_mib * MIB)
            results[loop] = runner.run(measure(options.blocks, size, options.rounds))
    if options.json:
        json.dump(results, sys.stdout, indent=1)
        return
    for loop, figures in results.items():
        print(f"\n{loop}, {options.blocks} blocks of {options.block_mib} MiB, best of rounds")
        for name, value in figures.items():
            print(f"  {name:38} {value:10.3f}")


if __name__ == "__main__":
    main()
