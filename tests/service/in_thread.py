"""A service in a thread of its own, for tests that block: browsers, and command lines."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import uvicorn

from kvoffload import AsyncLRUManager, DiskTier, MemoryTier
from kvoffload.service.access import AccessControl
from kvoffload.service.app import begin_drain, create_app
from kvoffload.service.state import STATE, Service
from kvoffload.workload import chat_workload, replay

BLOCK_BYTES = 4096
DEADLINE_S = 30.0
_T = TypeVar("_T")


def until(condition: Callable[[], _T | None]) -> _T:
    """Return the first true answer; fail when there is none in good time."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        time.sleep(0.02)
    raise AssertionError("it did not come about in time")


class ServiceInThread:
    """A service on a port of its own, with a load that can be started and stopped.

    Args:
        cold: Directory of the cold tier.
        access: Who may call; everybody unless told.
        token: What its own calls are made with.
        port: Where it listens; a free one unless told.
        path: Where its Unix socket is; then it has no port.
    """

    def __init__(
        self,
        cold: str,
        *,
        access: AccessControl | None = None,
        token: str | None = None,
        port: int = 0,
        path: str | None = None,
    ) -> None:
        self._cold = cold
        self._access = access or AccessControl(unprotected=True)
        self._path = path
        if path is None:
            self._socket = socket.create_server(("127.0.0.1", port))
            self.port: int = self._socket.getsockname()[1]
            self.url = f"http://127.0.0.1:{self.port}"
        else:
            self._socket = socket.create_server(path, family=socket.AF_UNIX)
            self.url = f"unix:{path}"
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._thread = threading.Thread(target=self._run)
        self._load: Future[None] | None = None
        self._is_loading = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        until(lambda: self._is_started() or not self._thread.is_alive())
        assert self._thread.is_alive()
        base = self.url if self._path is None else "http://kvoffload"
        transport = None if self._path is None else httpx.HTTPTransport(uds=self._path)
        self._http = httpx.Client(
            base_url=base, headers=self._headers, timeout=20, transport=transport
        )
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._http.close()
            self.stop_load()
        finally:
            self.drain()  # streams would keep the server from ending
            self._server.should_exit = True
            self._thread.join(DEADLINE_S)
            self._socket.close()
        assert not self._thread.is_alive()

    @property
    def service(self) -> Service:
        service = getattr(self.app.state, STATE)
        assert isinstance(service, Service)
        return service

    def call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the service's event loop."""
        return self._start(coroutine).result(DEADLINE_S)

    def overview(self) -> dict[str, Any]:
        """Return what the service says of itself."""
        answer = self._http.get("/v1/overview")
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert isinstance(body, dict)
        return body

    def store(self, block_hashes: Sequence[int], namespace: str = "") -> None:
        """Store some blocks."""
        self.call(self._store(block_hashes, namespace))

    def drain(self) -> None:
        """Let the service take no more calls."""
        self.call(self._drain())

    def start_load(self, namespaces: Sequence[str]) -> None:
        """Let chat traffic run in these namespaces until it is stopped."""
        self._is_loading.set()
        self._load = self._start(self._replay(namespaces))

    def stop_load(self) -> None:
        """Stop it, and wait until no counter moves any more."""
        self._is_loading.clear()
        if self._load is not None:
            load, self._load = self._load, None
            load.result(DEADLINE_S)
            until(self._is_at_rest)

    # Inside

    def _run(self) -> None:
        # Here, for the thread of the test may be in an event loop of playwright's.
        self.app = create_app(self._make_manager, access=self._access)
        self._server = uvicorn.Server(
            uvicorn.Config(self.app, log_config=None, ws="none", timeout_graceful_shutdown=1)
        )
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            runner.run(self._server.serve(sockets=[self._socket]))

    def _is_started(self) -> bool:
        server = getattr(self, "_server", None)
        return server is not None and server.started

    def _make_manager(self) -> AsyncLRUManager:
        return AsyncLRUManager(
            hot=MemoryTier(128, BLOCK_BYTES, name="hot"),
            warm=MemoryTier(256, BLOCK_BYTES, name="warm"),
            cold=DiskTier(self._cold, 1024, BLOCK_BYTES),
        )

    def _start(self, coroutine: Coroutine[Any, Any, _T]) -> Future[_T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _store(self, block_hashes: Sequence[int], namespace: str) -> None:
        view = self.service.manager.namespace(namespace)
        await view.store(block_hashes, [bytes(BLOCK_BYTES)] * len(block_hashes))

    async def _drain(self) -> None:
        begin_drain(self.app)

    async def _replay(self, namespaces: Sequence[str]) -> None:
        manager, seed = self.service.manager, 0
        while self._is_loading.is_set():
            for name in namespaces:
                view = manager.namespace(name)
                work = chat_workload(20, seed=seed)
                await replay(view, work, block_bytes=BLOCK_BYTES, concurrency=2)
            seed += 1

    def _is_at_rest(self) -> bool:
        """Tell whether nothing moves: blocks that move down do so after the load has ended."""
        first = self.call(self._stats())
        time.sleep(0.1)
        second = self.call(self._stats())
        busy = any(tier.queue_depth for tier in second.tiers.values())
        return first == second and not (second.pending or second.pinned or busy)

    async def _stats(self) -> Any:
        return self.service.manager.get_stats()
