"""Cancel a call at each place where it waits, one after the other."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from typing import Any, Literal, TypeVar

import anyio

T = TypeVar("T")


async def count_suspensions(awaitable: Awaitable[T]) -> tuple[T, int]:
    """Await it, and return its result and how often it gave control back to the event loop.

    0 means that no other task ran in between: no thread, no executor, no lock was waited for.
    """
    suspensions = 0

    def count() -> None:
        nonlocal suspensions
        suspensions += 1

    result = await _driven(_as_coroutine(awaitable), count, lambda _: None)
    return result, suspensions


async def cancel_everywhere(
    make_call: Callable[[], Awaitable[object]],
    check: Callable[[], Awaitable[object]] | None = None,
    *,
    how: Literal["scope", "task"] = "scope",
    turns: int = 0,
    prepare: Callable[[], Awaitable[object]] | None = None,
    limit: int = 1000,
) -> int:
    """Run a call again and again, cancelled at its first, second, ... suspension; then to its end.

    A suspension is a place where the call gives control back to the event loop. After each run
    `check` looks for what the call left behind::

        async def store() -> None:
            await kv.store(chain, payloads)

        async def check() -> None:
            await eventually(lambda: kv.get_stats().pending == 0)

        for how in ("scope", "task"):
            await cancel_everywhere(store, check, how=how, prepare=kv.clear)

    Works on asyncio and uvloop. A scope's cancellation arrives a turn of the loop after it was
    called; a wait that ended by then is let go, and the next one is cancelled instead. A call that
    was told to cancel and returns as if nothing had happened fails the test: cancellation must not
    be swallowed.

    Args:
        make_call: Makes the call; called once a run.
        check: Awaited after each run, the last one included.
        how: By the cancel scope around the call, as anyio's timeouts and task groups do, or by
            `task.cancel()`, as `asyncio.wait_for` and servers do; the latter pierces shields.
        turns: Turns of the event loop between the suspension and the cancellation. At 0 the
            background work that the call waits for has not begun yet, later it is under way.
        prepare: Awaited before each run, and never cancelled.
        limit: Runs to give up after; a call that can be cancelled so often rather hangs.

    Returns:
        How many suspensions were visited; 0 if the call never waits.

    Raises:
        AssertionError: The call swallowed a cancellation, or `limit` was reached.
    """
    if how not in ("scope", "task"):
        raise ValueError(f"how must be 'scope' or 'task', not {how!r}")
    for at in range(1, limit + 1):
        if prepare is not None:
            await prepare()
        run = _Run(at, how, turns)
        await run.run(make_call)
        if check is not None:
            await check()
        if run.suspensions < at:
            return at - 1
    raise AssertionError(f"still waiting at suspension {limit}: does it ever complete?")


class _Run:
    """One run of a call, cancelled at its `at`-th suspension."""

    def __init__(self, at: int, how: Literal["scope", "task"], turns: int) -> None:
        self.at = at
        self.how = how
        self.turns = turns
        self.suspensions = 0
        self._cancel: Callable[[], object] | None = None
        self._finished = False
        self._told_to_cancel = False
        self._thrown = False
        self._delivered = False

    async def run(self, make_call: Callable[[], Awaitable[object]]) -> None:
        """Run the call in a task of its own; raise what it raised unless we cancelled it."""
        failures: list[BaseException] = []
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(self._cancelled(make_call, failures))
            if self.how == "task":
                self._cancel = task.cancel
        if failures:
            raise failures[0]

    async def _cancelled(
        self, make_call: Callable[[], Awaitable[object]], failures: list[BaseException]
    ) -> None:
        with anyio.CancelScope() as scope:
            if self.how == "scope":
                self._cancel = scope.cancel
            try:
                call = _as_coroutine(make_call())
                await _driven(call, self._on_suspension, self._on_throw)
            except asyncio.CancelledError:
                self._finished = True
                if self._thrown:
                    raise
                failures.append(AssertionError("the call cancelled itself"))
            except BaseException as error:  # noqa: BLE001 - handed to the caller, not to the group
                failures.append(error)
            else:
                if self._delivered:
                    failures.append(
                        AssertionError(
                            f"cancelled by {self.how} at suspension {self.at}, the call returned "
                            f"as if nothing had happened"
                        )
                    )
            self._finished = True

    def _on_suspension(self) -> None:
        self.suspensions += 1
        if self.suspensions == self.at:
            self._cancel_after(self.turns)

    def _cancel_after(self, turns: int) -> None:
        if self._finished:
            return
        if turns:
            asyncio.get_running_loop().call_soon(self._cancel_after, turns - 1)
        elif self._cancel is not None:
            self._told_to_cancel = True
            self._cancel()

    def _on_throw(self, error: BaseException) -> None:
        # A timeout of the call's own arrives in the same way, and is none of our business.
        if isinstance(error, asyncio.CancelledError):
            self._thrown = True
            self._delivered = self._told_to_cancel


async def _as_coroutine(awaitable: Awaitable[T]) -> T:
    return await awaitable


@types.coroutine
def _driven(
    coroutine: Coroutine[Any, Any, T],
    on_suspension: Callable[[], None],
    on_throw: Callable[[BaseException], None],
) -> Generator[Any, Any, T]:
    """Await a coroutine by hand, telling of each value that it yields to the event loop.

    The value (a future that the loop waits for, or `None`) goes on unchanged, so the task around
    sees no difference.
    """
    step: Callable[[], Any] = partial(coroutine.send, None)
    while True:
        try:
            yielded = step()
        except StopIteration as stop:
            result: T = stop.value
            return result
        on_suspension()
        try:
            sent = yield yielded
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as error:  # noqa: BLE001 - thrown in by the loop, belongs to the call
            on_throw(error)
            step = partial(coroutine.throw, error)
        else:
            step = partial(coroutine.send, sent)
