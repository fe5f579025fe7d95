"""Endpoints on blocks, each complete in itself."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from ...types import StoreResult
from ..batches import BatchReader, BatchResponse, check_as_many
from ..dependencies import Admin, Reader, Writer
from ..guard import GuardedRoute
from ..problems import documented
from ..schemas import (
    Cancelled,
    Chain,
    Evicted,
    Eviction,
    Flushed,
    Hit,
    LoadChain,
    Location,
    Locations,
    Queued,
    Stored,
)
from ..wire import BATCH, hash_to_text, hashes_to_text

router = APIRouter(route_class=GuardedRoute, tags=["blocks"])

BINARY = {"schema": {"type": "string", "format": "binary"}}
BATCH_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {BATCH: BINARY}}}
BATCH_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "The blocks, as a batch", "content": {BATCH: BINARY}}
}


@router.post("/lookup", responses=documented())
async def lookup(caller: Reader, body: Chain, response: Response) -> Hit:
    """Count the leading blocks that are ready."""
    hashes = caller.hashes(body.block_hashes)
    hit = await caller.view.lookup(hashes)
    caller.tell(response, hashes)
    return Hit(hit=hit)


@router.post("/locate", responses=documented())
async def locate(caller: Reader, body: Chain, response: Response) -> Locations:
    """Say where each block is."""
    hashes = caller.hashes(body.block_hashes)
    found = caller.view.locate(hashes)
    caller.tell(response, hashes)
    return Locations(blocks=[Location(state=at.state.value, tier=at.tier) for at in found])


@router.post("/touch", status_code=204, responses=documented())
async def touch(caller: Reader, body: Chain, response: Response) -> None:
    """Count one use of a chain."""
    hashes = caller.hashes(body.block_hashes)
    await caller.view.touch(hashes)
    caller.tell(response, hashes)


@router.post("/load", response_class=Response, responses=BATCH_ANSWER | documented(507))
async def load(caller: Reader, body: LoadChain) -> Response:
    """Send the payloads of blocks; one use of the chain."""
    hashes = caller.hashes(body.block_hashes)
    return BatchResponse(
        caller.view.load(hashes, timeout_s=body.timeout_s),
        hashes,
        timeout_s=caller.service.limits.body_timeout_s,
        describe=lambda: caller.told(hashes),
    )


@router.post("/store", openapi_extra=BATCH_BODY, responses=documented(415, 507))
async def store(caller: Writer, request: Request, response: Response) -> Stored:
    """Store the payloads of a chain, head first: all of a body that arrives whole, or nothing."""
    batch = BatchReader(request, caller.service.limits, caller.service.block_bytes)
    header = await batch.header()
    check_as_many(header)
    result = await caller.view.store_from(header.block_hashes, header.sizes, batch)
    caller.tell(response, header.block_hashes)
    return as_stored(result)


@router.post("/evict", responses=documented())
async def evict(caller: Writer, body: Eviction, response: Response) -> Evicted:
    """Remove these blocks, or so many of the coldest, for good."""
    hashes = None if body.block_hashes is None else caller.hashes(body.block_hashes)
    left = await caller.view.evict(hashes, num_blocks=body.num_blocks)
    caller.tell(response, [*(hashes or ()), *left])
    return Evicted(evicted=hashes_to_text(left))


@router.post("/forget", responses=documented())
async def forget(caller: Writer, body: Chain, response: Response) -> Evicted:
    """Remove what no other chain was seen to share of a chain that is over."""
    hashes = caller.hashes(body.block_hashes)
    left = await caller.view.forget(hashes)
    caller.tell(response, hashes)
    return Evicted(evicted=hashes_to_text(left))


@router.post("/clear", status_code=204, responses=documented())
async def clear(caller: Writer, response: Response) -> None:
    """Evict all blocks of the namespace that are not pinned or pending."""
    await caller.view.clear()
    caller.tell(response)


@router.post("/flush", responses=documented())
async def flush(caller: Admin, response: Response) -> Flushed:
    """Make durable what the cold tier has room for, of all namespaces."""
    caller.check_sees_all()
    result = await caller.service.manager.flush()
    caller.tell(response)
    return Flushed(durable=result.durable, not_durable=result.not_durable)


@router.post("/prefetch", responses=documented())
async def prefetch(caller: Reader, body: Chain, response: Response) -> Queued:
    """Queue blocks to be brought up in the background."""
    queued = caller.view.hint_prefetch(caller.hashes(body.block_hashes))
    caller.tell(response)
    return Queued(queued=queued)


@router.post("/prefetch/cancel", responses=documented())
async def cancel_prefetch(caller: Reader, body: Chain, response: Response) -> Cancelled:
    """Take blocks back out of that queue."""
    cancelled = caller.view.cancel_prefetch(caller.hashes(body.block_hashes))
    caller.tell(response)
    return Cancelled(cancelled=cancelled)


def as_stored(result: StoreResult) -> Stored:
    """Return the result of a store as JSON."""
    return Stored(
        stored=hashes_to_text(result.stored),
        present=hashes_to_text(result.present),
        rejected={hash_to_text(each): why.value for each, why in result.rejected.items()},
        evicted=hashes_to_text(result.evicted),
        waited_s=result.waited_s,
    )
