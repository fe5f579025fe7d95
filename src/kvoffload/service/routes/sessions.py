"""Endpoints on what a client holds between its calls."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Request, Response

from ...errors import ConfigError, NotPinnedError
from ...request import RequestScope
from ...retention import as_retention
from ...twophase import Spec
from ...types import BlockHash, SlotEntry
from ..access import Principal
from ..batches import BatchReader, BatchResponse, check_as_many
from ..dependencies import (
    Caller,
    Everywhere,
    NamespaceName,
    Reader,
    ReadingMember,
    WritingMember,
    principal_of,
)
from ..guard import GuardedRoute, StreamRoute
from ..problems import RefusedError, documented, streamed
from ..schemas import (
    Chain,
    LoadHit,
    Plan,
    PlanBody,
    PrepareAnswer,
    Prepared,
    RequestChain,
    RequestInfo,
    RetentionChange,
    SessionInfo,
    SlotInfo,
    StoreChain,
    Stored,
    TierInfo,
)
from ..sessions import HeldRequest, Session
from ..state import Service, service_of
from ..streams import SessionStream, StreamResponse
from ..wire import hashes_to_text
from .blocks import BATCH_ANSWER, BATCH_BODY, as_stored

router = APIRouter(route_class=GuardedRoute, prefix="/sessions", tags=["sessions"])
streams = APIRouter(route_class=StreamRoute, prefix="/sessions", tags=["sessions"])


@router.post("", status_code=201, responses=documented())
async def open_session(caller: Reader, everywhere: Everywhere = False) -> SessionInfo:
    """Open a session: what a client holds ends with it.

    With `all`, its stream tells the counters and events of every namespace.
    """
    if everywhere:
        caller.check_sees_all()
    service = caller.service
    session = service.sessions.open(
        service.manager, caller.namespace, caller.principal, everywhere=everywhere
    )
    return _info(service, session)


@streams.get(
    "/{session}/stream",
    response_class=Response,
    responses=streamed("application/x-ndjson", "Lines of JSON") | documented(409),
)
async def follow_session(
    request: Request,
    session: str,
    principal: Annotated[Principal, Depends(principal_of)],
    namespace: NamespaceName = None,
) -> Response:
    """Tell what happens in the session's namespace; the session ends with this connection."""
    service = service_of(request)
    found = service.sessions.find(session, service.name_of(namespace), principal)
    if found.stream is not None:
        raise RefusedError(409, "SessionInUse", "a session has one stream, and this one has it")
    hello = _info(service, found).model_dump()
    found.stream = SessionStream(found.view, found.watched, hello, service.note_missed)
    return StreamResponse(
        found.stream.lines(),
        "application/x-ndjson",
        draining=service.draining,
        on_end=lambda: service.sessions.end(found),
    )


@router.delete("/{session}", status_code=204, responses=documented())
async def end_session(
    request: Request,
    session: str,
    principal: Annotated[Principal, Depends(principal_of)],
    namespace: NamespaceName = None,
) -> None:
    """Give back all that the session holds."""
    service = service_of(request)
    await service.sessions.end(
        service.sessions.find(session, service.name_of(namespace), principal)
    )


# Two phases


@router.post("/{session}/prepare_store", responses=documented(507))
async def prepare_store(
    caller: WritingMember, body: StoreChain, response: Response
) -> PrepareAnswer:
    """Reserve slots for the blocks that are neither there nor on their way."""
    session = _session_of(caller)
    hashes = caller.hashes(body.block_hashes)
    with session.taking(len(hashes), caller.service.limits):
        output = await caller.view.prepare_store(hashes, sizes=body.sizes)
    if output is None:
        caller.tell(response, hashes)
        return PrepareAnswer(prepared=None)
    assert isinstance(output.store_spec, Spec)
    entries = output.store_spec.entries
    session.reserved.update(zip(output.block_hashes_to_store, entries, strict=True))
    caller.gave(lambda: session.abandon_store(output.block_hashes_to_store))
    caller.tell(response, [*hashes, *output.block_hashes_evicted])
    return PrepareAnswer(
        prepared=Prepared(
            to_store=hashes_to_text(output.block_hashes_to_store),
            entries=[_slot(each) for each in entries],
            evicted=hashes_to_text(output.block_hashes_evicted),
        )
    )


