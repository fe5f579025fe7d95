"""One namespace of a service as a client has it: a session, its stream, and calls within it."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import anyio
import httpx

from ..errors import OffloadError, TierUnavailableError
from ..events import OffloadingEvent
from ..jobs import Job, Jobs
from ..lifecycle import Lifecycle, Phase
from ..signals import Signal
from .decoding import TIER, SessionLostError, error_of
from .http import (
    BrokenOffError,
    Http,
    NotSentError,
    Outgoing,
    check_status,
    chunks_of,
    read_all,
    read_json,
    sequence_of,
)
from .live import Live, Opening, Outcome
from .mirror import Mirror

log = logging.getLogger("kvoffload")

T = TypeVar("T")
Take: TypeAlias = Callable[[httpx.Response], Awaitable[T]]

CLOSED = "the client was closed"

SILENCE_S = 45.0
"""Seconds without a line after which a stream counts as broken: three of the service's beats."""
CLEAN_UP_S = 5.0
"""Seconds that giving something back to the service may take; its session's end does the rest."""


LAST_LINES_S = 1.0
"""Seconds that the end of a stream is waited for, once its session has ended."""


class Room:
    """One namespace of a service: opens a session when there is none, and calls within it.

    Args:
        http: The connections.
        lifecycle: The client's.
        namespace: The namespace.
        sees_all: Whether counters and events of all namespaces are told.
        on_open: Called with each new session.

    Attributes:
        mirror: What was told of the namespace.
        jobs: Runs what must not be torn by a caller's cancellation.
        on_loss: Called with each session that is lost, with it.
        on_event: Called with each event of the namespace.
    """

    def __init__(
        self,
        http: Http,
        lifecycle: Lifecycle,
        namespace: str,
        *,
        sees_all: bool,
        on_open: Callable[[Live], None],
    ) -> None:
        self.http = http
        self.mirror = Mirror(namespace)
        self.jobs: Jobs
        self.on_loss: list[Callable[[Live], None]] = []
        self.on_event: list[Callable[[OffloadingEvent], None]] = []
        self._lifecycle = lifecycle
        self._on_open = on_open
        self._params = {"namespace": namespace} if namespace else {}
        self._sees_all = sees_all
        self._live: Live | None = None
        self._opening: Opening | None = None
        self._names = itertools.count()
        self._calls = 0
        self._changed = Signal()

    # Sessions

    def begin(self) -> None:
        """Open a session in the background, if there is none."""
        if self._live is None and self._opening is None:
            opening = self._opening = Opening()
            self.jobs.start(lambda _: self._open(opening))

    async def session(self) -> Live:
        """Return the session; a new one where the last was lost.

        Raises:
            TierUnavailableError: The service can't be reached, or refuses one more.
            AccessDeniedError: It does not let the token in.
        """
        if self._live is not None:
            return self._live
        self.begin()
        assert self._opening is not None
        return await self._opening.result()

    async def end(self) -> None:
        """End the session, and wait for the last of what it tells."""
        live = self._live
        if live is not None:
            out = Outgoing("DELETE", f"/sessions/{live.name}")
            try:
                await self._answer(out, self._params)
            except (OffloadError, SessionLostError) as exc:
                log.debug("ending a session: %s", exc)
            else:
                await live.over(LAST_LINES_S)
            self._lost(live, CLOSED)
        self.mirror.renew_events()

    async def drain(self) -> None:
        """Wait until no call is under way."""
        while self._calls:
            await self._changed.wait()

    async def _open(self, opening: Opening) -> None:
        try:
            opening.live = self._live = await self._opened()
        except OffloadError as exc:
            opening.error = exc
        finally:
            self._opening = None
            if opening.live is None:
                self.mirror.renew_events()
            opening.done.set()

    async def _opened(self) -> Live:
        everywhere = {"all": "true"} if self._sees_all else {}
        hello = await self._answer(Outgoing("POST", "/sessions"), {**self._params, **everywhere})
        live = Live(hello["session"], hello)
        self.mirror.begin()
        self.jobs.start(lambda _: self._follow(live))
        try:
            if not await live.reached(1, self.http.timeout_s):  # its hello, and the counters
                why = live.lost or "its first lines did not come in time"
                raise TierUnavailableError(
                    f"no stream of a session at {self.http.address.shown}: {why}", tier=TIER
                )
            self._on_open(live)
        except BaseException:
            self._lost(live, "it could not be opened")
            raise
        return live

    async def _follow(self, live: Live) -> None:
        """Take the lines of a session's stream in until it ends."""
        why = "the service ended it"
        try:
            with live.following, self.http.trouble():
                path = f"/sessions/{live.name}/stream"
                async with self.http.stream(path, self._params, SILENCE_S) as response:
                    await check_status(response)
                    rest = b""
                    async for chunk in chunks_of(response):
                        *lines, rest = (rest + chunk).split(b"\n")
                        for line in lines:
                            why = self._take(live, json.loads(line), why)
        except (OffloadError, NotSentError, BrokenOffError, SessionLostError) as exc:
            why = str(exc)
        except (ValueError, KeyError, TypeError) as exc:
            why = f"its stream makes no sense: {exc!r}"
        finally:
            self._lost(live, why)

    def _take(self, live: Live, line: Mapping[str, Any], why: str) -> str:
        event = self.mirror.take(line)
        if event is not None:
            for take in self.on_event:
                take(event)
        live.came(line["n"])
        return str(line.get("end", why))

    def _lost(self, live: Live, why: str) -> None:
        if live.lost is not None:
            return
        live.lose(why)
        live.following.cancel()
        if self._lifecycle.phase is Phase.OPEN:
            log.warning("lost the session at %s: %s", self.http.address.shown, why)
        if self._live is live:
            self._live = None
            self.mirror.renew_events()  # what happens until there is another is not told
        for tell in self.on_loss:
            tell(live)

    # Calls

    async def call(self, out: Outgoing, live: Live | None = None) -> Any:
        """Make a call and return its JSON.

        Args:
            out: The call; `{session}` in its path stands for the session's name.
            live: The session that it belongs to. Without one it belongs to whichever there is,
                and is made again in a new one where the service does not know that any more.

        Raises:
            OffloadError: As the service says, or as the connection fails.
            SessionLostError: The session that it belongs to is lost.
        """
        return (await self.exchange(out, read_json, live))[0]

    async def exchange(
        self, out: Outgoing, take: Take[T], live: Live | None = None
    ) -> tuple[T, Live]:
        """Make a call, take its answer in, and wait for the line of the stream that it names.

        Cancelled, or where anything goes wrong after it was sent, the call is taken back.

        Returns:
            What was taken in, and the session that it was in.
        """
        self._calls += 1
        try:
            if live is not None:
                return await self._exchange(out, take, live), live
            found = await self.session()
            try:
                return await self._exchange(out, take, found), found
            except SessionLostError as exc:  # it was refused, so nothing was done
                self._lost(found, str(exc))
            found = await self.session()
            try:
                return await self._exchange(out, take, found), found
            except SessionLostError as exc:
                raise TierUnavailableError(f"lost two sessions in a row: {exc}", tier=TIER) from exc
        finally:
            if out.batch is not None:
                out.batch.end()
            self._calls -= 1
            self._changed.fire()

    async def _exchange(self, out: Outgoing, take: Take[T], live: Live) -> T:
        if live.lost is not None:
            raise SessionLostError(live.lost)
        path = out.path.replace("{session}", live.name)
        params = self._params if path != out.path else {**self._params, "session": live.name}
        name = f"{next(self._names):x}"
        refusal: Exception | None = None
        try:
            with self.http.trouble():
                response = await self._sent(replace(out, path=path), params, name)
                try:
                    if response.status_code >= 400:
                        refusal = error_of(response.status_code, await read_all(response))
                    else:
                        result = await take(response)
                finally:
                    await response.aclose()
            if not await live.reached(sequence_of(response), self.http.timeout_s):
                log.debug("a session's stream is late, or over")
        except NotSentError as exc:
            raise TierUnavailableError(str(exc), tier=TIER) from exc
        except BaseException as exc:
            if live.lost is None and self._lifecycle.phase is not Phase.CLOSED:
                await self._take_back(live, name)
            if isinstance(exc, BrokenOffError):
                raise TierUnavailableError(str(exc), tier=TIER) from exc
            raise
        if refusal is not None:
            raise refusal
        return result

    async def _answer(self, out: Outgoing, params: Mapping[str, str]) -> Any:
        """Make a call outside of any session, on a connection of its own; return its JSON."""
        try:
            with self.http.trouble():
                response = await self._sent(out, params, None)
                try:
                    await check_status(response)
                    return await read_json(response)
                finally:
                    await response.aclose()
        except (NotSentError, BrokenOffError) as exc:
            raise TierUnavailableError(str(exc), tier=TIER) from exc

    async def _sent(
        self, out: Outgoing, params: Mapping[str, str], name: str | None
    ) -> httpx.Response:
        try:
            return await self.http.answer(out, params, name)
        except NotSentError:
            pass
        except BrokenOffError:
            if not out.is_repeatable:
                raise
        return await self.http.answer(out, params, name)

    # Cleaning up

    async def see_through(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do what must not be torn, and wait for it in any case.

        Cancelled, it goes on and is waited for nevertheless, for a bounded time; the cancellation
        goes on then.

        Raises:
            Exception: What the work raised.
        """
        outcome: Outcome[T] = Outcome()

        async def run(_: Job[None]) -> None:
            with outcome.scope:
                try:
                    outcome.result = await work()
                except Exception as exc:  # noqa: BLE001  # whoever waits gets it
                    outcome.error = exc
                finally:
                    outcome.done.set()

        self.jobs.start(run)
        cancelled: BaseException | None = None
        with anyio.CancelScope(shield=True):
            while not outcome.done.is_set():
                try:
                    await outcome.done.wait()
                except BaseException as exc:  # noqa: BLE001  # it is raised below
                    cancelled = cancelled or exc
                    outcome.scope.deadline = anyio.current_time() + CLEAN_UP_S
        if cancelled is not None:
            if outcome.error is not None:
                log.warning("cleaning up at %s: %s", self.http.address.shown, outcome.error)
            raise cancelled
        error, outcome.error = outcome.error, None
        if error is not None:
            raise error
        return outcome.result  # type: ignore[return-value]  # set when there is no error

    async def give_back(self, live: Live, out: Outgoing) -> None:
        """Give back what a session holds, in any case; what goes wrong with that is only logged.

        What could not be given back ends with the session.
        """
        if live.lost is not None or self._lifecycle.phase is Phase.CLOSED:
            return

        async def give() -> None:
            with anyio.move_on_after(CLEAN_UP_S) as scope:
                try:
                    await self.call(out, live)
                except SessionLostError:
                    pass  # it ended with the session
                except OffloadError as exc:
                    log.warning("giving back at %s: %s", self.http.address.shown, exc)
            if scope.cancelled_caught:
                log.warning("gave up giving back at %s", self.http.address.shown)

        await self.see_through(give)

    async def _take_back(self, live: Live, name: str) -> None:
        """Take a call back whose answer was not taken in."""
        out = Outgoing("DELETE", f"/sessions/{live.name}/calls/{name}")

        async def take_back() -> None:
            with anyio.move_on_after(CLEAN_UP_S) as scope:
                try:
                    with self.http.trouble():
                        response = await self.http.answer(out, self._params, aside=True)
                        try:
                            await check_status(response)
                            await read_all(response)
                        finally:
                            await response.aclose()
                    await live.reached(sequence_of(response), CLEAN_UP_S)
                except SessionLostError:
                    pass  # it ended with the session
                except (NotSentError, BrokenOffError, OffloadError) as exc:
                    log.warning("taking a call back at %s: %s", self.http.address.shown, exc)
            if scope.cancelled_caught:
                log.warning("gave up taking a call back at %s", self.http.address.shown)

        await self.see_through(take_back)
