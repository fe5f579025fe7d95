"""`serve`: the service in a process of its own, from its first log line to its last."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import queue
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from logging.handlers import QueueHandler, QueueListener
from typing import TYPE_CHECKING

import anyio
import uvicorn
from fastapi import FastAPI

from ..errors import ConfigError
from ..managers.lru_manager_factory import LRUManagerFactory
from ..sizes import human_bytes
from .access import AccessControl
from .app import begin_drain, create_app
from .listening import Listener, listen
from .settings import ServiceSettings
from .state import STATE, Service
from .stopping import StopSignals

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

KEEP_ALIVE_S = 65
"""Seconds that an idle connection is kept: longer than clients do, so that none is closed just when
a client uses it again."""

YOUNG_OBJECTS = 10_000
"""New objects that the garbage collector looks through at a time: its own 700 are there again with
every other request, and each look holds the event loop for a millisecond."""

log = logging.getLogger("kvoffload")
_uvicorn_log = logging.getLogger("uvicorn")


def serve(settings: ServiceSettings) -> int:
    """Serve until a signal says to stop; to be called in the main thread.

    The first SIGTERM or SIGINT lets calls under way end, for `drain_timeout_s` at most, then
    flushes and closes the manager, for twice `close_timeout_s` at most. A second one ends the
    process at once.

    Args:
        settings: What to serve, and where.

    Returns:
        Exit status: 0, or 1 if the manager could not be closed in good order.

    Raises:
        ConfigError: A setting turns out wrong: the port is in use, for example.
        TierLockedError: Another process has the cold directory.
        TierError: The cold tier can't be opened.
    """
    access = settings.access()
    made: list[Listener] = []

    def close() -> None:
        for listener in made:
            listener.close()

    with _logging(settings.log_level), StopSignals(on_force=close) as signals:
        try:
            made.append(listen(host=settings.host, port=settings.port, uds=settings.uds))
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                return runner.run(_Serving(settings, access, made[0], signals).run())
        except MemoryError:
            raise ConfigError("there is not enough memory for the hot and warm tiers") from None
        finally:
            close()


class _Serving:
    """One run of the service."""

    def __init__(
        self,
        settings: ServiceSettings,
        access: AccessControl,
        listener: Listener,
        signals: StopSignals,
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._signals = signals
        self._app = create_app(
            partial(LRUManagerFactory.create_async, settings.manager_settings()),
            access=access,
            limits=settings.limits(),
            dashboard=settings.dashboard,
        )
        self._lifespan = _QuietLifespan(self._app)
        self._ready = anyio.Event()
        self._deadline: float | None = None
        config = uvicorn.Config(
            self._lifespan,
            http="httptools",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=2048,
        )
        self._server = _Server(config, self._on_ready, self._may_stop)

    async def run(self) -> int:
        """Serve; return the exit status."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._stop_when_told)
            with suppress(SystemExit):  # uvicorn's way to say that the application did not start
                await self._server.serve(sockets=self._listener.sockets)
            group.cancel_scope.cancel()
        failure = self._lifespan.failure
        if failure is not None and not self._ready.is_set():
            raise failure
        if failure is not None:
            log.error("the cache was not closed in good order: %s", failure, exc_info=failure)
            return 1
        log.info("stopped")
        return 0

    def _on_ready(self) -> None:
        # What is there by now is not looked through again and again by full collections; nor are
        # the objects of calls under way each time that there are a few hundred more of them.
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
        if self._settings.log_level != "debug":
            _uvicorn_log.setLevel("WARNING")
        log.info("listening on %s; %s", self._listener.url, _describe(self._settings))
        self._ready.set()

    async def _stop_when_told(self) -> None:
        await self._signals.wait()
        await self._ready.wait()
        limit_s = self._settings.drain_timeout_s
        log.info("stopping: calls under way have up to %g s to end", limit_s)
        begin_drain(self._app)
        self._deadline = anyio.current_time() + limit_s

    def _may_stop(self) -> bool:
        """Tell whether it was told to stop, and no call is under way or the time for them is over.

        Until then the sockets stay open, so that /readyz can say that the service is draining.
        """
        if self._deadline is None:
            return False
        left_s = self._deadline - anyio.current_time()
        service = getattr(self._app.state, STATE, None)
        if left_s > 0 and isinstance(service, Service) and service.calls:
            return False
        # For streams to end, and answers to be taken.
        self._server.config.timeout_graceful_shutdown = max(1, math.ceil(left_s))
        return True


class _Server(uvicorn.Server):
    """Uvicorn, but it leaves signals to us.

    Args:
        config: Its settings.
        on_ready: Called when it has begun to serve.
        may_stop: Called again and again; it stops once that is true.
    """

    def __init__(
        self, config: uvicorn.Config, on_ready: Callable[[], None], may_stop: Callable[[], bool]
    ) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._may_stop = may_stop

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    async def main_loop(self) -> None:
        self._on_ready()
        await super().main_loop()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._may_stop()


class _QuietLifespan:
    """Keeps what the start or the end of an application failed with; uvicorn logs tracebacks."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self.failure: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def quiet_send(message: Message) -> None:
            await send({**message, "message": ""} if "message" in message else message)

        try:
            await self._app(scope, receive, quiet_send)
        except Exception as exc:  # noqa: BLE001  # whoever runs us raises it
            # From inside the task groups of the service, where only one thing went wrong.
            while isinstance(exc, ExceptionGroup) and len(exc.exceptions) == 1:
                exc = exc.exceptions[0]
            self.failure = exc


def _describe(settings: ServiceSettings) -> str:
    """Return tiers, sizes and protection in one line."""
    one = settings.block_bytes
    parts = []
    for name in ("hot", "warm", "cold"):
        if blocks := getattr(settings, name) // one:
            where = f" in {settings.cold_path}" if name == "cold" else ""
            parts.append(f"{name} {human_bytes(blocks * one)}{where}")
    if settings.remote_url is not None:
        scheme = settings.remote_url.get_secret_value().partition("://")[0]  # nothing else of it
        parts.append(f"remote on {scheme}://")
    protection = "unprotected"
    if count := len(settings.tokens):
        protection = f"protected by {count} token{'s' if count > 1 else ''}"
    return f"{', '.join(parts)}, in blocks of {human_bytes(one)}; {protection}"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    from uvloop import new_event_loop

    return new_event_loop


@contextmanager
def _logging(level: str) -> Iterator[None]:
    """Log to standard error, by a thread: whoever reads it slowly must not hold the loop up."""
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    listener = QueueListener(lines, handler)
    root = logging.getLogger()
    queued = QueueHandler(lines)
    root.addHandler(queued)
    log.setLevel(level.upper())
    # Uvicorn's own steps are for who looks for a defect, and that it does not start is told by us.
    _uvicorn_log.setLevel("DEBUG" if level == "debug" else "CRITICAL")
    listener.start()
    try:
        yield
    finally:
        root.removeHandler(queued)
        listener.stop()