@router.post(
    "/{session}/complete_store",
    status_code=204,
    openapi_extra=BATCH_BODY,
    responses=documented(415),
)
async def complete_store(caller: WritingMember, request: Request, response: Response) -> None:
    """Fill reserved slots and publish their blocks; those that are not reserved are passed over.

    The bytes go straight into the slots. A body that does not arrive whole gives them up.
    """
    session = _session_of(caller)
    batch = BatchReader(request, caller.service.limits, caller.service.block_bytes)
    header = await batch.header()
    hashes = header.block_hashes
    check_as_many(header)
    reserved = {each: session.reserved.pop(each) for each in hashes if each in session.reserved}
    mine: dict[BlockHash, memoryview] = {}
    for block_hash, entry in reserved.items():
        with suppress(NotPinnedError):  # its time was up: a late complete changes nothing
            mine[block_hash] = entry.view
    is_whole = False
    try:
        for each, size in zip(hashes, header.sizes, strict=True):
            await batch.fill([_place_of(mine.get(each), size)])
        await batch.end()
        is_whole = True
    finally:
        done = list(mine)
        mine.clear()
        if not is_whole:
            with anyio.CancelScope(shield=True):
                await caller.view.complete_store(done, success=False)
    await caller.view.complete_store(done)
    caller.tell(response, hashes)


@router.post("/{session}/abandon_store", status_code=204, responses=documented())
async def abandon_store(caller: WritingMember, body: Chain, response: Response) -> None:
    """Give reserved slots up."""
    session = _session_of(caller)
    hashes = caller.hashes(body.block_hashes)
    await session.abandon_store(hashes)
    caller.tell(response, hashes)


@router.post(
    "/{session}/prepare_load",
    response_class=Response,
    responses=BATCH_ANSWER | documented(507),
)
async def prepare_load(caller: ReadingMember, body: Chain) -> Response:
    """Pin blocks until `complete_load`, or the session's end, and send them."""
    session = _session_of(caller)
    hashes = caller.hashes(body.block_hashes)
    with session.taking(len(hashes), caller.service.limits):
        spec = await caller.view.prepare_load(hashes)
    session.hold(hashes)
    caller.gave(lambda: session.abandon_load(hashes))
    return BatchResponse(
        _views_of(spec.entries),
        hashes,
        timeout_s=caller.service.limits.body_timeout_s,
        describe=lambda: caller.told(hashes),
        more={"entries": [_slot(each).model_dump() for each in spec.entries]},
    )


@router.post("/{session}/complete_load", status_code=204, responses=documented(409))
async def complete_load(caller: ReadingMember, body: Chain, response: Response) -> None:
    """Unpin what `prepare_load` pinned in this session."""
    session = _session_of(caller)
    hashes = caller.hashes(body.block_hashes)
    session.release(hashes)
    await caller.view.complete_load(hashes)
    caller.tell(response, hashes)


# Requests


@router.post("/{session}/requests", status_code=201, responses=documented())
async def open_request(
    caller: ReadingMember, body: RequestChain, response: Response
) -> RequestInfo:
    """Open the scope of one prompt's chain: its hit blocks stay until it is left."""
    session = _session_of(caller)
    hashes = caller.hashes(body.block_hashes)
    caller.forbid_unless_lasting(body.as_retention())
    scope = caller.view.request(
        hashes, wait_pending_s=body.wait_pending_s, retention=body.as_retention()
    )
    assert isinstance(scope, RequestScope)
    with session.taking(1 + len(hashes), caller.service.limits):
        await scope.__aenter__()
    name = secrets.token_urlsafe(8)
    session.requests[name] = HeldRequest(scope, hashes)
    caller.gave(lambda: session.end_request(name))
    caller.tell(response, hashes)
    return RequestInfo(request=name, hit=scope.hit)


