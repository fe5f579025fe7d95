"""A service of yours: it answers prompts, and reuses the KV blocks of those it has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvoffload import LoadTimeoutError, OffloadingManager, TierError, hash_blocks

BLOCK_TOKENS = 4


@dataclass(frozen=True)
class Answer:
    """What became of one prompt.

    Attributes:
        reused: Blocks that came out of the cache.
        computed: Blocks that had to be computed.
        kept: Of those, the blocks that the cache took.
    """

    reused: int
    computed: int
    kept: int


class MyService:
    """Answers prompts; the cache makes it faster, and must never make it fail.

    Args:
        kv: The cache; whoever opened it closes it.
        compute: Computes the KV of the block with this number of a prompt.
        load_timeout_s: How long a load may take before computing is quicker.
    """

    def __init__(
        self,
        kv: OffloadingManager,
        compute: Callable[[Sequence[int], int], bytes],
        *,
        load_timeout_s: float = 0.5,
    ) -> None:
        self._kv = kv
        self._compute = compute
        self._load_timeout_s = load_timeout_s

    async def answer(self, token_ids: Sequence[int]) -> Answer:
        """Answer one prompt."""
        hashes = hash_blocks(token_ids, BLOCK_TOKENS)
        async with self._kv.request(hashes) as request:
            reused = request.hit
            try:
                async with request.load(timeout_s=self._load_timeout_s) as lease:
                    for view in lease:
                        self._use(view)
            except (LoadTimeoutError, TierError):
                reused = 0  # too slow, or damaged: compute it all
            payloads = [self._compute(token_ids, number) for number in range(reused, len(hashes))]
            for payload in payloads:
                self._use(memoryview(payload))
            # What was there already stays there: only the blocks behind the hit are new.
            result = await request.store(payloads[request.hit - reused :])
        return Answer(reused, len(payloads), len(result.stored))

    def _use(self, block: memoryview) -> None:
        """Copy a block into the engine; here, read its first byte."""
        block[0]
