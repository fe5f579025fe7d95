"""An application of your own that keeps KV blocks: `kvoffload.integrations.fastapi` in use.

Run it with `python -m uvicorn examples.fastapi_server.app:app`; the README beside it says more.
"""

from __future__ import annotations

import os

from examples.toy_engine import BLOCK_BYTES, Answer, Prompt, answer
from fastapi import FastAPI

from kvoffload import ManagerSettings
from kvoffload.integrations.fastapi import Manager, create_router, lifespan_manager
from kvoffload.service.access import AccessControl, Right, Token


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


@app.post("/generate")
async def generate(prompt: Prompt, kv: Manager) -> Answer:
    """Answer a prompt, computing only what no earlier prompt began with."""
    return await answer(prompt, kv)
