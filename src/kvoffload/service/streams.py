"""What a service tells over a connection that stays: events, and what a session's calls did."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..events import OffloadingEvent, Subscription
from ..managers.async_lru_manager import NamespaceView
from ..managers.contract import Contract
from ..metrics import ManagerStats
from ..types import BlockHash, BlockState
from .wire import SEQUENCE_HEADER, hash_to_text, hashes_to_text

BEAT_S = 15.0
"""Seconds of silence after which a stream says that it is still there."""
MOST_LINES = 1024
"""Lines that a stream holds for a slow reader before it takes no more events from the manager,
which then counts what the reader misses."""
MOST_BYTES = 8 * 1024 * 1024
"""The same in bytes."""
SOON_S, LATER_S = 0.01, 2.0
"""Shortest and longest time after which a session's stream looks for what changed without a call:
soon after something happened, twice as long each time that nothing did."""
MOST_WATCHED = 4096
"""Blocks that were pending when they were told, and are looked at again."""


def stats_to_json(stats: ManagerStats) -> dict[str, Any]:
    """Return counters as JSON."""
    body = asdict(stats)
    for tier in body["tiers"].values():
        tier["medium"] = tier["medium"].value
        tier["state"] = tier["state"].value
    return body


def event_to_json(event: OffloadingEvent) -> dict[str, Any]:
    """Return an event as JSON."""
    return {
        "kind": event.kind.value,
        "block_hashes": hashes_to_text(event.block_hashes),
        "tier": event.tier,
        "medium": event.medium.value,
        "namespace": event.namespace,
        "sequence": event.sequence,
        "missed": event.missed,
        "detail": event.detail,
    }


class SessionStream:
    """The numbered lines that tell a session's client what happens in its namespace.

    Args:
        view: Where the session's calls go.
        watched: Whose events and counters are told: that, or the manager with all namespaces.
        hello: What the first line says.
        note_missed: Called with how many events were lost before one that is told.
    """

    def __init__(
        self,
        view: NamespaceView,
        watched: Contract,
        hello: Mapping[str, Any],
        note_missed: Callable[[int], None],
    ) -> None:
        events = watched.events()
        assert isinstance(events, Subscription)
        self._view = view
        self._watched = watched
        self._events = events
        self._note_missed = note_missed
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._number = -1
        self._stats: ManagerStats | None = None
        # Nothing tells of a block that somebody else reserved and gave up, so it is looked for.
        self._pending: dict[BlockHash, None] = {}
        self._pause_s = SOON_S
        self._wake = anyio.Event()
        self._is_over = False
        self._put({"hello": hello})
        self._tell_stats()
        events.on_put = self._wake_up

    def tell(self, block_hashes: Sequence[BlockHash]) -> dict[str, str]:
        """Add what has happened so far, where blocks are now, and the counters if they changed.

        Returns:
            The header that names the last line: a client that waits for it before it returns from
            its call sees what the call did.
        """
        self._take_events()
        if not self._is_full:
            self._tell_places(list(dict.fromkeys(block_hashes)))
            self._tell_stats()
        return {SEQUENCE_HEADER: str(self._number)}

    def end(self, why: str) -> None:
        """Let the lines end."""
        if not self._is_over:
            self._put({"end": why})
            self._is_over = True

    async def lines(self) -> AsyncGenerator[bytes]:
        """Yield the lines, until the session or the manager ends."""
        silent_s = 0.0
        while True:
            self._wake = anyio.Event()  # before looking, so that nothing comes in between
            if self._take_events():
                self._tell_stats()
            while self._lines:
                # At once, for who reads them to see events and counters change together.
                lines = b"".join(self._lines)
                self._lines.clear()
                self._bytes = 0
                yield lines
            if self._events.is_over:
                self.end("the service is closing")
            if self._is_over and not self._lines:
                return
            with anyio.move_on_after(self._pause_s) as silence:
                await self._wake.wait()
            if not silence.cancelled_caught:
                self._pause_s = SOON_S
                silent_s = 0.0
                continue
            silent_s += self._pause_s
            self._pause_s = min(2 * self._pause_s, LATER_S)
            if self._look_again():
                silent_s = 0.0
            elif silent_s >= BEAT_S:
                self._put({"beat": True})
                silent_s = 0.0

    @property
    def _is_full(self) -> bool:
        """Whether the reader is so far behind that it is told no more for now."""
        return len(self._lines) >= MOST_LINES or self._bytes >= MOST_BYTES

    def _take_events(self) -> bool:
        """Tell the events that there are; say whether there were any."""
        if self._is_full:
            return False
        events = self._events.take()
        for event in events:
            self._note_missed(event.missed)
            self._put({"event": event_to_json(event)})
        return bool(events)

    def _look_again(self) -> bool:
        """Tell what changed without a call and without an event; say whether something did."""
        number = self._number
        pending = list(self._pending)
        found = self._view.locate(pending) if pending else []
        settled = [
            each
            for each, place in zip(pending, found, strict=True)
            if place.state is not BlockState.PENDING
        ]
        self._tell_places(settled)
        self._tell_stats()
        return self._number > number

    def _tell_places(self, block_hashes: Sequence[BlockHash]) -> None:
        if not block_hashes:
            return
        places: list[list[str | None]] = []
        for block_hash, place in zip(block_hashes, self._view.locate(block_hashes), strict=True):
            places.append([hash_to_text(block_hash), place.state.value, place.tier])
            if place.state is not BlockState.PENDING:
                self._pending.pop(block_hash, None)
            elif len(self._pending) < MOST_WATCHED:
                self._pending[block_hash] = None
        self._put({"locations": places})

    def _tell_stats(self) -> None:
        stats = self._watched.get_stats()
        if stats != self._stats:
            self._stats = stats
            self._put({"stats": stats_to_json(stats)})

    def _put(self, line: Mapping[str, Any]) -> None:
        if self._is_over:
            return
        self._number += 1
        body = json.dumps({"n": self._number, **line}, separators=(",", ":")).encode() + b"\n"
        self._lines.append(body)
        self._bytes += len(body)
        self._wake_up()

    def _wake_up(self) -> None:
        self._wake.set()


async def server_sent(
    events: Subscription, note_missed: Callable[[int], None]
) -> AsyncGenerator[bytes]:
    """Yield events as server-sent ones, and a comment in each longer silence."""
    yield b": events of kvoffload\n\n"
    while True:
        is_open = True
        with anyio.move_on_after(BEAT_S) as waiting:
            is_open = await events.wait()
        if waiting.cancelled_caught:
            yield b": beat\n\n"
            continue
        if not is_open:
            return
        for event in events.take():
            note_missed(event.missed)
            data = json.dumps(event_to_json(event), separators=(",", ":"))
            yield f"id: {event.sequence}\nevent: {event.kind.value}\ndata: {data}\n\n".encode()


class StreamResponse(Response):
    """Sends pieces as they come, until they end, the client goes away, or the service drains.

    Args:
        pieces: What to send; closed in any case.
        media_type: Its type.
        draining: Set when the service is told to stop.
        on_end: Awaited when the sending has ended, however it did.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes],
        media_type: str,
        *,
        draining: anyio.Event,
        on_end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._pieces = pieces
        self._draining = draining
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces."""
        is_gone = False
        try:
            async with anyio.create_task_group() as group:

                async def stop_when_gone() -> None:
                    nonlocal is_gone
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    is_gone = True
                    group.cancel_scope.cancel()

                async def stop_when_draining() -> None:
                    await self._draining.wait()
                    group.cancel_scope.cancel()

                group.start_soon(stop_when_gone)
                group.start_soon(stop_when_draining)
                headers = self.raw_headers
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                async with aclosing(self._pieces) as pieces:
                    async for piece in pieces:
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                group.cancel_scope.cancel()
        finally:
            if self._on_end is not None:
                await self._on_end()
        if not is_gone:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
