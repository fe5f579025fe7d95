"""A cold tier from `open` to `close`: its threads, and the files that they work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from aiofiles.os import wrap

from ..types import StoredBlock
from . import format as fmt
from .recovery import RecoveryReport, Store, recover
from .slabs import Blocks
from .threads import Threads

_T = TypeVar("_T")


class Session:
    """What a tier holds from `open` to `close`: threads, and the files that they work on.

    `run` is for the event loop; most other methods block, and are run on the threads. The last
    call under way closes the files, so none ever meets one that was closed under it.
    """

    def __init__(
        self, tier: str, store: Callable[[], Store], *, num_threads: int, sync_always: bool
    ) -> None:
        """Take the name of the tier, and how to make its files known."""
        self.serving = False
        self.closing = False
        self.released = False
        self.report: RecoveryReport | None = None
        self.next_sequence = 0
        self.threads = Threads(num_threads, tier, self.abandon)
        self._tier = tier
        self._make_store = store
        self._sync_always = sync_always
        self._header = fmt.Header(1, 1)
        self._store: Store | None = None
        self._blocks: Blocks | None = None
        self._waiters: list[Future[None]] = []

    async def run(self, call: Callable[[], _T]) -> _T:
        """Make a call on the threads; it goes on when this is cancelled."""
        return await wrap(call)(executor=self.threads)

    def start(self, num_blocks: int) -> list[StoredBlock]:
        """Lock, recover, and return the blocks, coldest first; on an error close all again."""
        try:
            store = self._store = self._make_store()
            store.lock.acquire(self._tier)
            recovered = recover(store, num_blocks)
        except BaseException:
            self.abandon()
            raise
        self._blocks, self._header = recovered.blocks, recovered.header
        self.next_sequence = recovered.header.next_sequence
        self.report = recovered.report
        return recovered.found

    def read(self, slots: list[int], into: list[memoryview]) -> list[OSError | None]:
        """Read and check payloads; return one outcome a slot."""
        return self._open()[1].read(slots, into)

    def write(
        self, slots: list[int], payloads: list[memoryview], keys: Sequence[bytes], sequence: int
    ) -> list[OSError | None]:
        """Write payloads and records; return one outcome a slot."""
        store, blocks = self._open()
        outcomes = blocks.write(slots, payloads, keys, sequence)
        if self._sync_always:
            try:
                store.sync()
            except OSError as exc:
                unsure = [i for i, outcome in enumerate(outcomes) if outcome is None]
                blocks.erase([slots[i] for i in unsure])
                for i in unsure:
                    outcomes[i] = exc
        return outcomes

    def erase(self, slots: list[int]) -> list[OSError | None]:
        """Blank records; return one outcome a slot."""
        store, blocks = self._open()
        outcomes = blocks.erase(slots)
        if self._sync_always:
            store.sync()
        return outcomes

    def flush(self) -> None:
        """Sync everything."""
        self._open()[0].sync()

    def finish(self, order: Sequence[int]) -> None:
        """Wait for the other calls, sync, note that all is well, and close."""
        self.threads.wait_for_others()
        try:
            store, blocks = self._open()
            number = self._header.generation + 1
            header = replace(self._header, generation=number, next_sequence=self.next_sequence)
            store.write_clean(header, [slot for slot in dict.fromkeys(order) if blocks.holds(slot)])
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the files as they are; idempotent. No other call may be under way."""
        store, self._store, self._blocks = self._store, None, None
        if store is not None:
            store.close()
        self.serving = False
        self.released = True
        self._notify()

    def when_released(self) -> Future[None]:
        """Return a future that is done when the files are closed."""
        waiter: Future[None] = Future()
        self._waiters.append(waiter)
        if self.released:
            self._notify()
        return waiter

    def _notify(self) -> None:
        # Two threads may be here at once; each waiter is popped by one of them.
        with suppress(IndexError):
            while True:
                waiter = self._waiters.pop()
                if waiter.set_running_or_notify_cancel():
                    waiter.set_result(None)

    def _open(self) -> tuple[Store, Blocks]:
        # No call is made but after `start`, and the last one under way closes.
        assert self._store is not None
        assert self._blocks is not None
        return self._store, self._blocks
