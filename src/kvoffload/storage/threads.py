"""The executor of one tier, which all of its file calls run on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Threads(ThreadPoolExecutor):
    """A tier's threads, which know how many calls are under way, of cancelled callers too."""

    def __init__(self, num_threads: int, name: str, on_idle: Callable[[], None]) -> None:
        """Take the most threads, a name for them, and what the last call does on leaving."""
        super().__init__(num_threads, thread_name_prefix=f"kvoffload-{name}")
        self._on_idle = on_idle
        self._calls = 0
        self._retired = False
        self._changed = threading.Condition()

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Queue a call."""
        with self._changed:
            self._calls += 1
        try:
            future = super().submit(fn, *args, **kwargs)
        except BaseException:
            self._leave()
            raise
        future.add_done_callback(self._leave)  # comes also if it is cancelled in the queue
        return future

    def wait_for_others(self) -> None:
        """Return, inside a call, when it is the only one left."""
        with self._changed:
            self._changed.wait_for(lambda: self._calls == 1)

    def retire(self) -> None:
        """Take no more calls, and have `on_idle` called once the last one is done."""
        self.shutdown(wait=False)
        with self._changed:
            self._retired = True
            idle = not self._calls
        if idle:
            self._on_idle()

    def _leave(self, _: object = None) -> None:
        with self._changed:
            self._calls -= 1
            self._changed.notify_all()
            idle = self._retired and not self._calls
        if idle:
            self._on_idle()
