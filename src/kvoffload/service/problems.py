"""From errors to answers: a status, and a JSON body that names the error and the blocks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..errors import (
    BlockNotFoundError,
    CapacityError,
    ClosedError,
    ConfigError,
    LoadTimeoutError,
    NotPinnedError,
    OffloadError,
    TierError,
)
from .schemas import Problem
from .wire import WireError, hashes_to_text

log = logging.getLogger("kvoffload")

STATUS_OF: dict[type[Exception], int] = {
    WireError: 422,
    ConfigError: 422,
    TypeError: 422,
    BlockNotFoundError: 404,
    NotPinnedError: 409,
    CapacityError: 507,
    TierError: 503,
    LoadTimeoutError: 503,
    ClosedError: 503,
}
"""Answers to the library's errors; what is not here goes by its nearest base."""

DESCRIPTIONS = {
    401: "No token, or one that opens nothing",
    403: "The token does not allow this, or not in this namespace",
    404: "A block, session or request is not there",
    408: "The body took too long to arrive",
    409: "Nothing is held of this block in this session",
    413: "The body is too long",
    415: "The body is of another type",
    422: "The request is not valid; nothing was changed",
    429: "Too much at once; try again soon",
    503: "A tier failed or was too slow, or the service is closing",
    507: "No room: what is there is in use",
}
COMMON = (401, 403, 404, 408, 413, 422, 429, 503)


class RefusedError(Exception):
    """The service's own reasons not to do something."""

    def __init__(
        self, status: int, error: str, message: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = error
        self.headers = dict(headers or {})


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe, for the OpenAPI document, the errors that any call has, and these."""
    return {
        status: {"model": Problem, "description": DESCRIPTIONS[status]}
        for status in sorted({*COMMON, *statuses})
    }


def streamed(media_type: str, description: str) -> dict[int | str, dict[str, Any]]:
    """Describe, for the OpenAPI document, an answer that is no JSON."""
    return {200: {"description": description, "content": {media_type: {}}}}


def answer_to(exc: Exception) -> Response | None:
    """Return the answer to an error; `None` if it is a defect of ours."""
    if isinstance(exc, RefusedError):
        return problem(exc.status, exc.error, str(exc), headers=exc.headers)
    if isinstance(exc, HTTPException) and exc.status_code == 400:
        # FastAPI's, for a body that is not even text.
        return problem(422, "ValidationError", "the body is no JSON in UTF-8")
    if isinstance(exc, HTTPException):
        headers = exc.headers or {}
        return problem(exc.status_code, "HTTPError", str(exc.detail), headers=headers)
    if isinstance(exc, RequestValidationError):
        return problem(422, "ValidationError", _faults(exc))
    if isinstance(exc, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    status = next((STATUS_OF[kind] for kind in type(exc).__mro__ if kind in STATUS_OF), None)
    if status is None or not isinstance(exc, OffloadError | WireError):
        return None
    fields: dict[str, Any] = {}
    if isinstance(exc, BlockNotFoundError):
        fields["block_hashes"] = hashes_to_text(exc.block_hashes)
    if isinstance(exc, TierError):
        fields["tier"] = exc.tier
        if exc.block_hash is not None:
            fields["block_hashes"] = hashes_to_text([exc.block_hash])
    headers = {"Retry-After": "1"} if status == 503 else {}
    return problem(status, type(exc).__name__, str(exc), headers=headers, **fields)


def problem(
    status: int,
    error: str,
    message: str,
    *,
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> Response:
    """Return the answer of an error."""
    body = Problem(error=error, message=message, **fields)
    return JSONResponse(body.model_dump(exclude_none=True), status, headers=dict(headers or {}))


def _faults(exc: RequestValidationError) -> str:
    """Say what is wrong with a body, without repeating what came: it may be long, or secret."""
    errors = exc.errors()
    faults = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in errors[:5]]
    more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
    return ("; ".join(faults) + more).encode("utf-8", "replace").decode()
