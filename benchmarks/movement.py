"""Movement between three tiers: what it costs callers and the event loop, as ratios in one run.

    python benchmarks/movement.py [--path DIR] [--seconds 20] [--rounds 15]
        [--loop asyncio|uvloop|both] [--direct-io auto|off|on] [--quick] [--json]

- Loop lag while 64 concurrent requests move blocks in and out of hot, warm and cold tiers, beside
  the same loop with two bare threads that read a cached file.
- A load of 64 cold blocks by the manager, beside the cold tier's own batch read of the same slots.
- A store of 64 blocks into full memory tiers, beside a bare copy of as many bytes: with a pause in
  which room is made ahead, and one store right after the other.
- A request for 16 hot blocks: enter, load, leave; and the same with a look at every view, which are
  made when they are first looked at; by the default policy, and by plain LRU.

Python's own objects are set aside first (`gc.freeze`), as a service does once it has started: to
collect them takes 20 ms, whatever kvoffload does.

The default path is a temporary directory beside the current one; it takes some 2 GiB there and
1 GiB of memory. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import uvloop
from disk_contests import Bench, Work

from kvoffload import AsyncLRUManager, CapacityError, DiskTier, MemoryTier, TierStats
from kvoffload.benching.lag import Lag, lag_beside_threads, probe
from kvoffload.benching.machine import describe_machine
from kvoffload.benching.raw_io import KIB, MIB, make_blocks, plan_calls
from kvoffload.testing import eventually

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
REQUESTS = 64
WARM_SHARE = 0.25
"""Of the seconds measured, those that the same goes on before."""
CHAIN = 8
"""Blocks of a request in the measurement of lag; half of a chain is shared by four of them."""


def three_tiers(
    place: Path, block_bytes: int, sizes: tuple[int, int, int], direct_io: str
) -> AsyncLRUManager:
    """Return a manager with so many hot, warm and cold blocks."""
    hot, warm, cold = sizes
    return AsyncLRUManager(
        hot=MemoryTier(hot, block_bytes),
        warm=MemoryTier(warm, block_bytes, name="warm"),
        cold=DiskTier(place, cold, block_bytes, direct_io=direct_io),
        policy="lru",
        staging_bytes=256 * MIB,
    )


def moved_bytes(tier: TierStats) -> int:
    """Return the bytes that went in and out of a tier."""
    return tier.bytes_read + tier.bytes_written


async def busy_lag(
    place: Path, block_bytes: int, seconds: float, direct_io: str
) -> tuple[Lag, dict[str, float]]:
    """Serve 64 requests at a time, of more chains than fit; return the lag and the tiers' rates.

    Where as many read at once as the staging buffers hold, a request recomputes. Begun a while
    before, so that the tiers are full; what is there by then the garbage collector need not look at
    again (`gc.freeze`, as a service does that is warm).
    """
    sizes = tuple(count * MIB // block_bytes for count in (256, 256, 1024))
    total = sum(sizes)
    rng = random.Random(1)
    groups = 2 * total // (4 * CHAIN)
    payloads = make_blocks(CHAIN, block_bytes, seed=2)
    async with three_tiers(place, block_bytes, sizes, direct_io) as kv:  # type: ignore[arg-type]  # three
        until = time.perf_counter() + (1 + WARM_SHARE) * seconds

        async def serve() -> None:
            while time.perf_counter() < until:
                group = int(groups * rng.random() ** 2)
                member = rng.randrange(4)
                chain = [f"{group}-{number}" for number in range(CHAIN // 2)]
                chain += [f"{group}-{member}-{number}" for number in range(CHAIN // 2)]
                async with kv.request(chain) as request:
                    with suppress(CapacityError):
                        async with request.load():
                            pass
                    await request.store(payloads[request.hit :])

        async with asyncio.TaskGroup() as tasks:
            for _ in range(REQUESTS):
                tasks.create_task(serve())
            await asyncio.sleep(WARM_SHARE * seconds)
            gc.collect()
            gc.freeze()
            before = kv.get_stats()
            late = await probe(seconds)
            stats = kv.get_stats()
    moved = {
        name: moved_bytes(tier) - moved_bytes(before.tiers[name])
        for name, tier in stats.tiers.items()
    }
    rates = {name: size / seconds / 1e9 for name, size in moved.items()}
    return Lag.of(late, sum(moved.values()) / seconds), rates


async def cold_load(place: Path, rounds: int, direct_io: str) -> tuple[float, float]:
    """Return the best seconds of a manager's load of 64 cold blocks, and of the tier's own read."""
    block_bytes, count = 2 * MIB, 64
    cold = DiskTier(place, 2 * count, block_bytes, direct_io=direct_io)
    payloads = make_blocks(count, block_bytes, seed=3)
    into = make_blocks(count, block_bytes)
    chain = [f"c{number}" for number in range(count)]
    manager = AsyncLRUManager(
        hot=MemoryTier(4, block_bytes), cold=cold, promote_threshold=10**9, policy="lru"
    )
    ours, own = [], []
    async with manager as kv:
        await kv.store([f"x{number}" for number in range(4)], payloads[:4])
        async with kv.load([f"x{number}" for number in range(4)]):
            await kv.store(chain, payloads)  # past what is pinned, straight to the disk
        entries = [kv._core.index.ready[each] for each in chain]
        slots = [entry.slot for entry in entries if entry.level == 1]
        assert len(slots) == count
        for _ in range(rounds + 1):
            started = time.perf_counter()
            async with kv.load(chain) as lease:
                ours.append(time.perf_counter() - started)
                assert len(lease) == count
            started = time.perf_counter()
            assert not any(await cold.read(slots, into))
            own.append(time.perf_counter() - started)
    return min(ours[1:]), min(own[1:])


async def full_store(place: Path, rounds: int, direct_io: str) -> dict[str, float]:
    """Return the best (and median) seconds of a store of 64 blocks, and of a bare copy."""
    block_bytes, count = 2 * MIB, 64
    payloads = make_blocks(count, block_bytes, seed=4)
    into = make_blocks(count, block_bytes)
    found: dict[str, list[float]] = {"copy": [], "made ahead": [], "back to back": []}
    sizes = (4 * count, 4 * count, 8 * count)
    manager = AsyncLRUManager(
        hot=MemoryTier(sizes[0], block_bytes),
        warm=MemoryTier(sizes[1], block_bytes, name="warm"),
        cold=DiskTier(place, sizes[2], block_bytes, direct_io=direct_io),
        policy="lru",
        watermarks=(0.26, 0.3),  # room for one such store
    )
    number = 0
    async with manager as kv:

        async def store() -> float:
            nonlocal number
            number += 1
            chain = [f"{number}-{block}" for block in range(count)]
            started = time.perf_counter()
            result = await kv.store(chain, payloads)
            seconds = time.perf_counter() - started
            assert len(result.stored) == count
            return seconds

        async def rest() -> None:
            levels = kv._core.index.levels[:2]
            await eventually(
                lambda: all(level.slots.free >= level.high for level in levels), timeout_s=60.0
            )

        for _ in range(16):
            await store()
        for _ in range(rounds):
            await rest()
            started = time.perf_counter()
            for source, target in zip(payloads, into, strict=True):
                np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
            found["copy"].append(time.perf_counter() - started)
            found["made ahead"].append(await store())
        for _ in range(rounds):
            found["back to back"].append(await store())
    return {
        **{name: min(seconds) for name, seconds in found.items()},
        **{f"{name}, median": statistics.median(seconds) for name, seconds in found.items()},
    }


async def hot_request(rounds: int, policy: str) -> dict[str, float]:
    """Return the best seconds, over batches, of a request whose 16 blocks are hot."""
    chain = [bytes([number]) * 32 for number in range(16)]
    found: dict[str, list[float]] = {"entered": [], "looked at": []}
    async with AsyncLRUManager(
        hot=MemoryTier(4096, 64), warm=MemoryTier(64, 64, name="warm"), policy=policy
    ) as kv:
        await kv.store(chain, [b"x" * 64] * 16)
        for _ in range(rounds * 10):
            started = time.perf_counter()
            for _ in range(100):
                async with kv.request(chain) as request, request.load() as lease:
                    assert len(lease) == 16
            found["entered"].append((time.perf_counter() - started) / 100)
            started = time.perf_counter()
            for _ in range(100):
                async with kv.request(chain) as request, request.load() as lease:
                    for _ in lease:
                        pass
            found["looked at"].append((time.perf_counter() - started) / 100)
    return {
        **{name: min(seconds) for name, seconds in found.items()},
        **{f"{name}, median": statistics.median(seconds) for name, seconds in found.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--path", type=Path, default=Path.cwd().parent)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--loop", choices=(*LOOPS, "both"), default="both")
    parser.add_argument("--direct-io", choices=("auto", "off", "on"), default="auto")
    parser.add_argument("--quick", action="store_true", help="a smoke test: short")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seconds = options.seconds or (1.0 if options.quick else 20.0)
    rounds = options.rounds or (2 if options.quick else 15)
    loops = LOOPS if options.loop == "both" else {options.loop: LOOPS[options.loop]}
    report: dict[str, object] = {"machine": describe_machine(options.path)}
    say: Callable[[str], None] = (lambda _: None) if options.json else print
    gc.collect()
    gc.freeze()
    say(", ".join(f"{name}: {value}" for name, value in describe_machine(options.path).items()))
    for name, factory in loops.items():
        with (
            asyncio.Runner(loop_factory=factory) as runner,
            tempfile.TemporaryDirectory(prefix="kvoffload-move-", dir=options.path) as place,
        ):
            here = Path(place)
            result: dict[str, object] = {}
            report[name] = result
            reference = bare_lag(here, runner, seconds)
            say(f"\n{name}\n  lag, two bare threads:          {reference}")
            result["lag beside two bare threads"] = reference.as_json()
            for block_bytes in (2 * MIB, 64 * KIB):
                kind = f"{block_bytes // KIB} KiB"
                lag, rates = runner.run(
                    busy_lag(here / kind, block_bytes, seconds, options.direct_io)
                )
                each = ", ".join(f"{tier} {rate:.2f}" for tier, rate in rates.items())
                good = lag.p99_s <= reference.bound_s and lag.max_s <= max(
                    0.02, 2 * reference.max_s
                )
                say(f"  lag, 64 requests of {kind:>8}: {lag} ({each}) {_met(good)}")
                result[f"lag, {kind}"] = {**lag.as_json(), "GB/s": rates}
            ours, own = runner.run(cold_load(here / "load", rounds, options.direct_io))
            say(
                f"  load of 64 cold blocks: {ours * 1e3:.2f} ms, the tier's own read "
                f"{own * 1e3:.2f} ms: ratio {own / ours:.2f} {_met(own / ours >= 0.8)}"
            )
            result["cold load"] = {"manager_s": ours, "tier_s": own}
            stored = runner.run(full_store(here / "store", rounds, options.direct_io))
            for case in ("made ahead", "back to back"):
                ratio = stored["copy"] / stored[case]
                verdict = _met(ratio >= 0.5) if case == "made ahead" else ""
                say(
                    f"  store of 64 blocks, {case}: {stored[case] * 1e3:.2f} ms best, "
                    f"{stored[case + ', median'] * 1e3:.2f} median, bare copy "
                    f"{stored['copy'] * 1e3:.2f} ms: ratio {ratio:.2f} {verdict}"
                )
            result["store"] = stored
            for policy in ("weighted", "lru"):
                hot = runner.run(hot_request(rounds, policy))
                best, median = hot["entered"], hot["entered, median"]
                say(
                    f"  request of 16 hot blocks, {policy}: {best * 1e6:.1f} us best, "
                    f"{median * 1e6:.1f} median {_met(best <= 20e-6)}; all views looked at: "
                    f"{hot['looked at'] * 1e6:.1f} us"
                )
                result[f"hot request, {policy}"] = hot
    if options.json:
        json.dump(report, sys.stdout, indent=1)
    return 0


def bare_lag(place: Path, runner: asyncio.Runner, seconds: float) -> Lag:
    """Return the lag of a loop beside two bare threads that read a cached file."""
    work = Work(64, 2 * MIB, direct=False)
    bench = Bench(place, 1, {}, [], None)
    payloads = make_blocks(work.num_blocks, work.block_bytes, seed=1)
    into = make_blocks(work.num_blocks, work.block_bytes)
    with bench.raw_file(place / "raw", replace(work, direct=False)) as file:
        file.fill(payloads)
        shares: Sequence[list] = [plan_calls(buffers, 1) for buffers in (payloads, into)]  # type: ignore[type-arg]  # of calls
        return runner.run(lag_beside_threads(file, shares, seconds))


def _met(good: bool) -> str:
    return "(met)" if good else "(MISSED)"


if __name__ == "__main__":
    sys.exit(main())
