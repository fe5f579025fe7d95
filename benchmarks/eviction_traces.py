"""What a policy hits beside LRU on made-up traffic of many kinds: where does it lose?

    python benchmarks/eviction_traces.py [--policy weighted] [--seeds 4] [--families FAMILY...]

Prints, for each family and seed, how many points of prefix hits the policy is ahead of tail-first
LRU at 1, 2, 5, 10, 20 and 50 % of the distinct blocks; then the worst and the mean of all. No bytes
move: it is `kvoffload.workload.simulate`, and takes some minutes. A change that helps on some seeds
is worth something if it does on others: differences of half a point are often chance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate, count, islice
from random import Random

from kvoffload.workload import TraceRequest, Workload, chat_workload, simulate

SIZES = (1, 2, 5, 10, 20, 50)
Chain = tuple[int, ...]


class Blocks:
    """Hands out blocks that nobody had before."""

    def __init__(self) -> None:
        self._fresh = count()

    def __call__(self, number: int) -> Chain:
        return tuple(islice(self._fresh, number))


def agents(
    rng: Random, *, sessions: int = 8, turns: int = 40, order: str = "random"
) -> Iterator[Chain]:
    """Sessions that grow with each turn until they end, and whose turn it is by `order`.

    `random` draws one of them, `round` goes round, `burst` stays with one for five turns on
    average.
    """
    blocks = Blocks()
    system = blocks(10)

    def start() -> Chain:
        return system + blocks(rng.randint(5, 60))

    going = [start() for _ in range(sessions)]
    turn = 0
    while True:
        if order == "round":
            turn = (turn + 1) % sessions
        elif order == "random" or rng.random() < 0.2:
            turn = rng.randrange(sessions)
        yield going[turn]
        if rng.random() < 1 / turns:
            going[turn] = start()
        else:
            going[turn] += blocks(rng.randint(1, 8))


def users(rng: Random, *, people: int = 300, skew: float = 1.0) -> Iterator[Chain]:
    """Users of a chat, some far more active than others (Zipf), in conversations of some turns."""
    blocks = Blocks()
    systems = [blocks(rng.randint(1, 6)) for _ in range(8)]
    weights = list(accumulate((rank + 1) ** -skew for rank in range(people)))
    going: dict[int, Chain] = {}
    while True:
        (user,) = rng.choices(range(people), cum_weights=weights)
        history = going.get(user) or rng.choice(systems)
        prompt = history + blocks(rng.randint(1, 5))
        yield (*prompt, *blocks(1)) if rng.random() < 0.5 else prompt
        going[user] = () if rng.random() < 0.25 else prompt + blocks(rng.randint(1, 4))


def documents(rng: Random, *, number: int = 400, skew: float = 0.8) -> Iterator[Chain]:
    """Questions about documents, the popular ones more often; no question comes twice."""
    blocks = Blocks()
    system = blocks(4)
    texts = [system + blocks(rng.randint(5, 40)) for _ in range(number)]
    weights = list(accumulate((rank + 1) ** -skew for rank in range(number)))
    while True:
        (text,) = rng.choices(texts, cum_weights=weights)
        yield text + blocks(rng.randint(1, 3))


def loop(rng: Random, *, chains: int = 200) -> Iterator[Chain]:
    """The same chains round and round, which LRU is worst at."""
    blocks = Blocks()
    ring = [blocks(rng.randint(5, 30)) for _ in range(chains)]
    while True:
        yield from ring


def scan(rng: Random, *, share: float = 0.5) -> Iterator[Chain]:
    """A chat, and long prompts in between that never come again."""
    traffic = users(rng, people=100)
    fresh = count(10**9)
    while True:
        if rng.random() < share:
            yield tuple(islice(fresh, rng.randint(10, 80)))
        else:
            yield next(traffic)


def recent(rng: Random, *, memory: int = 60) -> Iterator[Chain]:
    """Only recency tells: each request goes on from one about so many requests ago, or is new."""
    blocks = Blocks()
    past: list[Chain] = []
    while True:
        back = int(rng.expovariate(1 / memory))
        old = past[-1 - back] if back < len(past) and rng.random() < 0.8 else ()
        chain = (old + blocks(rng.randint(1, 6)))[:120]
        past.append(chain)
        yield chain


def even(rng: Random, *, chains: int = 300) -> Iterator[Chain]:
    """Any chain as likely as any other, at any time: there is nothing to learn at all."""
    blocks = Blocks()
    pool = [blocks(rng.randint(10, 20)) for _ in range(chains)]
    while True:
        yield rng.choice(pool)


def twice(rng: Random, *, apart: int = 300) -> Iterator[Chain]:
    """Each chain twice, always equally far apart."""
    blocks = Blocks()
    past: list[Chain] = []
    while True:
        if len(past) >= apart:
            yield past[-apart]
        past.append(blocks(rng.randint(5, 15)))
        yield past[-1]


def batches(rng: Random) -> Iterator[Chain]:
    """Long prompts, each sampled some times in a row and never again."""
    blocks = Blocks()
    while True:
        chain = blocks(rng.randint(20, 100))
        for _ in range(rng.randint(1, 8)):
            yield chain


def tree(rng: Random) -> Iterator[Chain]:
    """Searches: each request goes on from a random node of a tree that is given up in the end."""
    blocks = Blocks()
    while True:
        nodes = [blocks(rng.randint(10, 40))]
        for _ in range(rng.randint(20, 120)):
            yield (node := rng.choice(nodes[-30:]) + blocks(rng.randint(1, 6)))
            nodes.append(node)


def mixed(rng: Random, *kinds: Callable[[Random], Iterator[Chain]]) -> Iterator[Chain]:
    """Several kinds of traffic at once, request by request by chance."""
    going = [kind(Random(rng.random())) for kind in kinds]
    while True:
        number = rng.randrange(len(going))
        yield tuple(block + number * 10**10 for block in next(going[number]))


def phases(
    rng: Random, *kinds: Callable[[Random], Iterator[Chain]], requests: int = 1000
) -> Iterator[Chain]:
    """Several kinds of traffic, one after the other and round again."""
    going = [kind(Random(rng.random())) for kind in kinds]
    while True:
        for number, traffic in enumerate(going):
            for chain in islice(traffic, requests):
                yield tuple(block + number * 10**10 for block in chain)


def generated(rng: Random) -> Iterator[Chain]:
    """The library's own generated chat."""
    workload = chat_workload(8000, seed=rng.randrange(10**6))
    return (request.hash_ids for request in workload.requests)


