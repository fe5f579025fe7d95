"""What fleets of 10, 100 and 1,000 nodes move over the network and need of a shared tier.

    python benchmarks/scaling.py TRACE [--nodes 10 100 1000] [--tokens-per-block 512] [--json]
        [--bytes-per-token 131072] [--local-gib 256] [--shared-gib 256] [--nodes-per-trace 5]
        [--block-tokens 16] [--server-gb-per-s 3.1] [--server-gib 256]
        [--admission all|reused] [--gib-month-memory 2.5] [--gib-month-object 0.025]
        [--million-gets 0.4] [--million-puts 5]

Replays a trace at its own times. A fleet of more nodes has as many more copies of it, each with
prefixes of its own. A node has a cache of its own and the fleet a shared one, which grows with it;
both evict what was used least recently. Requests go to any node (`any`), or to the one that had the
longest prefix of theirs last (`prefix`), as routers do that know prefixes. What a node computes is
sent to the shared cache, or with `--admission reused` what it uses again.

From what was hit where follow bytes and calls; from what one server of an engine does
(`shared_tier.py` measures it, and its network link bounds it) and from prices follows how many and
how much. The prices are round ones of large clouds' lists of 2025: put in your own.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvoffload.workload import Workload, read_trace

GIB = 1024**3
MONTH_S = 30 * 24 * 3600


class Cache:
    """So many blocks, the least recently used of which gives way."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._uses: OrderedDict[int, int] = OrderedDict()

    def use(self, block: int) -> int:
        """Return how often a block was used so far, 0 if it is not there; it is the most recent."""
        uses = self._uses.pop(block, 0)
        if uses:
            self._uses[block] = uses + 1
        return uses

    def add(self, block: int) -> None:
        """Let a block in that is not there: its first use."""
        self._uses[block] = 1
        if len(self._uses) > self._capacity:
            self._uses.popitem(last=False)


@dataclass(frozen=True)
class Fleet:
    """What so many nodes did in a replay; blocks are those of the trace.

    Attributes:
        nodes: How many nodes there were.
        routing: Which node got a request.
        seconds: How long the trace took.
        blocks: Blocks of all prompts.
        local: Of those, restored from the node's own cache.
        fetched: Restored from the shared one.
        sent: Blocks that were written to the shared one.
    """

    nodes: int
    routing: str
    seconds: float
    blocks: int
    local: int
    fetched: int
    sent: int


def replay(
    workload: Workload,
    nodes: int,
    copies: int,
    routing: str,
    local: int,
    shared: int,
    admission: str,
) -> Fleet:
    """Serve copies of a trace, request by request in the order of their times."""
    rng = random.Random(1)
    caches = [Cache(local) for _ in range(nodes)]
    common = Cache(shared * nodes)
    owners: dict[int, int] = {}
    blocks = hits = fetched = sent = 0
    for request in workload.requests:
        for copy in range(copies):
            chain = [copy << 32 | number for number in request.hash_ids]
            node = rng.randrange(nodes)
            if routing == "prefix":
                known = 0
                while known < len(chain) and chain[known] in owners:
                    known += 1
                node = owners[chain[known - 1]] if known else node
                owners.update(dict.fromkeys(chain, node))
            own = caches[node]
            blocks += len(chain)
            hitting = True
            for block in chain:
                uses = own.use(block)
                if uses:
                    hits += hitting
                    is_offered = admission == "reused" and uses == 1
                else:
                    hitting = hitting and common.use(block) > 0
                    fetched += hitting
                    is_offered = admission == "all" and not hitting
                    own.add(block)
                if is_offered and not common.use(block):
                    common.add(block)
                    sent += 1
    seconds = workload.requests[-1].timestamp_ms / 1000
    return Fleet(nodes, routing, seconds, blocks, hits, fetched, sent)


@dataclass(frozen=True)
class Needs:
    """What a fleet needs; a month has 30 days, gigabytes are 10^9 bytes.

    Attributes:
        prompt_tokens_per_s: Of one node.
        local, fetched, computed: Shares of the prompts' tokens.
        node_in_gb_per_s: What one node reads from the shared tier.
        node_out_gb_per_s: What it writes to it.
        fleet_gb_per_s: Both, of all nodes.
        shared_gib: Size of the shared tier.
        servers: Servers of an engine in memory, for its size and its traffic.
        memory_per_month: What that memory costs.
        object_per_month: What the same costs in an object store, without its requests.
        requests_per_month: What its requests cost, one for each block.
    """

    nodes: int
    routing: str
    prompt_tokens_per_s: float
    local: float
    fetched: float
    computed: float
    node_in_gb_per_s: float
    node_out_gb_per_s: float
    fleet_gb_per_s: float
    shared_gib: float
    servers: int
    memory_per_month: float
    object_per_month: float
    requests_per_month: float


