"""The threads of one tier, which run its calls."""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic

from ..scheduling import step_aside
from .calls import Call, Helper, this_call

IDLE_S = 10.0
"""Seconds after which a thread without work ends; the next call starts a new one."""


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
        call = this_call()
        assert call is not None
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
