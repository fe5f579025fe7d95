"""What a manager costs above an inline coroutine over an `OrderedDict`, as ratios in one run.

    python benchmarks/overhead.py [--blocks 30000] [--loop asyncio|uvloop|both] [--json]

Keys are 32 bytes with their hash cached, the cache is full, every call is a hit (lookup) or evicts
as much as it stores. The floor does the same work on one `OrderedDict` with nothing around it: no
pins, no pending state, no events, no checks.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

import uvloop

from kvoffload import AsyncLRUManager, LRUOffloadManager, MemoryTier
from kvoffload.managers.contract import Manager

Batch = list[bytes]


class Floor:
    """An LRU of nothing but hashes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.entries: OrderedDict[bytes, int] = OrderedDict()

    async def count(self, keys: Sequence[bytes]) -> int:
        hit = 0
        entries = self.entries
        for key in keys:
            if key not in entries:
                break
            hit += 1
        return hit

    async def touch(self, keys: Sequence[bytes]) -> int:
        hit = 0
        entries = self.entries
        for key in keys:
            if key not in entries:
                break
            entries.move_to_end(key)
            hit += 1
        return hit

    async def store(self, keys: Sequence[bytes]) -> None:
        entries = self.entries
        for key in keys:
            if key in entries:
                entries.move_to_end(key)
                continue
            slot = len(entries)
            if slot >= self.capacity:
                slot = entries.popitem(last=False)[1]
            entries[key] = slot


def make_keys(count: int) -> Batch:
    keys = [os.urandom(32) for _ in range(count)]
    for key in keys:
        hash(key)
    return keys


def batches(keys: Batch, size: int) -> list[Batch]:
    return [keys[start : start + size] for start in range(0, len(keys) - size + 1, size)]


async def time_each(call: Callable[[Batch], Awaitable[object]], work: list[Batch]) -> float:
    """Return nanoseconds a block."""
    started = time.perf_counter_ns()
    for batch in work:
        await call(batch)
    return (time.perf_counter_ns() - started) / sum(map(len, work))


def managers(blocks: int) -> dict[str, Callable[[], Manager]]:
    return {
        "LRUOffloadManager": lambda: LRUOffloadManager(MemoryTier(blocks, 1)),
        "AsyncLRUManager weighted": lambda: AsyncLRUManager(hot=MemoryTier(blocks, 1)),
        "AsyncLRUManager lru": lambda: AsyncLRUManager(hot=MemoryTier(blocks, 1), policy="lru"),
    }


async def measure(blocks: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return ns a block and ratios to the floor, by manager and operation; best of `rounds`."""
    keys = make_keys(blocks)
    # Enough new keys that every store of a round evicts, and so the first round's are gone.
    fresh = [make_keys(blocks) for _ in range(2)]
    random.Random(1).shuffle(keys)
    floor = Floor(blocks)
    await floor.store(keys)
    best: dict[tuple[str, str], float] = {}

    def note(who: str, what: str, value: float) -> None:
        best[who, what] = min(best.get((who, what), float("inf")), value)

    opened: dict[str, Manager] = {}
    for name, make in managers(blocks).items():
        opened[name] = await make().__aenter__()

        async def two_phase(batch: Batch, manager: Manager = opened[name]) -> None:
            await manager.prepare_store(batch)
            await manager.complete_store(batch)

        for batch in batches(keys, 100):
            await two_phase(batch)
        assert await opened[name].lookup(keys[: blocks // 100 * 100]) == blocks // 100 * 100
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        for size in (128, 1):
            work = batches(keys, size)[: 20_000 // size]
            note("floor", f"count {size}", await time_each(floor.count, work))
            note("floor", f"lookup {size}", await time_each(floor.touch, work))
            for name, manager in opened.items():
                note(name, f"lookup {size}", await time_each(manager.lookup, work))
    for number in range(rounds):
        for size in (128, 1):
            work = batches(fresh[number % 2], size)
            note("floor", f"store {size}", await time_each(floor.store, work))
            for name, manager in opened.items():

                async def two_phase(batch: Batch, manager: Manager = manager) -> None:
                    await manager.prepare_store(batch)
                    await manager.complete_store(batch)

                before = manager.get_stats().evictions
                note(name, f"store {size}", await time_each(two_phase, work))
                evicted = manager.get_stats().evictions - before
                expected = sum(map(len, work)) if size == 128 or number else 0
                assert evicted >= 0.9 * expected or size == 1, (name, size, evicted, expected)
            await floor.store(keys)
            for manager in opened.values():
                await manager.prepare_store(keys)
                await manager.complete_store(keys)
    for manager in opened.values():
        await manager.__aexit__(None, None, None)
    gc.unfreeze()
    table: dict[str, dict[str, dict[str, float]]] = {}
    for (who, what), value in best.items():
        ratio = value / best["floor", what]
        table.setdefault(who, {})[what] = {"ns": round(value, 1), "ratio": round(ratio, 2)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--blocks", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "both"), default="both")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    loops = ("asyncio", "uvloop") if options.loop == "both" else (options.loop,)
    results = {}
    for loop in loops:
        factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            results[loop] = runner.run(measure(options.blocks, options.rounds))
    if options.json:
        json.dump(results, sys.stdout, indent=1)
        return
    for loop, table in results.items():
        print(f"\n{loop}, {options.blocks} blocks: ns a block (ratio to the floor)")
        operations = ["count 128", "lookup 128", "store 128", "count 1", "lookup 1", "store 1"]
        print(f"{'':28}" + "".join(f"{name:>18}" for name in operations))
        for who, row in table.items():
            cells = [
                f"{row[name]['ns']:8.0f} ({row[name]['ratio']:.2f})" if name in row else "-"
                for name in operations
            ]
            print(f"{who:28}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
