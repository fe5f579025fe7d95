"""Calls of a tier: work on its threads, which may get stuck in the disk and be given up."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any, ParamSpec, Protocol, TypeVar

from .files import FileLayer

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Runner(Protocol):
    """What a call wants of the threads that run it.

    Attributes:
        last_sign: When any of the calls last showed a sign of life.
    """

    last_sign: float

    def enqueue(self, call: Call) -> None:
        """Queue a call."""

    def share(self, call: Call, tasks: Iterable[Callable[[], None]]) -> None:
        """Run tasks of a call on this thread, and on such as are idle."""

    def pass_over(self, call: Call) -> None:
        """Let another call begin in the place of one that was given up."""

    def leave(self, call: Call) -> None:
        """Note that no thread is in a call any more."""


class Call(Executor):
    """One call of a tier on its threads: an executor that takes a single function.

    Its caller may give it up. It goes on then, for nobody can stop a thread that is in the kernel,
    but looks at `given_up` before it does anything that shows.

    Attributes:
        given_up: Its caller doesn't wait any more.
        is_back: No thread is in it any more, however it ended.
        inside: The threads that are in it.
    """

    def __init__(self, threads: Runner, *, urgent: bool = False) -> None:
        """Make a call, to be submitted; urgent ones go ahead of others that wait."""
        self.urgent = urgent
        self.given_up = False
        self.is_back = False
        self.inside: set[int] = set()
        self._threads = threads
        self._function: Callable[[], object] | None = None
        self._future: asyncio.Future[Any] | None = None  # until it is known what to tell
        self._is_begun = False
        self._then: tuple[Callable[[], None], ...] = ()
        self._lock = threading.Lock()
        self._last_sign: float | None = None  # None while it waits for a thread
        self._operations: dict[int, float] = {}  # file calls under way: thread, since when

    def submit(  # type: ignore[override]  # the loop, which alone submits, takes its own futures
        self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> asyncio.Future[_T]:
        """Queue the function, on the event loop; return a future of the loop's own.

        One of `concurrent.futures`, and what ties it to the loop's, would be thirty objects more,
        and the garbage collector holds the loop for each.

        Raises:
            OSError: There is no thread for it.
            RuntimeError: The threads are retired.
        """
        future = self._future = asyncio.get_running_loop().create_future()
        self._function = partial(fn, *args, **kwargs) if args or kwargs else fn
        try:
            self._threads.enqueue(self)
        except BaseException:
            self._function = self._future = None
            self.came_back()
            raise
        return future

    def give_up(self, error: Exception) -> bool:
        """Let who waits have an error instead; say whether the call was still under way.

        On the event loop.
        """
        with self._lock:
            future = self._future
            if future is None or (future.cancelled() and not self._is_begun):
                return False
            self._future = None
            self.given_up = True
        _tell(future, None, error)
        self._threads.pass_over(self)
        return True

    def when_back(self, then: Callable[[], None]) -> None:
        """Have something done when no thread is in it any more, by the last one; or now."""
        with self._lock:
            if not self.is_back:
                self._then += (then,)
                return
        then()

    def came_back(self) -> None:
        """Note that no thread is in it any more."""
        with self._lock:
            self.is_back = True
            waiting, self._then = self._then, ()
        for then in waiting:
            then()

    def publish(self, action: Callable[[], None]) -> bool:
        """Run what must not happen once the call is given up; say whether it was run."""
        with self._lock:
            if not self.given_up:
                action()
            return not self.given_up

    def share(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Run tasks on this thread, and on such as are idle; none once the call is given up."""
        self._threads.share(self, tasks)

    def age(self) -> float:
        """Return the seconds since it last showed a sign of life.

        Of calls in a file operation, the oldest counts; while it waits for a thread, those of the
        threads do.
        """
        signs = list(self._operations.values())
        if signs:
            return monotonic() - min(signs)
        last = self._last_sign
        return monotonic() - (self._threads.last_sign if last is None else last)

    def enter(self) -> None:
        """Note that this thread begins to work on it."""
        _here.call = self
        self.inside.add(threading.get_ident())
        self._last_sign = monotonic()

    def exit(self) -> None:
        """Note that this thread works on it no more."""
        _here.call = None
        self.inside.discard(threading.get_ident())

    def begin(self) -> None:
        """Note that this thread begins a file operation."""
        self._operations[threading.get_ident()] = monotonic()

    def end(self) -> None:
        """Note that the operation is over."""
        self._operations.pop(threading.get_ident(), None)
        self._last_sign = self._threads.last_sign = monotonic()

    def run(self) -> None:
        """Run the function; on one of the threads."""
        self.enter()
        try:
            self._run()
        finally:
            with self._lock:
                self._function = self._future = None  # and with them the buffers
            self.exit()
            self._threads.leave(self)

    def _run(self) -> None:
        result, error = None, None
        with self._lock:
            function, future = self._function, self._future
            if function is None or future is None or future.cancelled():
                return
            self._is_begun = True
        try:
            result = function()
        except BaseException as exc:  # noqa: BLE001  # it belongs to who waits
            error = exc
        with self._lock:
            if self._future is None:
                return
            self._future = None
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
            future.get_loop().call_soon_threadsafe(_tell, future, result, error)


