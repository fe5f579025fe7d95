"""A session as a client has it, and those that are being opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import anyio

from ..errors import ClosedError, OffloadError, TierError
from ..signals import Signal

T = TypeVar("T")


class Live:
    """A session, from its first line to its loss.

    Attributes:
        name: What the service calls it.
        hello: What the service said at its beginning.
        number: The stream's last line that came.
        lost: Why it is over; `None` while it is not.
        following: What its stream is followed in.
    """

    def __init__(self, name: str, hello: Mapping[str, Any]) -> None:
        self.name = name
        self.hello = hello
        self.number = -1
        self.lost: str | None = None
        self.following = anyio.CancelScope()
        self._changed = Signal()

    def came(self, number: int) -> None:
        """Note how far the stream has come."""
        self.number = number
        self._changed.fire()

    def lose(self, why: str) -> None:
        """Note that it is over."""
        self.lost = self.lost or why
        self._changed.fire()

    async def reached(self, number: int, timeout_s: float) -> bool:
        """Wait until a line of the stream came; `False` if it does not."""
        if self.number < number and self.lost is None:
            with anyio.move_on_after(timeout_s):
                while self.number < number and self.lost is None:
                    await self._changed.wait()
        return self.number >= number

    async def over(self, timeout_s: float) -> None:
        """Wait until it is over."""
        with anyio.move_on_after(timeout_s):
            while self.lost is None:
                await self._changed.wait()

    def check(self, what: str) -> None:
        """Refuse the use of what ended with the session.

        Raises:
            ClosedError: It is over; says why.
        """
        if self.lost is not None:
            raise ClosedError(f"{what} ended with its session: {self.lost}")


class Outcome(Generic[T]):
    """What became of something that is seen through."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.done = anyio.Event()
        self.result: T | None = None
        self.error: Exception | None = None


class Opening:
    """A session that is being opened, for whoever waits for it.

    Attributes:
        done: Set when it is known what became of it.
        live: The session, if it could be opened.
        error: Why not, if it could not.
    """

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.live: Live | None = None
        self.error: OffloadError | None = None

    async def result(self) -> Live:
        """Wait for the session.

        Raises:
            OffloadError: It could not be opened.
        """
        await self.done.wait()
        if self.live is not None:
            return self.live
        error = self.error
        if error is None:
            raise ClosedError("the client was closed while it opened a session")
        if isinstance(error, TierError):  # a new one for each who waits
            raise type(error)(str(error), tier=error.tier) from error
        raise type(error)(str(error)) from error
