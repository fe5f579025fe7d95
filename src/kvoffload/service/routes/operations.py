"""Endpoints for those who run the service: counters, events, health."""

from __future__ import annotations

import time
from heapq import nlargest
from typing import Annotated, Any

from anyio.lowlevel import checkpoint
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from ...events import Subscription
from ...metrics import ManagerStats
from ...shares import NamespaceShare
from ...types import TierState
from .. import VERSION
from ..dependencies import Overseen, Reader
from ..exposition import Exposition
from ..guard import StreamRoute, WatchingRoute
from ..observing import OPERATIONS
from ..problems import RefusedError, documented, streamed
from ..prometheus import render
from ..schemas import Alive, Overview, Readiness, Stats
from ..state import Service, service_of
from ..streams import StreamResponse, server_sent, stats_to_json

NAMESPACES_A_TURN = 64
"""How many of them are looked at before others may run."""
MAX_NAMESPACES = 200
"""How many, those with the most bytes, are shown."""
NO_SHARE = NamespaceShare()

router = APIRouter(route_class=WatchingRoute, tags=["operations"])
streams = APIRouter(route_class=StreamRoute, tags=["operations"])
metrics = APIRouter(route_class=WatchingRoute, tags=["operations"])
health = APIRouter(tags=["health"])


@router.get("/stats", responses=documented(), response_model=Stats)
async def stats(caller: Reader) -> Response:
    """Return the counters of a namespace."""
    return JSONResponse(stats_to_json(caller.view.get_stats()))


@router.get("/overview", responses=documented(), response_model=Overview)
async def overview(service: Overseen) -> Response:
    """Return the whole service at one moment."""
    return JSONResponse(await _overview(service))


@streams.get(
    "/events",
    response_class=Response,
    responses=streamed("text/event-stream", "Server-sent events") | documented(),
)
async def events(
    caller: Reader,
    everywhere: Annotated[
        bool, Query(alias="all", description="Of all namespaces, for tokens that see them all")
    ] = False,
) -> Response:
    """Tell what happens to the blocks of a namespace, from now on."""
    service = caller.service
    if everywhere and not caller.principal.sees_all:
        raise RefusedError(
            403, "Forbidden", "this is for tokens with the right 'admin' in all namespaces"
        )
    subscription = service.manager.events() if everywhere else caller.view.events()
    assert isinstance(subscription, Subscription)
    service.begin_stream()
    return StreamResponse(
        server_sent(subscription, service.note_missed),
        "text/event-stream",
        draining=service.draining,
        on_end=service.end_stream,
    )


@metrics.get(
    "/metrics",
    response_class=Response,
    responses=streamed("text/plain", "Metrics, as Prometheus or OpenMetrics text") | documented(),
)
async def scrape(service: Overseen, request: Request) -> Response:
    """Return the metrics of the whole service."""
    exposition = Exposition.accepted(request.headers.get("accept"))
    body = await render(service.collector, exposition)
    return Response(body, headers={"content-type": exposition.content_type})


@health.get("/livez")
async def livez() -> Alive:
    """Say that the process answers."""
    return Alive(status="alive")


@health.get("/readyz", responses={503: {"model": Readiness, "description": "Not ready"}})
async def readyz(request: Request) -> Response:
    """Say whether the service takes work, and what each tier can do."""
    try:
        service = service_of(request)
    except RefusedError:
        return JSONResponse({"status": "closed", "tiers": {}}, 503)
    tiers = service.manager.tier_states()
    status = "ready"
    if service.draining.is_set():
        status = "draining"
    elif {TierState.READ_ONLY, TierState.UNAVAILABLE} & {*tiers.values()}:
        status = "degraded"  # it serves what it has
    body = {"status": status, "tiers": {name: state.value for name, state in tiers.items()}}
    return JSONResponse(body, 503 if status == "draining" else 200)


async def _overview(service: Service) -> dict[str, Any]:
    manager, lag = service.manager, service.loop_lag.snapshot()
    names = manager.namespaces()
    found: list[tuple[str, ManagerStats]] = []
    for number, name in enumerate(names):
        found.append((name, manager.namespace(name).get_stats()))
        if number % NAMESPACES_A_TURN == NAMESPACES_A_TURN - 1:
            await checkpoint()
    largest = nlargest(MAX_NAMESPACES, found, key=lambda each: _bytes_of(each[1]))
    return {
        "version": VERSION,
        "time": time.time(),
        "uptime_s": time.monotonic() - service.started_at,
        "draining": service.draining.is_set(),
        "block_bytes": service.block_bytes,
        "stats": stats_to_json(manager.get_stats()),
        "namespaces": {
            name: _summary(each, manager.shares.get(name, NO_SHARE)) for name, each in largest
        },
        "namespaces_total": len(names),
        "latencies": {name: service.latencies.snapshot(name).summary() for name in OPERATIONS},
        "loop_lag": {
            "p50_s": lag.quantile(0.5),
            "p99_s": lag.quantile(0.99),
            "max_s": service.loop_lag.recent_max_s,
        },
        "sessions": len(service.sessions),
        "requests_total": service.calls_total,
    }


def _bytes_of(stats: ManagerStats) -> int:
    return sum(tier.bytes for tier in stats.tiers.values())


def _summary(stats: ManagerStats, share: NamespaceShare) -> dict[str, float | None]:
    return {
        "hits": stats.hits,
        "misses": stats.misses,
        "stored": stats.stored,
        "rejected": stats.rejected,
        "evictions": stats.evictions,
        "blocks": sum(tier.blocks for tier in stats.tiers.values()),
        "bytes": _bytes_of(stats),
        "max_bytes": share.max_bytes,
        "reserved_bytes": share.reserved_bytes,
    }
