"""Bytes in and out: bounded on the way in, leased on the way out."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import AbstractAsyncContextManager

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvoffload import Lease

from .models import Manifest
from .problems import to_bytes
from .settings import ServiceSettings

log = logging.getLogger("uvicorn.error")  # where uvicorn's own lines go

CHUNK_BYTES = 256 * 1024
"""Bytes copied and sent at a time; more would hold the event loop for too long."""

MAX_JSON_BYTES = 512 * 1024
"""Longest body of JSON, or manifest: parsing it holds the event loop too."""

OCTETS = "application/octet-stream"


class BodyGuard:
    """Refuses a body that is too long, or too slow, before it is buffered.

    As a middleware that looks at each message it guards what FastAPI reads by itself, which it
    does before it runs any dependency, as well as what the handlers read.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, its `receive` guarded."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        settings: ServiceSettings = scope["state"]["settings"]
        headers = dict(scope["headers"])
        if scope["method"] == "PUT":
            limit = settings.block_bytes
        elif headers.get(b"content-type", b"").startswith(OCTETS.encode()):
            limit = settings.max_batch_bytes
        else:
            limit = MAX_JSON_BYTES
        # That it is a number is checked by the server, that the body is as long, too.
        announced = int(headers.get(b"content-length", 0))
        received, complete = 0, False
        deadline = asyncio.get_running_loop().time() + settings.transfer_timeout_s

        async def guarded_receive() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()  # says when the client is gone, in its own good time
            if announced > limit:
                raise HTTPException(413, f"{announced} bytes; at most {limit} are taken")
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                seconds = settings.transfer_timeout_s
                raise HTTPException(
                    408, f"the body did not arrive within {seconds} s", {"connection": "close"}
                ) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > limit:
                raise HTTPException(413, f"more than the {limit} bytes that are taken")
            return message

        await self.app(scope, guarded_receive, send)


async def read_body(request: Request) -> bytearray:
    """Return the whole body, which `BodyGuard` keeps within bounds.

    The manager hears of an upload when all of it is there. `prepare_store` could take the bytes
    straight into a slot; but then a client that is slow, or gone, would hold a slot of the hot
    tier, and who has the same block ready would be told that it is pending.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    return body


def parse_batch(body: bytearray, block_bytes: int) -> tuple[Manifest, list[memoryview]]:
    """Return a batch's manifest, and views of its payloads.

    Raises:
        HTTPException: It is no batch, or a block of it is too long.
        RequestValidationError: Its manifest is not valid.
    """
    end = body.find(b"\n", 0, MAX_JSON_BYTES)
    if end < 0:
        raise HTTPException(422, "a batch starts with a manifest, which is one line of JSON")
    try:
        manifest = Manifest.model_validate_json(body[:end])
    except ValidationError as exc:
        raise RequestValidationError(exc.errors()) from exc
    sizes = [block.size for block in manifest.blocks]
    if max(sizes, default=0) > block_bytes:
        raise HTTPException(413, f"a block of {max(sizes)} bytes; at most {block_bytes} are taken")
    payloads: list[memoryview] = []
    rest = memoryview(body)[end + 1 :]
    if len(rest) != sum(sizes):
        raise HTTPException(
            422, f"the manifest announces {sum(sizes)} bytes, but {len(rest)} follow"
        )
    for size in sizes:
        payloads.append(rest[:size])
        rest = rest[size:]
    return manifest, payloads


class LeasedResponse(Response):
    """Sends leased blocks; the lease lives as long as the sending does, and no longer.

    The views of a lease are valid inside its `async with` alone. A handler can't return one: the
    bytes are sent after it has returned. It could copy the blocks and end the lease, but then
    large ones lie in memory twice, for as long as a client pleases. So the lease is held while the
    client takes the bytes, chunk by chunk, and is over at a deadline whatever the client does.

    The `async with` is around the sending itself, so it ends when that ends, however it does. In a
    generator for `StreamingResponse` it would not: where sending is broken off, by a cancellation
    or by a server that raises, nobody closes the generator, and the lease lasts until the
    interpreter finalizes it.

    Args:
        lease: What to send; entered when the response is about to be sent.
        timeout_s: Seconds that the client may take. A pin must not last as long as a client
            pleases, nor until TCP finds out that the client is gone.
        with_manifest: Whether to send a batch, manifest first, or one bare payload.
    """

    media_type = OCTETS

    def __init__(
        self,
        lease: AbstractAsyncContextManager[Lease],
        *,
        timeout_s: float,
        with_manifest: bool = False,
    ) -> None:
        super().__init__()
        self.lease = lease
        self.timeout_s = timeout_s
        self.with_manifest = with_manifest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the blocks.

        Raises:
            OffloadError: There is no lease. Nothing was sent yet, so this can still become a
                problem.
        """
        async with self.lease as lease:
            try:
                async with asyncio.timeout(self.timeout_s):
                    await self.send_lease(lease, send)
            except TimeoutError:
                # The response is left unfinished, so that the server closes the connection and
                # the client sees fewer bytes than it was promised.
                log.warning("gave up on a client that took longer than %s s", self.timeout_s)
            except OSError:
                log.debug("a client went away")  # not from uvicorn, which drops the bytes instead

    async def send_lease(self, lease: Lease, send: Send) -> None:
        """Send status, headers and blocks."""
        head = manifest_of(lease) if self.with_manifest else b""
        length = len(head) + sum(view.nbytes for view in lease)
        self.headers["content-length"] = str(length)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": head, "more_body": True})
        for view in lease:
            for offset in range(0, view.nbytes, CHUNK_BYTES):
                # A copy, for the server keeps what the socket doesn't take at once, perhaps for
                # longer than the lease lasts. The slice itself is gone with this line.
                chunk = bytes(view[offset : offset + CHUNK_BYTES])
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                # With a client that is quick, or gone, `send` returns without ever suspending.
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def manifest_of(lease: Lease) -> bytes:
    """Return the manifest of leased blocks, as in an upload."""
    blocks = [
        {"hash": to_bytes(block_hash).hex(), "size": view.nbytes}
        for block_hash, view in zip(lease.block_hashes, lease, strict=True)
    ]
    return json.dumps({"blocks": blocks}).encode() + b"\n"
