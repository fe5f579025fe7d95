"""One node of several: its own memory and disk, and an engine that it shares with the others.

Run it with `python -m uvicorn examples.two_nodes.app:app`; the README beside it says more.
"""

from __future__ import annotations

import hashlib
import os
from typing import Annotated

from fastapi import FastAPI
from pydantic import BaseModel, Field

from kvoffload import (
    AsyncLRUManager,
    BlockNotFoundError,
    DiskTier,
    LoadTimeoutError,
    MemoryTier,
    TierError,
    ValkeyTier,
    hash_blocks,
)
from kvoffload.integrations.fastapi import Manager, create_router, lifespan_manager
from kvoffload.service.access import AccessControl

BLOCK_TOKENS = 16
BLOCK_BYTES = 4000  # with the header less than a power of two, which takes less of the engine
LAYOUT = "tiny-model/bf16"
"""Nodes that share blocks run one model in one format; others on the engine don't see them."""


def make_manager() -> AsyncLRUManager:
    """Return this node's manager."""
    return AsyncLRUManager(
        hot=MemoryTier(256, BLOCK_BYTES),
        cold=DiskTier(os.environ["COLD_PATH"], 1024, BLOCK_BYTES),
        remote=ValkeyTier(os.environ["SHARED_URL"], name="shared", layout=LAYOUT),
    )


app = FastAPI(
    title="One node of several",
    lifespan=lifespan_manager(make_manager, access=AccessControl(unprotected=True)),
)
app.include_router(create_router(), prefix="/cache")


class Prompt(BaseModel):
    """A prompt, as the tokenizer left it."""

    token_ids: Annotated[list[int], Field(min_length=1, max_length=32768)]


class Answer(BaseModel):
    """The answer, and what the cache was good for."""

    text: str
    restored_tokens: int
    computed_tokens: int


@app.post("/generate")
async def generate(prompt: Prompt, kv: Manager) -> Answer:
    """Answer a prompt, computing only what no earlier prompt began with, on whatever node."""
    tokens = prompt.token_ids
    chain = hash_blocks(tokens, BLOCK_TOKENS)
    state: list[bytes] = []
    async with kv.request(chain) as request:
        try:
            async with request.load() as lease:
                state = list(map(bytes, lease))  # an engine copies these to its accelerator
        except (BlockNotFoundError, LoadTimeoutError, TierError):
            pass  # the shared engine lost some a moment ago, or hangs: compute them
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
