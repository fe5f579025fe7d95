"""A session's calls by the names that its client gave them, so that it can take one back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import anyio

from .problems import RefusedError

T = TypeVar("T")

MOST_KEPT = 128
"""Calls that a session can take back after they ended, and before they came."""

Undo = Callable[[], Awaitable[None]]


class Calls:
    """What is under way in a session, and what gave it something that its client may not know of.

    A client that was cancelled, or lost the connection, before it read an answer does not know
    whether its call took place. It takes the call back by name: a call under way is cancelled, what
    one that ended gave to the session is given back, one that did not come yet is refused.
    """

    def __init__(self) -> None:
        self._scopes: dict[anyio.CancelScope, str | None] = {}
        self._undo: OrderedDict[str, Undo] = OrderedDict()
        self._taken_back: OrderedDict[str, None] = OrderedDict()
        self._ended = anyio.Event()

    def __len__(self) -> int:
        return len(self._scopes)

    @contextmanager
    def call(self, scope: anyio.CancelScope, name: str | None) -> Iterator[None]:
        """Count a call as under way for as long as the body takes.

        Raises:
            RefusedError: It was taken back already.
        """
        if name is not None and name in self._taken_back:
            raise RefusedError(409, "CallTakenBack", "the call was taken back before it came")
        self._scopes[scope] = name
        try:
            yield
        finally:
            del self._scopes[scope]
            ended, self._ended = self._ended, anyio.Event()
            ended.set()

    def gave(self, name: str | None, undo: Undo) -> None:
        """Note how what a call gave to the session is given back."""
        if name is not None:
            _keep(self._undo, name, undo)

    async def take_back(self, name: str) -> None:
        """Cancel a call, or undo it, or refuse it when it comes; returns once that is done."""
        mine = [scope for scope, each in self._scopes.items() if each == name]
        if not mine and name not in self._undo:
            _keep(self._taken_back, name, None)
        for scope in mine:
            scope.cancel()
        while any(scope in self._scopes for scope in mine):
            await self._ended.wait()
        undo = self._undo.pop(name, None)  # also where it ended before the cancellation arrived
        if undo is not None:
            await undo()

    async def cancel_all(self) -> None:
        """Cancel every call that is under way; returns once they ended."""
        for scope in self._scopes:
            scope.cancel()
        while self._scopes:
            await self._ended.wait()


def _keep(kept: OrderedDict[str, T], name: str, what: T) -> None:
    kept[name] = what
    if len(kept) > MOST_KEPT:
        kept.popitem(last=False)