FAMILIES: dict[str, tuple[int, Callable[[Random], Iterator[Chain]]]] = {
    "agents by chance": (3000, agents),
    "agents by chance, long": (8000, agents),
    "agents by chance, 3": (2000, lambda rng: agents(rng, sessions=3)),
    "agents by chance, 40": (3000, lambda rng: agents(rng, sessions=40)),
    "agents in turn": (3000, lambda rng: agents(rng, order="round")),
    "agents in bursts": (3000, lambda rng: agents(rng, order="burst")),
    "agents, short": (300, agents),
    "agents, few turns": (4000, lambda rng: agents(rng, turns=5)),
    "chat": (4000, generated),
    "chat, short": (400, generated),
    "users": (6000, users),
    "users, even": (6000, lambda rng: users(rng, skew=0.0)),
    "documents": (5000, documents),
    "documents, even": (5000, lambda rng: documents(rng, skew=0.0)),
    "documents, short": (300, documents),
    "loop": (4000, loop),
    "scan": (5000, scan),
    "recent": (5000, recent),
    "recent, far": (5000, lambda rng: recent(rng, memory=600)),
    "even": (6000, even),
    "even, short": (600, even),
    "twice": (6000, twice),
    "twice, near": (6000, lambda rng: twice(rng, apart=20)),
    "batches": (4000, batches),
    "tree": (4000, tree),
    "mixed": (5000, lambda rng: mixed(rng, agents, users, documents)),
    "mixed, agents and scans": (4000, lambda rng: mixed(rng, agents, scan)),
    "phases": (6000, lambda rng: phases(rng, users, agents, documents)),
    "phases, loop": (6000, lambda rng: phases(rng, recent, loop)),
    "phases, quick": (6000, lambda rng: phases(rng, users, even, batches, requests=300)),
}
"""Kinds of traffic, with how many requests of each."""


def make(family: str, seed: int) -> Workload:
    """Return a trace; equal seeds give equal ones."""
    requests, kind = FAMILIES[family]
    chains = islice(kind(Random(f"{family} {seed}")), requests)
    records = [TraceRequest(float(number), chain) for number, chain in enumerate(chains)]
    return Workload(f"{family} #{seed}", records)


def leads(workload: Workload, policy: str) -> list[float]:
    """Return by how many points of prefix hits a policy is ahead of LRU, size by size."""
    found = []
    for size in SIZES:
        capacity = max(1, workload.num_distinct_blocks * size // 100)
        ours, lru = (
            simulate(workload, name, capacity).prefix_hit_ratio for name in (policy, "lru")
        )
        found.append(100 * (ours - lru))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--policy", default="weighted")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    options = parser.parse_args()
    print(f"{'':28}" + "".join(f"{size:6} %" for size in SIZES))
    everything = []
    for family in options.families:
        for seed in range(options.seeds):
            workload = make(family, seed)
            row = leads(workload, options.policy)
            everything += row
            print(f"{workload.name:28}" + "".join(f"{lead:+8.2f}" for lead in row), flush=True)
    behind = sum(lead < -0.1 for lead in everything)
    print(f"more than 0.1 behind: {behind} of {len(everything)}")
    print(f"worst {min(everything):+.2f}, mean {sum(everything) / len(everything):+.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
