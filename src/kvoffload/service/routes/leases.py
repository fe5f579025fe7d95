"""Endpoints on leases, and on calls whose client never learned what became of them."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response

from ...types import Lease
from ..access import Principal
from ..batches import BatchResponse
from ..dependencies import NamespaceName, ReadingMember, principal_of
from ..guard import GuardedRoute
from ..problems import documented
from ..schemas import LoadChain
from ..state import service_of
from .blocks import BATCH_ANSWER

CallPath = Annotated[str, Path(max_length=64)]

router = APIRouter(route_class=GuardedRoute, prefix="/sessions", tags=["sessions"])


@router.post(
    "/{session}/leases", response_class=Response, responses=BATCH_ANSWER | documented(404, 507)
)
async def open_lease(caller: ReadingMember, body: LoadChain) -> Response:
    """Send blocks and keep them pinned until the lease ends; one use of the chain.

    The batch's header also has `lease`, its name.
    """
    session = caller.member
    hashes = caller.hashes(body.block_hashes)
    scope = caller.view.load(hashes, timeout_s=body.timeout_s)
    with session.taking(len(hashes), caller.service.limits):
        lease = await scope.__aenter__()
    name = secrets.token_urlsafe(8)
    session.leases[name] = scope, len(hashes)
    caller.gave(lambda: session.end_lease(name))
    return BatchResponse(
        _views_of(lease),
        hashes,
        timeout_s=caller.service.limits.body_timeout_s,
        describe=lambda: caller.told(hashes),
        more={"lease": name},
    )


@router.delete("/{session}/leases/{name}", status_code=204, responses=documented(404))
async def end_lease(caller: ReadingMember, name: str, response: Response) -> None:
    """Unpin a lease's blocks; nothing if it has ended already."""
    await caller.member.end_lease(name)
    caller.tell(response)


@router.delete("/{session}/calls/{name}", status_code=204, responses=documented(404))
async def take_back_call(
    request: Request,
    session: str,
    name: CallPath,
    principal: Annotated[Principal, Depends(principal_of)],
    response: Response,
    namespace: NamespaceName = None,
) -> None:
    """Take a call back: cancel it, or give back what it gave to the session, or refuse it.

    For a client that was cancelled, or lost its connection, before it had the answer.
    """
    service = service_of(request)
    found = service.sessions.find(session, service.name_of(namespace), principal)
    await found.calls.take_back(name)
    response.headers.update(found.tell(()))


@asynccontextmanager
async def _views_of(lease: Lease) -> AsyncIterator[Sequence[memoryview]]:
    yield lease
