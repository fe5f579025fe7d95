"""A real server in a thread of its own, whose manager and clock a test shares."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import anyio
import uvicorn
import uvloop
from fastapi import FastAPI

from kvoffload import AsyncLRUManager
from kvoffload.service.access import AccessControl
from kvoffload.service.app import create_router, lifespan_of
from kvoffload.service.limits import Limits
from kvoffload.testing import ManualClock

T = TypeVar("T")
MakeManager: TypeAlias = Callable[[asyncio.AbstractEventLoop], AsyncLRUManager]
"""Makes a manager for the loop that it is going to be opened on."""


class SharedClock(ManualClock):
    """A manual clock that a manager on another thread's loop sleeps on.

    The test advances it; sleepers wait on `ServedClock`s, each in its own loop.
    """

    def __init__(self, start: float = 0.0) -> None:
        super().__init__(start)
        self.served: list[ServedClock] = []

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        for clock in self.served:
            clock.catch_up()


class ServedClock:
    """The same time for a manager on another loop: its sleepers are woken there."""

    def __init__(self, shared: SharedClock, loop: asyncio.AbstractEventLoop) -> None:
        self._shared = shared
        self._own = ManualClock(shared())
        self._loop = loop
        shared.served.append(self)

    def __call__(self) -> float:
        return self._shared()

    async def sleep(self, seconds: float) -> None:
        await self._own.sleep(seconds - (self._shared() - self._own()))

    def catch_up(self) -> None:
        self._loop.call_soon_threadsafe(self._catch_up)

    def _catch_up(self) -> None:
        self._own.advance(max(0.0, self._shared() - self._own()))


@dataclass
class Hosted:
    """A manager that is being served."""

    manager: AsyncLRUManager
    app: FastAPI
    leave: Callable[[], Awaitable[None]]


class Host:
    """Serves one manager at a time, on a TCP port and on a Unix socket."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "service.sock"
        self.loop: asyncio.AbstractEventLoop
        # One for all managers: making its routes takes longer than most tests.
        self.app = FastAPI()
        self.app.include_router(create_router())
        self._sockets = [socket.socket(), socket.socket(socket.AF_UNIX)]
        self._sockets[0].bind(("127.0.0.1", 0))
        self._sockets[1].bind(str(self.path))
        self.port: int = self._sockets[0].getsockname()[1]
        config = uvicorn.Config(
            self.app, interface="asgi3", lifespan="off", log_config=None, ws="none"
        )
        self._server = uvicorn.Server(config)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)

    @property
    def tcp(self) -> str:
        """Its URL over TCP."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def unix(self) -> str:
        """Its URL over a Unix socket."""
        return f"unix:{self.path}"

    def start(self) -> None:
        """Start to serve."""
        self._thread.start()
        assert self._ready.wait(30)

    def stop(self) -> None:
        """Stop to serve."""
        self._server.should_exit = True
        self._thread.join(30)
        for each in self._sockets:
            each.close()

    async def on_loop(self, work: Awaitable[T]) -> T:
        """Await something on the server's loop."""

        async def run() -> T:
            return await work

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run(), self.loop))

    async def host(
        self,
        make_manager: MakeManager,
        access: AccessControl | None = None,
        limits: Limits | None = None,
    ) -> Hosted:
        """Open a manager on the server's loop and serve it, in the place of the one before."""
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[Hosted] = loop.create_future()
        left: asyncio.Future[None] = loop.create_future()
        asyncio.run_coroutine_threadsafe(
            self._host(make_manager, access, limits, loop, opened, left), self.loop
        )
        return await opened

    async def _host(
        self,
        make_manager: MakeManager,
        access: AccessControl | None,
        limits: Limits | None,
        loop: asyncio.AbstractEventLoop,
        opened: asyncio.Future[Hosted],
        left: asyncio.Future[None],
    ) -> None:
        made: list[AsyncLRUManager] = []

        def make() -> AsyncLRUManager:
            made.append(make_manager(self.loop))
            return made[0]

        def tell(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
            def settle() -> None:
                if not future.done():
                    if error is None:
                        future.set_result(result)
                    else:
                        future.set_exception(error)

            loop.call_soon_threadsafe(settle)

        leaving = anyio.Event()

        async def leave() -> None:
            self.loop.call_soon_threadsafe(leaving.set)
            await left

        try:
            access = access or AccessControl(unprotected=True)
            async with lifespan_of(make, access, limits or Limits())(self.app):
                tell(opened, Hosted(made[0], self.app, leave), None)
                await leaving.wait()
        except Exception as exc:  # noqa: BLE001  # the test gets it
            tell(opened, None, exc)
            tell(left, None, exc)
        else:
            tell(left, None, None)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run_server())

    async def _run_server(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._ready.set()
        await self._server.serve(self._sockets)


@contextmanager
def hosting(directory: Path) -> Iterator[Host]:
    """Run a host for as long as the body takes."""
    host = Host(directory)
    host.start()
    try:
        yield host
    finally:
        host.stop()
