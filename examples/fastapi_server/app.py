"""A block cache as an HTTP service: `AsyncLRUManager` in the lifespan of a FastAPI application.

Run it with `python -m uvicorn examples.fastapi_server.app:app`; the README beside it says more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Protocol, TypedDict

from fastapi import Depends, FastAPI, Header, Path, Request, Response
from starlette.exceptions import HTTPException

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    Lease,
    LRUManagerFactory,
    ManagerStats,
    OffloadingManager,
    StoreResult,
)

from .models import (
    EXAMPLE,
    Chain,
    Evicted,
    Eviction,
    Found,
    HashHex,
    Health,
    Location,
    Queued,
    Stored,
)
from .problems import add_handlers, problems, rejection
from .settings import ServiceSettings
from .transfer import OCTETS, BodyGuard, LeasedResponse, parse_batch, read_body


class State(TypedDict):
    """What the lifespan hands to every request, as `request.state`."""

    kv: AsyncLRUManager
    settings: ServiceSettings


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[State]:
    """Own the manager: open it before the first request, flush and close it after the last one.

    It is made in here and not at import, for it belongs to the event loop that it is opened on,
    and its cold directory to one process.
    """
    settings = ServiceSettings()
    async with LRUManagerFactory.create_async(settings.for_manager()) as manager:
        yield {"kv": manager, "settings": settings}


class Tenant(OffloadingManager, Protocol):
    """The manager as seen from inside one namespace."""

    def hint_prefetch(self, block_hashes: Sequence[BlockHash]) -> int:
        """Queue blocks to be brought up; see `AsyncLRUManager.hint_prefetch`."""


# Dependencies and handlers are coroutines: FastAPI runs others in threads, where managers refuse.


async def settings_of(request: Request) -> ServiceSettings:
    """Return the settings that the lifespan made."""
    settings: ServiceSettings = request.state.settings
    return settings


async def tenant_of(
    request: Request,
    x_namespace: Annotated[
        str,
        Header(
            description="Tenant, model, dtype and layout that the blocks belong to; those of other "
            "namespaces don't exist here. To be set by the gateway that knows the caller.",
            pattern=r"^[A-Za-z0-9._/-]{0,100}$",
            examples=["acme/llama-3-8b/bf16"],
        ),
    ] = "",
) -> Tenant:
    """Return the caller's part of the manager.

    Without the header that is a namespace too, the one without a name. It is never the manager
    itself, whose `clear` and `evict` reach everybody's blocks.
    """
    manager: AsyncLRUManager = request.state.kv
    return manager.namespace(x_namespace)


KV = Annotated[Tenant, Depends(tenant_of)]
Settings = Annotated[ServiceSettings, Depends(settings_of)]
HashPath = Annotated[HashHex, Path(description="Hash of the block", examples=[EXAMPLE])]

app = FastAPI(
    title="KV-cache blocks",
    summary="Hot and warm in memory, cold on disk.",
    version="1",
    lifespan=lifespan,
    responses=problems(422, 503),
)
app.add_middleware(BodyGuard)
add_handlers(app)

BYTES: dict[str, Any] = {OCTETS: {"schema": {"type": "string", "format": "binary"}}}
UPLOAD: dict[str, Any] = {
    "status_code": 201,
    "responses": {
        200: {"model": Stored, "description": "All was there"},
        **problems(408, 413, 507),
    },
    "openapi_extra": {"requestBody": {"required": True, "content": BYTES}},
}


@app.put("/blocks/{hash_hex}", response_model=Stored, **UPLOAD)
async def put_block(hash_hex: HashPath, request: Request, kv: KV) -> Response:
    """Store one block."""
    payload = await read_body(request)
    if not payload:
        # What a hash stands for is never written again, so a client's slip would stay.
        raise HTTPException(422, "the body is empty")
    return to_response(await kv.store([hash_hex], [payload]))


@app.post("/blocks", response_model=Stored, **UPLOAD)
async def post_blocks(request: Request, kv: KV, settings: Settings) -> Response:
    """Store blocks of one prompt in one call.

    The body is a line of JSON, `{"blocks": [{"hash": "9f...", "size": 65536}, ...]}`, and after it
    the payloads, one right after the other. If there is no room for all, the first ones are kept.

    Better than one PUT after the other: the blocks count as used together, so that later the tail
    of the prompt leaves before its head. Name the blocks of the prompt that come before these in
    `prefix` to make it a use of those too.
    """
    body = await read_body(request)
    manifest, payloads = parse_batch(body, settings.block_bytes)
    hashes: list[BlockHash] = [block.hash for block in manifest.blocks]
    result = await kv.store(hashes, payloads)
    if manifest.prefix:
        await kv.touch([*manifest.prefix, *hashes])
    return to_response(result)


def to_response(result: StoreResult) -> Response:
    """Return the answer to an upload."""
    if result.rejected:
        return rejection(result.rejected)
    stored = Stored.model_validate(result, from_attributes=True)
    return Response(
        stored.model_dump_json(), 201 if result.stored else 200, media_type="application/json"
    )


@app.get(
    "/blocks/{hash_hex}",
    response_class=Response,
    responses={200: {"content": BYTES}, **problems(404, 504, 507)},
)
async def get_block(hash_hex: HashPath, kv: KV, settings: Settings) -> Response:
    """Load one block."""
    lease = kv.load([hash_hex], timeout_s=settings.load_timeout_s)
    return LeasedResponse(lease, timeout_s=settings.transfer_timeout_s)


@app.post(
    "/load",
    response_class=Response,
    responses={200: {"content": BYTES}, **problems(408, 413, 504, 507)},
)
async def load(chain: Chain, kv: KV, settings: Settings) -> Response:
    """Load the prefix hit of a prompt, in the form that POST /blocks takes."""
    lease = leased_prefix(kv, chain.hashes, settings.load_timeout_s)
    return LeasedResponse(lease, timeout_s=settings.transfer_timeout_s, with_manifest=True)


@asynccontextmanager
async def leased_prefix(
    kv: Tenant, hashes: Sequence[BlockHash], timeout_s: float
) -> AsyncIterator[Lease]:
    """Lease as much of a prompt as is there."""
    async with kv.request(hashes) as request, request.load(timeout_s=timeout_s) as lease:
        yield lease


@app.post("/lookup", responses=problems(408, 413))
async def lookup(chain: Chain, kv: KV) -> Found:
    """Tell the prefix hit of a prompt, and where its blocks are. Not a use of them."""
    hit = await kv.lookup(chain.hashes)
    places = zip(chain.hashes, kv.locate(chain.hashes), strict=True)
    blocks = [Location(hash=hash_, state=at.state, tier=at.tier) for hash_, at in places]
    return Found(hit=hit, blocks=blocks)


@app.post("/prefetch", status_code=202, responses=problems(408, 413))
async def prefetch(chain: Chain, kv: KV) -> Queued:
    """Advise that blocks are needed soon; returns at once. A full queue drops hints."""
    return Queued(queued=kv.hint_prefetch(chain.hashes))


@app.post("/evict", responses=problems(408, 413))
async def evict(eviction: Eviction, kv: KV) -> Evicted:
    """Remove blocks from every tier, for good."""
    left = await kv.evict(eviction.hashes, num_blocks=eviction.num_blocks)
    return Evicted.model_validate({"evicted": left})


@app.delete("/blocks", status_code=204, response_class=Response)
async def clear(kv: KV) -> Response:
    """Remove all blocks of the namespace, for good."""
    await kv.clear()
    return Response(status_code=204)


@app.get("/stats")
async def stats(kv: KV) -> ManagerStats:
    """Return the counters of the namespace.

    For a tier these are the blocks and bytes that it has of the namespace; what else is counted of
    a tier, reads for instance, is counted for all together: see /healthz.
    """
    return kv.get_stats()


@app.get("/healthz")
async def healthz(request: Request) -> Health:
    """Say that the service serves, and how full it is; for probes and operators."""
    manager: AsyncLRUManager = request.state.kv
    await manager.lookup([])  # unlike get_stats, it refuses once the manager is closed
    return Health.model_validate(manager.get_stats(), from_attributes=True)
