"""An application of several workers that share one cache.

A cold directory belongs to one process, and blocks in memory to one too. So one `kvoffload serve`
has them, and each worker has a client of it. The README beside this says how to run it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, TypedDict

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, Field

from kvoffload import OffloadError, hash_blocks
from kvoffload.client import AsyncLRUClient

BLOCK_TOKENS = 16
BLOCK_BYTES = 64 * 1024

log = logging.getLogger(__name__)


class State(TypedDict):
    """What the lifespan hands to every request, as `request.state`."""

    kv: AsyncLRUClient


class Prompt(BaseModel):
    """What is asked of the model."""

    token_ids: list[Annotated[int, Field(ge=0)]]


class Answer(BaseModel):
    """What came of it.

    Attributes:
        worker: Process that answered.
        blocks: Full blocks of the prompt.
        from_cache: How many of them did not have to be computed.
        digest: SHA-256 over the KV of all of them, wherever it came from.
    """

    worker: int
    blocks: int
    from_cache: int
    digest: str


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[State]:
    """Have one client a worker, for as long as the worker lives."""
    url = os.environ.get("CACHE_URL", "unix:kv.sock")
    async with AsyncLRUClient(url, token=os.environ.get("CACHE_TOKEN")) as kv:
        yield {"kv": kv}


async def cache_of(request: Request) -> AsyncLRUClient:
    """Return the worker's client."""
    kv: AsyncLRUClient = request.state.kv
    return kv


app = FastAPI(title="One cache, many workers", lifespan=lifespan)


@app.post("/prefill")
async def prefill(prompt: Prompt, kv: Annotated[AsyncLRUClient, Depends(cache_of)]) -> Answer:
    """Get the KV of a prompt: load what any worker has computed, compute and store the rest."""
    hashes = hash_blocks(prompt.token_ids, BLOCK_TOKENS)
    blocks: list[bytes] = []
    hit = 0
    try:
        async with kv.request(hashes) as request:
            async with request.load() as lease:
                blocks += map(bytes, lease)
            hit = len(blocks)
            blocks += compute_from(hit, prompt.token_ids)
            await request.store(blocks[hit:])
    except OffloadError as exc:
        # A cache that fails costs time, and nothing else.
        log.warning("going on without the cache: %s", exc)
        blocks += compute_from(len(blocks), prompt.token_ids)
    return Answer(
        worker=os.getpid(),
        blocks=len(blocks),
        from_cache=hit,
        digest=hashlib.sha256(b"".join(blocks)).hexdigest(),
    )


def compute_from(start: int, token_ids: Sequence[int]) -> list[bytes]:
    """Compute the KV of the blocks of a prompt, from one of them on."""
    ends = range((start + 1) * BLOCK_TOKENS, len(token_ids) + 1, BLOCK_TOKENS)
    return [compute(token_ids[:end]) for end in ends]


def compute(token_ids: Sequence[int]) -> bytes:
    """Stand in for the model: the KV of the last block depends on all tokens up to its end."""
    seed = hashlib.sha256(repr(list(token_ids)).encode()).digest()
    return seed * (BLOCK_BYTES // len(seed))