@router.post(
    "/{session}/requests/{name}/load",
    response_class=Response,
    responses=BATCH_ANSWER | documented(507),
)
async def load_request(caller: ReadingMember, name: str, body: LoadHit) -> Response:
    """Send the request's hit blocks, or the first of them."""
    held = _session_of(caller).request(name)
    lease = held.scope.load(body.num_blocks, timeout_s=body.timeout_s)
    count = held.scope.hit if body.num_blocks is None else body.num_blocks
    hashes = held.block_hashes[:count]
    return BatchResponse(
        lease,
        hashes,
        timeout_s=caller.service.limits.body_timeout_s,
        describe=lambda: caller.told(hashes),
    )


@router.post("/{session}/requests/{name}/plan", responses=documented())
async def plan_request(caller: ReadingMember, name: str, body: PlanBody) -> Plan:
    """Say how many of the hit blocks are worth loading."""
    plan = (
        _session_of(caller)
        .request(name)
        .scope.plan(
            tokens_per_s=body.tokens_per_s,
            block_tokens=body.block_tokens,
            deadline_s=body.deadline_s,
        )
    )
    return Plan(blocks=plan.blocks, load_s=plan.load_s, compute_s=plan.compute_s)


@router.post(
    "/{session}/requests/{name}/store",
    openapi_extra=BATCH_BODY,
    responses=documented(415, 507),
)
async def store_request(
    caller: WritingMember, name: str, request: Request, response: Response
) -> Stored:
    """Store the next blocks of the request's chain: all of a body that arrives whole, or none."""
    held = _session_of(caller).request(name)
    batch = BatchReader(request, caller.service.limits, caller.service.block_bytes)
    sizes = (await batch.header()).sizes
    result = await held.scope.store_from(sizes, batch)
    caller.tell(response, held.block_hashes)
    return as_stored(result)


@router.patch("/{session}/requests/{name}", status_code=204, responses=documented())
async def change_request(caller: ReadingMember, name: str, body: RetentionChange) -> None:
    """Say how likely, or how soon, the request's chain is used again."""
    caller.forbid_unless_lasting(body.as_retention())
    _session_of(caller).request(name).scope.retention = as_retention(body.as_retention())


@router.delete("/{session}/requests/{name}", status_code=204, responses=documented())
async def end_request(caller: ReadingMember, name: str, response: Response) -> None:
    """Leave the request's scope: one use of its whole chain."""
    session = _session_of(caller)
    held = session.request(name)
    await session.end_request(name)
    caller.tell(response, held.block_hashes)


# Inside


def _session_of(caller: Caller) -> Session:
    assert caller.session is not None
    return caller.session


def _info(service: Service, session: Session) -> SessionInfo:
    stats = service.manager.get_stats()
    return SessionInfo(
        session=session.id,
        ttl_s=service.limits.session_ttl_s,
        namespace=session.namespace,
        block_bytes=service.block_bytes,
        tiers=[
            TierInfo(name=name, medium=tier.medium.value, num_blocks=tier.capacity_blocks)
            for name, tier in stats.tiers.items()
        ],
    )


def _slot(entry: SlotEntry) -> SlotInfo:
    return SlotInfo(slot=entry.slot, tier=entry.tier, medium=entry.medium.value)


def _place_of(reserved: memoryview | None, size: int) -> memoryview:
    """Return where a payload goes; that of a block that is not reserved goes nowhere.

    Raises:
        ConfigError: It has another size than what was reserved for it.
    """
    if reserved is None:
        return memoryview(bytearray(size))
    if size != reserved.nbytes:
        raise ConfigError(f"{reserved.nbytes} bytes were reserved for a payload of {size}")
    return reserved


@asynccontextmanager
async def _views_of(entries: Sequence[SlotEntry]) -> AsyncIterator[Sequence[memoryview]]:
    yield [entry.view for entry in entries]
