"""Servers that a test makes up, and a network that breaks in the middle of something."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio

from kvoffload.testing import eventually


@asynccontextmanager
async def serving(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    *,
    limit: int = 2**20,
) -> AsyncIterator[int]:
    """Have each connection talked to; yields the port. Leaves when nobody talks any more."""
    open_now: set[asyncio.StreamWriter] = set()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_now.add(writer)
        try:
            await talk(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()
            open_now.discard(writer)

    async with await asyncio.start_server(run, "127.0.0.1", 0, limit=limit) as listening:
        yield listening.sockets[0].getsockname()[1]
        for each in open_now:
            each.transport.abort()
        await eventually(lambda: not open_now)


@asynccontextmanager
async def cut_after(
    server_port: int, most: int, *, once: bool = True, sending: bool = False
) -> AsyncIterator[tuple[int, list[int]]]:
    """Stand between a client and its server, and cut a connection that gave so many bytes.

    Yields the port to go to, and the bytes that had been given at each cut.

    Args:
        server_port: Where the server is.
        most: Bytes from the server to its client.
        once: Whether that is all, or each connection is cut.
        sending: Whether it is bytes from the client to its server.
    """
    cuts: list[int] = []
    open_now: set[asyncio.StreamWriter] = set()

    async def pass_on(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, scope: anyio.CancelScope
    ) -> None:
        given = 0
        while data := await reader.read(65536):
            data = data[: max(0, most - given)] if not (cuts and once) else data
            given += len(data)
            writer.write(data)
            await writer.drain()
            if given >= most and not (cuts and once):
                cuts.append(given)
                break
        scope.cancel()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()

    async def stand_between(client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        server, question = await asyncio.open_connection("127.0.0.1", server_port)
        open_now.update((answer, question))
        there, back = (client, question), (server, answer)
        watched, other = (there, back) if sending else (back, there)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(forward, *other)
                await pass_on(*watched, tasks.cancel_scope)
        except* OSError:
            pass
        finally:
            answer.transport.abort()
            question.transport.abort()
            open_now.difference_update((answer, question))

    async with await asyncio.start_server(stand_between, "127.0.0.1", 0) as listening:
        yield listening.sockets[0].getsockname()[1], cuts
        for each in open_now:
            each.transport.abort()
        await eventually(lambda: not open_now)
