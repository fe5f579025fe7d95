"""An answer as server-sent events, for as long as somebody listens."""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
import json
from collections.abc import Sequence

import anyio
from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from .engine import Engine
from .pool import PoolFullError
from .tokenizer import Tokenizer

SEND_TIMEOUT_S = 10.0
"""Seconds that a client may take to accept an event: pages and pins must not last as it pleases."""


class AnswerStream(Response):
    """Streams the answer to a prompt; the generation lives as long as the sending does.

    The `async with` of the generation is around the sending itself, so it ends when that ends,
    however it does. A client that is gone cancels it: the token that is being computed is the last.

    Events, each with JSON: `origin` (with the first token), `text` (a piece), `done` (the answer's
    tokens, to be sent with the next turn), and `without` (what the first token takes if all is
    computed), if that is asked for.

    Args:
        engine: Answers.
        tokenizer: Makes text of it.
        prompt: The prompt's tokens.
        max_tokens: Longest answer.
        compare: Whether to compute the prompt again without any cache, to compare.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        compare: bool,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]  # nobody knows yet
        self.engine, self.tokenizer = engine, tokenizer
        self.prompt, self.max_tokens, self.compare = prompt, max_tokens, compare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until all is sent or the client is gone."""
        async with anyio.create_task_group() as tasks:

            async def until_gone() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(until_gone)
            try:
                await self._answer(send)
            except PoolFullError as exc:  # before anything was sent
                busy = JSONResponse({"detail": str(exc)}, 503, {"Retry-After": "2"})
                await busy(scope, receive, send)
            except (TimeoutError, OSError):
                pass  # a client that takes nothing any more; the server closes the connection
            tasks.cancel_scope.cancel()

    async def _answer(self, send: Send) -> None:
        stop, text = [self.tokenizer.end_of_turn], codecs.getincrementaldecoder("utf-8")("replace")
        async with self.engine.generate(self.prompt, self.max_tokens, stop=stop) as answer:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for token in answer:
                if len(answer.answer) == 1:
                    await self._send(send, "origin", dataclasses.asdict(answer.origin))
                if piece := text.decode(self.tokenizer.decode_bytes([token])):
                    await self._send(send, "text", piece)
            await self._send(send, "done", answer.answer)
        if self.compare:
            async with self.engine.generate(self.prompt, 1, use_cache=False) as again:
                async for _ in again:
                    pass
            same = again.answer == answer.answer[:1]
            seconds = again.origin.first_token_s
            await self._send(send, "without", {"first_token_s": seconds, "same": same})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @staticmethod
    async def _send(send: Send, event: str, data: object) -> None:
        body = f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await send({"type": "http.response.body", "body": body, "more_body": True})
