"""The threads of one tier: they run its calls, and know which of them is stuck in the disk."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any, ParamSpec, TypeVar

from ..scheduling import step_aside
from .files import FileLayer

_P = ParamSpec("_P")
_T = TypeVar("_T")

IDLE_S = 10.0
"""Seconds after which a thread without work ends; the next call starts a new one."""


class Call(Executor):
    """One call of a tier on its threads: an executor that takes a single function.

    Its caller may give it up. It goes on then, for nobody can stop a thread that is in the kernel,
    but looks at `given_up` before it does anything that shows.

    Attributes:
        given_up: Its caller doesn't wait any more.
        is_back: No thread is in it any more, however it ended.
        inside: The threads that are in it.
    """

    def __init__(self, threads: Threads, *, urgent: bool = False) -> None:
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


class Threads:
    """A bounded number of daemon threads, which know how many calls are under way.

    Daemons, so that one that is stuck in the kernel doesn't keep the interpreter from ending.

    Attributes:
        most: How many threads there may be.
        most_calls: How many calls are begun at a time; the other threads help with large ones.
        last_sign: When any of the calls last showed a sign of life.
    """

    def __init__(self, num_threads: int, name: str, on_idle: Callable[[], None]) -> None:
        """Take the most threads, a name for them, and what the last call does on leaving."""
        self.last_sign = monotonic()
        self.most = self.most_calls = num_threads
        self._name = f"kvoffload-{name}"
        self._on_idle = on_idle
        self._queue: deque[Call] = deque()
        self._urgent: deque[Call] = deque()
        self._helpers: deque[Helper] = deque()
        self._calls = 0
        self._begun: set[Call] = set()  # and not given up
        self._workers = 0
        self._idle = 0
        self._retired = False
        lock = threading.Lock()
        self._work_came = threading.Condition(lock)
        self._call_left = threading.Condition(lock)

    def enqueue(self, call: Call) -> None:
        """Queue a call.

        Raises:
            OSError: There is no thread, and the system starts none; the call isn't queued.
            RuntimeError: They are retired.
        """
        with self._work_came:
            if self._retired:
                raise RuntimeError("the threads take no more calls")
            if not self._calls:
                self.last_sign = monotonic()  # nobody showed any while there was nothing to do
            self._calls += 1
            queue = self._urgent if call.urgent else self._queue
            queue.append(call)
            self._wake()
            if not self._workers:
                # Not left for a later one: its caller is told that it failed, and may use its
                # buffers for something else.
                queue.remove(call)
                self._calls -= 1
                raise OSError(errno.EAGAIN, "the system starts no more threads for now")

    def share(self, call: Call, tasks: Iterable[Callable[[], None]]) -> None:
        """Run tasks of a call on this thread, and on such as are idle; return after the last.

        Raises:
            BaseException: The first one that a task raised.
        """
        todo = deque(tasks)

        def work() -> None:
            while not call.given_up:
                try:
                    task = todo.popleft()
                except IndexError:
                    return
                task()

        helpers = [Helper(call, work) for _ in range(self._spare(len(todo) - 1))]
        if helpers:
            with self._work_came:
                self._helpers += helpers
                self._wake()
        try:
            work()
        finally:
            for helper in helpers:
                if not self._dismiss(helper):
                    helper.done.wait()
        for helper in helpers:
            if helper.error is not None:
                raise helper.error

    def pass_over(self, call: Call) -> None:
        """Let another call begin in the place of one that was given up."""
        with self._work_came:
            if call in self._begun:
                self._begun.discard(call)
                self._work_came.notify()

    def wait_for_others(self, is_stuck: Callable[[], bool], interval_s: float) -> None:
        """Return, inside a call, when it is the only one left.

        Meanwhile the call shows signs of life, unless the others are stuck.
        """
        call: Call = _here.call
        while True:
            with self._call_left:
                if self._call_left.wait_for(lambda: self._calls == 1, interval_s):
                    return
            if not is_stuck():
                call.end()

    def retire(self) -> None:
        """Take no more calls, and have `on_idle` called once the last one is done."""
        with self._work_came:
            if self._retired:
                return
            self._retired = True
            self._work_came.notify_all()
            idle = not self._calls
        if idle:
            self._on_idle()

    def leave(self, call: Call) -> None:
        """Note that no thread is in a call any more."""
        with self._call_left:
            self._calls -= 1
            self._begun.discard(call)
            self._call_left.notify_all()
            idle = self._retired and not self._calls
        call.came_back()
        if idle:
            self._on_idle()

    # Inside

    def _spare(self, wanted: int) -> int:
        """Return how many helpers would find a thread at once."""
        with self._work_came:
            queued = len(self._queue) + len(self._urgent) + len(self._helpers)
            spare = self._idle + self.most - self._workers - queued
        return max(0, min(wanted, spare))

    def _dismiss(self, helper: Helper) -> bool:
        """Take back a helper that no thread has begun."""
        with self._work_came:
            try:
                self._helpers.remove(helper)
            except ValueError:
                return False
        return True

    def _wake(self) -> None:
        """Have threads come for what is queued; as many as the system lets there be."""
        queued = len(self._queue) + len(self._urgent) + len(self._helpers)
        self._work_came.notify(queued)
        for _ in range(min(queued - self._idle, self.most - self._workers)):
            try:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            except RuntimeError:  # it may in a while, and those that there are go on
                return
            self._workers += 1

    def _work(self) -> None:
        step_aside()
        while (item := self._next()) is not None:
            item.run()
            del item  # or its buffers would live until the next one comes

    def _next(self) -> Call | Helper | None:
        with self._work_came:
            while True:
                # What was begun goes first: its caller waits already.
                if self._helpers:
                    return self._helpers.popleft()
                queue = self._urgent or self._queue
                if queue and len(self._begun) < self.most_calls:
                    call = queue.popleft()
                    self._begun.add(call)
                    return call
                self._idle += 1
                came = not (self._retired and not queue) and self._work_came.wait(IDLE_S)
                self._idle -= 1
                if not (came or self._helpers or self._urgent or self._queue):
                    self._workers -= 1
                    return None


class WatchedFiles(FileLayer):
    """A file layer that shows each of its calls as an operation of the tier's call."""

    def __init__(self, layer: FileLayer) -> None:
        """Take the layer that does the work."""
        for name in _OPERATIONS:
            setattr(self, name, _watched(getattr(layer, name)))


_OPERATIONS = [name for name in vars(FileLayer) if not name.startswith("_")]


def _watched(operation: Callable[_P, _T]) -> Callable[_P, _T]:
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        call: Call | None = getattr(_here, "call", None)
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


_here = threading.local()
