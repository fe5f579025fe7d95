"""A service on an engine that others share: what it shows of it, and that it serves on without."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tests.service.serving import BLOCK_BYTES, Served, serving

from kvoffload import AsyncLRUManager, LRUManagerFactory, ManagerSettings
from kvoffload.cli.overview import parse_overview
from kvoffload.testing import eventually, payload_for

from .servers import Server

SECRET = "Correct-Horse.Battery~Staple"
HASHES = ["a", "b", "c", "d"]


def manager_at(url: str, **settings: Any) -> AsyncLRUManager:
    return LRUManagerFactory.create_async(
        ManagerSettings(
            hot_blocks=8, block_bytes=BLOCK_BYTES, policy="lru", remote_url=url, **settings
        )
    )


async def shown(served: Served) -> dict[str, Any]:
    """Return what the service says of the engine, wherever it does."""
    ready = await served.http.get("/readyz")
    stats = (await served.http.get("/v1/stats")).json()
    overview = (await served.http.get("/v1/overview")).json()
    assert parse_overview(json.dumps(overview)).stats.tiers["remote"].medium.value == "remote"
    metrics = {
        name: float(value)
        for line in (await served.http.get("/metrics")).text.splitlines()
        if 'tier="remote"' in line
        for name, value in [line.rsplit(" ", 1)]
    }
    (state,) = [
        name.split('state="')[1].rstrip('"}')
        for name, value in metrics.items()
        if name.startswith("kvoffload_tier_state") and value
    ]
    tier = overview["stats"]["tiers"]["remote"]
    assert metrics['kvoffload_tier_backlog_bytes{tier="remote"}'] == tier["backlog_bytes"]
    assert metrics['kvoffload_tier_dropped_blocks_total{tier="remote"}'] == tier["dropped_blocks"]
    states = {state, tier["state"], stats["tiers"]["remote"]["state"]}
    states.add(ready.json()["tiers"]["remote"])
    assert len(states) == 1, states
    return {
        "ready": (ready.status_code, ready.json()["status"]),
        "state": state,
        **{key: tier[key] for key in ("backlog_bytes", "dropped_blocks", "blocks_written")},
    }


async def test_the_engine_dies_and_comes_back(own_server: Server) -> None:
    """It stays ready meanwhile, answers from what it has, and says what it can't send."""
    here = payload_for("a", BLOCK_BYTES)
    async with (
        manager_at(own_server.url, remote_ttl_s=0.0) as there,
        serving(make_manager=lambda: manager_at(own_server.url, remote_ttl_s=0.0)) as served,
    ):
        await there.store(["there"], [here])
        await there.flush()
        assert await served.hit(["there"]) == 1
        await served.store(HASHES[:2], [here] * 2)
        assert (await served.post("flush")).status_code == 200
        assert await shown(served) == {
            "ready": (200, "ready"),
            "state": "serving",
            "backlog_bytes": 0,
            "dropped_blocks": 0,
            "blocks_written": 2,
        }

        own_server.kill()
        assert await served.hit([*HASHES[:2], "there"]) == 2
        await served.store(HASHES[2:], [here] * 2)
        assert await served.hit(HASHES) == 4
        assert await shown(served) == {
            "ready": (200, "degraded"),
            "state": "unavailable",
            "backlog_bytes": 2 * BLOCK_BYTES,
            "dropped_blocks": 0,
            "blocks_written": 2,
        }
        await served.post("evict", block_hashes=["s:c"])

        own_server.start()
        await eventually(lambda: served.manager.get_stats().tiers["remote"].blocks_written == 3)
        assert await shown(served) == {
            "ready": (200, "ready"),
            "state": "serving",
            "backlog_bytes": 0,
            "dropped_blocks": 1,
            "blocks_written": 3,
        }


async def test_an_engine_that_is_full_is_read_from(tmp_path: Path) -> None:
    server = Server(tmp_path / "server", "--maxmemory", "1", "--maxmemory-policy", "noeviction")
    with server:
        async with serving(make_manager=lambda: manager_at(server.url)) as served:
            await served.store(HASHES, [payload_for("a", BLOCK_BYTES)] * 4)
            await served.post("flush")
            said = await shown(served)
            assert (said["ready"], said["state"]) == ((200, "degraded"), "read_only")
            assert said["dropped_blocks"] == 4


async def test_it_starts_without_the_engine_and_says_no_password(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with Server(tmp_path / "server", "--requirepass", "another") as server:
        url = server.url.replace("//", f"//user:{SECRET}@")
        async with serving(make_manager=lambda: manager_at(url)) as served:
            assert (await shown(served))["ready"] == (200, "degraded")
            answers = [
                await served.store(["a"], [payload_for("a", BLOCK_BYTES)]),
                await served.post("lookup", block_hashes=["s:a", "s:b"]),
                await served.post("evict", block_hashes=["s:a"]),
                await served.post("clear"),
                await served.post("flush"),
            ]
            paths = ("/v1/stats", "/v1/overview", "/metrics", "/readyz", "/openapi.json")
            answers += [await served.http.get(path) for path in paths]
            for answer in answers:
                assert SECRET not in answer.text + repr(answer.headers)
            assert [answer.status_code for answer in answers[:3]] == [200, 200, 503]
            assert answers[2].json()["tier"] == "remote"
    assert "WRONGPASS" in caplog.text
    assert SECRET not in caplog.text
