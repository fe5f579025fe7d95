"""Hints that blocks will be needed soon, and the background task that acts on them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

import anyio

from .index import Index
from .types import Key

QUEUE_BLOCKS = 4096
"""Hinted blocks that wait at a time; beyond it the oldest are dropped and counted."""

log = logging.getLogger("kvoffload")


class Prefetcher:
    """A bounded queue of hinted blocks, and the tasks that fetch them.

    Args:
        index: Where the blocks are to come.
        wanted: Says whether fetching a block would make sense now.
        fetch: Fetches a batch, notes in `index.prefetched` what came, and returns it. It may
            raise: that costs the batch.
        batch_blocks: Most blocks given to one `fetch`.
        workers: Batches fetched at a time.
        may_fetch: Waits until a batch may be fetched; false where all that is queued is dropped.
        find: Returns those of a batch that are there to be fetched, where that has to be asked;
            what it can't find out, it counts as dropped.
    """

    def __init__(
        self,
        index: Index,
        wanted: Callable[[Key], bool],
        fetch: Callable[[Sequence[Key]], Awaitable[Sequence[Key]]],
        *,
        batch_blocks: int,
        workers: int,
        may_fetch: Callable[[], Awaitable[bool]] | None = None,
        find: Callable[[Sequence[Key]], Awaitable[Sequence[Key]]] | None = None,
    ) -> None:
        self._index = index
        self._wanted = wanted
        self._fetch = fetch
        self._may_fetch = _at_once if may_fetch is None else may_fetch
        self._find = find
        self._batch_blocks = batch_blocks
        self.workers = workers
        self._queue: OrderedDict[Key, bool] = OrderedDict()  # whether somebody asked for it
        self._fetching: dict[Key, bool] = {}
        self._wake = anyio.Event()
        self.hinted: set[Key] = set()
        """All that was hinted since the queue was empty: no victim of what is fetched for it."""

    def waiting(self, most: int) -> list[Key]:
        """Return the blocks that are next in the queue."""
        return list(islice(self._queue, most))

    def hint(self, keys: Sequence[Key], *, asked: bool = True) -> list[Key]:
        """Queue blocks that are wanted and not queued yet; return them. Never waits.

        Where the queue is full, older hints give way to newer ones, and of one that is longer than
        it the end is left out. One that nobody asked for can't be late.
        """
        queue = self._queue
        if asked:
            queue.update((key, True) for key in keys if key in queue)
        new = [key for key in dict.fromkeys(keys) if key not in queue and self._wanted(key)]
        dropped, new = new[QUEUE_BLOCKS:], new[:QUEUE_BLOCKS]
        dropped += [
            queue.popitem(last=False)[0] for _ in range(len(queue) + len(new) - QUEUE_BLOCKS)
        ]
        self._index.count("prefetch_dropped", dropped)
        if new:
            queue.update(dict.fromkeys(new, asked))
            if len(self.hinted) < QUEUE_BLOCKS:
                self.hinted.update(keys[:QUEUE_BLOCKS])
            self._wake.set()
        return new

    def note_wanted(self, keys: Sequence[Key]) -> None:
        """Note that somebody reads these now: hints of them come too late."""
        for waiting in (self._queue, self._fetching):
            if waiting:
                late = [key for key in keys if waiting.pop(key, False)]
                self._index.count("prefetch_late", late)

    def cancel(self, keys: Sequence[Key], *, asked: bool = True) -> int:
        """Take blocks back out of the queue; return how many. What is being fetched goes on.

        Unless `asked`, only those that nobody asked for.
        """
        queue = self._queue
        cancelled = [
            key for key in dict.fromkeys(keys) if key in queue and (asked or not queue[key])
        ]
        for key in cancelled:
            del self._queue[key]
        self._index.count("prefetch_dropped", cancelled)
        return len(cancelled)

    async def run(self) -> None:
        """Fetch what is hinted, batch by batch, until cancelled."""
        while True:
            while not self._queue:
                self.hinted.clear()
                if self._wake.is_set():
                    self._wake = anyio.Event()
                await self._wake.wait()
            if not await self._may_fetch():
                self.cancel(list(self._queue))
                continue
            size = min(self._batch_blocks, len(self._queue))
            batch = dict(self._queue.popitem(last=False) for _ in range(size))
            self._fetching |= batch
            try:
                wanted = [key for key in batch if self._wanted(key)]
                if wanted and self._find is not None:
                    found = await self._find(wanted)
                    wanted = [key for key in found if self._wanted(key)]
                await self._fetch_batch(wanted)
            finally:
                for key in batch:
                    self._fetching.pop(key, None)

    async def _fetch_batch(self, batch: Sequence[Key]) -> None:
        if not batch:
            return
        index = self._index
        index.count("prefetch_issued", batch)
        came: Sequence[Key] = ()
        try:
            came = await self._fetch(batch)
        except Exception as exc:  # noqa: BLE001  # a hint must not end the task that runs hints
            log.warning("prefetching %d blocks failed: %r", len(batch), exc)
        index.count("prefetch_dropped", [key for key in batch if key not in came])


async def _at_once() -> bool:
    return True
