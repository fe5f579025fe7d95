"""A cold tier from `open` to `close`: its threads, and the files that they work on."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import TypeVar

from aiofiles.os import wrap

from ..errors import ClosedError
from ..signals import Signal
from ..types import StoredBlock
from . import format as fmt
from .blocks import Blocks
from .breaker import Breaker
from .calls import Call, Watch
from .os_errors import is_full
from .recovery import RecoveryReport, Store, recover
from .space import Space
from .threads import Threads

_T = TypeVar("_T")

_log = logging.getLogger("kvoffload")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a session may take, and for how long.

    Attributes:
        io_threads: Most calls at once; `None` for what suits the machine.
        io_timeout_s: Seconds that a file operation may take; `None` for any time.
        min_free_bytes: What must stay free on the file system.
        sync_always: Make everything durable before a call returns.
    """

    io_threads: int | None
    io_timeout_s: float | None
    min_free_bytes: int
    sync_always: bool


class Role(Enum):
    """What a call does, to its slots or to all."""

    OPEN = "open"
    READ = "read"
    WRITE = "write"
    ERASE = "erase"
    SYNC = "sync"
    CLOSE = "close"


class Session:
    """What a tier holds from `open` to `close`: threads, and the files that they work on.

    Coroutines are for the event loop; most other methods block, and are run on the threads. The
    last call under way closes the files, so none ever meets one that was closed under it.
    """

    def __init__(
        self,
        tier: str,
        store: Callable[[], Store],
        limits: Limits,
        *,
        writes: Breaker,
        growth: Breaker,
    ) -> None:
        """Take the tier's name, how to make its files known, its limits and its breakers."""
        self.serving = False
        self.closing = False
        self.released = False
        self.report: RecoveryReport | None = None
        self.next_sequence = 0
        self.threads = Threads(limits.io_threads or default_threads(), tier, self.abandon)
        self.direct = False
        self._tier = tier
        self._make_store = store
        self._limits = limits
        self._writes = writes
        self._growth = growth
        self._header = fmt.Header(1, 1)
        self._store: Store | None = None
        self._blocks: Blocks | None = None
        self._space: Space | None = None
        # Calls that nobody waits for any more, with their slots and what they do to them.
        self._drifting: dict[Call, tuple[frozenset[int], Role]] = {}
        self._syncing: Call | None = None  # the last one that syncs
        self._changed = Signal()  # one of these is back, or given up
        self._watch = Watch(limits.io_timeout_s, self._changed.fire)
        self._waiters: list[Future[None]] = []

    # On the event loop

    async def run(
        self,
        work: Callable[[Call], _T],
        *,
        slots: Sequence[int] = (),
        role: Role,
    ) -> _T:
        """Make a call on the threads; it goes on when this is cancelled.

        Args:
            work: What to do.
            slots: Slots that it reads or changes.
            role: What it does; reads go ahead of others that wait for a thread.

        Raises:
            ClosedError: The tier was closed before the call's turn came.
            OSError: It could not be made, or failed as a whole; `TimeoutError` where a file
                operation took too long.
        """
        await self._wait_for_turn(slots, role)
        call = Call(self.threads, urgent=role is Role.READ)
        self._watch.add(call)
        if self._syncs(role):
            self._syncing = call
            self._when_back(call, self._changed.fire)
        try:
            return await wrap(work)(call, executor=call)
        except asyncio.CancelledError:
            self._let_drift(call, slots, role)
            raise
        except TimeoutError:
            if call.given_up:
                self._let_drift(call, slots, role)
            raise
        finally:
            if call not in self._drifting:
                self._watch.discard(call)

    @property
    def stuck_threads(self) -> int:
        """Threads that are not back from calls that took too long."""
        return sum(len(call.inside) for call in list(self._drifting) if call.given_up)

    async def let_go(self) -> None:
        """Wait until the files are closed.

        Raises:
            TimeoutError: A call that is under way is stuck.
        """
        released = asyncio.wrap_future(self.when_released())
        while not (await asyncio.wait([released], timeout=self._limits.io_timeout_s))[0]:
            if self.stuck_threads:
                raise TimeoutError(errno.ETIMEDOUT, "the disk does not answer")

    # On a thread

    def start(self, num_blocks: int, _: Call) -> list[StoredBlock]:
        """Lock, recover, and return the blocks, coldest first; on an error close all again."""
        try:
            store = self._store = self._make_store()
            store.lock.acquire(self._tier)
            store.choose_io()
            self.direct = store.slabs.direct
            if self.direct and self._limits.io_threads is None:
                self.threads.most = DIRECT_THREADS
            recovered = recover(store, num_blocks)
            self._space = Space(
                store.layer,
                store.path,
                store.slabs.filled_bytes(num_blocks),
                slot_bytes=store.slabs.slot_bytes,
                min_free_bytes=self._limits.min_free_bytes,
                growth=self._growth,
            )
        except BaseException:
            self.abandon()
            raise
        self._blocks, self._header = recovered.blocks, recovered.header
        self.next_sequence = recovered.header.next_sequence
        self.report = recovered.report
        return recovered.found

    def read(
        self,
        slots: list[int],
        into: list[memoryview],
        outcomes: list[OSError | None],
        call: Call,
    ) -> None:
        """Read and check payloads; one outcome a slot, as soon as it is known."""
        self._open()[1].read(slots, into, outcomes, call)

    def write(
        self,
        slots: list[int],
        payloads: list[memoryview],
        keys: Sequence[bytes],
        sequence: int,
        outcomes: list[OSError | None],
        call: Call,
    ) -> None:
        """Write payloads and records; one outcome a slot."""
        store, blocks = self._open()
        assert self._space is not None
        sizes = list(map(len, payloads))
        if not self._writes.allows():
            outcomes[:] = [
                OSError(errno.EAGAIN, "writes failed over and over; they are tried again later")
            ] * len(slots)
            return
        try:
            store.lock.check()
            admitted = self._space.admit(slots, sizes)
        except OSError as exc:
            outcomes[:] = [exc] * len(slots)
            self._writes.failed()
            return
        todo = [n for n, refusal in enumerate(admitted) if refusal is None]
        results = [refusal or outcomes[n] for n, refusal in enumerate(admitted)]

        def tell(written: Sequence[OSError | None]) -> None:
            for n, outcome in zip(todo, written, strict=True):
                results[n] = outcome
            outcomes[:] = results

        try:
            if todo:
                blocks.write(
                    [slots[n] for n in todo],
                    [payloads[n] for n in todo],
                    [keys[n] for n in todo],
                    [sequence + n for n in todo],
                    tell,
                    call,
                    sync=store.sync if self._limits.sync_always else None,
                )
            else:
                call.publish(partial(tell, ()))
        finally:
            if not call.given_up:
                self._judge(slots, results)
            self._space.settle(slots, sizes, admitted, results)

    def erase(self, slots: list[int], _: Call) -> list[OSError | None]:
        """Blank records; return one outcome a slot."""
        store, blocks = self._open()
        outcomes = blocks.erase(slots)
        if self._limits.sync_always:
            store.sync()
        return outcomes

    def flush(self, _: Call) -> None:
        """Sync everything."""
        self._open()[0].sync()

    def finish(self, order: Sequence[int], call: Call) -> None:
        """Wait for the other calls, sync, note that all is well, and close."""
        interval = (self._limits.io_timeout_s or 60.0) / 8
        self.threads.wait_for_others(lambda: self.stuck_threads > 0, interval)
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

    # Inside

    def _syncs(self, role: Role) -> bool:
        changes = role in (Role.WRITE, Role.ERASE)
        return role is Role.SYNC or (changes and self._limits.sync_always)

    def _let_drift(self, call: Call, slots: Sequence[int], role: Role) -> None:
        """Keep slots to a call that goes on without its caller, until its thread is back.

        It is still watched, for who was cancelled does not tell that it is stuck.
        """
        self._drifting[call] = (frozenset(slots), role)

        def forget() -> None:
            self._watch.discard(call)
            del self._drifting[call]
            self._changed.fire()

        self._when_back(call, forget)
        self._changed.fire()

    def _when_back(self, call: Call, then: Callable[[], None]) -> None:
        """Do something on the event loop when no thread is in a call any more."""
        loop = asyncio.get_running_loop()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(then)

        call.when_back(tell)

    async def _wait_for_turn(self, slots: Sequence[int], role: Role) -> None:
        """Wait, where it costs no thread, until nothing is in the way of a call."""
        while True:
            if self.stuck_threads >= self.threads.most:
                raise TimeoutError(errno.ETIMEDOUT, "every thread is stuck in an earlier call")
            in_the_way = self._in_the_way(slots, role)
            if not in_the_way:
                return
            if any(call.given_up for call in in_the_way):
                raise TimeoutError(errno.ETIMEDOUT, "an earlier call for it is stuck")
            await self._changed.wait()
            if self.closing:
                # The last call is queued already, and waits for nobody who comes after it.
                raise ClosedError(f"tier {self._tier!r} was closed meanwhile")

    def _in_the_way(self, slots: Sequence[int], role: Role) -> list[Call]:
        """Return the calls that must be back before one for these slots is made."""
        calls = [
            call
            for call, (theirs, their_role) in self._drifting.items()
            if not theirs.isdisjoint(slots) and _collide(role, their_role, stuck=call.given_up)
        ]
        if self._syncing is not None and self._syncs(role):
            # They go one after the other anyway; in threads, which others need, if not here.
            calls.append(self._syncing)
        return [call for call in calls if not call.is_back]

    def _judge(self, slots: list[int], results: list[OSError | None]) -> None:
        """Tell the breaker how a write went, but for what a full disk explains."""
        assert self._space is not None
        bad = [
            error
            for slot, error in zip(slots, results, strict=True)
            if error is not None and not (is_full(error) and not self._space.is_filled(slot))
        ]
        if any(error is None for error in results):
            # Then a bad place or two are no reason to store nowhere.
            if self._writes.succeeded():
                _log.info("tier %r stores again", self._tier)
        elif bad and self._writes.failed():
            _log.warning("tier %r stops storing for a while: %s", self._tier, bad[0])

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


DIRECT_THREADS = 4
"""Threads with direct I/O: they wait for the disk, so that large batches may have more of them."""


def default_threads() -> int:
    """Return as many threads as there are cores, but two to four.

    More calls at once would hold the event loop up, for each takes the interpreter.
    """
    return max(2, min(4, os.cpu_count() or 1))


def _collide(role: Role, drifting: Role, *, stuck: bool) -> bool:
    """Tell whether a call for a slot must not be made while one from before has it still."""
    if drifting is Role.READ:
        # A second read would get stuck too; an erasure leaves the payload alone.
        return role is Role.WRITE or (role is Role.READ and stuck)
    return True
