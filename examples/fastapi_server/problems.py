"""From errors to answers: a status, and a JSON body that names the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kvoffload import (
    BlockHash,
    BlockNotFoundError,
    CapacityError,
    ClosedError,
    ConfigError,
    CorruptBlockError,
    LoadTimeoutError,
    OffloadError,
    RejectReason,
    TierError,
)

from .models import Problem

PROBLEM_JSON = "application/problem+json"

STATUS_OF: dict[type[OffloadError], tuple[int, str]] = {
    BlockNotFoundError: (404, "Block not found"),
    CorruptBlockError: (404, "Block not found"),  # it was dropped: from now on a miss
    ConfigError: (422, "Not acceptable"),
    CapacityError: (507, "No room"),
    LoadTimeoutError: (504, "Too slow, recompute"),
    TierError: (503, "Storage failed, try again later"),
    ClosedError: (503, "Shutting down"),
}
"""Answers to the library's errors; what is not here goes by its nearest base.

There is no line for `TypeError`. Pydantic has checked the types of what a caller sends (422), so a
`TypeError` from a manager is a mistake of ours, and stays a 500 with a traceback in the log.
"""


def problem(
    status: int,
    title: str,
    detail: str,
    *,
    block_hashes: Sequence[BlockHash] = (),
    rejected: Mapping[BlockHash, RejectReason] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return an answer of `application/problem+json`."""
    body = Problem(
        title=title,
        status=status,
        detail=detail,
        block_hashes=[to_bytes(each) for each in block_hashes],
        rejected={to_bytes(each).hex(): why.value for each, why in (rejected or {}).items()},
    )
    retry = {"retry-after": "1"} if status == 503 else {}
    return JSONResponse(
        body.model_dump(mode="json", exclude_defaults=True),
        status,
        headers=retry | dict(headers or {}),
        media_type=PROBLEM_JSON,
    )


def rejection(rejected: Mapping[BlockHash, RejectReason]) -> Response:
    """Return the answer to an upload of which some blocks were not stored."""
    # A tier that fails or lags may do better soon; one that is full won't do so by itself.
    passing = {RejectReason.FAILED, RejectReason.THROTTLED} & set(rejected.values())
    return problem(
        503 if passing else 507,
        "Not stored",
        f"{len(rejected)} of the blocks were not stored; the others are there",
        block_hashes=list(rejected),
        rejected=rejected,
    )


def to_bytes(block_hash: BlockHash) -> bytes:
    """Return a hash as what it is: this service makes every one of them from hexadecimal digits."""
    assert isinstance(block_hash, bytes)
    return block_hash


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe problems for the OpenAPI document."""
    content = {PROBLEM_JSON: {"schema": Problem.model_json_schema()}}
    return {
        status: {"description": DESCRIPTIONS[status], "content": content} for status in statuses
    }


DESCRIPTIONS = {
    404: "A block is not there",
    408: "The body took too long to arrive",
    413: "The body, or a block, is too long",
    422: "The request is not valid",
    503: "The storage failed; try again later",
    504: "The read took too long; recompute",
    507: "No room: what is there is in use",
}


async def on_offload_error(_request: Request, exc: Exception) -> Response:
    """Answer for an error of the manager."""
    # The message of this one spells hashes as Python does; the answer has them in hexadecimal.
    missing = "absent, or still being stored" if isinstance(exc, BlockNotFoundError) else None
    for kind in type(exc).__mro__:
        if kind in STATUS_OF:
            return problem(*STATUS_OF[kind], missing or str(exc), block_hashes=blocks_of(exc))
    raise exc


def blocks_of(exc: Exception) -> Sequence[BlockHash]:
    """Return the blocks that an error concerns."""
    if isinstance(exc, BlockNotFoundError):
        return exc.block_hashes
    if isinstance(exc, TierError) and exc.block_hash is not None:
        return [exc.block_hash]
    return []


async def on_http_error(_request: Request, exc: Exception) -> Response:
    """Answer for what the framework or the guard of bodies refuses."""
    assert isinstance(exc, HTTPException)
    return problem(exc.status_code, "Refused", str(exc.detail), headers=exc.headers)


async def on_invalid(_request: Request, exc: Exception) -> Response:
    """Answer for what pydantic refuses."""
    assert isinstance(exc, RequestValidationError)
    faults = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in exc.errors()]
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    return problem(422, "Not valid", "; ".join(faults[:5]) + more)


async def on_disconnect(_request: Request, _exc: Exception) -> Response:
    """Answer nobody: else an upload that breaks off would be logged as a crash of the service."""
    return Response(status_code=499)


def add_handlers(app: FastAPI) -> None:
    """Make an application answer in this way."""
    app.add_exception_handler(OffloadError, on_offload_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
