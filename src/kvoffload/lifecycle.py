"""Opening and closing a manager: its loop, its task group, and the order in which things end."""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from enum import Enum
from threading import get_ident
from typing import Any

import anyio

from .errors import ClosedError, OffloadError, WrongLoopError
from .jobs import Jobs

log = logging.getLogger("kvoffload")


class Phase(Enum):
    """Where a manager is in its life; it goes through it once."""

    NEW = "not opened yet"
    OPENING = "being opened"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class Tasks:
    """The manager's own task group; it awaits every task that it starts.

    On asyncio's task group and not anyio's, for that one leaves a cancel scope open in whoever
    enters the manager: managers would have to be left in the reverse order, by the very task that
    entered them, which an async test fixture, for one, can't promise.
    """

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._running: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Get ready to start tasks."""
        await self._group.__aenter__()

    def start(self, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Start a task."""
        task = self._group.create_task(_guard(work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def cancel_others(self) -> None:
        """Cancel every task but the one that asks."""
        current = asyncio.current_task()
        for task in self._running:
            if task is not current:
                task.cancel()

    async def close(self, timeout_s: float) -> None:
        """Cancel what still runs and wait for its end. Cancelled, it waits nevertheless.

        A task that does not end in `timeout_s`, for the code of some tier won't be cancelled, is
        told and left behind.
        """
        self.cancel_others()
        deadline = anyio.current_time() + timeout_s
        cancelled: asyncio.CancelledError | None = None
        while self._running and (left := deadline - anyio.current_time()) > 0:
            try:
                await asyncio.wait(self._running, timeout=left)
            except asyncio.CancelledError as exc:
                cancelled = exc
        if self._running:
            log.error(
                "closing: %d tasks won't be cancelled and are left behind", len(self._running)
            )
        else:
            await self._group.__aexit__(None, None, None)
        if cancelled is not None:
            raise cancelled


async def _guard(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        await work()
    except Exception:
        # In a task group this would cancel whoever entered the manager.
        log.exception("a background task of the manager failed")


class Lifecycle:
    """Binds a manager to one event loop, owns its tasks, and ends them in a bounded time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.phase = Phase.NEW
        # Asking for the running loop costs a system call on Python 3.11. The same told cheaply: a
        # thread runs one loop at a time, so on the owner's thread, while the owner's loop runs,
        # the running loop is the owner's. While not open, no thread is the right one.
        self._thread = NO_THREAD
        self._runs: Callable[[], bool] = bool
        self._owner: asyncio.AbstractEventLoop | None = None
        self._tasks: Tasks | None = None
        self._background: list[asyncio.Task[None]] = []
        self._closed: anyio.Event

    def check(self) -> None:
        """Refuse use while not open, or from elsewhere than the loop it was opened on.

        Raises:
            ClosedError: Before open or after close.
            WrongLoopError: From another loop, thread or process.
        """
        if get_ident() != self._thread or not self._runs():
            raise self._refusal()

    async def open(self) -> Jobs:
        """Bind to the running loop and start to own tasks.

        Raises:
            ClosedError: It was opened before.
        """
        if self.phase is not Phase.NEW:
            raise ClosedError(
                f"{self._name} is {self.phase.value} and opens only once: make a new one"
            )
        self._owner = asyncio.get_running_loop()
        self._runs = self._owner.is_running
        self._tasks = Tasks()
        await self._tasks.open()
        self._closed = anyio.Event()
        self.phase = Phase.OPENING  # until the tiers are open, nothing but close is allowed
        return Jobs(self._tasks.start)

    def opened(self) -> None:
        """Let callers in.

        Raises:
            ClosedError: It was closed while it was being opened.
        """
        if self.phase is not Phase.OPENING:
            raise ClosedError(f"{self._name} was closed while it was being opened")
        self.phase = Phase.OPEN
        self._thread = get_ident()
        _OPEN.add(self)

    def start(self, *loops: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start background tasks, which are the first to end when the manager closes."""
        if self._tasks is None:
            raise RuntimeError("not open")
        self._background += [self._tasks.start(loop) for loop in loops]

    async def close(
        self,
        steps: Sequence[Callable[[], Awaitable[None]]],
        final: Sequence[Callable[[], Awaitable[None]]],
        timeout_s: float,
    ) -> None:
        """Refuse new work, take the steps in turn, and end every task; idempotent.

        Each step is taken, whatever became of those before; `steps` together get `timeout_s`.
        Then what still runs is cancelled, and the `final` ones get as much again. Cancelled, all
        of them are still taken, and the cancellation goes on afterwards. A second closer waits for
        the first.

        Raises:
            WrongLoopError: From another loop, thread or process.
            Exception: The first error of a step.
        """
        if self.phase in (Phase.NEW, Phase.CLOSED):
            self.phase = Phase.CLOSED
            return
        if asyncio._get_running_loop() is not self._owner:
            raise self._refusal()
        tasks = self._tasks
        if tasks is None:
            await self._closed.wait()
            return
        self._tasks = None
        self.phase = Phase.CLOSING
        self._thread = NO_THREAD
        _OPEN.discard(self)
        for task in self._background:
            task.cancel()
        closing = Closing(tasks, steps, final, timeout_s)
        tasks.start(closing.run)
        cancelled: asyncio.CancelledError | None = None
        # A scope's shield would not hold against task.cancel(); waiting on does.
        with anyio.CancelScope(shield=True):
            while not closing.done.is_set():
                try:
                    await closing.done.wait()
                except asyncio.CancelledError as exc:
                    cancelled = exc
            try:
                await tasks.close(timeout_s)
            except asyncio.CancelledError as exc:
                cancelled = exc
        self.phase = Phase.CLOSED
        self._closed.set()
        if cancelled is not None:
            raise cancelled
        if closing.error is not None:
            raise closing.error

    def _refusal(self) -> OffloadError:
        if asyncio._get_running_loop() is not self._owner and self._owner is not None:
            return WrongLoopError(
                f"{self._name} belongs to the event loop that it was opened on: from another "
                "thread, call through asyncio.run_coroutine_threadsafe; in another loop or "
                "process, open one there"
            )
        return ClosedError(f"{self._name} is {self.phase.value}: use it inside `async with`")


NO_THREAD = -1
_OPEN: weakref.WeakSet[Lifecycle] = weakref.WeakSet()


def _forked() -> None:
    """In a forked child, a manager is its parent's: its threads and its locks are there."""
    for lifecycle in tuple(_OPEN):
        lifecycle._thread = NO_THREAD


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Closing:
    """The steps of a close, as a task of their own."""

    def __init__(
        self,
        tasks: Tasks,
        steps: Sequence[Callable[[], Awaitable[None]]],
        final: Sequence[Callable[[], Awaitable[None]]],
        timeout_s: float,
    ) -> None:
        self._tasks = tasks
        self._steps = steps
        self._final = final
        self._timeout_s = timeout_s
        self.done = anyio.Event()
        self.error: Exception | None = None

    async def run(self) -> None:
        """Take the steps; those that the time does not suffice for are given up, and told."""
        try:
            await self._take(self._steps)
            self._tasks.cancel_others()
            await self._take(self._final)
        finally:
            self.done.set()

    async def _take(self, steps: Sequence[Callable[[], Awaitable[None]]]) -> None:
        deadline = anyio.current_time() + self._timeout_s
        for step in steps:
            with anyio.CancelScope(deadline=deadline) as scope:
                try:
                    await step()
                except Exception as exc:  # noqa: BLE001  # the steps after it must be taken
                    log.error("closing: %s", exc)
                    self.error = self.error or exc
            if scope.cancelled_caught:
                name = step.__name__.strip("_").replace("_", " ")
                log.error("closing: %s took longer than %g s", name, self._timeout_s)
