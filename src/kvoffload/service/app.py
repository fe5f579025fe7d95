"""The router of all endpoints, and an application that is nothing but the service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import APIRouter, FastAPI, Response

from ..managers.async_lru_manager import AsyncLRUManager
from . import VERSION
from .access import AccessControl
from .dashboard import load_page
from .limits import Limits
from .routes import blocks, leases, operations, sessions
from .state import STATE, Service, running

PAGE = load_page()
"""Read here, for an application may be made in an event loop."""

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_router() -> APIRouter:
    """Return the router of all endpoints, for an application of your own.

    The application's lifespan must be `lifespan_of`'s, or run it.
    """
    router = APIRouter()
    for each in (
        blocks.router,
        sessions.router,
        sessions.streams,
        leases.router,
        operations.router,
        operations.streams,
    ):
        router.include_router(each, prefix="/v1")
    router.include_router(operations.metrics)
    router.include_router(operations.health)
    return router


def lifespan_of(
    make_manager: Callable[[], AsyncLRUManager], access: AccessControl | None, limits: Limits
) -> Lifespan:
    """Return a lifespan that opens a manager, serves it, and flushes and closes it at the end.

    The manager is made in there, for it belongs to the event loop that it is opened on.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(make_manager, access, limits) as service:
            setattr(app.state, STATE, service)
            try:
                yield
            finally:
                delattr(app.state, STATE)

    return lifespan


def create_app(
    make_manager: Callable[[], AsyncLRUManager],
    *,
    access: AccessControl,
    limits: Limits | None = None,
    dashboard: bool = True,
) -> FastAPI:
    """Return an application that is nothing but the service.

    Args:
        make_manager: Makes the manager; called when the application starts.
        access: Who may call.
        limits: How much is taken on.
        dashboard: Whether `/` shows the dashboard.
    """
    app = FastAPI(
        title="kvoffload",
        version=VERSION,
        description="Keeps the KV-cache blocks of language models in memory and on disk.",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan_of(make_manager, access, limits or Limits()),
    )
    app.include_router(create_router())
    if dashboard:

        @app.get("/", include_in_schema=False)
        async def show_dashboard() -> Response:
            return Response(PAGE.html, headers=PAGE.headers)

    return app


def begin_drain(app: FastAPI) -> None:
    """Let the service take no more calls, and end its streams; what is under way goes on."""
    service = getattr(app.state, STATE, None)
    if isinstance(service, Service):
        service.draining.set()