class Helper:
    """Part of a call that another thread may take over, as long as none has."""

    def __init__(self, call: Call, work: Callable[[], None]) -> None:
        self.call = call
        self.error: BaseException | None = None
        self.done = threading.Event()
        self._work: Callable[[], None] | None = work

    def run(self) -> None:
        """Do the work; on one of the threads."""
        self.call.enter()
        try:
            if self._work is not None:
                self._work()
        except BaseException as exc:  # noqa: BLE001  # raised where the call is run
            self.error = exc
        finally:
            self._work = None
            self.call.exit()
            self.done.set()


class Watch:
    """Gives calls up in which a file operation takes too long; for the event loop.

    One timer for all: most calls are over long before it is their turn.
    """

    def __init__(self, limit_s: float | None, told: Callable[[], None]) -> None:
        """Take the limit, `None` for none, and who is told when a call was given up."""
        self._limit_s = limit_s
        self._told = told
        self._calls: set[Call] = set()
        self._handle: asyncio.TimerHandle | None = None

    def add(self, call: Call) -> None:
        """Watch a call."""
        if self._limit_s is not None:
            self._calls.add(call)
            if self._handle is None:
                self._look_in(self._limit_s)

    def discard(self, call: Call) -> None:
        """Watch it no more."""
        self._calls.discard(call)
        if not self._calls and self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _look_in(self, seconds: float) -> None:
        self._handle = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        self._handle = None
        limit_s = self._limit_s
        assert limit_s is not None
        what = f"the disk did not answer within io_timeout_s={limit_s:g} s"
        for call in [call for call in self._calls if call.age() >= limit_s]:
            self._calls.discard(call)
            if call.give_up(TimeoutError(errno.ETIMEDOUT, what)):
                self._told()
        if self._calls:
            self._look_in(max(0.0, limit_s - max(call.age() for call in self._calls)))


class WatchedFiles(FileLayer):
    """A file layer that shows each of its calls as an operation of the tier's call."""

    def __init__(self, layer: FileLayer) -> None:
        """Take the layer that does the work."""
        for name in _OPERATIONS:
            setattr(self, name, _watched(getattr(layer, name)))


_OPERATIONS = [name for name in vars(FileLayer) if not name.startswith("_")]


def _watched(operation: Callable[_P, _T]) -> Callable[_P, _T]:
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        call = this_call()
        if call is None:  # the loop's own thread, when it lets go of everything
            return operation(*args, **kwargs)
        call.begin()
        try:
            return operation(*args, **kwargs)
        finally:
            call.end()

    return run


def _tell(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    """Let who waits go on, if anybody does."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def this_call() -> Call | None:
    """Return the call that this thread works on."""
    call: Call | None = getattr(_here, "call", None)
    return call


_here = threading.local()
