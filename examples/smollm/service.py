"""A chat service: the engine in the lifespan of a FastAPI application, and a page to chat on.

    python -m uvicorn examples.smollm.service:app

Settings come from the environment: `SMOLLM_COLD_PATH` is where blocks survive a restart, and
`SMOLLM_GGUF` another file than the installed one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict

from kvoffload import AsyncLRUManager, DiskTier, ManagerStats, MemoryTier
from kvoffload.integrations.fastapi import Manager, lifespan_manager

from .demo import load_model
from .engine import Engine
from .model import Model
from .page import load_page
from .streaming import AnswerStream
from .tokenizer import Message, Tokenizer

PAGE = load_page()


class ChatSettings(BaseSettings):
    """What the service is made from: `SMOLLM_HOT_BLOCKS=50` sets `hot_blocks`.

    Attributes:
        cold_path: Directory of the cold tier; without one nothing survives a restart.
        hot_blocks: Slots in memory; a block is 16 tokens and 0.7 MB in float32.
        cold_blocks: Slots on disk.
        pool_pages: Blocks that chats under way may have at once.
        dtype: What KV is kept in.
        max_prompt_tokens: Longest prompt.
        load_timeout_s: Seconds until blocks that are being loaded are computed instead.
    """

    model_config = SettingsConfigDict(env_prefix="SMOLLM_")

    cold_path: Path | None = None
    hot_blocks: PositiveInt = 200
    cold_blocks: PositiveInt = 1000
    pool_pages: PositiveInt = 512
    dtype: Literal["float32", "float16"] = "float32"
    max_prompt_tokens: PositiveInt = 3000
    load_timeout_s: float = Field(default=5.0, gt=0)

    def make_manager(self, model: Model) -> AsyncLRUManager:
        """Return the manager, not yet open."""
        block_bytes = model.geometry(self.dtype).block_bytes
        cold = None
        if self.cold_path is not None:
            cold = DiskTier(self.cold_path, self.cold_blocks, block_bytes)
        return AsyncLRUManager(hot=MemoryTier(self.hot_blocks, block_bytes), cold=cold)


class Turn(BaseModel):
    """One message; an answer of the model as the tokens that it was made of."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(default="", max_length=100_000)
    tokens: tuple[NonNegativeInt, ...] | None = Field(default=None, max_length=8192)


class Chat(BaseModel):
    """A chat so far."""

    messages: list[Turn] = Field(min_length=1, max_length=200)
    max_tokens: int = Field(default=200, ge=1, le=1000)
    compare: bool = Field(default=False, description="Also measure without any cache")


class Served:
    """What requests need, made by the lifespan."""

    def __init__(self, settings: ChatSettings, tokenizer: Tokenizer, engine: Engine) -> None:
        self.settings, self.tokenizer, self.engine = settings, tokenizer, engine


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model off the loop; open the manager before the engine, close it after."""
    settings = ChatSettings()
    tokenizer, model = await asyncio.to_thread(load_model)
    manager = settings.make_manager(model)
    async with (
        lifespan_manager(lambda: manager)(app),
        Engine(
            model,
            manager,
            pool_pages=settings.pool_pages,
            dtype=settings.dtype,
            load_timeout_s=settings.load_timeout_s,
        ) as engine,
    ):
        app.state.served = Served(settings, tokenizer, engine)
        yield


async def get_served(request: Request) -> Served:
    """Return what the lifespan made."""
    served: Served = request.app.state.served
    return served


app = FastAPI(title="SmolLM2 over kvoffload", lifespan=lifespan)


@app.get("/", include_in_schema=False)
async def page() -> Response:
    """Return the page to chat on."""
    return Response(PAGE.html, headers=PAGE.headers)


@app.get("/stats")
async def stats(kv: Manager) -> ManagerStats:
    """Return the manager's counters."""
    return kv.get_stats()


@app.post("/chat", response_class=AnswerStream)
async def chat(chat: Chat, served: Annotated[Served, Depends(get_served)]) -> Response:
    """Stream the answer to the last message, as server-sent events."""
    engine, tokenizer = served.engine, served.tokenizer
    messages = [Message(turn.role, turn.content, turn.tokens) for turn in chat.messages]
    if any(max(turn.tokens or (0,)) >= tokenizer.size for turn in chat.messages):
        raise HTTPException(422, "a token that the model does not have")
    # On the worker: a long text takes a while, and the event loop has other things to do.
    prompt = await engine.worker.run(tokenizer.encode_chat, messages)
    longest = min(
        served.settings.max_prompt_tokens, engine.model.config.context_tokens - chat.max_tokens
    )
    if len(prompt) > longest:
        raise HTTPException(413, f"the chat has {len(prompt)} tokens; at most {longest} are taken")
    return AnswerStream(engine, tokenizer, prompt, chat.max_tokens, compare=chat.compare)
