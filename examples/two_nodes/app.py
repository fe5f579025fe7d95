"""One node of several: its own memory and disk, and an engine that it shares with the others.

Run it with `python -m uvicorn examples.two_nodes.app:app`; the README beside it says more.
"""

from __future__ import annotations

import os

from examples.toy_engine import BLOCK_BYTES, Answer, Prompt, answer
from fastapi import FastAPI

from kvoffload import AsyncLRUManager, DiskTier, MemoryTier, ValkeyTier
from kvoffload.integrations.fastapi import Manager, create_router, lifespan_manager
from kvoffload.service.access import AccessControl

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


@app.post("/generate")
async def generate(prompt: Prompt, kv: Manager) -> Answer:
    """Answer a prompt, computing only what none began with before, on whatever node."""
    return await answer(prompt, kv)
