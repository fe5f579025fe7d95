"""A server that answers as a test scripts it, byte by byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

BLOCK_BYTES = 64
HELLO = {
    "session": "S",
    "ttl_s": 60.0,
    "namespace": "",
    "block_bytes": BLOCK_BYTES,
    "tiers": [{"name": "hot", "medium": "cpu", "num_blocks": 8}],
}
STATS: dict[str, Any] = {"tiers": {"hot": {"medium": "cpu", "capacity_blocks": 8, "state": "full"}}}

Answer: TypeAlias = Callable[[asyncio.StreamWriter], Awaitable[None]]
"""Answers one call; the connection is closed afterwards unless it was answered in full."""


class Script:
    """What a scripted server does: `on` a path's end, in the place of its usual answer.

    Attributes:
        on: Answers to calls, by how their paths end; each is used up by one call.
        seen: Method and path of each call.
    """

    def __init__(self, path: Path) -> None:
        self.url = f"unix:{path}"
        self.on: dict[str, list[Answer]] = {}
        self.seen: list[str] = []
        self.streams: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (head := await _head(reader)) is not None:
                call, headers = head
                await reader.readexactly(int(headers.get("content-length", 0)))
                self.seen.append(call)
                path = call.partition(" ")[2].partition("?")[0]
                for end, answers in self.on.items():
                    if path.endswith(end) and answers:
                        await answers.pop(0)(writer)
                        return
                await self._usual(call.partition(" ")[0], path, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _usual(self, method: str, path: str, writer: asyncio.StreamWriter) -> None:
        if path.endswith("/stream"):
            self.streams.append(writer)
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            self.tell(writer, {"n": 0, "hello": HELLO})
            self.tell(writer, {"n": 1, "stats": STATS})
            await writer.drain()
        elif method == "POST" and path.endswith("/sessions"):
            writer.write(answer(201, HELLO))
        elif path.endswith("/lookup"):
            writer.write(answer(200, {"hit": 7}))
        else:
            if path.endswith("/sessions/S"):
                for stream in self.streams:
                    stream.close()
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    @staticmethod
    def tell(writer: asyncio.StreamWriter, line: Any) -> None:
        """Send a line of a session's stream."""
        body = json.dumps(line).encode() + b"\n"
        writer.write(b"%x\r\n%b\r\n" % (len(body), body))


def answer(status: int, body: Any, kind: str = "application/json") -> bytes:
    """Return a whole answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} Said\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def says(data: bytes) -> Answer:
    """Answer with these bytes, and close the connection."""

    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return send


async def never(writer: asyncio.StreamWriter) -> None:
    """Answer nothing, for as long as the client stays."""
    while not writer.is_closing():
        writer.write(b"")
        await asyncio.sleep(0.01)


async def _head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]] | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    return first.rpartition(" ")[0], headers


@asynccontextmanager
async def scripted() -> AsyncIterator[Script]:
    """Run a scripted server."""
    with TemporaryDirectory(prefix="kvo") as directory:
        path = Path(directory) / "scripted.sock"
        script = Script(path)
        server = await asyncio.start_unix_server(script.serve, path)
        try:
            yield script
        finally:
            server.close()
            for writer in script.streams:
                writer.close()
