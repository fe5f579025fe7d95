"""A stand-in for a model: what an engine does with a manager, without the mathematics.

[examples/smollm](smollm) is a real one.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import BaseModel, Field

from kvoffload import (
    BlockNotFoundError,
    LoadTimeoutError,
    OffloadingManager,
    TierError,
    hash_blocks,
)

BLOCK_TOKENS = 16
BLOCK_BYTES = 4000  # with its header less than a power of two, which takes less of a shared engine


class Prompt(BaseModel):
    """A prompt, as the tokenizer left it."""

    token_ids: Annotated[list[int], Field(min_length=1, max_length=32768)]


class Answer(BaseModel):
    """The answer, and what the cache was good for."""

    text: str
    restored_tokens: int
    computed_tokens: int


async def answer(prompt: Prompt, kv: OffloadingManager) -> Answer:
    """Answer a prompt, computing only what no earlier prompt began with."""
    tokens = prompt.token_ids
    chain = hash_blocks(tokens, BLOCK_TOKENS)
    state: list[bytes] = []
    async with kv.request(chain) as request:
        try:
            async with request.load() as lease:
                state = list(map(bytes, lease))  # an engine copies these to its accelerator
        except (BlockNotFoundError, LoadTimeoutError, TierError):
            pass  # too slow, damaged, or lost by a shared engine a moment ago: compute them
        restored = len(state) * BLOCK_TOKENS
        ends = range(restored + BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS)
        state += [compute(tokens[:end]) for end in ends]
        await request.store(state[request.hit :])
    return Answer(
        text=hashlib.sha256(b"".join(state)).hexdigest()[:16],
        restored_tokens=restored,
        computed_tokens=len(tokens) - restored,
    )


def compute(prefix: list[int]) -> bytes:
    """Stand in for the model: the KV of a block depends on all tokens before it."""
    return hashlib.shake_256(repr(prefix).encode()).digest(BLOCK_BYTES)
