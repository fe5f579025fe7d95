"""A real server over a Unix socket, in the loop of the test, and clients of it."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import httpx
import uvicorn

from kvoffload import AsyncLRUManager, BlockHash, MemoryTier
from kvoffload.service.access import AccessControl
from kvoffload.service.app import create_app
from kvoffload.service.limits import Limits
from kvoffload.service.state import STATE, Service
from kvoffload.service.wire import BATCH, hashes_to_text, pack_header
from kvoffload.testing import eventually

BLOCK_BYTES = 64 * 1024
UNPROTECTED = AccessControl(unprotected=True)


def small() -> AsyncLRUManager:
    """Return a manager of eight blocks in memory."""
    return AsyncLRUManager(hot=MemoryTier(8, BLOCK_BYTES), policy="lru")


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def batch(block_hashes: Sequence[BlockHash], payloads: Sequence[bytes]) -> bytes:
    return pack_header(block_hashes, [len(each) for each in payloads]) + b"".join(payloads)


@dataclass
class Served:
    """A server, from the outside and from the inside."""

    path: Path
    http: httpx.AsyncClient
    service: Service

    @property
    def manager(self) -> AsyncLRUManager:
        return self.service.manager

    async def post(self, path: str, **json: object) -> httpx.Response:
        return await self.http.post(f"/v1/{path}", json=json)

    async def store(
        self,
        block_hashes: Sequence[BlockHash],
        payloads: Sequence[bytes],
        *,
        query: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        return await self.http.post(
            f"/v1/store{query}",
            content=batch(block_hashes, payloads),
            headers={"Content-Type": BATCH, **(headers or {})},
        )

    async def hit(self, block_hashes: Sequence[BlockHash]) -> int:
        answer = await self.post("lookup", block_hashes=hashes_to_text(block_hashes))
        return int(answer.json()["hit"])

    async def raw(self, request: bytes) -> anyio.abc.SocketStream:
        """Send bytes over a connection of its own, which is not closed."""
        stream = await anyio.connect_unix(self.path)
        await stream.send(request)
        return stream

    async def at_rest(self) -> None:
        """Wait until nothing is pinned, pending or under way any more."""

        def is_at_rest() -> bool:
            stats = self.manager.get_stats()
            return not (stats.pinned or stats.pending or self.service.calls)

        await eventually(is_at_rest)
        self.manager.check_invariants()


@asynccontextmanager
async def serving(
    *,
    access: AccessControl = UNPROTECTED,
    limits: Limits | None = None,
    make_manager: Callable[[], AsyncLRUManager] = small,
) -> AsyncIterator[Served]:
    """Run a server for as long as the body takes, and check that nothing leaked."""
    app = create_app(make_manager, access=access, limits=limits)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        server = uvicorn.Server(uvicorn.Config(app, uds=str(path), log_config=None))
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        stopped = anyio.Event()

        async def serve() -> None:
            try:
                await server.serve()
            finally:
                stopped.set()

        async with anyio.create_task_group() as group:
            group.start_soon(serve)
            await eventually(lambda: server.started)
            try:
                async with httpx.AsyncClient(
                    transport=transport, base_url="http://kvoffload", timeout=20
                ) as http:
                    served = Served(path, http, getattr(app.state, STATE))
                    yield served
                    await served.service.sessions.end_all()
                    await served.at_rest()
            finally:
                server.should_exit = True
                # By itself, before a failure of the body cancels it.
                with anyio.CancelScope(shield=True):
                    await stopped.wait()
