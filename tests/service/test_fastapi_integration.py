"""The kit in an application of one's own: lifespan, dependency, router."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from kvoffload import DiskTier, ManagerSettings, TierLockedError
from kvoffload.integrations.fastapi import Manager, create_router, lifespan_manager
from kvoffload.service.app import Lifespan
from kvoffload.service.settings import ServiceSettings


def application(lifespan: Lifespan) -> FastAPI:
    app = FastAPI(lifespan=lifespan)
    app.include_router(create_router(), prefix="/cache")

    @app.post("/put/{name}")
    async def put(name: str, kv: Manager) -> int:
        await kv.store([name], [name.encode()])
        return await kv.lookup([name])

    return app


@asynccontextmanager
async def calling(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Run the application's lifespan, and call it without a server in between."""
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://app") as http,
    ):
        yield http


@pytest.fixture
def settings() -> ServiceSettings:
    """Return settings; made before the loop runs, as on import, for they look at files."""
    return ServiceSettings(
        hot="1MiB",
        block_bytes="64KiB",
        staging="1MiB",
        tokens=[{"token": "open", "rights": ["read"]}],
        max_batch_blocks=1,
    )


async def test_settings_of_the_service_bring_access_and_limits(settings: ServiceSettings) -> None:
    async with calling(application(lifespan_manager(settings))) as http:
        assert (await http.post("/put/a")).json() == 1
        body = {"block_hashes": ["s:a"]}
        assert (await http.post("/cache/v1/lookup", json=body)).status_code == 401
        http.headers["Authorization"] = "Bearer open"
        assert (await http.post("/cache/v1/lookup", json=body)).json() == {"hit": 1}
        body = {"block_hashes": ["s:a", "s:b"]}
        assert (await http.post("/cache/v1/lookup", json=body)).status_code == 422
        assert (await http.post("/cache/v1/clear")).status_code == 403


async def test_without_access_the_endpoints_are_for_nobody() -> None:
    """The manager is there for the application; that it is open to the world must be said."""
    async with calling(application(lifespan_manager(ManagerSettings(hot_blocks=8)))) as http:
        assert (await http.post("/put/a")).json() == 1
        answer = await http.post("/cache/v1/lookup", json={"block_hashes": []})
        assert answer.status_code == 403
        assert "access=" in answer.json()["message"]
        assert (await http.get("/cache/readyz")).json()["status"] == "ready"


async def test_without_the_lifespan_nothing_is_open() -> None:
    app = application(lifespan_manager(ManagerSettings(hot_blocks=8)))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as http:
        answer = await http.get("/cache/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "closed")
        answer = await http.post("/cache/v1/lookup", json={"block_hashes": []})
        assert (answer.status_code, answer.json()["error"]) == (503, "ClosedError")


async def test_a_second_worker_learns_what_to_do(tmp_path: Path) -> None:
    """As with `uvicorn --workers 2`: the second one can't have the same cold directory."""
    async with opened(tmp_path):
        settings = ManagerSettings(
            hot_blocks=8, cold_blocks=8, cold_path=tmp_path / "cold", block_bytes=4096
        )
        app = application(lifespan_manager(settings))
        with pytest.raises(TierLockedError) as told:
            async with app.router.lifespan_context(app):
                pass
        assert "kvoffload serve" in str(told.value)


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[DiskTier]:
    tier = DiskTier(folder / "cold", 8, 4096)
    await tier.open()
    try:
        yield tier
    finally:
        await tier.close()