def needs(fleet: Fleet, options: argparse.Namespace) -> Needs:
    """Do the sums."""
    tokens = options.tokens_per_block
    block_bytes = tokens * options.bytes_per_token
    objects = tokens / options.block_tokens
    rate_in = fleet.fetched * block_bytes / fleet.seconds / 1e9
    rate_out = fleet.sent * block_bytes / fleet.seconds / 1e9
    shared_gib = options.shared_gib * fleet.nodes
    by_size = math.ceil(shared_gib / options.server_gib)
    by_traffic = math.ceil((rate_in + rate_out) / options.server_gb_per_s)
    months = MONTH_S / fleet.seconds / 1e6
    gets, puts = fleet.fetched * objects * months, fleet.sent * objects * months
    return Needs(
        nodes=fleet.nodes,
        routing=fleet.routing,
        prompt_tokens_per_s=fleet.blocks * tokens / fleet.seconds / fleet.nodes,
        local=fleet.local / fleet.blocks,
        fetched=fleet.fetched / fleet.blocks,
        computed=1 - (fleet.local + fleet.fetched) / fleet.blocks,
        node_in_gb_per_s=rate_in / fleet.nodes,
        node_out_gb_per_s=rate_out / fleet.nodes,
        fleet_gb_per_s=rate_in + rate_out,
        shared_gib=shared_gib,
        servers=max(by_size, by_traffic),
        memory_per_month=shared_gib * options.gib_month_memory,
        object_per_month=shared_gib * options.gib_month_object,
        requests_per_month=gets * options.million_gets + puts * options.million_puts,
    )


def table(rows: Sequence[Needs]) -> str:
    """Return a table in Markdown."""
    lines = [
        "| nodes | routing | own cache | shared | computed | a node reads, writes | the fleet "
        "| shared size | servers | memory | objects | their requests |",
        "| --- " * 12 + "|",
    ]
    lines += [
        f"| {row.nodes:,} | {row.routing} | {row.local:.1%} | {row.fetched:.1%} "
        f"| {row.computed:.1%} | {row.node_in_gb_per_s:.2f}, {row.node_out_gb_per_s:.2f} GB/s "
        f"| {row.fleet_gb_per_s:,.1f} GB/s | {row.shared_gib / 1024:,.1f} TiB | {row.servers:,} "
        f"| {row.memory_per_month:,.0f} | {row.object_per_month:,.0f} "
        f"| {row.requests_per_month:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--nodes-per-trace", type=int, default=5)
    parser.add_argument("--tokens-per-block", type=int, default=512, help="of the trace")
    parser.add_argument("--block-tokens", type=int, default=16, help="of a block that is stored")
    parser.add_argument("--bytes-per-token", type=int, default=128 * 1024)
    parser.add_argument("--local-gib", type=float, default=256)
    parser.add_argument("--shared-gib", type=float, default=256, help="for each node")
    parser.add_argument("--server-gb-per-s", type=float, default=3.1)
    parser.add_argument("--server-gib", type=float, default=256)
    parser.add_argument("--gib-month-memory", type=float, default=2.5)
    parser.add_argument("--gib-month-object", type=float, default=0.025)
    parser.add_argument("--million-gets", type=float, default=0.4)
    parser.add_argument("--million-puts", type=float, default=5)
    parser.add_argument("--admission", choices=["all", "reused"], default="all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    block_bytes = options.tokens_per_block * options.bytes_per_token
    local, shared = (
        int(gib * GIB / block_bytes) for gib in (options.local_gib, options.shared_gib)
    )
    workload = read_trace(options.trace)
    rows = [
        needs(
            replay(
                workload,
                nodes,
                max(1, round(nodes / options.nodes_per_trace)),
                routing,
                local,
                shared,
                options.admission,
            ),
            options,
        )
        for nodes in options.nodes
        for routing in ("any", "prefix")
    ]
    if options.json:
        json.dump([asdict(row) for row in rows], sys.stdout, indent=1)
        return
    print(f"{workload.name}: {rows[0].prompt_tokens_per_s:,.0f} prompt tokens a second a node")
    print(table(rows))


if __name__ == "__main__":
    main()
