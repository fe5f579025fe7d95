"""The one thread that computes: jobs in the order in which they were asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """Runs plain functions on a thread of its own.

    Chats submit their work in pieces (a chunk of a prompt, one token), so that those under way
    take turns. One thread is enough: NumPy's products use several cores where they may.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function, and return what it returns.

        A cancelled caller waits until a job that has begun is over: it works on buffers that the
        caller is about to give back. Jobs are short. One that has not begun is not run.
        """
        job = self._executor.submit(function, *args, **kwargs)
        ended = asyncio.wrap_future(job)
        try:
            await asyncio.wait([ended])  # which leaves the job alone when this is cancelled
        except asyncio.CancelledError:
            if not job.cancel():
                while not ended.done():
                    try:
                        await asyncio.wait([ended])
                    except asyncio.CancelledError:
                        continue  # cancelled again; the first one is on its way
                ended.exception()  # nobody is left to hear of it
            raise
        return ended.result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # All who had submitted something have waited for it, so this does not block.
        self._executor.shutdown()
