"""An application of your own that keeps KV blocks: `kvoffload.integrations.fastapi` in use.

Run it with `python -m uvicorn examples.fastapi_server.app:app`; the README beside it says more.
"""

from __future__ import annotations

import hashlib
import os
from typing import Annotated

from fastapi import FastAPI
from pydantic import BaseModel, Field

from kvoffload import ManagerSettings, hash_blocks
from kvoffload.integrations.fastapi import Manager, create_router, lifespan_manager
from kvoffload.service.access import AccessControl, Right, Token

BLOCK_TOKENS = 16
BLOCK_BYTES = 4096


def settings() -> ManagerSettings:
    """Return what the manager is made from, with a cold tier where there is a directory for it."""
    cold_path = os.environ.get("COLD_PATH")
    return ManagerSettings(
        hot_blocks=256,
        cold_blocks=1024 if cold_path else 0,
        cold_path=cold_path,
        block_bytes=BLOCK_BYTES,
    )


def access() -> AccessControl:
    """Return who may look at the cache itself: operators, who read and administer."""
    token = os.environ.get("OPERATOR_TOKEN")
    if token is None:
        return AccessControl(unprotected=True)  # uvicorn listens on loopback unless told otherwise
    return AccessControl([Token.of(token, rights=[Right.READ, Right.ADMIN])])


app = FastAPI(
    title="An engine with a cache", lifespan=lifespan_manager(settings(), access=access())
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
    """Answer a prompt, computing only what no earlier prompt began with."""
    tokens = prompt.token_ids
    chain = hash_blocks(tokens, BLOCK_TOKENS)
    async with kv.request(chain) as request:
        async with request.load() as lease:
            state = list(map(bytes, lease))  # an engine copies these to its accelerator
        ends = range((request.hit + 1) * BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS)
        state += [compute(tokens[:end]) for end in ends]
        await request.store(state[request.hit :])
    restored = request.hit * BLOCK_TOKENS
    return Answer(
        text=hashlib.sha256(b"".join(state)).hexdigest()[:16],
        restored_tokens=restored,
        computed_tokens=len(tokens) - restored,
    )


def compute(prefix: list[int]) -> bytes:
    """Stand in for the model: the KV of a block depends on all tokens before it."""
    return hashlib.shake_256(repr(prefix).encode()).digest(BLOCK_BYTES)
