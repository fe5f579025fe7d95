"""A generator of multi-turn chat traffic, for when there is no recorded trace at hand."""

from __future__ import annotations

import heapq
import math
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate, count, islice
from random import Random

from .trace import TraceRequest, Workload

BLOCK_TOKENS = 512
SYSTEM_PROMPTS = 16
DOCUMENTS = 64
MAX_TURNS = 40


def chat_workload(num_requests: int, *, seed: int = 0) -> Workload:
    """Return the first `num_requests` requests of `chat_requests(seed)`."""
    return Workload(f"generated-chat-{seed}", list(islice(chat_requests(seed), num_requests)))


def chat_requests(seed: int = 0) -> Iterator[TraceRequest]:
    """Yield an endless chat workload in order of arrival; equal seeds give equal requests.

    What is drawn, each independently:

    * Conversations start as a Poisson process, one every 2 s on average.
    * Each has one of 16 system prompts of 1 to 8 blocks (uniform), the r-th most popular with a
      probability proportional to 1/r (Zipf with exponent 1).
    * 3 in 10 go on with one of 64 documents of 4 to 32 blocks (uniform), again Zipf with
      exponent 1. A document after another system prompt is another chain, as in any prefix cache.
    * Turns: geometric with mean 5, at most 40. The first adds a question; each later one adds the
      answer before it and the next question. Question and answer are geometric with a mean of 2
      and 3 blocks, at least 1.
    * From one turn to the next: 2 s and an exponential with mean 28 s.

    So system prompts are shared by all, documents by some, and a conversation's history is hit
    again half a minute later, after some 70 requests of others. Blocks are 512 tokens.

    Args:
        seed: Any integer.
    """
    # Random.random() is the one method that Python promises to keep reproducible, so everything
    # is made from it: one seed is one workload, on every machine and version.
    rng = Random(seed)
    fresh = count()
    by_rank = {n: list(accumulate(1 / rank for rank in range(1, n + 1))) for n in _RANKED}
    sizes = {SYSTEM_PROMPTS: (1, 8), DOCUMENTS: (4, 32)}
    lengths = {n: [_uniform(rng, *sizes[n]) for _ in range(n)] for n in _RANKED}
    prompts: dict[tuple[int, int], tuple[int, ...]] = {}

    def ranked(n: int) -> int:
        return bisect(by_rank[n], rng.random() * by_rank[n][-1], hi=n - 1)

    def blocks(number: int) -> tuple[int, ...]:
        return tuple(islice(fresh, number))

    def opening() -> tuple[int, ...]:
        system, document = ranked(SYSTEM_PROMPTS), -1
        if rng.random() < 0.3:
            document = ranked(DOCUMENTS)
        if (system, -1) not in prompts:
            prompts[system, -1] = blocks(lengths[SYSTEM_PROMPTS][system])
        if (system, document) not in prompts:
            prompts[system, document] = prompts[system, -1] + blocks(lengths[DOCUMENTS][document])
        return prompts[system, document]

    # (arrival in seconds, number of the conversation, turns left, history); the number breaks ties
    turns: list[tuple[float, int, int, tuple[int, ...]]] = []
    next_start_s, conversations = 0.0, count()
    while True:
        while not turns or next_start_s <= turns[0][0]:
            left = min(_geometric(rng, 5), MAX_TURNS)
            heapq.heappush(turns, (next_start_s, next(conversations), left, opening()))
            next_start_s += _exponential(rng, 2.0)
        now_s, conversation, left, history = heapq.heappop(turns)
        prompt = history + blocks(_geometric(rng, 2))
        answer_blocks = _geometric(rng, 3)
        yield TraceRequest(
            float(int(now_s * 1e3)),
            prompt,
            len(prompt) * BLOCK_TOKENS,
            answer_blocks * BLOCK_TOKENS,
        )
        if left > 1:
            later_s = now_s + 2.0 + _exponential(rng, 28.0)
            history = prompt + blocks(answer_blocks)
            heapq.heappush(turns, (later_s, conversation, left - 1, history))


_RANKED = (SYSTEM_PROMPTS, DOCUMENTS)


def _uniform(rng: Random, low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))


def _exponential(rng: Random, mean: float) -> float:
    return -mean * math.log(1.0 - rng.random())


def _geometric(rng: Random, mean: int) -> int:
    """Draw from 1, 2, ..."""
    return 1 + int(math.log(1.0 - rng.random()) / math.log(1.0 - 1.0 / mean))
