"""Opening and closing a manager: its loop, its task group, and the order in which things end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum

import anyio
import anyio.abc

from .errors import ClosedError, OffloadError, WrongLoopError
from .jobs import Jobs

log = logging.getLogger("kvoffload")


class Phase(Enum):
    """Where a manager is in its life; it goes through it once."""

    NEW = "not opened yet"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class Lifecycle:
    """Binds a manager to one event loop, owns its tasks, and ends them in a bounded time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.phase = Phase.NEW
        # What the running loop is compared with: no loop while closed, so that one comparison
        # tells a wrong loop, thread or process and a closed manager alike.
        self._loop: asyncio.AbstractEventLoop | object = self
        self._owner: asyncio.AbstractEventLoop | None = None
        self._tasks: anyio.abc.TaskGroup | None = None
        self._background: list[anyio.CancelScope] = []

    def check(self) -> None:
        """Refuse use while not open, or from elsewhere than the loop it was opened on.

        Raises:
            ClosedError: Before open or after close.
            WrongLoopError: From another loop, thread or process.
        """
        if asyncio._get_running_loop() is not self._loop:
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
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self.phase = Phase.CLOSING  # until the tiers are open, nothing but close is allowed
        return Jobs(self._tasks)

    def opened(self) -> None:
        """Let callers in."""
        self.phase = Phase.OPEN
        self._loop = self._owner or self

    def start(self, *loops: Callable[[], Awaitable[None]]) -> None:
        """Start background tasks, which are the first to end when the manager closes."""
        if self._tasks is None:
            raise RuntimeError("not open")
        for loop in loops:
            scope = anyio.CancelScope()
            self._background.append(scope)
            self._tasks.start_soon(_run_within, scope, loop)

    async def close(self, steps: Sequence[Callable[[], Awaitable[None]]], timeout_s: float) -> None:
        """Refuse new work, take the steps in turn, and end every task; idempotent.

        Each step is taken, whatever became of those before; together they get `timeout_s`.
        Cancelled, the steps are still taken, and the cancellation goes on afterwards.

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
            raise RuntimeError("not open")
        self._tasks = None
        self.phase = Phase.CLOSING
        self._loop = self
        for scope in self._background:
            scope.cancel()
        closing = Closing(steps, timeout_s)
        cancelled: asyncio.CancelledError | None = None
        with anyio.CancelScope(shield=True):
            tasks.start_soon(closing.run)
            # A scope's shield does not hold against task.cancel(); waiting on does.
            while not closing.done.is_set():
                try:
                    await closing.done.wait()
                except asyncio.CancelledError as exc:
                    cancelled = exc
        tasks.cancel_scope.cancel()
        try:
            await tasks.__aexit__(None, None, None)
        except asyncio.CancelledError as exc:
            cancelled = exc
        self.phase = Phase.CLOSED
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


async def _run_within(scope: anyio.CancelScope, loop: Callable[[], Awaitable[None]]) -> None:
    with scope:
        await loop()


class Closing:
    """The steps of a close, as a task of their own."""

    def __init__(self, steps: Sequence[Callable[[], Awaitable[None]]], timeout_s: float) -> None:
        self._steps = steps
        self._timeout_s = timeout_s
        self.done = anyio.Event()
        self.error: Exception | None = None

    async def run(self) -> None:
        """Take the steps; those that the time does not suffice for are skipped, and told."""
        deadline = anyio.current_time() + self._timeout_s
        try:
            for step in self._steps:
                with anyio.CancelScope(deadline=deadline) as scope:
                    try:
                        await step()
                    except Exception as exc:  # noqa: BLE001  # the steps after it must be taken
                        log.error("closing: %s", exc)
                        self.error = self.error or exc
                if scope.cancelled_caught:
                    log.error("closing: %s took too long and was given up", step.__name__)
        finally:
            self.done.set()
