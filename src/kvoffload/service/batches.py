"""Batches in and out: bounded and never whole in memory on the way in, leased on the way out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import NotPinnedError
from ..types import BlockHash
from .limits import Limits
from .problems import RefusedError
from .wire import BATCH, PREFIX, BatchHeader, WireError, header_bytes, pack_header, parse_header

log = logging.getLogger("kvoffload")

PIECE_BYTES = 256 * 1024
"""Bytes copied and sent at a time; more would hold the event loop for too long."""
NOTHING = memoryview(b"")


class BatchReader:
    """Reads one batch from a request's body.

    Raises:
        RefusedError: The body is of another type.
    """

    def __init__(self, request: Request, limits: Limits, block_bytes: int) -> None:
        if request.headers.get("content-type", "").partition(";")[0].strip() != BATCH:
            raise RefusedError(415, "WireError", f"this call takes a body of type {BATCH}")
        self._receive = request.receive
        self._is_over = False
        self._announced = request.headers.get("content-length")
        self._rest = NOTHING
        self._limits = limits
        self._block_bytes = block_bytes

    async def header(self) -> BatchHeader:
        """Return what the batch says of its payloads; checked against all limits.

        Raises:
            WireError: It is no batch, a block is too long, or its lengths do not agree.
        """
        prefix = bytearray(PREFIX.size)
        await self._fill(memoryview(prefix))
        length = header_bytes(prefix)
        if length > self._limits.max_json_bytes:
            raise WireError(
                f"a header of {length} bytes; at most {self._limits.max_json_bytes} are taken"
            )
        body = bytearray(length)
        await self._fill(memoryview(body))
        header = parse_header(body)
        check_batch(len(header.sizes), self._limits)
        if max(header.sizes, default=0) > self._block_bytes:
            raise WireError(
                f"a payload of {max(header.sizes)} bytes is longer than a block of "
                f"{self._block_bytes} bytes"
            )
        total = PREFIX.size + length + header.payload_bytes
        if total > self._limits.max_body_bytes:
            raise RefusedError(
                413,
                "BodyTooLarge",
                f"a batch of {total} bytes; at most {self._limits.max_body_bytes} are taken",
            )
        if self._announced is not None and int(self._announced) != total:
            raise WireError(
                f"the body has {self._announced} bytes, but its header describes {total}"
            )
        return header

    async def fill(self, views: Sequence[memoryview]) -> None:
        """Read the next payload into each of these views."""
        for view in views:
            await self._fill(view)

    async def end(self) -> None:
        """Check that nothing follows.

        Raises:
            WireError: Something does.
        """
        while not self._rest:
            if not await self._more():
                return
        raise WireError("the body is longer than its header describes")

    async def _more(self) -> bool:
        """Receive some more; `False` if the body is over."""
        if self._is_over:
            return False
        # Let go of what came before: its memory, still warm, is then used again for what comes.
        self._rest = NOTHING
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._rest = memoryview(message.get("body", b""))
        self._is_over = not message.get("more_body", False)
        return True

    async def _fill(self, view: memoryview) -> None:
        filled, wanted = 0, len(view)
        while filled < wanted:
            if not self._rest:
                if not await self._more():
                    raise WireError("the body ended before what its header describes")
                continue
            size = min(len(self._rest), wanted - filled)
            try:
                view[filled : filled + size] = self._rest[:size]
            except ValueError as exc:  # it was taken back
                raise NotPinnedError(
                    "the time of what was reserved was up before its bytes came: prepare it again"
                ) from exc
            filled += size
            self._rest = self._rest[size:]


def check_batch(count: int, limits: Limits) -> None:
    """Refuse a call that names too many blocks.

    Raises:
        WireError: It does.
    """
    if count > limits.max_batch_blocks:
        raise WireError(
            f"{count} blocks in one call; at most {limits.max_batch_blocks} are taken: split it"
        )


def check_as_many(header: BatchHeader) -> None:
    """Refuse a batch that does not say which blocks its payloads are.

    Raises:
        WireError: It does not.
    """
    if len(header.block_hashes) != len(header.sizes):
        raise WireError(f"{len(header.sizes)} sizes, but {len(header.block_hashes)} block_hashes")


class BatchResponse(Response):
    """Sends blocks; whatever holds them does so for as long as the sending takes, and no longer.

    Args:
        blocks: Entered when the answer is about to be sent; gives the blocks' views.
        block_hashes: Those blocks.
        timeout_s: Seconds that the client may take: a pin must not last as long as it pleases.
        describe: Called once the blocks are there; returns headers of the answer.
        more: Further fields of the batch's header.
    """

    media_type = BATCH

    def __init__(
        self,
        blocks: AbstractAsyncContextManager[Sequence[memoryview]],
        block_hashes: Sequence[BlockHash],
        *,
        timeout_s: float,
        describe: Callable[[], Mapping[str, str]],
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._blocks = blocks
        self._block_hashes = block_hashes
        self._timeout_s = timeout_s
        self._describe = describe
        self._more = more or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the blocks.

        Raises:
            OffloadError: They are not there. Nothing was sent yet, so that it can be answered.
        """
        async with self._blocks as views:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._send(views, send)
            except TimeoutError:
                # Unfinished, so that the server closes the connection, and the client sees fewer
                # bytes than it was promised.
                log.warning("gave up on a client that took longer than %g s", self._timeout_s)
            except OSError:
                log.debug("a client went away")

    async def _send(self, views: Sequence[memoryview], send: Send) -> None:
        sizes = [view.nbytes for view in views]
        head = pack_header(self._block_hashes, sizes, **self._more)
        self.headers["content-length"] = str(len(head) + sum(sizes))
        self.headers.update(self._describe())
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": head, "more_body": True})
        for view in views:
            for start in range(0, view.nbytes, PIECE_BYTES):
                # A copy, for the server keeps what the socket doesn't take at once, perhaps for
                # longer than the blocks are held. The slice itself is gone with this line.
                piece = bytes(view[start : start + PIECE_BYTES])
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                # With a client that is quick, or gone, `send` returns without ever suspending.
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
