"""What each `cold_admission` writes to disk on a trace, and what prefix hits it leaves.

    python benchmarks/disk_wear.py TRACE... [--hot 2%] [--cold 20%] [--json]

A whole manager with a disk serves the requests one after the other; payloads are eight bytes, for
only their number matters. Sizes are per cent of the trace's distinct blocks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from kvoffload import AsyncLRUManager, DiskTier, MemoryTier
from kvoffload.workload import Workload, read_trace

PAYLOAD = b"8 bytes!"
ADMISSIONS = ("all", "likely", "reused")


async def serve(workload: Workload, admission: str, hot: int, cold: int) -> dict[str, object]:
    """Serve a trace; return what was hit and what was written."""
    hits = 0
    with tempfile.TemporaryDirectory(prefix="kvoffload-wear-") as place:
        manager = AsyncLRUManager(
            hot=MemoryTier(hot, len(PAYLOAD)),
            cold=DiskTier(Path(place) / "cold", cold, len(PAYLOAD)),
            cold_admission=admission,
        )
        async with manager as kv:
            for chain in workload.chains:
                async with kv.request(chain) as request:
                    hits += request.hit
                    await request.store([PAYLOAD] * (len(chain) - request.hit))
            stats = kv.get_stats()
    return {
        "trace": workload.name,
        "cold_admission": admission,
        "prefix_hit_ratio": hits / workload.num_blocks,
        "blocks_written": stats.tiers["cold"].blocks_written,
        "spared": stats.spared,
    }


def share(text: str) -> float:
    """Return per cent as a fraction."""
    return float(text.removesuffix("%")) / 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--hot", type=share, default=0.02)
    parser.add_argument("--cold", type=share, default=0.2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for trace in options.traces:
        workload = read_trace(trace)
        distinct = workload.num_distinct_blocks
        hot, cold = (max(1, int(distinct * part)) for part in (options.hot, options.cold))
        for admission in ADMISSIONS:
            row = asyncio.run(serve(workload, admission, hot, cold))
            rows.append(row)
            if not options.json:
                print(
                    f"{row['trace']}, {admission:6}: {row['prefix_hit_ratio']:6.1%} prefix hits, "
                    f"{row['blocks_written']:,} blocks written, {row['spared']:,} spared",
                    flush=True,
                )
    if options.json:
        json.dump(rows, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
