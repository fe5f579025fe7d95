"""Around every call: how many at once, how long its body may be, what errors become."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from ..errors import OffloadError
from .authentication import authenticate
from .problems import RefusedError, answer_to
from .sessions import CANCEL, SESSION, Session
from .state import service_of
from .wire import BATCH, SEQUENCE_HEADER, WireError

GOODBYE_S = 1.0
"""Seconds that a call which was taken back waits for its client to hang up."""
ANSWERED = (OffloadError, RefusedError, WireError, HTTPException, RequestValidationError)


class GuardedRoute(APIRoute):
    """A route whose calls are counted, whose bodies are bounded, and whose errors are answered.

    Here rather than in a middleware and exception handlers, so that the router can be included in
    any application.

    Attributes:
        is_counted: Whether calls count as under way, and are refused while the service drains.
    """

    is_counted = True

    @property
    def takes_batch(self) -> bool:
        """Whether the body of a call is a batch."""
        body = (self.openapi_extra or {}).get("requestBody", {})
        return BATCH in body.get("content", {})

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, whose errors are answered."""
        handler = super().get_route_handler()

        async def answering(request: Request) -> Response:
            try:
                return await handler(request)
            except (*ANSWERED, ClientDisconnect) as exc:
                # What stops the reading of a body, FastAPI makes its own error of.
                cause = exc.__cause__
                answer = answer_to(cause if isinstance(cause, RefusedError) else exc)
                if answer is None:
                    raise
                return answer

        return answering

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a call, the sending of its answer included."""
        if not self.methods or scope["method"] not in self.methods:
            await super().handle(scope, receive, send)
            return
        is_begun = False

        async def noting_send(message: Message) -> None:
            nonlocal is_begun
            if not is_begun:
                is_begun = True
                _tell(scope, message)
            await send(message)

        try:
            connection = Request(scope)
            principal = authenticate(connection)
            service = service_of(connection)
            if self.is_counted:
                service.begin_call(principal)
            try:
                body = BodyGuard(scope, receive, takes_batch=self.takes_batch)
                with anyio.CancelScope() as cancel:
                    scope[CANCEL] = cancel
                    await self._serve(scope, body, noting_send)
            finally:
                if self.is_counted:
                    service.end_call(principal)
            if cancel.cancelled_caught:
                await _part(receive)
                if not is_begun:
                    await Response(status_code=499)(scope, receive, send)  # nobody reads it
        except ANSWERED as exc:
            answer = answer_to(exc)
            if answer is None or is_begun:
                raise
            await answer(scope, receive, noting_send)

    async def _serve(self, scope: Scope, body: BodyGuard, send: Send) -> None:
        """Serve a call for as long as its client is there."""
        failure: Exception | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(body.cancel_when_gone, scope[CANCEL])
            try:
                await super().handle(scope, body.receive, send)
            except Exception as exc:  # noqa: BLE001  # raised below, not in a group of errors
                failure = exc
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure


def _tell(scope: Scope, start: Message) -> None:
    """Let the session's stream tell what the call did, also where it failed."""
    session = scope.get(SESSION)
    name = SEQUENCE_HEADER.lower().encode()
    if isinstance(session, Session) and all(key != name for key, _ in start["headers"]):
        told = [(name, value.encode()) for value in session.tell(()).values()]
        start["headers"] = [*start["headers"], *told]


async def _part(receive: Receive) -> None:
    """Wait until the client of a call that was taken back has hung up."""
    with anyio.move_on_after(GOODBYE_S):
        while (await receive())["type"] != "http.disconnect":
            pass


class BodyGuard:
    """Refuses a body that is too long, or too slow, before it is buffered."""

    def __init__(self, scope: Scope, receive: Receive, *, takes_batch: bool) -> None:
        limits = service_of(Request(scope)).limits
        headers = dict(scope["headers"])
        self._receive = receive
        self._is_batch = takes_batch
        self._limit = limits.max_body_bytes if self._is_batch else limits.max_json_bytes
        # That it is a number is checked by the server; and that the body is as long, too.
        self._announced = int(headers.get(b"content-length", 0))
        self._timeout_s = limits.body_timeout_s
        self._deadline = asyncio.get_running_loop().time() + limits.body_timeout_s
        self._received = 0
        self._is_complete = False
        self._complete = anyio.Event()

    async def cancel_when_gone(self, scope: anyio.CancelScope) -> None:
        """Cancel a call whose client hangs up, once its body has come: nobody waits for it."""
        await self._complete.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def receive(self) -> Message:
        """Return the next message.

        Raises:
            RefusedError: The body is too long, or did not come in time.
        """
        if self._is_complete:
            await anyio.sleep_forever()  # `cancel_when_gone` listens
        if self._announced > self._limit:
            raise self._too_large(self._announced)
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise RefusedError(
                408,
                "BodyTooSlow",
                f"the body did not arrive within {self._timeout_s:g} s",
                headers={"Connection": "close"},
            ) from None
        self._received += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._is_complete:
            self._complete.set()
        if self._received > self._limit:
            raise self._too_large(self._received)
        return message

    def _too_large(self, size: int) -> RefusedError:
        kind = "a batch" if self._is_batch else "JSON"
        return RefusedError(
            413,
            "BodyTooLarge",
            f"{size} bytes of {kind}; at most {self._limit} are taken",
            headers={"Connection": "close"},
        )


class WatchingRoute(GuardedRoute):
    """The same for calls that only look: a service that is busy or drains can be watched."""

    is_counted = False


class StreamRoute(GuardedRoute):
    """The same for answers that stay: they don't count as calls under way."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a stream."""
        await APIRoute.handle(self, scope, receive, send)
